"""The recorder's ring: a mapped file (``mapped``) of fixed slots, one per request or row.

After the header lie ``capacity`` slots: META, then the values, padded to 8. Position ``p`` lives in slot ``p % capacity``.
Who cannot get the file's lock must not fold the ring yet. The ring knows nothing of windows; ``fold`` reads it.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from skerry_contract import window as w

from skerry_agent.worker import mapped
from skerry_agent.worker.plan import Plan

CAPACITY = 8192
VERSION = 4
READABLE = (VERSION, 3)
"""Versions that are folded: an agent may find what its older release left in the same boot."""
MAGIC = b"SKRYRING"
OK, INVALID, FAILED, SHED, ROW = 1, 2, 3, 4, 5
"""Outcomes of a slot; ``ROW`` continues the request of the slot before it. 0 is a slot that was never written."""
OUTCOMES = 6
TAG = 0xFFFF
"""A slot's tag is its position in these bits: it tells a slot of this lap from an older one and from a scribble."""
MOST_UNCOMMITTED = 1 << 40
"""No device answers so often between two commits: a position further on is not what a recorder wrote."""
LONGEST_NS = 1 << 53
TIMES = ("total_ns", "queue_ns", "transform_ns", "infer_ns")
RETRY, CACHED, FALLBACK, VALUES, MARKED = 1, 2, 4, 8, 16
"""Flags; ``VALUES`` says that the slot's values are set, ``MARKED`` that ``kinds`` and ``age_ms`` say something."""
OLDEST_MS = (1 << 31) - 1
"""24 days: what is older counts as that old."""

META = np.dtype(
    [
        ("outcome", "u1"),
        ("flags", "u1"),
        ("tag", "<u2"),
        ("rows", "<u4"),
        ("total_ns", "<i8"),
        ("queue_ns", "<i8"),
        ("transform_ns", "<i8"),
        ("infer_ns", "<i8"),
        ("at_ns", "<i8"),
        ("ident", "<u8"),
        ("kinds", "<u4"),
        ("age_ms", "<i4"),
    ]
)
"""One slot: 64 bytes.

``at_ns``: monotonic clock, when the reply was ready. ``ident``: digest of the client's own id, 0 for none. ``kinds``: what
guards did, a bit per ``window.GUARD_KINDS``. ``age_ms``: of the request's oldest feature, -1 where nobody said.
"""
_META_3 = np.dtype(META.descr[:-2])
_MARKS = {VERSION: RETRY | CACHED | FALLBACK | VALUES | MARKED, 3: RETRY | CACHED | FALLBACK | VALUES}
META_FORMAT = "<BBHIqqqqqQIi"
pack = struct.Struct(META_FORMAT).pack
"""The bytes of one ``META``, its fields in order."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a ring holds: the window key, the columns, and the boot in which it was made. ``seed``: see ``choosing``."""

    key: w.Key
    plan: Plan
    capacity: int
    boot_id: str
    seed: int = 0


class Ring:
    """A mapped ring. Use ``create`` or ``open``.

    Attributes:
        meta: (capacity,) records with the fields of ``META``; values: (capacity, width) floats. Views into the file.
        padding: bytes that fill a slot up after its values.
        memory, start, slot_bytes: the file, where its first slot begins, and how long each is.
        positions: the file's own; ``positions[mapped.WRITTEN]`` is raised after what it stands for is written.
        due: its writer's: position at which it wants to fold.
    """

    def __init__(self, header: Header, file: mapped.Mapped) -> None:
        self.path = file.path
        self.header = header
        self.capacity = header.capacity
        self._file = file
        self.memory = file.memory
        self.start = file.start
        meta = META if file.version == VERSION else _META_3
        layout = _slot_layout(header.plan, meta)
        self._marks = _MARKS[file.version]
        self.slot_bytes = layout.itemsize
        self.padding = bytes(layout.itemsize - meta.itemsize - header.plan.width * np.dtype(header.plan.dtype).itemsize)
        self.meta: npt.NDArray[np.void] = np.frombuffer(file.memory, layout, self.capacity, file.start)
        self.values: npt.NDArray[np.floating] = (
            self.meta["values"] if header.plan.width else np.empty((self.capacity, 0), header.plan.dtype)
        )
        self.positions = file.positions
        self.written: int = self.positions[mapped.WRITTEN]
        self.committed: int = self.positions[mapped.COMMITTED]
        self.due = 0

    @classmethod
    def create(cls, path: str, header: Header) -> Ring:
        """Makes the file; without room on the disk the ring lives in memory, and dies with the worker.

        Raises:
            FileExistsError: there is a ring of that name, perhaps with records that nobody has folded yet.
        """
        size = header.capacity * _slot_layout(header.plan).itemsize
        return cls(header, mapped.create(path, MAGIC, VERSION, header, header.boot_id, size))

    @classmethod
    def open(cls, path: str, *, boot_id: str) -> Ring:
        """Maps a ring that another worker left, perhaps one of an older release, to read it.

        Raises:
            mapped.Damaged: it cannot be read, or is of another boot than ``boot_id``.
        """
        file, header = mapped.open_existing(path, MAGIC, READABLE, Header, boot_id=boot_id)
        return cls._of(header, file)

    @classmethod
    def _of(cls, header: Header, file: mapped.Mapped) -> Ring:
        if header.capacity < 1:
            raise mapped.Damaged(f"capacity {header.capacity}")
        try:
            return cls(header, file)
        except ValueError as error:
            raise mapped.Damaged(f"unreadable: {error}") from None

    def span(self, start: int, upto: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The slots of positions ``[start, upto)``, at most ``capacity`` of them, and which of them a recorder wrote there."""
        at = np.arange(start, upto, dtype=np.int64)
        slots = at % self.capacity
        found = self.meta[slots]
        written = (found["tag"] == at & TAG) & (found["outcome"] >= OK) & (found["outcome"] <= ROW)
        written &= found["flags"] <= self._marks
        for name in TIMES:
            written &= (found[name] >= 0) & (found[name] < LONGEST_NS)
        return slots, written

    def append(self, slot: bytes) -> None:
        """Writes and publishes one whole slot: ``pack`` and the values' bytes and ``padding``.

        Raises:
            IndexError: it is not as long as a slot; nothing is published then.
        """
        written = self.written
        offset = self.start + written % self.capacity * self.slot_bytes
        self.memory[offset : offset + self.slot_bytes] = slot
        self.written = written = written + 1
        self.positions[mapped.WRITTEN] = written

    def write(self, meta: bytes) -> None:
        """Fills the part before the values of the slot at ``written``; ``publish`` makes it valid."""
        offset = self.start + self.written % self.capacity * self.slot_bytes
        self.memory[offset : offset + META.itemsize] = meta

    def publish(self, slots: int) -> None:
        """Makes the next ``slots`` positions valid, all at once."""
        self.written += slots
        self.positions[mapped.WRITTEN] = self.written

    def commit(self, upto: int) -> None:
        """Notes that the store holds everything below ``upto``. The store's own note is the one that counts."""
        self.committed = max(self.committed, upto)
        self.positions[mapped.COMMITTED] = self.committed

    def look_at_clocks(self) -> None:
        """Notes how the clocks stand to each other, so that records need only the monotonic one."""
        self._file.look_at_clocks()

    def slept(self) -> bool:
        """Whether the device was suspended since the clocks were last looked at."""
        return self._file.slept()

    @property
    def boot_offset_ns(self) -> int:
        """Boottime less monotonic clock, when last looked at."""
        return self._file.boot_offset_ns

    def instant(self, at_ns: int) -> w.Instant:
        """The moment of a record's ``at_ns``."""
        return self._file.instant(at_ns)

    def close(self, *, remove: bool = False) -> None:
        """Gives up the mapping and the lock; with ``remove`` the file too."""
        self._file.release()
        # The views keep the mapping alive; dropping them lets it go.
        self.meta = np.empty(0, META)
        self.values = np.empty((0, 0), self.header.plan.dtype)
        if remove:
            self._file.unlink()


def most_in(path: str, start: int, capacity: int) -> int:
    """How many requests a ring that cannot be folded may hold from position ``start`` on.

    Args:
        path: of the ring; it may be anything.
        start: what lies below is committed.
        capacity: of rings whose header cannot be read.
    """
    written = mapped.written_in(path)
    try:
        file, header = mapped.open_existing(path, MAGIC, READABLE, Header, boot_id=None)
        ring = Ring._of(header, file)
        first = max(start, min(written, start + MOST_UNCOMMITTED) - ring.capacity)
        slots, _ = ring.span(first, min(written, first + ring.capacity))
        # The further rows of a request are none of their own; whatever cannot be told is one.
        return int(np.count_nonzero(ring.meta["outcome"][slots] != ROW))
    except (mapped.Damaged, ValueError, ArithmeticError, LookupError):
        return int(min(max(0, written - start), capacity))


def _slot_layout(plan: Plan, meta: np.dtype[np.void] = META) -> np.dtype[np.void]:
    fields: list[Any] = list(meta.descr)
    used = meta.itemsize
    if plan.width:
        fields.append(("values", plan.dtype, (plan.width,)))
        used += plan.width * np.dtype(plan.dtype).itemsize
    if used % 8:
        fields.append(("padding", f"V{8 - used % 8}"))
    return np.dtype(fields)
