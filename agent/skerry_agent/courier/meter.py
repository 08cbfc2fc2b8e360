"""How much has come, how fast it may and must come, and who hears of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from skerry_agent.courier import requests, watch

_PROGRESS_S = 0.5

Report = Callable[[dict[str, Any]], None]


class Sized(Protocol):
    """A file that is counted."""

    @property
    def name(self) -> str:
        """How it is called in reports."""

    @property
    def size(self) -> int:
        """Bytes."""


class Meter:
    """Of one run over the files of a bundle.

    Args:
        report: gets {file, done, size, total_done, total_size, received} in bytes, at most twice a second.
        overdue: rings when the peer brings less than ``limits`` want.
        max_bytes_s: the rate that may not be passed, 0 for any.

    Attributes:
        received: bytes that came over the network in this run.
    """

    def __init__(self, report: Report, overdue: watch.Watch, *, max_bytes_s: int, limits: requests.Limits) -> None:
        self._report = report
        self._overdue = overdue
        self._rate = _Rate(max_bytes_s)
        self._slow_bytes = limits.slow_bytes
        self._slow_s = limits.slow_s
        self._total = 0
        self._finished = 0
        self._reported = float("-inf")
        self._unwatched = 0
        self.received = 0

    def begin(self, files: Iterable[Sized]) -> None:
        """These are the files of the run."""
        self._total = sum(file.size for file in files)

    def came(self, file: Sized, done: int, size: int) -> None:
        """``size`` more bytes of a file came from the peer, ``done`` are here. Waits when they came too fast."""
        self.received += size
        self._unwatched += size
        if self._unwatched >= self._slow_bytes:
            self._unwatched = 0
            self._overdue.wind()
        pause_s = self._rate.pause_s(size, time.monotonic())
        if pause_s > 0:
            # Our own slowness is not the peer's.
            self.pause(pause_s)
        self.show(file, done)

    def show(self, file: Sized, done: int) -> None:
        """Reports how far a file is, when it is time to."""
        if time.monotonic() - self._reported >= _PROGRESS_S:
            self._say(file, done, self._finished + done)

    def finished(self, file: Sized) -> None:
        """A file is here."""
        self._finished += file.size
        self._say(file, file.size, self._finished)

    def _say(self, file: Sized, done: int, total_done: int) -> None:
        self._reported = time.monotonic()
        self._report(
            {
                "file": file.name,
                "done": done,
                "size": file.size,
                "total_done": total_done,
                "total_size": self._total,
                "received": self.received,
            }
        )

    def wind(self) -> None:
        """The peer has its whole time again: something new is asked of it."""
        self._overdue.wind()

    def pause(self, seconds: float) -> None:
        """Sleeps; the peer is not watched meanwhile."""
        with self.own_work():
            time.sleep(seconds)

    @contextlib.contextmanager
    def own_work(self, limit_s: float = 0.0) -> Iterator[None]:
        """What takes this device's time, and not the peer's: at most ``limit_s`` of it, 0 for any. Raises ``watch.Overdue``."""
        if limit_s:
            self._overdue.wind(limit_s)
        else:
            self._overdue.stop()
        try:
            yield
        finally:
            self._overdue.wind(self._slow_s)


class _Rate:
    """A rate limit in bytes per second, 0 for none; at most a quarter of a second of it may come at once."""

    def __init__(self, bytes_s: int) -> None:
        self._bytes_s = bytes_s
        self._free_at = float("-inf")

    def pause_s(self, size: int, now: float) -> float:
        """How long to wait after ``size`` bytes came at ``now``."""
        if not self._bytes_s:
            return 0.0
        self._free_at = max(self._free_at, now - 0.25) + size / self._bytes_s
        return self._free_at - now
