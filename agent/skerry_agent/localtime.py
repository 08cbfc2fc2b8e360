"""What time it is here, for rules that speak of hours."""

from __future__ import annotations

import time

from skerry_agent.clock import Clock
from skerry_agent.config import Config


def now(config: Config, clock: Clock) -> tuple[int, int] | None:
    """Weekday (0: Monday) and minute of the day; None where the clock is not to be trusted (``updates.clock``)."""
    if config.updates.clock == "synced" and not clock.synced():
        return None
    here = time.localtime(clock.wall_s())
    return here.tm_wday, here.tm_hour * 60 + here.tm_min
