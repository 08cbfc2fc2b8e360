"""The recorder's ring: a file of fixed slots, mapped shared, that outlives a killed process.

Layout, in the byte order of the machine, which is little-endian wherever Skerry runs::

    0   magic "SKRYRING"      8   version u32        12  length of the JSON u32
    16  written u64           24  committed u64
    32  boot_offset_ns i64    boottime - monotonic, when last looked at
    40  wall_offset_ns i64    wall clock - boottime, when last looked at
    48  synced u8
    64  JSON of ``Header``, padded to 4096
    ..  capacity slots: META, then the values, padded to 8

Position ``p`` lives in slot ``p % capacity``. A writer fills the slots first and raises ``written`` last, so every position
below ``written`` is whole as long as the kernel lives: ``kill -9`` loses nothing. The writer holds ``flock(2)`` on the file until
it closes it or dies: who cannot get that lock must not fold the ring yet. After a power cut pages may be torn,
and a ring of another boot is therefore refused. The ring knows nothing of windows; ``fold`` reads it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import struct
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from skerry_contract import window as w

from skerry_agent.worker.plan import Plan

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None)
_TIME_ERROR = 5

VERSION = 2
MAGIC = b"SKRYRING"
PAGE = 4096
OK, INVALID, FAILED, SHED, ROW = 1, 2, 3, 4, 5
"""Outcomes of a slot; ``ROW`` continues the request of the slot before it. 0 is a slot that was never written."""
OUTCOMES = 6
TAG = 0xFFFF
"""A slot's tag is its position in these bits: it tells a slot of this lap from an older one and from a scribble."""
MOST_UNCOMMITTED = 1 << 40
"""No device answers so often between two commits: a position further on is not what a recorder wrote."""
LONGEST_NS = 1 << 53
TIMES = ("total_ns", "queue_ns", "transform_ns", "infer_ns")
RETRY, CACHED, FALLBACK, VALUES = 1, 2, 4, 8
"""Flags; ``VALUES`` says that the slot's values are set."""

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
    ]
)
"""One slot. ``at_ns``: monotonic clock, when the reply was ready."""
pack = struct.Struct("<BBHIqqqqq").pack
"""The bytes of one ``META``, its fields in order."""
_CLOCK = struct.Struct("<qqB")
_POSITIONS, _CLOCK_AT = slice(16, 32), 32
_WRITTEN, _COMMITTED = 0, 1


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a ring holds: the window key, the columns, and the boot in which it was made."""

    key: w.Key
    plan: Plan
    capacity: int
    boot_id: str


class DamagedRing(Exception):
    """The file is no ring of ours, is cut short, or is of another boot."""


class Ring:
    """A mapped ring. Use ``create`` or ``open``.

    Attributes:
        meta: (capacity,) records with the fields of ``META``; values: (capacity, width) floats. Views into the file.
        padding: bytes that fill a slot up after its values.
    """

    def __init__(self, path: str, header: Header, memory: mmap.mmap, start: int, lock: int = -1) -> None:
        self.path = path
        self.header = header
        self.capacity = header.capacity
        self._memory = memory
        self._start = start
        self._lock = lock
        layout = _slot_layout(header.plan)
        self._slot_bytes = layout.itemsize
        self.padding = bytes(layout.itemsize - META.itemsize - header.plan.width * np.dtype(header.plan.dtype).itemsize)
        self.meta: npt.NDArray[np.void] = np.frombuffer(memory, layout, self.capacity, start)
        self.values: npt.NDArray[np.floating] = (
            self.meta["values"] if header.plan.width else np.empty((self.capacity, 0), header.plan.dtype)
        )
        # One aligned store of a machine word: a kill cannot leave half of a position. (struct writes byte by byte.)
        self._positions = memoryview(memory)[_POSITIONS].cast("Q")
        self.written: int = self._positions[_WRITTEN]
        self.committed: int = self._positions[_COMMITTED]

    @classmethod
    def create(cls, path: str, header: Header) -> Ring:
        """Makes the file (0600, space reserved). Without room on the disk the ring lives in memory, and dies with the worker.

        Raises:
            FileExistsError: there is a ring of that name, perhaps with records that nobody has folded yet.
        """
        text = msgspec.json.encode(header)
        start = _up(64 + len(text))
        size = _up(start + header.capacity * _slot_layout(header.plan).itemsize)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):
                # A file system without locks: the ring does without, as its reader will.
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Reserved now: a write into a hole of a full disk would kill the worker with SIGBUS.
            os.posix_fallocate(fd, 0, size)
            memory = mmap.mmap(fd, size)
        except OSError as error:
            log.warning("ring kept in memory path=%s error=%s", path, error)
            os.unlink(path)
            os.close(fd)
            fd = -1
            memory = mmap.mmap(-1, size)
        memory[64 : 64 + len(text)] = text
        struct.pack_into("<II", memory, 8, VERSION, len(text))
        memory[:8] = MAGIC
        ring = cls(path, header, memory, start, fd)
        ring.look_at_clocks()
        return ring

    @classmethod
    def open(cls, path: str, *, boot_id: str) -> Ring:
        """Maps a ring that another worker left.

        Raises:
            DamagedRing: it cannot be read, or is of another boot than ``boot_id``.
        """
        ring = cls._map(path)
        if ring.header.boot_id != boot_id:
            ring.close()
            raise DamagedRing("of another boot: its pages may be torn")
        return ring

    @classmethod
    def _map(cls, path: str) -> Ring:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DamagedRing(f"cannot open: {error.strerror}") from None
        try:
            size = os.fstat(fd).st_size
            if size < PAGE:
                raise DamagedRing(f"wanted at least {PAGE} bytes, got {size}")
            memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        version, length = struct.unpack_from("<II", memory, 8)
        if memory[:8] != MAGIC or version != VERSION or 64 + length > size:
            raise DamagedRing("not a ring of this version")
        try:
            header = msgspec.json.decode(memory[64 : 64 + length], type=Header)
            if header.capacity < 1:
                raise DamagedRing(f"capacity {header.capacity}")
            return cls(path, header, memory, _up(64 + length))
        except (msgspec.DecodeError, ValueError) as error:
            raise DamagedRing(f"unreadable: {error}") from None

    def span(self, start: int, upto: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The slots of positions ``[start, upto)``, at most ``capacity`` of them, and which of them a recorder wrote there."""
        at = np.arange(start, upto, dtype=np.int64)
        slots = at % self.capacity
        found = self.meta[slots]
        written = (found["tag"] == at & TAG) & (found["outcome"] >= OK) & (found["outcome"] <= ROW)
        for name in TIMES:
            written &= (found[name] >= 0) & (found[name] < LONGEST_NS)
        return slots, written

    def append(self, slot: bytes) -> None:
        """Writes and publishes one whole slot: ``pack`` and the values' bytes and ``padding``.

        Raises:
            IndexError: it is not as long as a slot; nothing is published then.
        """
        written = self.written
        offset = self._start + written % self.capacity * self._slot_bytes
        self._memory[offset : offset + self._slot_bytes] = slot
        self.written = written = written + 1
        self._positions[_WRITTEN] = written

    def write(self, meta: bytes) -> None:
        """Fills the part before the values of the slot at ``written``; ``publish`` makes it valid."""
        offset = self._start + self.written % self.capacity * self._slot_bytes
        self._memory[offset : offset + META.itemsize] = meta

    def publish(self, slots: int) -> None:
        """Makes the next ``slots`` positions valid, all at once."""
        self.written += slots
        self._positions[_WRITTEN] = self.written

    def commit(self, upto: int) -> None:
        """Notes that the store holds everything below ``upto``. The store's own note is the one that counts."""
        self.committed = max(self.committed, upto)
        self._positions[_COMMITTED] = self.committed

    def look_at_clocks(self) -> None:
        """Notes how the clocks stand to each other, so that records need only the monotonic one."""
        mono = time.monotonic_ns()
        boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        _CLOCK.pack_into(self._memory, _CLOCK_AT, boot - mono, time.time_ns() - boot, clock_synchronised())

    def instant(self, at_ns: int) -> w.Instant:
        """The moment of a record's ``at_ns``."""
        boot_offset, wall_offset, synced = _CLOCK.unpack_from(self._memory, _CLOCK_AT)
        boot = at_ns + boot_offset
        return w.Instant(
            boot_id=self.header.boot_id, boot_ns=boot, wall_ms=(boot + wall_offset) // 1_000_000, synced=bool(synced)
        )

    def close(self, *, remove: bool = False) -> None:
        """Gives up the mapping and the lock; with ``remove`` the file too."""
        if self._lock >= 0:
            # Said aloud: the mapping has a copy of the descriptor, and may live a little longer.
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = -1
        # The views keep the mapping alive; dropping them lets it go.
        self.meta = np.empty(0, META)
        self.values = np.empty((0, 0), self.header.plan.dtype)
        if remove:
            Path(self.path).unlink(missing_ok=True)


