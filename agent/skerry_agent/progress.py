"""How far the files of an update are: what the courier says while it fetches, for the status and, now and then, for the server.

Lives in memory only: after a restart the courier says it again, counted from what is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skerry_contract import wire

from skerry_agent.clock import Clock

TELL_S = 30.0
"""The server hears of a download that lasts so long, and then as often: a short one is over before anybody looks."""


class FetchProgress:
    """See the module.

    Args:
        tell: reports this device's state to the server.
        scale: of the time between two reports; below 1 in tests and demonstrations.
    """

    def __init__(self, clock: Clock, tell: Callable[[], None], scale: float) -> None:
        self._clock = clock
        self._tell = tell
        self._scale = scale
        self._file = ""
        self._began_s = 0.0
        self._began_at = -1
        self._told_s = 0.0
        self.now: wire.Progress | None = None

    def begin(self) -> None:
        """A download begins."""
        self.now, self._began_at = None, -1
        self._told_s = self._began_s = self._clock.boot_s()

    def take(self, said: dict[str, Any]) -> None:
        """A courier's line. One that is no such line is passed over: progress decides nothing."""
        done, size, file = said.get("total_done"), said.get("total_size"), said.get("file")
        if not isinstance(done, int) or not isinstance(size, int) or not 0 <= done <= size < 1 << 63:
            return
        now_s = self._clock.boot_s()
        if self._began_at < 0:
            # What was here already did not come at any speed.
            self._began_s, self._began_at = now_s, done
        self.now, self._file = wire.Progress(done=done, size=size), str(file)[:200]
        if now_s - self._told_s >= TELL_S * self._scale:
            self._told_s = now_s
            self._tell()

    def end(self) -> None:
        """It is over, however."""
        self.now = None

    def status(self) -> dict[str, Any] | None:
        """For people: None while nothing is fetched."""
        if self.now is None:
            return None
        spent_s = self._clock.boot_s() - self._began_s
        rate = (self.now.done - self._began_at) / spent_s if spent_s > 0 else 0.0
        return {
            "file": self._file, "done_bytes": self.now.done, "size_bytes": self.now.size, "bytes_per_s": round(rate, 1),
            "left_s": round((self.now.size - self.now.done) / rate, 1) if rate > 0 else None,
        }  # fmt: skip
