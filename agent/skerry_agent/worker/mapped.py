"""A file of fixed layout, mapped shared, that outlives a killed process: what rings and label books have in common.

Layout, in the byte order of the machine, which is little-endian wherever Skerry runs::

    0   magic, 8 bytes        8   version u32        12  length of the JSON u32
    16  written u64           24  committed u64
    32  boot_offset_ns i64    boottime - monotonic, when last looked at
    40  wall_offset_ns i64    wall clock - boottime, when last looked at
    48  synced u8             56  a third position u64, of the kind's own use
    64  JSON of the header, padded to 4096
    ..  what the kind holds

A writer fills what a position stands for first and raises the position last, so everything below a position is whole as
long as the kernel lives: ``kill -9`` loses nothing. The writer holds ``flock(2)`` on the file until it closes it or dies: who
cannot get that lock leaves the file to it. After a power cut pages may be torn, and a file of another boot is therefore
refused. ``written`` and ``committed`` are where the supervisor looks for them, in every kind.
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
from typing import TypeVar

import msgspec
from skerry_contract import window as w

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None)
_TIME_ERROR = 5

PAGE = 4096
SLEPT_NS = 1_000_000_000
"""A shorter sleep moves no window to where it does not belong."""
WRITTEN, COMMITTED, THIRD = 0, 1, 5
_CLOCK = struct.Struct("<qqB")
_POSITIONS, _CLOCK_AT = slice(16, 64), 32


given: dict[str, int] = {}
"""Descriptors of empty files, made and locked for this process by another one that owns them, by path: ``create`` takes them out."""

H = TypeVar("H", bound=msgspec.Struct)


class Damaged(Exception):
    """The file is none of ours, is cut short, or is of another boot."""


class Locked(Exception):
    """Another process, or another part of this one, writes the file."""


class Mapped:
    """A mapped file.

    Attributes:
        memory: the whole file; start: where the kind's own part begins.
        version: of the file.
        positions: ``positions[WRITTEN]``, ``[COMMITTED]``, ``[THIRD]`` are the file's own words, each stored at once.
    """

    def __init__(self, path: str, version: int, boot_id: str, memory: mmap.mmap, start: int, lock: int = -1) -> None:
        self.path = path
        self.version = version
        self.memory = memory
        self.start = start
        self._boot_id = boot_id
        self._lock = lock
        # One aligned store of a machine word: a kill cannot leave half of a position. (struct writes byte by byte.)
        self.positions = memoryview(memory)[_POSITIONS].cast("Q")

    def look_at_clocks(self) -> None:
        """Notes how the clocks stand to each other, so that records need only the monotonic one."""
        mono = time.monotonic_ns()
        boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        _CLOCK.pack_into(self.memory, _CLOCK_AT, boot - mono, time.time_ns() - boot, clock_synchronised())

    def slept(self) -> bool:
        """Whether the device was suspended since the clocks were last looked at: its monotonic clock stood still meanwhile."""
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
        return now_ns - self.boot_offset_ns > SLEPT_NS

    @property
    def boot_offset_ns(self) -> int:
        """Boottime less monotonic clock, when last looked at."""
        return int(_CLOCK.unpack_from(self.memory, _CLOCK_AT)[0])

    def instant(self, at_ns: int) -> w.Instant:
        """The moment of a monotonic time."""
        boot_offset, wall_offset, synced = _CLOCK.unpack_from(self.memory, _CLOCK_AT)
        boot = at_ns + boot_offset
        return w.Instant(
            boot_id=self._boot_id, boot_ns=boot, wall_ms=(boot + wall_offset) // 1_000_000, synced=bool(synced)
        )

    def release(self) -> None:
        """Gives up the lock, if it was had: nothing is written any more."""
        if self._lock >= 0:
            # Said aloud: the mapping has a copy of the descriptor, and may live a little longer.
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = -1

    def unlink(self) -> None:
        """Removes the file; the mapping stays until nothing refers to it."""
        Path(self.path).unlink(missing_ok=True)


def create(path: str, magic: bytes, version: int, header: msgspec.Struct, boot_id: str, body_bytes: int) -> Mapped:
    """Makes the file (0600, space reserved, locked). Without room on the disk it lives in memory, and dies with the worker.

    Raises:
        FileExistsError: there is a file of that name, perhaps with records that nobody has counted yet.
    """
    text = msgspec.json.encode(header)
    start = _up(64 + len(text))
    size = _up(start + body_bytes)
    fd = given.pop(path, -1)
    ours = fd < 0
    if ours:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):
            # A file system without locks: the file does without, as its reader will.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Reserved now: a write into a hole of a full disk would kill the worker with SIGBUS.
        os.posix_fallocate(fd, 0, size)
        memory = mmap.mmap(fd, size)
    except OSError as error:
        log.warning("kept in memory path=%s error=%s", path, error)
        if ours:
            os.unlink(path)
        else:
            # Its owner sees that there is nothing in it.
            os.ftruncate(fd, 0)
        os.close(fd)
        fd = -1
        memory = mmap.mmap(-1, size)
    memory[64 : 64 + len(text)] = text
    struct.pack_into("<II", memory, 8, version, len(text))
    memory[:8] = magic
    found = Mapped(path, version, boot_id, memory, start, fd)
    found.look_at_clocks()
    return found


def read_header(path: str, magic: bytes, version: int, kind: type[H], *, boot_id: str) -> H:
    """The header alone, of a file that another process may be writing.

    Raises:
        Damaged: it cannot be read, or is of another boot than ``boot_id``.
    """
    try:
        with open(path, "rb") as file:
            first = file.read(64)
            _, length = _version_and_length(first, magic, (version,))
            return _header(file.read(length), kind, boot_id)
    except OSError as error:
        raise Damaged(f"cannot open: {error.strerror}") from None


def open_existing(
    path: str, magic: bytes, versions: tuple[int, ...], kind: type[H], *, boot_id: str | None, write: bool = False
) -> tuple[Mapped, H]:
    """Maps a file that another worker left.

    Args:
        path, magic, kind: of the file.
        versions: those that the caller reads; the first is the one it writes.
        boot_id: the boot it must be of; None for any.
        write: take its lock, to go on writing it.

    Raises:
        Damaged: it cannot be read, or is of another boot than ``boot_id``.
        Locked: somebody still writes it; only with ``write``.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Damaged(f"cannot open: {error.strerror}") from None
    lock = -1
    try:
        if write:
            _take_lock(fd, path)
        size = os.fstat(fd).st_size
        if size < PAGE:
            raise Damaged(f"wanted at least {PAGE} bytes, got {size}")
        memory = mmap.mmap(fd, size)
        version, length = _version_and_length(memory[:64], magic, versions)
        if 64 + length > size:
            raise Damaged("cut short")
        header = _header(memory[64 : 64 + length], kind, boot_id)
        lock = fd if write else -1
        return Mapped(path, version, getattr(header, "boot_id", ""), memory, _up(64 + length), lock), header
    finally:
        if lock < 0:
            if write:
                # Said aloud, as in ``Mapped.release``.
                with contextlib.suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def _take_lock(fd: int, path: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Locked(path) from None
    except OSError:
        # A file system without locks: whoever made the file had none either.
        pass


def written_in(path: str) -> int:
    """How far a file that may be anything says that it was written; 0 when it does not."""
    try:
        with open(path, "rb") as file:
            return int(struct.unpack_from("<Q", file.read(PAGE), _POSITIONS.start)[0])
    except (OSError, struct.error):
        return 0


def clock_synchronised() -> bool:
    """Whether the kernel holds the wall clock for synchronised (adjtimex(2) without changing anything)."""
    # struct timex is 208 bytes on 64-bit and 128 on 32-bit Linux; all zero means "only read".
    timex = ctypes.create_string_buffer(256)
    state: int = _libc.adjtimex(timex)
    return 0 <= state < _TIME_ERROR


def _version_and_length(first: bytes, magic: bytes, versions: tuple[int, ...]) -> tuple[int, int]:
    if len(first) < 64 or first[:8] != magic:
        raise Damaged("not a file of this kind")
    found, length = struct.unpack_from("<II", first, 8)
    if found not in versions:
        raise Damaged(f"of version {found}, wanted {versions[0]}")
    return int(found), int(length)


def _header(text: bytes, kind: type[H], boot_id: str | None) -> H:
    try:
        header = msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, ValueError) as error:
        raise Damaged(f"unreadable: {error}") from None
    if boot_id is not None and getattr(header, "boot_id", None) != boot_id:
        raise Damaged("of another boot: its pages may be torn")
    return header


def _up(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE
