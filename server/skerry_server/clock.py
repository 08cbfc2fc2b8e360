"""The server's clock: read here and nowhere else, passed on as an argument."""

from __future__ import annotations

import datetime as dt
import time


def now_ms() -> int:
    """Milliseconds since 1970, by the system's wall clock."""
    return time.time_ns() // 1_000_000


def utc(ms: int) -> dt.datetime:
    """The same moment as an aware datetime in UTC."""
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC)


def utc_now() -> dt.datetime:
    """Now, as an aware datetime in UTC."""
    return utc(now_ms())


def monotonic_s() -> float:
    """Seconds by a clock that nobody sets; its start means nothing."""
    return time.monotonic()