def most_in(path: str, start: int, capacity: int) -> int:
    """How many requests a ring that cannot be folded may hold from position ``start`` on.

    Args:
        path: of the ring; it may be anything.
        start: what lies below is committed.
        capacity: of rings whose header cannot be read.
    """
    try:
        with open(path, "rb") as file:
            written, _ = struct.unpack("<QQ", file.read(PAGE)[_POSITIONS])
    except (OSError, struct.error):
        return 0
    try:
        ring = Ring._map(path)
        first = max(start, min(written, start + MOST_UNCOMMITTED) - ring.capacity)
        slots, _ = ring.span(first, min(written, first + ring.capacity))
        # The further rows of a request are none of their own; whatever cannot be told is one.
        return int(np.count_nonzero(ring.meta["outcome"][slots] != ROW))
    except (DamagedRing, ValueError, ArithmeticError, LookupError):
        return int(min(max(0, written - start), capacity))


def clock_synchronised() -> bool:
    """Whether the kernel holds the wall clock for synchronised (adjtimex(2) without changing anything)."""
    # struct timex is 208 bytes on 64-bit and 128 on 32-bit Linux; all zero means "only read".
    timex = ctypes.create_string_buffer(256)
    state: int = _libc.adjtimex(timex)
    return 0 <= state < _TIME_ERROR


def _slot_layout(plan: Plan) -> np.dtype[np.void]:
    fields: list[Any] = list(META.descr)
    used = META.itemsize
    if plan.width:
        fields.append(("values", plan.dtype, (plan.width,)))
        used += plan.width * np.dtype(plan.dtype).itemsize
    if used % 8:
        fields.append(("padding", f"V{8 - used % 8}"))
    return np.dtype(fields)


def _up(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE
