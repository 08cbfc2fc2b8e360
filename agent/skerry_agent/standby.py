"""What ran before, kept loaded while another bundle is on trial: the way back is a hand-over then, and no start.

The worker that served before the trial drains and ends, as at every hand-over, so that what it counted is folded and none of its
leaks stays. Once it is gone, another one loads the same bundles, proves them and waits without listening. It costs their memory
for the time of the trial: it is not begun where that is not free, and let go when memory gets short. Without it the way back
starts a worker, as after any crash.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

import psutil  # type: ignore[import-untyped]  # ships no types

from skerry_agent.config import Config
from skerry_agent.core import memory
from skerry_agent.errors import AgentError
from skerry_agent.logs import kv
from skerry_agent.serving import Launch, Serving
from skerry_agent.slots import Slot, Slots

log = logging.getLogger(__name__)

_START_S = 180.0


def free_mb() -> float:
    """Memory that a process could have now, MB (1e6 bytes)."""
    return float(psutil.virtual_memory().available) / 1e6


class Standby:
    """See the module. At most one at a time.

    Args:
        free_mb: as above.
    """

    def __init__(
        self, config: Config, slots: Slots, serving: Serving, *, free_mb: Callable[[], float] = free_mb
    ) -> None:
        self._config = config
        self._slots = slots
        self._serving = serving
        self._free_mb = free_mb
        self._start: asyncio.Task[Launch | None] | None = None
        self.state = "none"

    def configure(self, config: Config) -> None:
        """Goes on with another configuration."""
        self._config = config

    def status(self) -> dict[str, Any]:
        """For people: ``none``, ``starting``, ``ready``, ``failed`` or ``no_memory``, and the processes that wait."""
        start = self._start
        launch = start.result() if self.state == "ready" and start is not None and start.done() else None
        pids = [generation.worker.pid for generation in launch.new.values()] if launch is not None else []
        return {"state": self.state, "pids": pids}

    def begin(self, models: Mapping[str, Slot]) -> None:
        """Loads these, if memory allows; what serves of them already goes on. Returns at once."""
        self.end()
        if not self._config.pool.standby or not models or self._serving.runs(models):
            return
        answer = memory.may_stand_by(
            needs_mb=self._needs_mb(models), free_mb=self._free_mb(), reserve_mb=self._config.limits.memory_reserve_mb
        )
        if answer:
            self.state = "no_memory"
            log.info("what ran before is not kept loaded", extra=kv(detail=answer))
            return
        self.state = "starting"
        self._start = self._serving.site.background(self._bring_up(dict(models)))

    async def _bring_up(self, models: dict[str, Slot]) -> Launch | None:
        try:
            launch = await self._serving.start(models, timeout_s=_START_S)
        except AgentError as error:
            # The way back will find out by itself, and has substitutes for what does not start.
            self.state = "failed"
            log.warning(
                "what ran before does not load beside the trial", extra=kv(code=error.code, detail=error.detail)
            )
            return None
        self.state = "ready"
        return launch

    def _needs_mb(self, models: Mapping[str, Slot]) -> float:
        variants = [self._slots.variant(slot) for name, slot in models.items() if not self._served_as(name, slot)]
        return sum(float(variant.needs.rss_mb) for variant in variants if variant is not None)

    def _served_as(self, model: str, slot: Slot) -> bool:
        cell = self._serving.cell_of(model)
        return cell is not None and cell.models().get(model) == slot and cell.name == model

    def tick(self) -> None:
        """Lets it go when memory gets short: what serves is worth more."""
        if self.state not in ("starting", "ready"):
            return
        if memory.must_let_go(free_mb=self._free_mb(), reserve_mb=self._config.limits.memory_reserve_mb):
            log.warning("what ran before is let go: memory is short", extra=kv(free_mb=round(self._free_mb())))
            self.end()
            self.state = "no_memory"

    async def take(self, models: Mapping[str, Slot]) -> Launch | None:
        """What waits, if it is these and alive; from now on it is the caller's. A start under way is waited for."""
        start, self._start = self._start, None
        if start is None:
            return None
        self.state = "none"
        try:
            launch = await start
        except asyncio.CancelledError:
            self._serving.site.background(self._retire(start))
            raise
        if launch is None:
            return None
        if self._serving.fits(launch, models):
            return launch
        self._serving.site.background(self._serving.retire(launch))
        return None

    def end(self) -> None:
        """It is not needed any more."""
        start, self._start = self._start, None
        self.state = "none"
        if start is not None:
            self._serving.site.background(self._retire(start))

    async def _retire(self, start: asyncio.Task[Launch | None]) -> None:
        if not start.done():
            start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        if not start.cancelled() and start.exception() is None and (launch := start.result()) is not None:
            await self._serving.retire(launch)
