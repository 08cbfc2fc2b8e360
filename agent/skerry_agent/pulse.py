"""The service manager's watchdog: asks the agent's own endpoint now and then, and says ``WATCHDOG=1`` while all is well.

When that is withheld is ``core.watchdog``'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from skerry_agent import probe
from skerry_agent.clock import Clock
from skerry_agent.core import watchdog
from skerry_agent.logs import kv
from skerry_agent.notify import Notify

log = logging.getLogger(__name__)

_PROBE_S = 5.0


class Pulse:
    """See the module.

    Args:
        address: of the endpoint, as ``probe`` takes it.
        should_answer: whether something is to be served now.
        store_failed: whether the store gave an error that a restart cures.
        unserved_s: for how long nothing may answer.
    """

    def __init__(
        self,
        notify: Notify,
        clock: Clock,
        address: Mapping[str, Any],
        *,
        should_answer: Callable[[], bool],
        store_failed: Callable[[], bool],
        unserved_s: Callable[[], float],
    ) -> None:
        self._notify = notify
        self._clock = clock
        self._address = address
        self._should_answer = should_answer
        self._store_failed = store_failed
        self._unserved_s = unserved_s
        self._pinged_s = 0.0
        self._answered_s = clock.boot_s()

    def tick(self) -> None:
        """Pings when it is time."""
        every_s = self._notify.interval_s
        now_s = self._clock.boot_s()
        if every_s is not None and now_s - self._pinged_s >= every_s:
            self._pinged_s = now_s
            # Beside the loop: what does not answer must not hold up what ends it.
            ping = asyncio.get_running_loop().create_task(self._ping(), name="ping")
            ping.add_done_callback(_pinged)

    async def _ping(self) -> None:
        """Tells the service manager that all is well, if it is."""
        should = self._should_answer()
        if not should or await probe.answers(self._address, _PROBE_S):
            self._answered_s = self._clock.boot_s()
        health = watchdog.Health(
            store_failed=self._store_failed(),
            should_answer=should,
            unanswered_s=self._clock.boot_s() - self._answered_s,
        )
        withheld = watchdog.judge_health(health, self._unserved_s())
        if withheld:
            log.critical("watchdog not told", extra=kv(detail=withheld))
        else:
            self._notify.tell("WATCHDOG=1")


def _pinged(ping: asyncio.Task[None]) -> None:
    if not ping.cancelled() and (error := ping.exception()) is not None:
        log.error("watchdog not told", exc_info=error)
