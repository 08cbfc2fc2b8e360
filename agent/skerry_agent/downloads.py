"""How the files of a bundle come, for an update and for a shadow alike: a courier that keeps to the group's rules while they change.

A download ends when it gets no further for as long as the state ``fetch`` may last, and once it took longer than its size allows at the least
rate (``lifecycle.fetch_s``): what only trickles must not keep other models' updates waiting. What came stays for the next try. A new bound reaches the one that is under way; the courier is started again with it and goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from skerry_agent.clock import Clock
from skerry_agent.core import lifecycle
from skerry_agent.errand import Errands
from skerry_agent.errors import Transient
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
        self._end_s = float("inf")

    def left_s(self) -> float:
        """How long the download that is under way, or was last, may still last without getting further."""
        now_s = self._clock.boot_s()
        still_s = lifecycle.left_s("fetch", now_s - self._further_s) or 0.0
        return max(0.0, min(still_s, self._end_s - now_s))

    async def run(
        self, request: dict[str, Any], *, on_progress: Callable[[dict[str, Any]], None] = lambda _said: None
    ) -> dict[str, Any]:
        """A courier's answer to ``fetch``, with the bytes of all couriers that it took.

        Raises:
            AgentError: the courier's; ``timeout`` when it stands still or trickles; ``network_not_allowed`` and ``fetch_window_closed``.
        """
        self._further_s = self._clock.boot_s()
        self._reached = self._received = -1
        before = 0
        while True:
            cap = self._max_kib_s()
            size_bytes = sum(int(file["size"]) for file in request.get("files", ()))
            self._end_s = self._clock.boot_s() + lifecycle.fetch_s(size_bytes, cap)
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
        request = {**request, "max_kib_s": cap, "metered": metered}
        still_s = lifecycle.left_s("fetch", 0.0) or 0.0
        errand = self._errands.run("fetch", request, timeout_s=still_s, on_progress=take)
        errand = self._in_time(errand, self._end_s - self._clock.boot_s())
        return await self._networks.while_allowed(
            errand, digest=str(request.get("digest", "")), overtaken=lambda: self._max_kib_s() != cap
        )

    @staticmethod
    async def _in_time(errand: Coroutine[None, None, dict[str, Any]], most_s: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(most_s) as limit:
                return await errand
        except TimeoutError:
            if not limit.expired():
                raise
            raise Transient("timeout", f"not all of it is here after {most_s:.0f} s") from None

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
