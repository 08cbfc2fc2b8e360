"""Carries out the update lifecycle: feeds ``core.lifecycle``, stores each state, then does what the table says.

One update at a time. ``feed`` is called in the loop; effects that take time run as one task whose outcome is fed again. A
change of state from outside (withdrawn, crashed, deadline) cancels that task first.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from skerry_contract import ids
from skerry_contract import manifest as m
from skerry_contract.errors import ContractError

from skerry_agent import facts
from skerry_agent.clock import Clock
from skerry_agent.config import Config, Identity
from skerry_agent.core import admission, backoff, culprits, lifecycle, liveness, trial
from skerry_agent.core import effects as e
from skerry_agent.core.effects import Effect
from skerry_agent.core.lifecycle import Update
from skerry_agent.errand import Errands
from skerry_agent.errors import AgentError, Degraded, Rejected
from skerry_agent.failures import Failures
from skerry_agent.logs import kv
from skerry_agent.restoring import Restoring
from skerry_agent.runtimes import Runtimes
from skerry_agent.serving import Generation, Launch, Serving
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Store

log = logging.getLogger(__name__)

_FETCH_S = 3600.0
_RESTORE_TRIES = 3
"""How often what ran before is started before the update gives up: a busy moment passes, a broken runtime stays."""
_NOTES = frozenset({Effect.RECORD, Effect.PENALISE})
_CONFIRMED = frozenset({"confirmed", "confirmed_on_golden"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRules:
    """From the group's settings, or the configuration. ``max_kib_s``: of downloads, 0 for any."""

    duration_s: float = 60.0
    inferences: int = 100
    max_kib_s: int = 0


