"""Token buckets that hold for the device: a file that all its workers map, so that a limit is one limit however many of them answer.

A bucket is full at first, refilled with ``rate`` tokens per second up to ``burst``, and known by its name's hash. Its level and the moment
of it lie in the file; rate and burst are the reader's. A successor finds the levels that its predecessor left. ``held`` is a lock on the
file: a worker that dies gives it up, and who cannot have it soon goes on without, for the worst that follows is a request too many.
Where the file cannot be had, or there are more than ``SLOTS`` clients, what is left is a bucket of the worker's own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)

SLOTS = 128
_BYTES = 4096
_LEVEL, _AT = SLOTS, 2 * SLOTS
_PATIENCE_S, _PAUSE_S = 0.1, 0.0001
_STALE_S = 1.0
"""A moment further in the future is of another boot."""


class Bucket:
    """One bucket. ``words``: doubles, of which ``level`` and ``at`` are the numbers of this one's; both 0 before it was ever used."""

    __slots__ = ("_at", "_level", "_words", "burst", "rate")

    def __init__(
        self, rate: float, burst: float, words: memoryview[float] | None = None, level: int = 0, at: int = 1
    ) -> None:
        self.rate = rate
        self.burst = burst
        self._words = memoryview(bytearray(16)).cast("d") if words is None else words
        self._level, self._at = level, at

    def wait_s(self, now_s: float) -> float:
        """How long until a token is there; 0 when one is."""
        level, at_s = self._words[self._level], self._words[self._at]
        if not 0.0 < at_s <= now_s + _STALE_S:
            level, at_s = self.burst, now_s
        # Another worker may have looked at a clock a moment after this one did.
        level = min(self.burst, max(0.0, level) + max(0.0, now_s - at_s) * self.rate)
        self._words[self._level], self._words[self._at] = level, max(now_s, at_s)
        return 0.0 if level >= 1.0 else (1.0 - level) / self.rate

    def take(self) -> None:
        """Takes one; ``wait_s`` has just said that it is there."""
        self._words[self._level] -= 1.0


class Buckets:
    """All buckets of the device, as one worker sees them. Not thread-safe."""

    def __init__(self, path: str = "") -> None:
        """Args: ``path``: of the file, made when it is not there; empty for buckets of this worker alone."""
        self._fd = -1
        memory = None
        if path:
            try:
                self._fd, memory = _mapped(path)
            except OSError as error:
                log.warning("limits hold for this worker alone path=%s error=%s", path, error.strerror)
        memory = mmap.mmap(-1, _BYTES) if memory is None else memory
        self._keys = memoryview(memory)[: SLOTS * 8].cast("Q")
        self._words = memoryview(memory)[: 3 * SLOTS * 8].cast("d")

    def bucket(self, name: str, rate: float, burst: float) -> Bucket:
        """The bucket of that name."""
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") or 1
        with self.held():
            for i in range(SLOTS):
                slot = (key + i) % SLOTS
                if self._keys[slot] in (0, key):
                    self._keys[slot] = key
                    return Bucket(rate, burst, self._words, _LEVEL + slot, _AT + slot)
        return Bucket(rate, burst)

    def _lock(self) -> bool:
        end_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end_s:
                    return False
                # It is held for microseconds, unless its holder was taken off the processor.
                time.sleep(_PAUSE_S)
            except OSError:
                # A file system without locks.
                return False
            else:
                return True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While no other worker looks at or takes from a bucket."""
        got = self._fd >= 0 and self._lock()
        try:
            yield
        finally:
            if got:
                fcntl.flock(self._fd, fcntl.LOCK_UN)


def _mapped(path: str) -> tuple[int, mmap.mmap]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Reserved now: a write into a hole of a full disk would kill the worker with SIGBUS.
        os.posix_fallocate(fd, 0, _BYTES)
        return fd, mmap.mmap(fd, _BYTES)
    except OSError:
        os.close(fd)
        raise
