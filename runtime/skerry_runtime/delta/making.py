"""From base and target to a patch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from skerry_runtime.delta import container, weights
from skerry_runtime.delta.applying import element_steps_most, steps_most
from skerry_runtime.delta.blocks import Blocks
from skerry_runtime.delta.choosing import Choice, Chooser
from skerry_runtime.delta.coder import U64, Encoder
from skerry_runtime.delta.container import (
    DICTIONARIES_MOST,
    DICTIONARY_MOST_BITS,
    Coding,
    Op,
    Packed,
    Role,
    signed,
    unsigned,
)
from skerry_runtime.delta.elements import (
    BY_EXPONENT,
    PLANES,
    PLANES_CHUNK,
    WITH_BASE,
    Codec,
    combined,
    planes,
    to_integers,
)
from skerry_runtime.delta.matching import DIFFERS, Bytes, Match, Matches
from skerry_runtime.delta.packing import pack, squeeze
from skerry_runtime.delta.parts import Part, find
from skerry_runtime.delta.summary import Segment, Summary

_WORTH_A_STEP = 64
"""Bytes of elements from which a step of their own pays."""
_OTHER_DIFFERS = (1, 100)
"""What a difference costs in programs, whose addresses move, and in lists that only grow."""
_SORTED_MOST = 1 << 23
"""Bytes of base and target, outside of tensors, beyond which they are matched by blocks: sorting all places takes some 160 times their memory."""
_SMALL_MODEL = 1 << 19
"""Bytes of base and target of a model up to which it is tried as bytes, too."""


def make(base: Path, target: Path, patch: Path) -> Summary:
    """See ``skerry_runtime.delta.make``."""
    started = time.perf_counter()
    old, new = base.read_bytes(), target.read_bytes()
    kind, parts = find(new)
    data, segments = encode(old, new, parts, find(old)[1])
    patch.write_bytes(data)
    return Summary(
        kind=kind,
        size_bytes=len(data),
        base_bytes=len(old),
        target_bytes=len(new),
        segments=tuple(segments),
        seconds=time.perf_counter() - started,
    )


def encode(old: bytes, new: bytes, parts: list[Part], old_parts: list[Part]) -> tuple[bytes, list[Segment]]:
    """The smallest of a patch that knows the tensors, one that knows only bytes, and one without the base."""
    digest = hashlib.sha256(old).digest()
    best: tuple[bytes, list[Segment]] | None = None
    for plan in _plans(np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8), parts, old_parts):
        data = container.write(digest, len(old), len(new), plan.streams())
        if best is None or len(data) < len(best[0]):
            best = data, plan.segments
    assert best is not None
    return best


def _plans(base: Bytes, target: Bytes, parts: list[Part], old_parts: list[Part]) -> Iterator[Plan]:
    if np.array_equal(base, target) and len(base):
        same = Plan()
        same.copy(0, len(base))
        yield same
        return
    if parts:
        yield _by_tensors(base, target, parts, old_parts)
    if not parts and (alike := weights.segments(base, target)):
        yield _by_tensors(base, target, alike, alike)
    if not parts or len(base) + len(target) <= _SMALL_MODEL:
        matches = _matches(base, target, [(0, len(target))], [(0, len(base))])
        for differs in (DIFFERS, *_OTHER_DIFFERS):
            plan = Plan()
            generic(plan, matches, 0, len(target), differs)
            yield plan
            if all(one.method == Op.LITERAL.name.lower() for one in plan.segments):
                # The base has nothing of it, however differences count.
                return
    alone = Plan()
    alone.literal(target.tobytes())
    yield alone


def _by_tensors(base: Bytes, target: Bytes, parts: list[Part], old_parts: list[Part]) -> Plan:
    plan, chooser = Plan(), Chooser()
    beside = matched(parts, old_parts, base, target)
    aligned = [
        (part, old)
        for part, old in zip(parts, beside, strict=True)
        if old is not None and old.count == part.count and not part.tag
    ]
    asked = _between([part for part, _ in aligned], len(target))
    searched = _between(sorted((old for _, old in aligned), key=lambda part: part.start), len(base))
    index = _matches(base, target, asked, searched)
    at = 0
    for part, old in zip(parts, beside, strict=True):
        generic(plan, index, at, part.start)
        _tensor(plan, chooser, part, old, index)
        at = part.start + part.size
    generic(plan, index, at, len(target))
    return plan


def _matches(base: Bytes, target: Bytes, asked: list[tuple[int, int]], searched: list[tuple[int, int]]) -> Matches:
    large = sum(end - start for start, end in asked + searched) > _SORTED_MOST
    return (Blocks if large else Matches)(base, target, asked, searched)


def _between(parts: list[Part], size: int) -> list[tuple[int, int]]:
    """What lies outside of tensors."""
    edges = [0, *(edge for part in parts for edge in (part.start, part.start + part.size)), size]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def matched(parts: list[Part], old_parts: list[Part], base: Bytes, target: Bytes) -> list[Part | None]:
    """For each tensor the base's of the same content, else of the same name, else the next of its shape whose name is gone."""
    by_content = {_digest(base, part): part for part in reversed(old_parts)}
    by_name = {_named(part): part for part in old_parts}
    names = {_named(part) for part in parts}
    left: dict[tuple[object, ...], list[Part]] = {}
    for part in old_parts:
        if _named(part) not in names:
            left.setdefault(_kind(part), []).append(part)
    found: list[Part | None] = []
    for part in parts:
        old = by_content.get(_digest(target, part)) or by_name.get(_named(part))
        alike = left.get(_kind(part)) if old is None else None
        found.append(alike.pop(0) if alike else old)
    return found


