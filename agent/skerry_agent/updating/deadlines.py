"""How long a state may last: the one timer that runs while an update is in it.

What it has lasted already counts, over restarts and boots where that is known (``readiness``). What follows when the time is over is
``driving``'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from skerry_agent.clock import Clock
from skerry_agent.core import lifecycle
from skerry_agent.core.lifecycle import Update
from skerry_agent.readiness import Readiness

_LAST_LOOK_S = 5.0


class Deadline:
    """See the module.

    Args:
        overdue: the time is over.

    Attributes:
        drain_s: what a worker gets to end what it is at.
    """

    def __init__(self, clock: Clock, readiness: Readiness, *, drain_s: float, overdue: Callable[[], None]) -> None:
        self._clock = clock
        self._readiness = readiness
        self.drain_s = drain_s
        self._overdue = overdue
        self._timer: asyncio.TimerHandle | None = None
        self._extended = False

    def arm(self, update: Update, *, trial_s: float, at_least_s: float = 0.0) -> None:
        """The time of the state begins, or goes on by other rules; a state without a deadline gets none."""
        self.cancel()
        self._timer = None
        self._extended = False
        in_it_s = 0.0
        if update.state == "ready":
            in_it_s = self._readiness.lain_s(update)
        elif update.state == "trial" and update.since.boot_id == self._clock.boot_id:
            in_it_s = self._clock.boot_s() - update.since.boot_ns / 1e9
        left_s = lifecycle.left_s(update.state, in_it_s, trial_s=trial_s, drain_s=self.drain_s)
        if left_s is not None:
            self.go_on(max(left_s, at_least_s))

    def go_on(self, for_s: float) -> None:
        """The state gets this much longer."""
        self._timer = asyncio.get_running_loop().call_later(for_s, self._overdue)

    def last_look(self) -> bool:
        """Gives the state one moment more, for what is still on its way. False when it had that already."""
        if self._extended:
            return False
        self._extended = True
        self.go_on(_LAST_LOOK_S)
        return True

    def cancel(self) -> None:
        """It comes no more."""
        if self._timer is not None:
            self._timer.cancel()

    def when_s(self) -> float | None:
        """By the loop's clock; None where the state has none."""
        return self._timer.when() if self._timer is not None else None
