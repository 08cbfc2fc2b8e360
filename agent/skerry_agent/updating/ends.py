"""How an update ends before its time, how a device goes back, and what a person may order.

A worker that dies or gets out of hand, a start after the agent's own deaths, a person's word: each is judged here by what is under way,
and fed to the table, or owed until what is under way has made way for it (``returning``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping, Sequence

import msgspec
from skerry_contract import ids

from skerry_agent.core import culprits, lifecycle, liveness, why
from skerry_agent.core import effects as e
from skerry_agent.core.lifecycle import Update
from skerry_agent.errors import AgentError, Degraded, Rejected
from skerry_agent.logs import kv
from skerry_agent.serving import Generation
from skerry_agent.slots import Slot
from skerry_agent.updating.driving import Driving

log = logging.getLogger(__name__)


class Updating(Driving):
    """The updates of a device: the lifecycle that is driven, and what else comes to it from outside.

    Attributes:
        crashes: of serving workers, those that still count.
    """

    crashes: Sequence[culprits.Crash] = ()

    def booted(self) -> None:
        """What was under way when the agent ended comes to rest."""
        here = self.fetching.bytes_here()
        before = self._store.get("progress", {})
        began_at = int(before["bytes"]) if before.get("digest") == self.update.digest else 0
        further = self.update.state == "fetch" and here > began_at
        if further:
            try:
                self._store.put("progress", {"digest": self.update.digest, "bytes": here})
            except Degraded as error:
                log.warning("progress not noted", extra=kv(code=error.code, detail=error.detail))
        self.feed(e.Booted(further=further))
        if self.update.state == "ready":
            self._readiness.note(self.update)
            self._deadline.arm(self.update, trial_s=self.rules.duration_s)

    async def booted_and_told(self) -> None:
        """``booted``, until it is said: whoever takes up the next update before that has the end of this one forgotten."""
        self.booted()
        tasks = [task for task in (self._task, *self._others) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    def crashed(self, generation: Generation, how: str) -> bool:
        """The serving generation died. True when it was on trial: the update goes back, and brings up what ran before.

        A confirmed bundle that brings its worker down again and again goes back too, when there is one before it; else it gets a
        worker of its own. Of several in one worker the suspects are those that were in work.
        """
        own = self._is_own(generation)
        if own and lifecycle.restores(self.update):
            # It goes anyway: what comes back is being brought up, and its end must not end that.
            return True
        if own and self.update.state == "trial":
            self.feed(e.Failed(code="trial_crashed", detail=f"the worker died: {how}"))
            # Without room to store the way back, the trial's bundle is what can answer.
            return not self._owed
        return self._looped(generation)

    def _is_own(self, generation: Generation) -> bool:
        """Whether it has the update's bundle."""
        slot = generation.models.get(self.update.model)
        return slot is not None and slot.digest == self.update.digest

    def unruly(self, generation: Generation, found: liveness.Unruly) -> bool:
        """The serving generation leaks or spins. True when it was on trial, or did so too often: the update goes back.

        Otherwise another generation of the same models takes over from it.
        """
        own = self._is_own(generation)
        if own and lifecycle.restores(self.update):
            # What comes back takes its place; another of the same would take the memory that this needs.
            return True
        if own and self.update.state == "trial":
            self.feed(e.Failed(code=found.code, detail=found.detail))
            return not self._owed
        return self._looped(generation)

    def go_back(self, model: str, slot: Slot, why: str) -> bool:
        """Gives a confirmed bundle up for the one before it; what is under way makes way first.

        False when it is none, when there is none before it, or not now.
        """
        pointers = self._slots.pointers(model)
        back, confirmed = pointers.previous, pointers.confirmed
        if self.update.state == "revert" or self._owed or self.returning.owed is not None:
            return False
        if (
            back is None
            or confirmed is None
            or confirmed.digest != slot.digest
            or not self._slots.may_serve(model, back)
        ):
            return False
        looped = e.CrashLooped(
            model=model, digest=slot.digest, version=slot.version, variant=slot.variant, detail=why[:500]
        )
        at_rest = self.at_rest
        if not at_rest:
            try:
                self.returning.owe(looped)
            except Degraded as error:
                log.error("way back not stored", extra=kv(model=model, code=error.code, detail=error.detail))
                return False
        self._forget(slot.digest)
        if at_rest:
            self.feed(looped)
        else:
            self._go_back_first()
        return not self._owed

    def _looped(self, generation: Generation) -> bool:
        now_s = self._clock.boot_s()
        suspects = tuple((name, generation.models[name].digest) for name in generation.suspects)
        self.crashes = [*culprits.remembered(self.crashes, now_s), culprits.Crash(at_s=now_s, suspects=suspects)]
        found = culprits.culprit(self.crashes, now_s)
        slot = generation.models.get(found[0]) if found is not None else None
        if found is None or slot is None or self.update.state == "revert":
            return False
        model, digest = found
        if digest == slot.digest and self.go_back(model, slot, ""):
            # Until what is under way has made way, the worker is started again as after any crash.
            return self.returning.owed is None
        if not self.update.resting:
            return False
        if not self._owed and len(generation.models) > 1:
            # There is nothing to go back to; at least it takes no other model along.
            self._forget(digest)
            self._serving.set_apart(model, slot)
        return False

    def _forget(self, digest: str) -> None:
        """Nothing counts against it any more: it was dealt with."""
        kept = ((crash.at_s, tuple(s for s in crash.suspects if s[1] != digest)) for crash in self.crashes)
        self.crashes = [culprits.Crash(at_s=at_s, suspects=suspects) for at_s, suspects in kept]

    def blame(self, why: str) -> bool:
        """At a start: what was confirmed last is taken for the cause of the agent's own deaths. Whether the one before it comes back."""
        if not self.update.resting and self.update.state != "ready":
            return False
        model = self.returning.last_confirmed(self.update)
        pointers = self._slots.pointers(model)
        confirmed, back = pointers.confirmed, pointers.previous
        if confirmed is None or back is None or not self._slots.whole(back.digest, back.variant):
            return False
        # What lies ready is taken up again from its files.
        self.turnover.parked = self.update.digest
        looped = e.CrashLooped(
            model=model, digest=confirmed.digest, version=confirmed.version, variant=confirmed.variant, detail=why
        )
        given_up, _ = lifecycle.step(Update(state="confirmed"), looped, self._clock.instant())
        # A power cut is likelier than the bundle's fault.
        given_up = msgspec.structs.replace(given_up, at_boot=True)
        try:
            with self._store.transaction():
                self._store.put("update", given_up)
                self.failures.penalise(given_up)
        except Degraded as error:
            # On a full disk, say. No reason not to start.
            log.error("way back not stored", extra=kv(model=model, code=error.code, detail=error.detail))
            return False
        self.update = given_up
        self._telling.record(self.update)
        return True

    async def come_up(self, models: Mapping[str, Slot], *, timeout_s: float) -> AgentError | None:
        """At a start: brings up what the pointers say, or what a way back leads to that was cut off. Where that does not come up it is over,
        as at any other time.

        Returns:
            Why nothing came up; it is tried on and on, beside whatever the plan fetches. So is what is encrypted and cannot be opened,
            while what it was before serves in its place.
        """
        ordered = self.turnover.ordered_back()
        wanted = {**models, **({ordered[0]: ordered[1]} if ordered is not None else {})}
        came_up, error = await self.turnover.bring_up(wanted, timeout_s=timeout_s)
        if ordered is not None:
            model, back = ordered
            here = came_up.get(model)
            self.turnover.went_back(model, back, here)
            if here is None or here.digest != back.digest:
                self._give_up_way_back(error)
                wanted = dict(models)
        if error is not None:
            whole = {name: slot for name, slot in wanted.items() if self._slots.whole(slot.digest, slot.variant)}
            self._serving.start_later(whole)
        for model, here in came_up.items():
            slot = models.get(model)
            if slot is not None and here.digest != slot.digest and self._slots.is_closed(slot.digest, slot.variant):
                self.turnover.replace_later(model, slot)
        return error

    def _give_up_way_back(self, error: AgentError | None) -> None:
        why = f"{error.code}: {error.detail[:500]}" if error is not None else "what was before it does not start"
        given_up = lifecycle.given_up(self.update, why)
        try:
            self._store.put("update", given_up)
        except Degraded as found:
            # The next start tries that way once more.
            log.error("end of a way back not stored", extra=kv(code=found.code, detail=found.detail))
            return
        self.update = given_up
        self._telling.record(given_up)

    def order_revert(self, model: ids.ModelName) -> Slot:
        """A person wants the previous bundle back; what is under way makes way first. Returns the slot that comes back.

        Raises:
            Rejected: ``no_previous``, ``busy``, or ``below_floor`` for what ran before and was outdated by the approvers since.
            Degraded: it could not be stored.
        """
        pointers = self._slots.pointers(model)
        on_trial = self.update.state == "trial" and self.update.model == model
        owed = self.returning.owed
        if self.update.state == "revert" or (owed is not None and owed.model != model):
            going_back = self.update.model if owed is None else owed.model
            raise Rejected("busy", f"{going_back} is on its way back", advice="try again later")
        # What is confirmed, and not in the pointer file yet, has before it what the pointer file still calls confirmed.
        confirming = not self.at_rest and self.update.state in lifecycle.CONFIRMED and self.update.model == model
        stale = on_trial or (confirming and pointers.confirmed != pointers.active)
        back, going = (pointers.confirmed, pointers.active) if stale else (pointers.previous, pointers.confirmed)
        if back is None or going is None or not self._slots.may_serve(model, back):
            raise Rejected("no_previous", f"there is no bundle of {model} to go back to")
        floor = str(self._store.get("floors", {}).get(model, ""))
        if not on_trial and floor and ids.version_key(back.version) < ids.version_key(floor):
            raise Rejected(
                "below_floor", f"{model} {back.version}, which ran before, is below the signed floor {floor}"
            )
        ordered = e.RevertOrdered(model=model, digest=going.digest, version=going.version, variant=going.variant)
        if on_trial or self.at_rest:
            self._order(ordered)
        else:
            self.returning.owe(ordered)
            self._go_back_first()
        return back

    def cancel(self, who: str, model: str = "") -> tuple[Update, ...]:
        """A person ends the update under way, or else what waits for its next try or turn; it is not tried again before a pardon.

        Args:
            who: in words.
            model: whose, of several; empty for any.

        Returns:
            The updates as they stand then; more than one where several models wait.

        Raises:
            Rejected: ``nothing_to_cancel``.
            Degraded: it could not be stored.
        """
        update = self.update
        if not update.resting and model in ("", update.model):
            if update.state == "revert" and update.failed_in not in lifecycle.RESTING:
                # It goes home anyway, and might have come again.
                self.failures.hold(update.digest, "cancelled")
            self._order(e.Cancelled(detail=f"cancelled by {who}"))
            return (self.update,)
        ended = (update, *self._endings.beside(update.model))
        ended = tuple(one for one in ended if one.resting and one.code not in ("", "cancelled"))
        parked, wait_s = self.turnover.parked, self.failures.wait_s
        waits = [o for o in ended if model in ("", o.model) and (wait_s(o.digest) > 0 or o.digest == parked)]
        if not waits:
            of_it = f" of {model}" if model else ""
            raise Rejected("nothing_to_cancel", f"no update{of_it} is under way, and none waits for its next try")
        how = {"code": "cancelled", "detail": f"cancelled by {who}", "at_boot": False, "since": self._clock.instant()}
        cancelled = tuple(msgspec.structs.replace(one, **how) for one in waits)
        own = next((one for one in cancelled if one.model == update.model), update)
        with self._store.transaction():
            for one in cancelled:
                self.failures.hold(one.digest, "cancelled")
                self._endings.note(one)
            if own != update:
                self._store.put("update", own)
        self.update = own
        for one in cancelled:
            if one.model == own.model:
                self._telling.record(one)
            else:
                self._telling.beside(one)
        return cancelled

    def pardon(self) -> int:
        """A person clears all failures, those of the attempt under way too. Returns how many bundles had some."""
        with self._store.transaction():
            cleared = self.failures.pardon()
            update = msgspec.structs.replace(self.update, moves=0)
            if update != self.update:
                self._store.put("update", update)
        self.update = update
        return cleared

    def activate(self, *, despite_locks: bool) -> tuple[Update, str]:
        """A person wants the staged update to begin now, whatever the hour.

        Returns:
            The update, and what holds it all the same: locks, unless ``despite_locks``.

        Raises:
            Rejected: ``nothing_to_activate``.
        """
        update = self.update
        if update.state != "ready":
            raise Rejected("nothing_to_activate", "no update lies ready and is held back")
        why_held = self._beginning.order(despite_locks=despite_locks)
        self._look_at_holds()
        return update, why_held

    def held_back(self, model: str, digest: str, version: str) -> str:
        """What would hold an update to this bundle back once it is here; empty for nothing."""
        return self._holding.why(Update(model=model, digest=digest, version=version))

    def why(self) -> why.Facts:
        """What is known here of the update, for ``core.why``."""
        when_s = None if self.update.resting else self._deadline.when_s()
        left_s = None if when_s is None else when_s - asyncio.get_running_loop().time()
        pause = self._beginning.pause()
        # What is stored held it last: while it pauses, nothing does.
        update = self.update if pause is None else msgspec.structs.replace(self.update, detail=pause)
        told = self._telling.facts(update, left_s=left_s, trial=self._watching.so_far(self.rules))
        return dataclasses.replace(told, unwritten=self._slots.unwritten)