def _digest(data: Bytes, part: Part) -> bytes:
    return hashlib.sha256(data[part.start : part.start + part.size].tobytes()).digest()


def _named(part: Part) -> tuple[object, ...]:
    return part.name, part.width, part.floats, part.tag


def _kind(part: Part) -> tuple[object, ...]:
    return part.width, part.floats, part.tag, part.shape, part.count


def _tensor(plan: Plan, chooser: Chooser, part: Part, old: Part | None, index: Matches) -> None:
    end = part.start + part.size
    new_bytes = index.target[part.start : end]
    base_bytes = None if old is None else index.base[old.start : old.start + old.size]
    if old is not None and base_bytes is not None and np.array_equal(new_bytes, base_bytes):
        plan.copy(old.start, part.size)
        return
    if plan.element_steps >= element_steps_most(part.start):
        generic(plan, index, part.start, end)
        return
    new = _elements(new_bytes, part)
    base = None if old is None or base_bytes is None or old.count != part.count else _elements(base_bytes, old)
    choice = chooser.best(part, new, base)
    matches = list(index.within(part.start, end))
    if _cost(matches, part, choice, index) < choice.cost_bytes:
        _pieces(plan, chooser, part, matches, index)
        return
    plan.elements(part, choice, new, base, 0 if old is None else old.start)


def _elements(data: Bytes, part: Part) -> U64:
    rows = data.reshape(-1, part.stride)[:, part.stride - part.width :]
    return to_integers(np.ascontiguousarray(rows).ravel(), part.width)


def _cost(matches: list[Match], part: Part, choice: Choice, index: Matches) -> float:
    """About what a tensor costs by matches of bytes, with the rest of it as by the choice."""
    covered = sum(match.size for match in matches)
    differences = b"".join(_difference(match, index) for match in matches)
    rest = choice.cost_bytes * (part.size - covered) / part.size
    return rest + 6 * len(matches) + len(squeeze(differences, 0, 0, 0, 16))


def _difference(match: Match, index: Matches) -> bytes:
    new, old = index.target[match.at : match.at + match.size], index.base[match.base : match.base + match.size]
    return (new - old).tobytes()


