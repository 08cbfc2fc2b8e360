"""From base and target to a patch."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from skerry_runtime.delta import container
from skerry_runtime.delta.applying import steps_most
from skerry_runtime.delta.container import DICTIONARIES_MOST, DICTIONARY_MOST_BITS, Op, Packed, Role, signed, unsigned
from skerry_runtime.delta.matching import Bytes, Index
from skerry_runtime.delta.packing import pack
from skerry_runtime.delta.summary import Segment, Summary


def make(base: Path, target: Path, patch: Path) -> Summary:
    """See ``skerry_runtime.delta.make``."""
    started = time.perf_counter()
    old, new = base.read_bytes(), target.read_bytes()
    data, segments = encode(old, new)
    patch.write_bytes(data)
    return Summary(
        kind="bytes",
        size_bytes=len(data),
        base_bytes=len(old),
        target_bytes=len(new),
        segments=tuple(segments),
        seconds=time.perf_counter() - started,
    )


def encode(old: bytes, new: bytes) -> tuple[bytes, list[Segment]]:
    """The smaller of a patch with matches and one of literals alone."""
    digest = hashlib.sha256(old).digest()
    best: tuple[bytes, list[Segment]] | None = None
    for plan in (_matched(old, new), _literal(new)):
        data = container.write(digest, len(old), len(new), plan.streams())
        if best is None or len(data) < len(best[0]):
            best = data, plan.segments
    assert best is not None
    return best


@dataclass
class Plan:
    """Steps of a patch and what they take from its streams."""

    control: bytearray = field(default_factory=bytearray)
    raw: dict[Role, bytearray] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    steps: int = 0
    base_at: int = 0

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
        most = DICTIONARY_MOST_BITS
        while True:
            packed = [pack(role, data, most) for role, data in sorted(raw.items())]
            if sum(1 << one.properties[1] for one in packed if one.properties) <= DICTIONARIES_MOST:
                return packed
            most -= 1


def _literal(new: bytes) -> Plan:
    plan = Plan()
    plan.literal(new)
    return plan


def _matched(old: bytes, new: bytes) -> Plan:
    base, target = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    plan = Plan()
    generic(plan, Index(base), target, 0, len(target))
    return plan


def generic(plan: Plan, index: Index, target: Bytes, start: int, end: int) -> None:
    """Steps for ``target[start:end]`` by matches of bytes."""
    at = start
    for match in index.matches(target, start, end):
        if plan.steps + 4 > steps_most(match.at):
            break
        plan.literal(target[at : match.at].tobytes())
        new, old = target[match.at : match.at + match.size], index.base[match.base : match.base + match.size]
        difference = new - old
        if difference.any():
            plan.add(match.base, difference.tobytes())
        else:
            plan.copy(match.base, match.size)
        at = match.at + match.size
    plan.literal(target[at:end].tobytes())
