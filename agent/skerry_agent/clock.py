"""What time it is, as far as a device can know: wall clock, time since boot, and a lower bound that somebody signed.

Wall time may be wrong by years (no battery, no network); time since boot orders what happened within one boot. Only the
``x-skerry-signed-at`` of a verified timestamp raises the lower bound; MQTT times annotate and decide nothing.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NewType, cast

from skerry_contract.window import Instant

BootSeconds = NewType("BootSeconds", float)
WallSeconds = NewType("WallSeconds", float)

_TIME_ERROR = 5


class Clock:
    """The only reader of time. ``lower_bound_s`` is seconds since 1970, 0 before anything was verified."""

    def __init__(self, *, lower_bound_s: float = 0.0) -> None:
        self.boot_id = _boot_id()
        self.lower_bound_s = lower_bound_s
        self._adjtimex = _adjtimex()

    def wall_s(self) -> WallSeconds:
        """The wall clock, seconds since 1970."""
        return WallSeconds(time.time())

    def now_s(self) -> WallSeconds:
        """The wall clock, never before the signed lower bound."""
        return WallSeconds(max(time.time(), self.lower_bound_s))

    def boot_s(self) -> BootSeconds:
        """Seconds since boot, sleep included."""
        return BootSeconds(time.clock_gettime(time.CLOCK_BOOTTIME))

    def synced(self) -> bool:
        """Whether the kernel calls the wall clock synchronised."""
        if self._adjtimex is None:
            return False
        # modes = 0 reads only. struct timex is below 256 bytes everywhere; the answer is its clock state.
        state = self._adjtimex(ctypes.create_string_buffer(512))
        return 0 <= state != _TIME_ERROR

    def instant(self) -> Instant:
        """Now, as records carry it."""
        return Instant(
            self.boot_id, time.clock_gettime_ns(time.CLOCK_BOOTTIME), time.time_ns() // 1_000_000, self.synced()
        )

    def set_lower_bound(self, signed_at_s: float) -> None:
        """Takes a verified signing time, seconds since 1970. Whether it may is the caller's to know."""
        self.lower_bound_s = signed_at_s


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    except OSError:
        return ""


def _adjtimex() -> Callable[[Any], int] | None:
    try:
        return cast("Callable[[Any], int]", ctypes.CDLL(None).adjtimex)
    except (OSError, AttributeError):
        return None