class Updating:
    """See the module.

    Args:
        errand_input: fields that every courier gets.
        on_change: the update or what runs changed: report it.
        on_rest: the update came to rest: look for the next.
        on_fault: the store cannot be used any more.

    Attributes:
        failures: what is remembered of bundles that failed.
        update: as it is stored.
        rules: of trials and downloads.
        crashes: of serving workers, those that still count.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        store: Store,
        slots: Slots,
        serving: Serving,
        errands: Errands,
        clock: Clock,
        runtimes: Runtimes,
        restoring: Restoring,
        *,
        errand_input: Callable[[], dict[str, Any]],
        on_change: Callable[[str, dict[str, Any]], None],
        on_rest: Callable[[], None],
        on_fault: Callable[[Degraded], None],
        draw: Callable[[], float],
    ) -> None:
        self._config = config
        self._identity = identity
        self._store = store
        self._slots = slots
        self._serving = serving
        self._errands = errands
        self._clock = clock
        self._runtimes = runtimes
        self._restoring = restoring
        self._errand_input = errand_input
        self._on_change = on_change
        self._on_rest = on_rest
        self._on_fault = on_fault
        self._draw = draw
        self._owed: deque[e.Event] = deque()
        self._task: asyncio.Task[None] | None = None
        self._others: set[asyncio.Task[None]] = set()
        self._deadline: asyncio.TimerHandle | None = None
        self.failures = Failures(store, clock, draw, config.timing.backoff_scale)
        self._manifest: m.Manifest | None = None
        self._text = ""
        self._new: Launch | None = None
        self._watching = False
        self.crashes: list[culprits.Crash] = []
        self.rules = TrialRules()
        self.update = msgspec.convert(store.get("update", {}), Update)

    def configure(self, config: Config) -> None:
        """Goes on with another configuration."""
        self._config = config

    # --- the table ---------------------------------------------------------------------------------------------------

    def feed(self, event: e.Event) -> None:
        """Takes an event: stores the state that follows, then starts the effects. Without room to store, it waits its turn."""
        self._owed.append(event)
        error = self._catch_up()
        if error is not None:
            log.error("update not stored", extra=kv(code=error.code, detail=error.detail, advice=error.advice))

    def tick(self) -> None:
        """Takes the events that could not be stored when they came; looks at the trial's time."""
        self._catch_up()
        self.judge()

    def _catch_up(self) -> Degraded | None:
        while self._owed:
            event = self._owed.popleft()
            try:
                self._take(event)
            except Degraded as error:
                self._owed.appendleft(event)
                if error.code == "store_damaged":
                    self._on_fault(error)
                return error
        return None

    def _take(self, event: e.Event) -> None:
        before = self.update
        after, effects = lifecycle.step(before, event, self._clock.instant())
        if after == before and not effects:
            return
        self._store.put("update", after)
        self.update = after
        moved = after.state != before.state or isinstance(event, e.Deadline)
        if moved:
            log.info(
                "update",
                extra=kv(
                    model=after.model, version=after.version, state=after.state, code=after.code, detail=after.detail
                ),
            )
            self._watching = False
            self._arm()
            current = asyncio.current_task()
            if self._task is not None and self._task is not current:
                self._task.cancel()
            self._task = asyncio.get_running_loop().create_task(self._carry_out(effects), name=f"update-{after.state}")
        elif effects:
            task = asyncio.get_running_loop().create_task(self._carry_out(effects))
            self._others.add(task)
            task.add_done_callback(self._others.discard)

    async def _carry_out(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            try:
                event = await self._do(effect)
            except AgentError as error:
                if effect in _NOTES:
                    # What is only noted must not hold back what brings the device home.
                    log.error("effect not noted", extra=kv(effect=effect.name, code=error.code, detail=error.detail))
                    continue
                event = e.Failed(code=error.code, detail=error.detail[:500])
            except ContractError as error:
                event = e.Failed(code="malformed_manifest", detail=str(error)[:500])
            except OSError as error:
                event = e.Failed(code="not_enough_disk", detail=str(error)[:500])
            except Exception:
                # A bug. The update's deadline or the next start takes it from here; it must not end in silence.
                log.exception("update step failed", extra=kv(effect=effect.name.lower(), state=self.update.state))
                raise
            if event is not None:
                self.feed(event)
                return
        if self.update.resting:
            self._on_rest()

    def _arm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        limit = lifecycle.DEADLINES_S.get(self.update.state)
        if limit is not None:
            self._deadline = asyncio.get_running_loop().call_later(limit, self.feed, e.Deadline())

    async def stop(self) -> None:
        """Leaves the update where it is: the next start finds its stored state."""
        if self._deadline is not None:
            self._deadline.cancel()
        tasks = [task for task in (self._task, *self._others) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- the effects -------------------------------------------------------------------------------------------------

    async def _do(self, effect: Effect) -> e.Event | None:
        match effect:
            case Effect.RECORD:
                self._record()
            case Effect.PENALISE:
                self._penalise()
            case Effect.FETCH_MANIFEST:
                return await self._fetch_manifest()
            case Effect.ADMIT:
                return self._admit()
            case Effect.FETCH_FILES:
                return await self._fetch_files()
            case Effect.VERIFY_FILES:
                await asyncio.to_thread(self._slots.verify, self.update.digest, self._files())
                return e.Verified()
            case Effect.STAGE_SLOT:
                await asyncio.to_thread(self._slots.stage, self.update.digest)
                return e.Staged()
            case Effect.START_WORKER:
                return await self._prove()
            case Effect.HAND_OVER:
                return await self._hand_over()
            case Effect.WATCH_TRIAL:
                self._watching = True
                self.judge()
            case Effect.CONFIRM:
                await self._confirm()
            case Effect.DISCARD:
                self._discard()
                return e.Reverted()
            case Effect.STOP_NEW:
                await self._stop_new()
                return e.Reverted()
            case Effect.RESTORE:
                return await self._restore()
        return None

    def _record(self) -> None:
        update = self.update
        quiet = self.failures.was_said(update)
        data: dict[str, Any] = {
            "model": update.model, "digest": update.digest, "version": update.version, "variant": update.variant,
            "state": update.state, "attempt": update.attempt, "arm": update.arm, "rollout": update.rollout,
            "stage": update.stage, "detail": update.detail, "failed_in": update.failed_in,
        }  # fmt: skip
        self._on_change("" if quiet else update.code, {} if quiet else data)

    def _penalise(self) -> None:
        if self._has_another_variant():
            # It is taken at once, without a wait.
            return
        self.failures.penalise(self.update)

    async def _fetch_manifest(self) -> e.Event:
        update = self.update
        pointers = self._slots.pointers(update.model)
        # What this device confirmed itself needs no catalog to come back to, only to be above the floor.
        own = any(slot is not None and slot.digest == update.digest for slot in (pointers.confirmed, pointers.previous))
        manifest = self._slots.manifest(update.digest) if own else None
        if manifest is not None:
            self._text = (self._slots.path(update.digest) / m.MANIFEST_FILE).read_text()
        if manifest is None:
            answer = await self._errands.run(
                "manifest",
                {**self._errand_input(), "model": update.model, "version": update.version, "digest": update.digest},
                timeout_s=self._config.timing.courier_s,
            )
            self._text = str(answer.get("manifest", ""))
            data = self._text.encode()
            if m.digest(data) != update.digest:
                raise Rejected("hash_mismatch", f"manifest: wanted {update.digest}, got {m.digest(data)}")
            manifest = m.parse(data)
        if (manifest.model, manifest.version) != (update.model, update.version):
            raise Rejected(
                "malformed_manifest",
                f"wanted {update.model} {update.version}, the manifest says {manifest.model} {manifest.version}",
            )
        self._manifest = manifest
        return e.ManifestFetched()

    def _admit(self) -> e.Event:
        assert self._manifest is not None
        answer = self.admission(self._manifest, self.update.digest)
        if isinstance(answer, admission.Refuse):
            raise Rejected(answer.code, answer.detail)
        return e.Admitted(variant=answer.variant)

    def admission(self, manifest: m.Manifest, digest: str) -> admission.Admit | admission.Refuse:
        """May the bundle run here, now? As which variant?"""
        return admission.admit(
            manifest,
            facts.device(self._config, self._runtimes.usable, self._runtimes.broken),
            admission.Memory(
                floor=str(self._store.get("floors", {}).get(manifest.model, "")),
                failures=self.failures.of(digest),
                present_bytes=self._slots.present_bytes(digest, manifest.files()),
            ),
        )

    def _files(self) -> tuple[m.File, ...]:
        assert self._manifest is not None
        return self._manifest.variant(self.update.variant).files

    async def _fetch_files(self) -> e.Event:
        digest = self.update.digest
        if not self._slots.whole(digest, self.update.variant):
            await self._errands.run(
                "fetch",
                {
                    **self._errand_input(),
                    "digest": digest,
                    "manifest": self._text,
                    "files": [{"path": f.path, "sha256": f.sha256, "size": f.size} for f in self._files()],
                    "max_kib_s": self.rules.max_kib_s,
                },
                timeout_s=_FETCH_S,
            )
        return e.FilesFetched()

    def _slot(self, standing: Any) -> Slot:
        update = self.update
        return Slot(
            digest=update.digest, version=update.version, variant=update.variant, standing=standing,
            arm=update.arm, rollout=update.rollout, stage=update.stage,
        )  # fmt: skip

    def _next_models(self) -> dict[str, Slot]:
        return {**self._confirmed_models(), self.update.model: self._slot("trial")}

    def _confirmed_models(self) -> dict[str, Slot]:
        """What should serve beside or instead of the update: of its own model what is confirmed, of the others what runs."""
        running = self._serving.models()
        found: dict[str, Slot] = {}
        for model in self._slots.models():
            confirmed = self._slots.pointers(model).confirmed
            if model != self.update.model and running:
                if model in running and (self._serving.answering(model) or not self._lost(running[model])):
                    found[model] = running[model]
                continue
            slot = self._slots.runnable(model)
            if slot is not None and (model == self.update.model or not self._lost(slot)):
                found[model] = slot
            elif confirmed is not None and model in running and running[model].digest == confirmed.digest:
                # Damaged on disk, and still answering.
                found[model] = running[model]
        return found

    async def _prove(self) -> e.Event:
        self._new = await self._serving.start(self._next_models(), timeout_s=lifecycle.DEADLINES_S["prove"])
        return e.Proved()

    def _lost(self, slot: Slot) -> bool:
        """Whether a worker with this slot could not be started, for want of its runtime: it must keep no other model down."""
        variant = self._slots.variant(slot)
        return variant is not None and self._runtimes.lacks(variant)

    def _has_another_variant(self) -> bool:
        """Whether the variant failed for a runtime that does not work here, and another of the bundle may run."""
        if self.update.failed_in != "prove" or self._manifest is None:
            return False
        if not self._runtimes.lacks(self._manifest.variant(self.update.variant)):
            return False
        return isinstance(self.admission(self._manifest, self.update.digest), admission.Admit)

    async def _hand_over(self) -> e.Event:
        new = self._new
        if new is None or not new.alive:
            raise Rejected("trial_crashed", "the worker died between its proof and the hand-over")
        self._slots.activate(self.update.model, self._slot("trial"))
        # From here on it serves: whoever goes back in the middle of the drain must not end it as one that never listened.
        self._new = None
        await self._serving.switch(new)
        return e.HandedOver()

    def judge(self) -> None:
        """Looks at the trial's counts; called with every health report and at the end of its time."""
        generation = self._serving.generation_of(self.update.model)
        if (
            self._owed
            or not self._watching
            or self.update.state != "trial"
            or generation is None
            or generation.listening_s is None
        ):
            return
        elapsed_s = self._clock.boot_s() - generation.listening_s
        manifest = self._manifest or self._slots.manifest(self.update.digest)
        rules = trial.Trial(
            inferences=self.rules.inferences,
            duration_s=self.rules.duration_s,
            limit_ms=manifest.slo.latency_p95_ms if manifest is not None else None,
        )
        model = self.update.model
        verdict = trial.judge_trial(
            rules, self._serving.counts(model), self._serving.before.get(model), elapsed_s,
            current=self._serving.current_counts(model),
        )  # fmt: skip
        match verdict.answer:
            case "keep":
                self.feed(e.TrialKept(detail=verdict.detail))
            case "quiet":
                self.feed(e.TrialQuiet(detail=verdict.detail))
            case "revert":
                self.feed(e.Failed(code=verdict.code, detail=verdict.detail))
            case _:
                pass

    def crashed(self, generation: Generation, how: str) -> bool:
        """The serving generation died. True when it was on trial: the update goes back, and brings up what ran before.

        A confirmed bundle that brings its worker down again and again goes back too, when there is one before it; else it gets a
        worker of its own. Of several in one worker the suspects are those that were in work.
        """
        slot = generation.models.get(self.update.model)
        if slot is not None and slot.digest == self.update.digest and self.update.state in ("trial", "revert"):
            self.feed(e.Failed(code="trial_crashed", detail=f"the worker died: {how}"))
            # Without room to store the way back, the trial's bundle is what can answer.
            return not self._owed
        return self._looped(generation)

    def unruly(self, generation: Generation, found: liveness.Unruly) -> bool:
        """The serving generation leaks or spins. True when it was on trial, or did so too often: the update goes back.

        Otherwise another generation of the same models takes over from it.
        """
        slot = generation.models.get(self.update.model)
        if slot is not None and slot.digest == self.update.digest and self.update.state == "trial":
            self.feed(e.Failed(code=found.code, detail=found.detail))
            return not self._owed
        return self._looped(generation)

    def _looped(self, generation: Generation) -> bool:
        now_s = self._clock.boot_s()
        suspects = tuple((name, generation.models[name].digest) for name in generation.suspects)
        self.crashes = [*culprits.remembered(self.crashes, now_s), culprits.Crash(at_s=now_s, suspects=suspects)]
        found = culprits.culprit(self.crashes, now_s)
        slot = generation.models.get(found[0]) if found is not None else None
        if found is None or slot is None or not self.update.resting:
            return False
        model, digest = found
        pointers = self._slots.pointers(model)
        back = pointers.previous
        confirmed = pointers.confirmed is not None and pointers.confirmed.digest == digest == slot.digest
        if not confirmed or back is None or not self._slots.whole(back.digest, back.variant):
            if len(generation.models) > 1:
                # There is nothing to go back to; at least it takes no other model along.
                self._forget(digest)
                self._serving.set_apart(model, slot)
            return False
        self._forget(digest)
        self.feed(e.CrashLooped(model=model, digest=digest, version=slot.version, variant=slot.variant))
        return not self._owed

    def _forget(self, digest: str) -> None:
        """Nothing counts against it any more: it was dealt with."""
        kept = ((crash.at_s, tuple(s for s in crash.suspects if s[1] != digest)) for crash in self.crashes)
        self.crashes = [culprits.Crash(at_s=at_s, suspects=suspects) for at_s, suspects in kept]

    def finish(self) -> None:
        """Before the first start: carries out what power cut off between the stored state and the pointer file."""
        try:
            self.finish_confirm()
        except OSError as error:
            log.error("pointer file not written", extra=kv(model=self.update.model, detail=str(error)))

    def finish_confirm(self) -> None:
        """The pointer file follows a stored ``confirmed``; once per update, also when a restart came in between."""
        update = self.update
        if update.state not in _CONFIRMED:
            return
        now = self._slots.pointers(update.model).confirmed
        # After a restart the pointer file may know a later key of the same bundle: it stays.
        same = now is not None and (now.digest, now.variant) == (update.digest, update.variant)
        if not same and self._slots.whole(update.digest, update.variant):
            self._slots.confirm(update.model, self._slot(update.state))

    async def _confirm(self) -> None:
        model = self.update.model
        failures = 0
        while True:
            try:
                self.finish_confirm()
                break
            except OSError as error:
                # The bundle serves and is confirmed; only a boot would not know it yet.
                failures += 1
                log.error("pointer file not written", extra=kv(detail=str(error), failures=failures))
                wait_s = backoff.delay_s("worker", failures, self._draw(), scale=self._config.timing.backoff_scale)
                await asyncio.sleep(wait_s)
        generation = self._serving.generation_of(model)
        if generation is not None:
            slot = generation.models[model]
            generation.models[model] = msgspec.structs.replace(slot, standing=self.update.state)
        self.failures.forgive(self.update.digest)
        self._slots.collect({self.update.digest})

    def _discard(self) -> None:
        # What was fetched right stays for the next try; what was wrong must not be taken up again.
        if self.update.code in ("hash_mismatch", "size_mismatch", "malformed_manifest"):
            if self._slots.discard(self.update.digest):
                # It was this device's own copy that rotted: nothing is said about the bundle.
                self.failures.forgive(self.update.digest)

    async def _stop_new(self) -> None:
        new, self._new = self._new, None
        if new is not None:
            await self._serving.retire(new)

    def ordered_back(self) -> tuple[str, Slot] | None:
        """The model and the bundle that a way back leads to which has not been gone to its end; None without any."""
        update = self.update
        pointers = self._slots.pointers(update.model)
        ordered = update.code in lifecycle.STEPS_BACK and update.failed_in in lifecycle.RESTING
        if not ordered or pointers.confirmed is None or pointers.confirmed.digest != update.digest:
            return None
        back = pointers.previous
        return None if back is None else (update.model, msgspec.structs.replace(back, arm="none", rollout="", stage=0))

    def went_back(self, model: str, wanted: Slot, came_up: Slot | None) -> None:
        """The end of a way back: the pointer file follows what proved itself, or the bundle that had to go is taken up again."""
        if came_up is not None and came_up.digest == wanted.digest:
            self._slots.step_back(model)
        else:
            self.failures.forgive(self.update.digest)

    async def _restore(self) -> e.Event:
        await self._stop_new()
        ordered = self.ordered_back()
        model = self.update.model
        if ordered is None:
            self._slots.revert_active(model)
        wanted = self._confirmed_models()
        if ordered is not None:
            wanted[model] = ordered[1]
        if not wanted:
            await self._serving.clear()
            return e.Reverted()
        if not self._serving.runs(wanted):
            error = await self._bring_back(wanted, model if ordered is not None else "")
            if error is not None:
                if ordered is not None:
                    self.went_back(*ordered, None)
                return e.Failed(code=error.code, detail=error.detail[:500])
        if ordered is not None:
            self.went_back(*ordered, ordered[1])
        return e.Reverted()

    async def _bring_back(self, wanted: dict[str, Slot], ordered: str) -> AgentError | None:
        for failures in range(1, _RESTORE_TRIES + 1):
            try:
                limit_s = lifecycle.DEADLINES_S["revert"]
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
        # What nothing serves: go on trying what is whole, beside whatever the plan fetches.
        self._serving.start_later({name: s for name, s in wanted.items() if self._slots.whole(s.digest, s.variant)})
        return last

    def order_revert(self, model: ids.ModelName) -> Slot:
        """A person wants the previous bundle back. Returns the slot that comes back.

        Raises:
            Rejected: ``no_previous`` or ``busy``.
        """
        pointers = self._slots.pointers(model)
        if self.update.state == "trial" and self.update.model == model:
            back = pointers.confirmed
        elif not self.update.resting:
            raise Rejected(
                "busy", f"an update of {self.update.model} is in {self.update.state}", advice="try again later"
            )
        else:
            back = pointers.previous
        going = pointers.active or pointers.confirmed
        if back is None or going is None or not self._slots.whole(back.digest, back.variant):
            raise Rejected("no_previous", f"there is no bundle of {model} to go back to")
        self.feed(e.RevertOrdered(model=model, digest=going.digest, version=going.version, variant=going.variant))
        return back
