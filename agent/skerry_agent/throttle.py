"""The operator's throttle: how many inferences per second this device answers, until when, and kept over restarts of the agent.

A throttle with an end that was set in another boot has ended: nobody can say how much of it is left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from skerry_agent.clock import Clock
from skerry_agent.control import Answer
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.store import Store

log = logging.getLogger(__name__)

MOST_RATE = 1e6
MOST_S = 366 * 86400.0
_KEY = "throttle"


class Throttle:
    """Holds the throttle and says it to ``apply``, which bounds the workers."""

    def __init__(self, store: Store, clock: Clock, apply: Callable[[float], None]) -> None:
        self._store = store
        self._clock = clock
        self._apply = apply
        found = store.get(_KEY, {})
        self._rate = float(found.get("rate", 0.0))
        self._until_s: float | None = found.get("until_s")
        if self._until_s is not None and found.get("boot_id") != clock.boot_id:
            self._rate, self._until_s = 0.0, None
        if self._rate:
            apply(self._rate)

    def tick(self) -> None:
        """Ends what has come to its end."""
        if self._until_s is not None and self._clock.boot_s() >= self._until_s:
            log.info("throttle ended", extra=kv(rate=self._rate))
            self._set(0.0, None)

    def status(self) -> dict[str, Any] | None:
        """``rate`` and ``left_s``, None for without end; None when nothing is throttled."""
        if not self._rate:
            return None
        left_s = None if self._until_s is None else max(0.0, self._until_s - self._clock.boot_s())
        return {"rate": self._rate, "left_s": left_s}

    async def answer(self, body: dict[str, Any]) -> Answer:
        """``POST /skerry/v1/throttle`` with ``rate``, 0 for off, and ``for_s``, absent for without end."""
        rate, for_s = body.get("rate"), body.get("for_s")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= MOST_RATE:
            return Answer(400, {"error": f"rate: wanted inferences/s from 0 (off) to {MOST_RATE:g}, got {rate!r}"})
        if for_s is not None and (
            isinstance(for_s, bool) or not isinstance(for_s, (int, float)) or not 0 < for_s <= MOST_S
        ):
            return Answer(400, {"error": f"for_s: wanted seconds, more than 0, at most {MOST_S:g}, got {for_s!r}"})
        self._set(float(rate), None if for_s is None or not rate else self._clock.boot_s() + for_s)
        log.info("throttle set", extra=kv(rate=self._rate, for_s=for_s))
        return Answer(200, {"ok": True, "throttle": self.status()})

    def _set(self, rate: float, until_s: float | None) -> None:
        self._rate, self._until_s = rate, until_s
        self._apply(rate)
        try:
            self._store.put(_KEY, {"rate": rate, "until_s": until_s, "boot_id": self._clock.boot_id})
        except Degraded as error:
            # It holds for as long as this agent runs.
            log.error("throttle not stored", extra=kv(code=error.code, detail=error.detail))
