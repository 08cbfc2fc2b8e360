"""How the files of a bundle come, for an update and for a shadow alike: a courier that keeps to the group's rules while they change.

A download ends when it gets no further for as long as the state ``fetch`` may last, however long it takes: with a bound on the rate it
may be under way for days. A new bound reaches the one that is under way; the courier is started again with it and goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from skerry_agent.clock import Clock
from skerry_agent.core import lifecycle
from skerry_agent.errand import Errands
from skerry_agent.logs import kv
from skerry_agent.network import Networks, Overtaken

log = logging.getLogger(__name__)


class Downloads:
    """See the module.

    Args:
        max_kib_s: of a download, 0 for any. networks: over which, and when, it may come.
    """

    def __init__(self, errands: Errands, clock: Clock, networks: Networks, *, max_kib_s: Callable[[], int]) -> None:
        self._errands = errands
        self._clock = clock
        self._networks = networks
        self._max_kib_s = max_kib_s
        self._further_s = float("-inf")
        self._reached = self._received = -1

    def left_s(self) -> float:
        """How long the download that is under way, or was last, may still stand still."""
        return lifecycle.left_s("fetch", self._clock.boot_s() - self._further_s) or 0.0

    async def run(
        self, request: dict[str, Any], *, on_progress: Callable[[dict[str, Any]], None] = lambda _said: None
    ) -> dict[str, Any]:
        """A courier's answer to ``fetch``, with the bytes of all couriers that it took.

        Raises:
            AgentError: the courier's; ``timeout`` when it stands still; ``network_not_allowed`` and ``fetch_window_closed``.
        """
        self._further_s = self._clock.boot_s()
        self._reached = self._received = -1
        before = 0
        while True:
            cap = self._max_kib_s()
            try:
                answer = await self._at(cap, request, before, on_progress)
            except Overtaken:
                log.info("download goes on at another rate", extra=kv(max_kib_s=self._max_kib_s()))
                before = max(0, self._received)
                continue
            return {**answer, "bytes": int(answer.get("bytes") or 0) + before}

    async def _at(
        self, cap: int, request: dict[str, Any], before: int, on_progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """One courier, at this rate. ``before``: bytes that former ones brought."""

        def take(said: dict[str, Any]) -> bool:
            if isinstance(said.get("received"), int):
                said = {**said, "received": before + said["received"]}
            on_progress(said)
            return self._is_further(said)

        metered = self._networks.now().metered
        request, still_s = {**request, "max_kib_s": cap, "metered": metered}, lifecycle.left_s("fetch", 0.0) or 0.0
        errand = self._errands.run("fetch", request, timeout_s=still_s, on_progress=take)
        return await self._networks.while_allowed(errand, overtaken=lambda: self._max_kib_s() != cap)

    def _is_further(self, said: dict[str, Any]) -> bool:
        # Bytes that came may be in vain (a delta that is no good), and what was here already comes without any: both are bounded.
        reached, received = (
            value if isinstance(value, int) else -1 for value in (said.get("total_done"), said.get("received"))
        )
        if reached <= self._reached and received <= self._received:
            return False
        self._reached, self._received = max(self._reached, reached), max(self._received, received)
        self._further_s = self._clock.boot_s()
        return True
