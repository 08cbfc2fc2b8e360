"""Who serves: the proof of a new bundle, its taking over, its confirmation, and the ways back.

These are the lifecycle's effects from the start of a worker on; when each is due is the table's (``updating``). Which bundle a
boot starts is decided by the slots' pointer file alone, which follows the stored state.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from skerry_agent.config import Config
from skerry_agent.core import backoff, lifecycle
from skerry_agent.core import effects as e
from skerry_agent.core.lifecycle import Update
from skerry_agent.errors import AgentError, Rejected
from skerry_agent.failures import Failures
from skerry_agent.logs import kv
from skerry_agent.restoring import Restoring
from skerry_agent.runtimes import Runtimes
from skerry_agent.serving import Launch, Serving
from skerry_agent.slots import Slot, Slots
from skerry_agent.standby import Standby

log = logging.getLogger(__name__)

_RESTORE_TRIES = 3
"""How often what ran before is started before the update gives up: a busy moment passes, a broken runtime stays."""
_CONFIRMED = frozenset({"confirmed", "confirmed_on_golden"})


class Turnover:
    """See the module.

    Args:
        update: the one under way, as it is stored.
        draw: uniform in [0, 1), for the waits.
    """

    def __init__(
        self,
        config: Config,
        slots: Slots,
        serving: Serving,
        runtimes: Runtimes,
        restoring: Restoring,
        failures: Failures,
        *,
        update: Callable[[], Update],
        draw: Callable[[], float],
    ) -> None:
        self._config = config
        self._slots = slots
        self._serving = serving
        self._runtimes = runtimes
        self._restoring = restoring
        self._failures = failures
        self._update = update
        self._draw = draw
        # A bundle that made way for another model's and has its turn again: its slot stays.
        self.parked = ""
        self._new: Launch | None = None
        self.standby = Standby(config, slots, serving)

    def configure(self, config: Config) -> None:
        """Goes on with another configuration."""
        self._config = config
        self.standby.configure(config)

    def _slot(self, standing: Any) -> Slot:
        update = self._update()
        return Slot(
            digest=update.digest, version=update.version, variant=update.variant, standing=standing,
            arm=update.arm, rollout=update.rollout, stage=update.stage,
        )  # fmt: skip

    def _next_models(self) -> dict[str, Slot]:
        return {**self._confirmed_models(), self._update().model: self._slot("trial")}

    def _confirmed_models(self) -> dict[str, Slot]:
        """What should serve beside or instead of the update: of its own model what is confirmed, of the others what runs."""
        running = self._serving.models()
        found: dict[str, Slot] = {}
        for model in self._slots.models():
            confirmed = self._slots.pointers(model).confirmed
            if model != self._update().model and running:
                if self._is_forbidden(model, running.get(model)):
                    continue
                if model in running and (self._serving.answering(model) or not self._lost(running[model])):
                    found[model] = running[model]
                continue
            slot = self._slots.runnable(model)
            if slot is not None and (model == self._update().model or not self._lost(slot)):
                found[model] = slot
            elif confirmed is not None and model in running and running[model].digest == confirmed.digest:
                # Damaged on disk, and still answering.
                found[model] = running[model]
            if self._is_forbidden(model, found.get(model)):
                del found[model]
        return found

    def _is_forbidden(self, model: str, slot: Slot | None) -> bool:
        return slot is not None and self._slots.forbidden(model, slot.version)

    async def prove(self) -> e.Event:
        """Starts a worker with what is to serve, and has it prove itself.

        Raises:
            AgentError: why it does not come up.
        """
        self._new = await self._serving.start(self._next_models(), timeout_s=lifecycle.DEADLINES_S["prove"])
        return e.Proved()

    def _lost(self, slot: Slot) -> bool:
        """Whether a worker with this slot could not be started, for want of its runtime: it must keep no other model down."""
        variant = self._slots.variant(slot)
        return variant is not None and self._runtimes.lacks(variant)

    async def hand_over(self) -> e.Event:
        """The new worker takes over, and is on trial.

        Raises:
            Rejected: ``trial_crashed``: it died since its proof.
        """
        new = self._new
        if new is None or not new.alive:
            raise Rejected("trial_crashed", "the worker died between its proof and the hand-over")
        self._slots.activate(self._update().model, self._slot("trial"))
        # From here on it serves: whoever goes back in the middle of the drain must not end it as one that never listened.
        self._new = None
        await self._serving.switch(new)
        self.standby.begin(self._confirmed_models())
        return e.HandedOver()

    def finish(self) -> None:
        """The pointers follow a stored ``confirmed``, before the first start too: power may have cut it off. Once per update."""
        update = self._update()
        if update.state not in _CONFIRMED:
            return
        now = self._slots.pointers(update.model).confirmed
        # After a restart the pointer file may know a later key of the same bundle: it stays.
        same = now is not None and (now.digest, now.variant) == (update.digest, update.variant)
        if not same and self._slots.whole(update.digest, update.variant):
            self._slots.confirm(update.model, self._slot(update.state))

    def confirm(self) -> None:
        """The bundle is what a boot starts from now on."""
        self.standby.end()
        model = self._update().model
        self.finish()
        generation = self._serving.generation_of(model)
        if generation is not None:
            slot = generation.models[model]
            generation.models[model] = msgspec.structs.replace(slot, standing=self._update().state)

    async def stop_new(self) -> None:
        """Ends a worker that was not handed over to."""
        new, self._new = self._new, None
        if new is not None:
            # Whatever comes next, no worker is left behind.
            await asyncio.shield(self._serving.site.background(self._serving.retire(new)))

    def ordered_back(self) -> tuple[str, Slot] | None:
        """The model and the bundle that a way back leads to which has not been gone to its end; None without any."""
        update = self._update()
        pointers = self._slots.pointers(update.model)
        if not lifecycle.steps_back(update) or pointers.confirmed is None or pointers.confirmed.digest != update.digest:
            return None
        back = pointers.previous
        return (
            None
            if back is None or self._is_forbidden(update.model, back)
            else (update.model, msgspec.structs.replace(back, arm="none", rollout="", stage=0))
        )

    async def bring_up(
        self, wanted: Mapping[str, Slot], *, timeout_s: float
    ) -> tuple[Mapping[str, Slot], AgentError | None]:
        """Starts these. What came up in the end, and why nothing did."""
        try:
            return await self._restoring.bring_up(wanted, timeout_s=timeout_s), None
        except AgentError as error:
            return {}, error

    def went_back(self, model: str, wanted: Slot, came_up: Slot | None) -> None:
        """The end of a way back: the pointer file follows what proved itself, or the bundle that had to go is taken up again."""
        if came_up is not None and came_up.digest == wanted.digest:
            self._slots.step_back(model)
        else:
            self._failures.forgive(self._update().digest)

    async def restore(self) -> e.Event:
        """What ran before serves again, if it does not still."""
        await self.stop_new()
        ordered = self.ordered_back()
        model = self._update().model
        if ordered is None:
            self._slots.revert_active(model)
        wanted = self._confirmed_models()
        if ordered is not None:
            wanted[model] = ordered[1]
        if not wanted:
            await self._serving.clear()
            return e.Reverted()
        if not self._serving.runs(wanted):
            back = ordered is None and await self._hand_back(wanted)
            error = None if back else await self._bring_back(wanted, model if ordered is not None else "")
            if error is not None:
                if ordered is not None:
                    self.went_back(*ordered, None)
                    # What had to go is confirmed still: where it does not answer any more, it is what must come up.
                    wanted = self._confirmed_models()
                if not self._serving.runs(wanted):
                    self._keep_trying(wanted)
                return e.Failed(code=error.code, detail=error.detail[:500])
        if ordered is not None:
            self.went_back(*ordered, ordered[1])
        else:
            self._leave_forbidden(model)
        return e.Reverted()

    def _leave_forbidden(self, model: str) -> None:
        """What a forced floor stopped is confirmed no more, where the bundle before it serves now."""
        pointers = self._slots.pointers(model)
        back = pointers.previous
        if self._is_forbidden(model, pointers.confirmed) and back is not None and self._slots.may_serve(model, back):
            self._slots.step_back(model)

    async def _hand_back(self, wanted: dict[str, Slot]) -> bool:
        """To what was kept loaded during the trial. False when it was not, or died."""
        launch = await self.standby.take(wanted)
        if launch is None:
            return False
        try:
            await self._serving.switch(launch)
        except AgentError as error:
            log.warning("what was kept loaded died", extra=kv(code=error.code, detail=error.detail))
            await self._serving.retire(launch)
            return False
        return True

    async def give_up(self) -> None:
        """The way back does not come to its end: what serves goes on, and what does not is tried on and on in the background."""
        await self.stop_new()
        self._slots.revert_active(self._update().model)
        wanted = self._confirmed_models()
        if not self._serving.runs(wanted):
            self._keep_trying(wanted)

    async def _bring_back(self, wanted: dict[str, Slot], ordered: str) -> AgentError | None:
        for failures in range(1, _RESTORE_TRIES + 1):
            try:
                limit_s = lifecycle.DEADLINES_S["prove"]
                await self._restoring.bring_up(wanted, timeout_s=limit_s, without_substitute=ordered)
                return None
            except AgentError as error:
                last = error
            if not all(self._slots.whole(slot.digest, slot.variant) for slot in wanted.values()):
                # It was found damaged and set aside: trying again cannot help, fetching can.
                break
            if failures < _RESTORE_TRIES:
                wait_s = backoff.delay_s("worker", failures, self._draw(), scale=self._config.timing.backoff_scale)
                await asyncio.sleep(wait_s)
        return last

    def _keep_trying(self, wanted: dict[str, Slot]) -> None:
        """Tries on in the background, beside whatever the plan fetches: what nothing serves, and what something else serves."""
        whole = {name: s for name, s in wanted.items() if self._slots.whole(s.digest, s.variant)}
        self._serving.start_later(whole)
        model = self._update().model
        slot, now = whole.get(model), self._serving.models().get(model)
        if slot is not None and now is not None and now.digest != slot.digest and self._serving.answering(model):
            # The bundle that has to go answers meanwhile, which is better than nothing.
            self.replace_later(model, slot)

    def replace_later(self, model: str, slot: Slot) -> None:
        """Tries on in the background until the slot serves in place of what does, or is confirmed no more."""
        self._serving.site.background(self._replace_later(model, slot))

    async def _replace_later(self, model: str, slot: Slot) -> None:
        failures = 0
        while True:
            failures += 1
            wait_s = backoff.delay_s("worker", failures, self._draw(), scale=self._config.timing.backoff_scale)
            await asyncio.sleep(wait_s)
            confirmed, now = self._slots.pointers(model).confirmed, self._serving.models().get(model)
            if confirmed is None or confirmed.digest != slot.digest or now is None or now.digest == slot.digest:
                return
            if not self._update().resting:
                continue
            serves = self._serving.models()
            try:
                limit_s = lifecycle.DEADLINES_S["prove"]
                # What an update has taken up meanwhile is not taken away from it.
                came_up = await self._restoring.bring_up(
                    {**serves, model: slot}, timeout_s=limit_s, without_substitute=model,
                    still=functools.partial(self._nothing_moved, serves),
                )  # fmt: skip
                if came_up:
                    return
            except AgentError as error:
                log.error("what ran before does not start yet", extra=kv(code=error.code, failures=failures))

    def _nothing_moved(self, serves: Mapping[str, Slot]) -> bool:
        """Whether no update is under way, and the same bundles serve."""
        now = self._serving.models()
        return self._update().resting and {n: s.digest for n, s in now.items()} == {
            n: s.digest for n, s in serves.items()
        }