def _pieces(plan: Plan, chooser: Chooser, part: Part, matches: list[Match], index: Matches) -> None:
    """A tensor by matches of bytes; whole elements between them by a method without a base."""
    target = index.target
    at, end = part.start, part.start + part.size
    for match in [*matches, Match(end, 0, 0)]:
        first = part.start + -(-(at - part.start) // part.stride) * part.stride
        last = part.start + (match.at - part.start) // part.stride * part.stride
        if last - first >= _WORTH_A_STEP and plan.element_steps < element_steps_most(first):
            plan.literal(target[at:first].tobytes())
            piece = replace(part, start=first, size=last - first, shape=())
            new = _elements(target[first:last], piece)
            plan.elements(piece, chooser.best(piece, new, None), new, None, 0)
            at = last
        plan.literal(target[at : match.at].tobytes())
        if match.size:
            plan.matched(match, index)
        at = match.at + match.size


def generic(plan: Plan, index: Matches, start: int, end: int, differs: int = DIFFERS) -> None:
    """Steps for ``target[start:end]`` by matches of bytes."""
    target = index.target
    at = start
    for match in index.within(start, end, differs):
        if plan.steps + 4 > steps_most(match.at):
            break
        plan.literal(target[at : match.at].tobytes())
        plan.matched(match, index)
        at = match.at + match.size
    plan.literal(target[at:end].tobytes())


@dataclass
class Plan:
    """Steps of a patch and what they take from its streams."""

    control: bytearray = field(default_factory=bytearray)
    raw: dict[Role, bytearray] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    steps: int = 0
    element_steps: int = 0
    base_at: int = 0
    encoder: Encoder = field(default_factory=Encoder)

    def __post_init__(self) -> None:
        self._codec = Codec(self.encoder)

    def put(self, role: Role, data: bytes) -> None:
        """Appends to a stream."""
        self.raw.setdefault(role, bytearray()).extend(data)

    def literal(self, data: bytes) -> None:
        """Bytes as they are."""
        if data:
            self._step(Op.LITERAL, len(data))
            self.put(Role.LITERALS, data)

    def copy(self, at: int, size: int) -> None:
        """Bytes of the base."""
        self._step(Op.COPY, size, at)

    def add(self, at: int, difference: bytes) -> None:
        """Bytes of the base and what they differ by, modulo 256."""
        self._step(Op.ADD, len(difference), at)
        self.put(Role.DIFFERENCES, difference)

    def matched(self, match: Match, index: Matches) -> None:
        """Bytes of the base, with differences where there are any."""
        difference = _difference(match, index)
        if any(difference):
            self.add(match.base, difference)
        else:
            self.copy(match.base, match.size)

    def elements(self, part: Part, choice: Choice, target: U64, base: U64 | None, at: int) -> None:
        """Elements by a method; those of the base begin at ``at``."""
        method, width = choice.method, part.width
        self.control += bytes([Op.ELEMENTS, method, width, part.tag]) + unsigned(len(target))
        if method in WITH_BASE:
            self.control += signed(at - self.base_at)
            self.base_at = at + len(target) * part.stride
        else:
            base = None
        if method in BY_EXPONENT:
            self.control += unsigned(choice.low)
        if choice.scaling is not None:
            ratios = choice.scaling.ratios.tolist()
            self.control += unsigned(len(ratios)) + unsigned(choice.scaling.inner) + signed(choice.scaling.offset)
            self.control += b"".join(signed(ratio) for ratio in ratios)
        if choice.sizes is not None:
            rows = len(choice.sizes.rows)
            self.control += unsigned(rows)
            self._codec.sizes(rows, len(target) // rows, choice.sizes)
        if choice.product is not None:
            rows, rank = choice.product.left.shape
            self.control += unsigned(rank) + signed(choice.product.exponent)
            self._codec.product(rows, len(target) // rows, rank, choice.product.exponent, choice.product)
        start, added = 0, choice.added
        while start < len(target):
            room = PLANES_CHUNK if method in PLANES else self._codec.room(method, width)
            new = target[start : start + room]
            old = None if base is None else base[start : start + room]
            if method in PLANES:
                self.put(Role.PLANES, planes(combined(method, width, new, old), width))
            else:
                self._codec.run(
                    method, width, start, old, new, len(new), choice.low, choice.scaling, choice.sizes, added
                )
            start += len(new)
        self.steps += 1
        self.element_steps += 1
        self.segments.append(Segment(name=part.name, method=method.name.lower(), size_bytes=len(target) * part.stride))

    def _step(self, op: Op, size: int, at: int | None = None) -> None:
        self.control += bytes([op]) + unsigned(size)
        if at is not None:
            self.control += signed(at - self.base_at)
            self.base_at = at + size
        self.steps += 1
        self.segments.append(Segment(name="", method=op.name.lower(), size_bytes=size))

    def streams(self) -> list[Packed]:
        """All streams, packed so that their dictionaries fit into a device together."""
        raw = {Role.CONTROL: bytes(self.control), **{role: bytes(data) for role, data in self.raw.items()}}
        words, bits = self.encoder.finish()
        stored = [Packed(role=role, coding=Coding.STORED, size_bytes=len(data), data=data)
                  for role, data in ((Role.WORDS, words), (Role.BITS, bits))]  # fmt: skip
        most = DICTIONARY_MOST_BITS
        while True:
            packed = [pack(role, data, most) for role, data in sorted(raw.items())]
            if sum(1 << one.properties[1] for one in packed if one.properties) <= DICTIONARIES_MOST:
                return packed + stored
            most -= 1
