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
from skerry_agent.core import admission, backoff, lifecycle, trial
from skerry_agent.core import effects as e
from skerry_agent.core.effects import Effect
from skerry_agent.core.lifecycle import Update
from skerry_agent.errand import Errands
from skerry_agent.errors import AgentError, Degraded, Rejected
from skerry_agent.logs import kv
from skerry_agent.serving import Generation, Serving
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Store

log = logging.getLogger(__name__)

_FETCH_S = 3600.0
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
        runtimes: dict[str, str],
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
        self._errand_input = errand_input
        self._on_change = on_change
        self._on_rest = on_rest
        self._on_fault = on_fault
        self._draw = draw
        self._owed: deque[e.Event] = deque()
        self._task: asyncio.Task[None] | None = None
        self._others: set[asyncio.Task[None]] = set()
        self._deadline: asyncio.TimerHandle | None = None
        self._manifest: m.Manifest | None = None
        self._text = ""
        self._new: Generation | None = None
        self._watching = False
        self.rules = TrialRules()
        self.update = msgspec.convert(store.get("update", {}), Update)

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
                limit_s = lifecycle.DEADLINES_S["prove"]
                self._new = await self._serving.start(self._next_models(), timeout_s=limit_s)
                return e.Proved()
            case Effect.HAND_OVER:
                return await self._hand_over()
            case Effect.WATCH_TRIAL:
                self._watching = True
                self.judge()
            case Effect.CONFIRM:
                self._confirm()
            case Effect.DISCARD:
                self._discard()
                return e.Reverted()
            case Effect.STOP_NEW:
                await self._stop_new()
                return e.Reverted()
            case Effect.RESTORE:
                await self._restore()
                return e.Reverted()
        return None

    def _record(self) -> None:
        update = self.update
        refused = update.code if update.state in ("revert", "idle") else ""
        known = self._store.get("recorded", {}).get(update.digest)
        # A bundle that is refused again and again for the same reason is worth one line, not one per try.
        quiet = update.attempt > 3 and (update.state == "fetch" or refused == known)
        if refused:
            self._store.put("recorded", {update.digest: refused})
        data: dict[str, Any] = {
            "model": update.model, "digest": update.digest, "version": update.version, "variant": update.variant,
            "state": update.state, "attempt": update.attempt, "arm": update.arm, "rollout": update.rollout,
            "stage": update.stage, "detail": update.detail, "failed_in": update.failed_in,
        }  # fmt: skip
        self._on_change("" if quiet else update.code, {} if quiet else data)

    def _penalise(self) -> None:
        failures = self._store.get("failures", {})
        mine = failures.setdefault(self.update.digest, {})
        mine[self.update.penalty] = mine.get(self.update.penalty, 0) + 1
        waits = self._store.get("waits", {})
        tries = sum(mine.values())
        delay_s = backoff.delay_s("update", tries, self._draw(), scale=self._config.timing.backoff_scale)
        waits[self.update.digest] = {
            "code": self.update.code, "boot_id": self._clock.boot_id, "until_s": self._clock.boot_s() + delay_s,
        }  # fmt: skip
        with self._store.transaction():
            self._store.put("failures", failures)
            self._store.put("waits", waits)

    async def _fetch_manifest(self) -> e.Event:
        update = self.update
        pointers = self._slots.pointers(update.model)
        # What this device confirmed itself needs no catalog to come back to, only to be above the floor.
        own = any(slot is not None and slot.digest == update.digest for slot in (pointers.confirmed, pointers.previous))
        manifest = self._slots.manifest(update.digest) if own else None
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
        digest = self.update.digest
        answer = admission.admit(
            self._manifest,
            facts.device(self._config, self._runtimes),
            admission.Memory(
                floor=str(self._store.get("floors", {}).get(self.update.model, "")),
                failures=dict(self._store.get("failures", {}).get(digest, {})),
                present_bytes=self._slots.present_bytes(digest, self._manifest.files()),
            ),
        )
        if isinstance(answer, admission.Refuse):
            raise Rejected(answer.code, answer.detail)
        return e.Admitted(variant=answer.variant)

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
        running = self._serving.models()
        found: dict[str, Slot] = {}
        for model in self._slots.models():
            slot = self._slots.pointers(model).confirmed
            if slot is None:
                # Its first bundle was on trial, or is: there is nothing to go back to.
                continue
            if self._slots.whole(slot.digest, slot.variant):
                found[model] = slot
            elif model in running and running[model].digest == slot.digest:
                found[model] = running[model]
        return found

    async def _hand_over(self) -> e.Event:
        new = self._new
        if new is None or not new.worker.alive:
            raise Rejected("trial_crashed", "the worker died between its proof and the hand-over")
        self._slots.activate(self.update.model, self._slot("trial"))
        await self._serving.switch(new)
        self._new = None
        return e.HandedOver()

    def judge(self) -> None:
        """Looks at the trial's counts; called with every health report and at the end of its time."""
        generation = self._serving.current
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
        verdict = trial.judge_trial(rules, self._serving.counts(model), self._serving.before.get(model), elapsed_s)
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
        """The serving generation died. True when it was on trial: the update goes back, and brings up what ran before."""
        slot = generation.models.get(self.update.model)
        if slot is None or slot.digest != self.update.digest or self.update.state not in ("trial", "revert"):
            return False
        self.feed(e.Failed(code="trial_crashed", detail=f"the worker died: {how}"))
        # Without room to store the way back, the trial's bundle is what can answer.
        return not self._owed

    def _confirm(self) -> None:
        model = self.update.model
        now = self._slots.pointers(model).confirmed
        # After a restart the pointer file may know a later key of the same bundle: it stays.
        if now is None or now.digest != self.update.digest:
            self._slots.confirm(model, self._slot(self.update.state))
        generation = self._serving.current
        if generation is not None and model in generation.models:
            slot = generation.models[model]
            generation.models[model] = msgspec.structs.replace(slot, standing=self.update.state)
        failures, waits = self._store.get("failures", {}), self._store.get("waits", {})
        with self._store.transaction():
            if failures.pop(self.update.digest, None) is not None:
                self._store.put("failures", failures)
            if waits.pop(self.update.digest, None) is not None:
                self._store.put("waits", waits)
        self._slots.collect({self.update.digest})

    def _discard(self) -> None:
        # What was fetched right stays for the next try; what was wrong must not be taken up again.
        if self.update.code in ("hash_mismatch", "size_mismatch", "malformed_manifest"):
            self._slots.discard(self.update.digest)

    async def _stop_new(self) -> None:
        new, self._new = self._new, None
        if new is not None:
            await self._serving.retire(new)

    def finish(self) -> None:
        """Before the first start: carries out what power cut off between the stored state and the pointer file."""
        update = self.update
        try:
            self.finish_step_back()
            confirmed = self._slots.pointers(update.model).confirmed
            unsaid = confirmed is None or confirmed.digest != update.digest
            if update.state in _CONFIRMED and unsaid and self._slots.whole(update.digest, update.variant):
                self._slots.confirm(update.model, self._slot(update.state))
        except OSError as error:
            log.error("pointer file not written", extra=kv(model=update.model, detail=str(error)))

    def finish_step_back(self) -> None:
        """A person's revert: the pointer file follows. Once per order, also when a restart came in between."""
        update = self.update
        confirmed = self._slots.pointers(update.model).confirmed
        ordered = update.code == "reverted_by_operator" and update.failed_in in lifecycle.RESTING
        if ordered and confirmed is not None and confirmed.digest == update.digest:
            self._slots.step_back(update.model)

    async def _restore(self) -> None:
        await self._stop_new()
        self.finish_step_back()
        self._slots.revert_active(self.update.model)
        wanted = self._confirmed_models()
        failures = 0
        while wanted:
            running = self._serving.current
            if running is not None and running.worker.alive and _same(running.models, wanted):
                return
            try:
                new = await self._serving.start(wanted, timeout_s=lifecycle.DEADLINES_S["revert"])
                await self._serving.switch(new)
                return
            except AgentError as error:
                failures += 1
                log.error("what ran before does not start", extra=kv(code=error.code, detail=error.detail))
                wait_s = backoff.delay_s("worker", failures, self._draw(), scale=self._config.timing.backoff_scale)
                await asyncio.sleep(wait_s)
        await self._serving.clear()

    # --- memory ------------------------------------------------------------------------------------------------------

    def refused(self) -> tuple[set[str], set[str]]:
        """Digests not to try now: (for good or until a person clears it, until their wait is over)."""
        failures, waits = self._store.get("failures", {}), self._store.get("waits", {})
        spent = {digest for digest, mine in failures.items() if admission.exhausted(mine) is not None}
        held: set[str] = set()
        waiting: set[str] = set()
        for digest, wait in waits.items():
            if digest in spent or wait["boot_id"] != self._clock.boot_id or wait["until_s"] <= self._clock.boot_s():
                continue
            (held if wait["code"] in _OF_THIS_DEVICE else waiting).add(digest)
        return spent | held, waiting

    def next_try_s(self) -> float | None:
        """Seconds until the earliest wait of a bundle is over; None without any."""
        now = self._clock.boot_s()
        ends = [
            w["until_s"] - now for w in self._store.get("waits", {}).values() if w["boot_id"] == self._clock.boot_id
        ]
        ahead = [end for end in ends if end > 0]
        return min(ahead) if ahead else None

    def attempt_of(self, digest: str) -> int:
        """The number of the next try of a bundle, from 1."""
        return int(sum(self._store.get("failures", {}).get(digest, {}).values())) + 1

    def pardon(self) -> int:
        """A person clears all failures. Returns how many bundles had some."""
        cleared = len(self._store.get("failures", {}))
        with self._store.transaction():
            for key in ("failures", "waits", "recorded"):
                self._store.delete(key)
        return cleared

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


_OF_THIS_DEVICE = frozenset(
    {"agent_too_old", "below_floor", "no_variant", "not_enough_disk", "not_enough_memory", "runtime_missing"}
)
"""Refusals that speak of this device: while they hold, it takes what the group document offers instead."""


def _same(running: dict[str, Slot], wanted: dict[str, Slot]) -> bool:
    return {name: slot.digest for name, slot in running.items()} == {name: slot.digest for name, slot in wanted.items()}
