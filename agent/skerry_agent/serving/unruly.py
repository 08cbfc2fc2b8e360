"""Replaces a worker that leaks or spins: a successor takes its connections over, so that no request fails.

Where there is no memory for a second one beside it, or it has far more than it may, it is killed and started again like one that
crashed. One that is so again and again is replaced after growing pauses; it serves meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import psutil  # type: ignore[import-untyped]  # ships no types

from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.core import backoff, liveness
from skerry_agent.logs import kv
from skerry_agent.serving.generation import Generation, use_of

log = logging.getLogger(__name__)

_RULY_S = 3600.0
"""A worker that lived so long had no part in what those before it did."""

OnUnruly = Callable[[Generation, liveness.Unruly], bool]


class Replacing:
    """Of one succession of generations.

    Args:
        on_unruly: says what was found, once per generation; answers whether somebody else replaces it (a trial goes back).
        replace: starts the same models again and hands over to them; must not raise.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        draw: Callable[[], float],
        *,
        on_unruly: OnUnruly,
        replace: Callable[[Generation], Awaitable[None]],
        background: Callable[[Any], Any],
    ) -> None:
        self._config = config
        self._clock = clock
        self._draw = draw
        self._on_unruly = on_unruly
        self._replace = replace
        self._background = background
        self._times = 0
        self._not_before_s = 0.0

    def look(self, generation: Generation) -> None:
        """Judges a serving generation by its last report, and replaces it when it must."""
        if generation.health is None or generation.spins_since is None or generation.hung:
            return
        found = liveness.judge_use(
            use_of(generation.health), generation.spins_since, most_mb=generation.most_mb,
            longest_s=self._config.timing.spin_s,
        )  # fmt: skip
        if found is None:
            return
        if not generation.unruly:
            self._begin(generation, found)
        elif found.now and generation.worker.alive:
            self._kill(generation, found)

    def _begin(self, generation: Generation, found: liveness.Unruly) -> None:
        now_s = self._clock.boot_s()
        crowded = found.now or not self._room(generation)
        if now_s < self._not_before_s and not crowded:
            return
        generation.unruly = found.code
        told = kv(generation=generation.number, pid=generation.worker.pid, code=found.code, detail=found.detail)
        log.error("worker is replaced", extra=told)
        lived_s = now_s - (generation.listening_s or now_s)
        self._times = 1 if lived_s >= _RULY_S else self._times + 1
        pause_s = backoff.delay_s("unruly", self._times, self._draw(), scale=self._config.timing.backoff_scale)
        self._not_before_s = now_s + pause_s
        if self._on_unruly(generation, found):
            return
        if crowded:
            self._kill(generation, found)
        else:
            self._background(self._replace(generation))

    def _room(self, generation: Generation) -> bool:
        """Whether the next worker fits beside this one."""
        wanted_mb = max(generation.ready_mb, generation.needs_mb) + self._config.limits.memory_reserve_mb
        return bool(psutil.virtual_memory().available / 1e6 >= wanted_mb)

    def _kill(self, generation: Generation, found: liveness.Unruly) -> None:
        log.error("worker is killed", extra=kv(generation=generation.number, code=found.code, detail=found.detail))
        generation.worker.kill()
