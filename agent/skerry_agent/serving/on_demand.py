"""A cell whose worker comes with the first request and goes when none has come for a while.

Asleep it has no process; its model counts as served all the same, since a request wakes it. The request waits in ``passing`` meanwhile. A
bundle on trial never sleeps, and each one proves itself whenever it is woken. Going to sleep is a drain: connections are
passed to the front, what was counted is folded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec

from skerry_agent import workerwire as ww
from skerry_agent.core import backoff
from skerry_agent.core.effects import Arm
from skerry_agent.errors import AgentError
from skerry_agent.logs import kv
from skerry_agent.serving.generation import Generation
from skerry_agent.serving.site import Site
from skerry_agent.serving.succession import START_S, Cell, retire
from skerry_agent.slots import Slot

log = logging.getLogger(__name__)


class OnDemand(Cell):
    """See the module.

    Attributes:
        cold_starts, cold_start_s: how often its worker was waked by a request, and how long that took in all.
        cold_last_s, cold_max_s: the last time, and at most.
    """

    def __init__(self, name: str, site: Site) -> None:
        super().__init__(name, site)
        self._asleep: dict[str, Slot] = {}
        self._waking = False
        self._fallen = 0
        self._wake_after_s = 0.0
        self._work = -1
        self._used_s = 0.0
        self.cold_starts = 0
        self.cold_start_s = self.cold_last_s = self.cold_max_s = 0.0

    @property
    def resting(self) -> bool:
        """Whether a request would wake it."""
        return self.current is None and bool(self._asleep)

    def models(self) -> dict[str, Slot]:
        """What answers requests here, or would when it is waked."""
        return dict(self._asleep) if self.resting else super().models()

    def runs(self, models: Mapping[str, Slot]) -> bool:
        """Whether it would serve exactly these bundles."""
        if not self.resting:
            return super().runs(models)
        return {n: s.digest for n, s in self._asleep.items()} == {n: s.digest for n, s in models.items()}

    def rest(self, models: Mapping[str, Slot]) -> Generation | None:
        """Serves these from the next request on. Returns what answered before, which is to be drained."""
        old, self.current = self.current, None
        if not self.runs(models):
            # What the bundle before it did says nothing of this one.
            self._fallen, self._wake_after_s = 0, 0.0
        self._asleep, self.trying = dict(models), {}
        self._turn += 1
        return old

    def take_over(self, new: Generation, *, accept: bool) -> Generation | None:
        """See ``Cell``."""
        self._asleep = {}
        self._fallen, self._wake_after_s = 0, 0.0
        self._used_s = self._site.clock.boot_s()
        return super().take_over(new, accept=accept)

    def cold(self) -> ww.Cold:
        """See ``Cell``."""
        return ww.Cold(
            starts=self.cold_starts, last_ms=round(self.cold_last_s * 1e3), max_ms=round(self.cold_max_s * 1e3)
        )

    def rekey(self, model: str, *, arm: Arm, rollout: str, stage: int) -> None:
        """See ``Cell``; asleep, it counts under that key from its next start on."""
        if self.resting and model in self._asleep:
            slot = self._asleep[model]
            self._asleep[model] = msgspec.structs.replace(slot, arm=arm, rollout=rollout, stage=stage)
        super().rekey(model, arm=arm, rollout=rollout, stage=stage)

    def wake(self) -> bool:
        """A request wants it. Where it did not start lately, the next try has to wait."""
        if not self.resting or self._waking or self._site.clock.boot_s() < self._wake_after_s:
            return False
        self._waking = True
        self._site.background(self._wake(dict(self._asleep)))
        return True

    async def _wake(self, models: dict[str, Slot]) -> None:
        site = self._site
        new: Generation | None = None
        try:
            new = await self.start(models, timeout_s=START_S)
            if self.resting and not site.stopping and self.runs(models):
                self.cold_starts += 1
                self.cold_start_s += self.start_s
                self.cold_last_s, self.cold_max_s = self.start_s, max(self.cold_max_s, self.start_s)
                new.cold_ms = max(1, round(self.start_s * 1e3))
                log.info("model waked", extra=kv(model=self.name, took_s=round(self.start_s, 3)))
                await self.switch(new)
        except AgentError as error:
            self._fallen += 1
            pause_s = backoff.delay_s("worker", self._fallen, site.draw(), scale=site.config.timing.backoff_scale)
            self._wake_after_s = site.clock.boot_s() + pause_s
            log.error("model not waked", extra=kv(model=self.name, code=error.code, detail=error.detail))
            site.on_not_started(models, error)
        finally:
            self._waking = False
        if new is not None and new is not self.current:
            await retire(new)

    def tick(self) -> None:
        """See ``Cell``; puts it to sleep when it was not used for ``pool.idle_s``."""
        super().tick()
        generation, idle_s = self.current, self._site.config.pool.idle_s
        if generation is None or generation.health is None or not self.answering() or idle_s == 0:
            return
        now_s, health = self._site.clock.boot_s(), generation.health
        if health.work != self._work or health.inflight or health.busy_s:
            self._work, self._used_s = health.work, now_s
        on_trial = any(slot.standing == "trial" for slot in generation.models.values())
        if not on_trial and not generation.unruly and now_s - self._used_s > idle_s:
            log.info("model sleeps", extra=kv(model=self.name, idle_s=round(now_s - self._used_s, 1)))
            self.rest(generation.models)
            self._site.on_change()
            self._site.background(self.drain(generation))
