"""From base and target to a patch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from skerry_runtime.delta import container
from skerry_runtime.delta.applying import steps_most
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
from skerry_runtime.delta.matching import Bytes, Index, Match
from skerry_runtime.delta.packing import pack, squeeze
from skerry_runtime.delta.parts import Part, find
from skerry_runtime.delta.summary import Segment, Summary

_WORTH_A_STEP = 64
"""Bytes of elements from which a step of their own pays."""


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
    index = Index(np.frombuffer(old, np.uint8))
    best: tuple[bytes, list[Segment]] | None = None
    for plan in _plans(new, parts, old_parts, index):
        data = container.write(digest, len(old), len(new), plan.streams())
        if best is None or len(data) < len(best[0]):
            best = data, plan.segments
    assert best is not None
    return best


def _plans(new: bytes, parts: list[Part], old_parts: list[Part], index: Index) -> Iterator[Plan]:
    target = np.frombuffer(new, np.uint8)
    if parts:
        yield _by_tensors(target, parts, old_parts, index)
    plan = Plan()
    generic(plan, index, target, 0, len(target))
    yield plan
    if any(segment.method != Op.COPY.name.lower() for segment in plan.segments):
        alone = Plan()
        alone.literal(new)
        yield alone


def _by_tensors(target: Bytes, parts: list[Part], old_parts: list[Part], index: Index) -> Plan:
    plan, chooser = Plan(), Chooser()
    beside = matched(parts, old_parts)
    at = 0
    for part, old in zip(parts, beside, strict=True):
        generic(plan, index, target, at, part.start)
        _tensor(plan, chooser, part, old, target, index)
        at = part.start + part.count * part.stride
    generic(plan, index, target, at, len(target))
    return plan


def matched(parts: list[Part], old_parts: list[Part]) -> list[Part | None]:
    """For each tensor the base's of the same name, or the next one that looks like it and has no name in common with another."""
    by_name = {(part.name, part.width, part.tag): part for part in old_parts}
    names = {(part.name, part.width, part.tag) for part in parts}
    left: dict[tuple[object, ...], list[Part]] = {}
    for part in old_parts:
        if (part.name, part.width, part.tag) not in names:
            left.setdefault((part.width, part.floats, part.tag, part.shape, part.count), []).append(part)
    found: list[Part | None] = []
    for part in parts:
        old = by_name.get((part.name, part.width, part.tag))
        alike = left.get((part.width, part.floats, part.tag, part.shape, part.count))
        found.append(old or (alike.pop(0) if alike else None))
    return found


def _tensor(plan: Plan, chooser: Chooser, part: Part, old: Part | None, target: Bytes, index: Index) -> None:
    end = part.start + part.size
    new_bytes = target[part.start : end]
    base_bytes = None if old is None else index.base[old.start : old.start + old.size]
    if old is not None and base_bytes is not None and np.array_equal(new_bytes, base_bytes):
        plan.copy(old.start, part.size)
        return
    new = _elements(new_bytes, part)
    base = None if old is None or base_bytes is None or old.count != part.count else _elements(base_bytes, old)
    choice = chooser.best(part, new, base)
    matches = list(index.matches(target, part.start, end))
    if _cost(matches, part, choice, target, index) < choice.cost_bytes:
        _pieces(plan, chooser, part, matches, target, index)
        return
    plan.elements(part, choice, new, base, 0 if old is None else old.start)


def _elements(data: Bytes, part: Part) -> U64:
    rows = data.reshape(-1, part.stride)[:, part.stride - part.width :]
    return to_integers(np.ascontiguousarray(rows).ravel(), part.width)


def _cost(matches: list[Match], part: Part, choice: Choice, target: Bytes, index: Index) -> float:
    """About what a tensor costs by matches of bytes, with the rest of it as by the choice."""
    covered = sum(match.size for match in matches)
    differences = b"".join(_difference(match, target, index) for match in matches)
    rest = choice.cost_bytes * (part.size - covered) / part.size
    return rest + 6 * len(matches) + len(squeeze(differences, 0, 0, 0, 16))


def _difference(match: Match, target: Bytes, index: Index) -> bytes:
    new, old = target[match.at : match.at + match.size], index.base[match.base : match.base + match.size]
    return (new - old).tobytes()


def _pieces(plan: Plan, chooser: Chooser, part: Part, matches: list[Match], target: Bytes, index: Index) -> None:
    """A tensor by matches of bytes; whole elements between them by a method without a base."""
    at, end = part.start, part.start + part.size
    for match in [*matches, Match(end, 0, 0)]:
        first = part.start + -(-(at - part.start) // part.stride) * part.stride
        last = part.start + (match.at - part.start) // part.stride * part.stride
        if last - first >= _WORTH_A_STEP:
            plan.literal(target[at:first].tobytes())
            piece = replace(part, start=first, size=last - first, shape=())
            new = _elements(target[first:last], piece)
            plan.elements(piece, chooser.best(piece, new, None), new, None, 0)
            at = last
        plan.literal(target[at : match.at].tobytes())
        if match.size:
            plan.matched(match, target, index)
        at = match.at + match.size


def generic(plan: Plan, index: Index, target: Bytes, start: int, end: int) -> None:
    """Steps for ``target[start:end]`` by matches of bytes."""
    at = start
    for match in index.matches(target, start, end):
        if plan.steps + 4 > steps_most(match.at):
            break
        plan.literal(target[at : match.at].tobytes())
        plan.matched(match, target, index)
        at = match.at + match.size
    plan.literal(target[at:end].tobytes())


@dataclass
class Plan:
    """Steps of a patch and what they take from its streams."""

    control: bytearray = field(default_factory=bytearray)
    raw: dict[Role, bytearray] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    steps: int = 0
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

    def matched(self, match: Match, target: Bytes, index: Index) -> None:
        """Bytes of the base, with differences where there are any."""
        difference = _difference(match, target, index)
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
        start = 0
        while start < len(target):
            room = PLANES_CHUNK if method in PLANES else self._codec.room(method, width)
            new = target[start : start + room]
            old = None if base is None else base[start : start + room]
            if method in PLANES:
                self.put(Role.PLANES, planes(combined(method, width, new, old), width))
            else:
                self._codec.run(method, width, start, old, new, len(new), choice.low, choice.scaling)
            start += len(new)
        self.steps += 1
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
