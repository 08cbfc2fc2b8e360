"""Carries out the update lifecycle: feeds ``core.lifecycle``, stores each state, then does what the table says.

The effects themselves are ``fetching``'s up to a slot and ``turnover``'s from a worker on. One update at a time. ``feed`` is
called in the loop; effects that take time run as one task whose outcome is fed again. A change of state from outside
(withdrawn, crashed, deadline) cancels that task first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from skerry_contract import ids
from skerry_contract.errors import ContractError

from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.core import backoff, culprits, lifecycle, liveness, trial, why
from skerry_agent.core import effects as e
from skerry_agent.core.effects import Effect
from skerry_agent.core.lifecycle import Update
from skerry_agent.downloads import Downloads
from skerry_agent.endings import Endings
from skerry_agent.errand import Errands
from skerry_agent.errors import AgentError, Degraded, Rejected
from skerry_agent.failures import Failures
from skerry_agent.fetching import Fetching
from skerry_agent.holding import Holding
from skerry_agent.logs import kv
from skerry_agent.network import Networks
from skerry_agent.progress import FetchProgress
from skerry_agent.readiness import Readiness
from skerry_agent.restoring import Restoring
from skerry_agent.returning import Returning
from skerry_agent.runtimes import Runtimes
from skerry_agent.serving import Generation, Serving
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Store
from skerry_agent.turnover import Turnover

log = logging.getLogger(__name__)

_LAST_LOOK_S = 5.0
_WARM_S, _WARM_POLL_S = 30.0, 0.1
"""So long a worker that proved itself is kept for what came to hold it meanwhile, a short lock say."""


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
        on_progress: it is time to report how far a download is.
        on_rest: the update came to rest: look for the next.
        on_fault: the store cannot be used any more.

    Attributes:
        failures: what is remembered of bundles that failed.
        returning: ways back that go before what is under way.
        fetching, turnover: the effects of the table, up to a slot and from a worker on.
        update: as it is stored.
        rules: of trials and downloads.
        crashes: of serving workers, those that still count.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        slots: Slots,
        serving: Serving,
        errands: Errands,
        clock: Clock,
        runtimes: Runtimes,
        restoring: Restoring,
        holding: Holding,
        networks: Networks,
        *,
        errand_input: Callable[[], dict[str, Any]],
        on_change: Callable[[str, dict[str, Any]], None],
        on_progress: Callable[[], None],
        on_rest: Callable[[], None],
        on_fault: Callable[[Degraded], None],
        draw: Callable[[], float],
    ) -> None:
        self._store = store
        self._slots = slots
        self._serving = serving
        self._clock = clock
        self._holding = holding
        holding.begins = self._begins
        slots.in_use = lambda: {
            slot.digest for found in (serving.trying(), serving.models()) for slot in found.values()
        }
        self._on_change = on_change
        self._on_rest = on_rest
        self._on_fault = on_fault
        self._owed: deque[e.Event] = deque()
        self._task: asyncio.Task[None] | None = None
        self._others: set[asyncio.Task[None]] = set()
        self._deadline: asyncio.TimerHandle | None = None
        self._drain_s = config.timing.drain_s
        self._scale = config.timing.backoff_scale
        self._extended = False
        self._up = False
        self._draw = draw
        self._unsettled, self._settle_s = 0, 0.0
        self._held_in_proof, self._looks_again_s = ("", 0), 0.0
        self.returning = Returning(store, slots)
        self.failures = Failures(store, clock, draw, config.timing.backoff_scale)
        self._readiness = Readiness(store, clock)
        self._endings = Endings(store)
        self._watching = False
        self.crashes: list[culprits.Crash] = []
        self.rules = TrialRules()
        self.update = msgspec.convert(store.get("update", {}), Update)
        self._take_for_said()
        self.fetching = Fetching(
            config, store, slots, errands, runtimes, self.failures, update=lambda: self.update,
            errand_input=errand_input, progress=FetchProgress(clock, on_progress, config.timing.backoff_scale),
            downloads=Downloads(errands, clock, networks, max_kib_s=lambda: self.rules.max_kib_s),
            parked=lambda: self.turnover.parked,
        )  # fmt: skip
        self.turnover = Turnover(
            config, slots, serving, runtimes, restoring, self.failures, update=lambda: self.update, draw=draw
        )

    def configure(self, config: Config) -> None:
        """Goes on with another configuration."""
        self._drain_s = config.timing.drain_s
        self.fetching.configure(config)
        self.turnover.configure(config)

    def apply(self, rules: TrialRules) -> None:
        """Goes by other rules, in a trial that runs already too."""
        before, self.rules = self.rules, rules
        if self.update.state == "trial" and rules.duration_s != before.duration_s:
            # One that is over by the new rules alone has not been silent for that.
            self._arm(at_least_s=lifecycle.TRIAL_OVER_S)

    # --- the table ---------------------------------------------------------------------------------------------------

    def feed(self, event: e.Event) -> None:
        """Takes an event: stores the state that follows, then starts the effects. Without room to store, it waits its turn."""
        self._owed.append(event)
        error = self._catch_up()
        if error is not None:
            log.error("update not stored", extra=kv(code=error.code, detail=error.detail, advice=error.advice))

    def _order(self, event: e.Event) -> None:
        """Takes a person's order now, or not at all.

        Raises:
            Degraded: why it could not be stored; then it is not obeyed later, when nobody expects it any more.
        """
        self._owed.append(event)
        error = self._catch_up()
        if error is not None:
            with contextlib.suppress(ValueError):
                self._owed.remove(event)
            raise error

    def tick(self) -> None:
        """Takes the events that could not be stored when they came; looks at the trial's time."""
        self._up = True
        self._catch_up()
        self._go_back_first()
        self._settle()
        self._holding.tick()
        self._look_at_holds()
        self._readiness.tick(self.update)
        self.judge()
        self.turnover.standby.tick()

    def _settle(self) -> None:
        """A way back that the disk took no note of is noted, by tries that grow rarer; until then nothing new is taken up."""
        if not self._slots.unwritten:
            self._unsettled = 0
            return
        if self._clock.boot_s() < self._settle_s:
            return
        self._unsettled += 1
        self._settle_s = self._clock.boot_s() + backoff.delay_s(
            "worker", self._unsettled, self._draw(), scale=self._scale
        )
        if self._slots.settle() and self.at_rest:
            self._on_rest()

    def _look_at_holds(self) -> None:
        if self.update.state != "ready" or self._owed:
            return
        why_held = self._holding.why(self.update)
        if not why_held:
            if self._held_in_proof[0] != self.update.digest or self._clock.boot_s() >= self._looks_again_s:
                self.feed(e.Opened())
        elif why_held != self.update.detail:
            self.feed(e.Held(detail=why_held))

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
        penalise = Effect.PENALISE in effects and self._counts(after)
        effects = tuple(effect for effect in effects if effect is not Effect.PENALISE)
        with self._store.transaction():
            self._store.put("update", after)
            if penalise:
                # With the state: power that fails behind it must not forget a person's word or a bad bundle's only attempt.
                self.failures.penalise(after)
            self.failures.rested(after)
            if isinstance(event, (e.TrialKept, e.TrialQuiet)) and after.state in lifecycle.CONFIRMED:
                self.failures.forgive(after.digest)
            self._endings.note(after)
            self.returning.note(after, event)
            self._holding.settled(after)
        self.returning.noted(event)
        self.update = after
        moved = after.state != before.state or isinstance(event, e.Deadline)
        current = asyncio.current_task()
        if moved:
            log.info(
                "update",
                extra=kv(
                    model=after.model, version=after.version, state=after.state, code=after.code, detail=after.detail
                ),
            )
            self._watching = False
            self._arm()
            if self._task is not None and self._task is not current:
                self._task.cancel()
            self._task = asyncio.get_running_loop().create_task(self._carry_out(effects), name=f"update-{after.state}")
        elif effects:
            task = asyncio.get_running_loop().create_task(self._carry_out(effects), name=f"update-{after.state}")
            if current is not None and current is self._task:
                # The next step of the same work: whoever ends the state ends it, and nothing of it reaches the next update.
                self._task = task
                return
            self._others.add(task)
            task.add_done_callback(self._others.discard)

    async def _carry_out(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            try:
                event = await self._do(effect)
            except AgentError as error:
                if effect in (Effect.RECORD, Effect.CONFIRM):
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
        if self.at_rest:
            self._go_back_first()
            if self.at_rest:
                self._on_rest()

    @property
    def at_rest(self) -> bool:
        """Whether the update rests and all that follows from it is done: the next would cut off a confirmation that is not written yet."""
        done = self._task is None or self._task.done() or self._task is asyncio.current_task()
        return self.update.resting and done

    def _go_back_first(self) -> None:
        """A way back that is owed: what is under way makes way for it; then it begins. Not before this agent is up."""
        if self.returning.owed is None or self._owed or not self._up:
            return
        if self.update.resting and not self.at_rest:
            # What is being confirmed is confirmed first; where a way back leads is told by what the pointer file says then.
            return
        try:
            owed = self.returning.due()
        except Degraded as error:
            log.error("way back not forgotten", extra=kv(code=error.code, detail=error.detail))
            return
        if owed is None:
            return
        if self.at_rest:
            self.feed(owed)
        else:
            self.make_way(f"for the way back of {owed.model}")

    def _arm(self, *, at_least_s: float = 0.0) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._extended = False
        update, in_it_s = self.update, 0.0
        if update.state == "ready":
            in_it_s = self._readiness.lain_s(update)
        elif update.state == "trial" and update.since.boot_id == self._clock.boot_id:
            in_it_s = self._clock.boot_s() - update.since.boot_ns / 1e9
        left_s = lifecycle.left_s(update.state, in_it_s, trial_s=self.rules.duration_s, drain_s=self._drain_s)
        if left_s is not None:
            self._deadline = asyncio.get_running_loop().call_later(max(left_s, at_least_s), self._overdue)

    def _overdue(self) -> None:
        if self.update.state == "trial":
            # The trial's own rules come first. What this process slept through is still to be read.
            self.judge()
            if self.update.state != "trial":
                return
            if not self._extended:
                self._extended = True
                self._deadline = asyncio.get_running_loop().call_later(_LAST_LOOK_S, self._overdue)
                return
        if self.update.state == "fetch" and (left_s := self.fetching.downloads.left_s()) > 0:
            # It gets further. How long that takes is a matter of its size and of the rate that the group allows.
            self._deadline = asyncio.get_running_loop().call_later(left_s, self._overdue)
            return
        self.feed(e.Deadline())

    async def stop(self, *, in_order: bool = False) -> None:
        """Leaves the update where it is: the next start finds its stored state. What was with a worker, and is ended in order, says so."""
        if self._deadline is not None:
            self._deadline.cancel()
        before = self._task
        self._readiness.note(self.update)
        if in_order:
            self.feed(e.Stopped())
            if self._task is not None and self._task is not before:
                # It only says so.
                await asyncio.gather(self._task, return_exceptions=True)
        if self._deadline is not None:
            self._deadline.cancel()
        tasks = [task for task in (before, self._task, *self._others) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- the effects -------------------------------------------------------------------------------------------------

    async def _do(self, effect: Effect) -> e.Event | None:
        match effect:
            case Effect.RECORD:
                self._record()
            case Effect.FETCH_MANIFEST:
                return await self.fetching.fetch_manifest()
            case Effect.ADMIT:
                return self.fetching.admit()
            case Effect.FETCH_FILES:
                return await self.fetching.fetch_files()
            case Effect.VERIFY_FILES:
                return await self.fetching.verify_files()
            case Effect.STAGE_SLOT:
                staged = await self.fetching.stage()
                why_held = self._holding.why(self.update)
                return e.Held(detail=why_held) if why_held else staged
            case Effect.START_WORKER:
                proved = await self.turnover.prove()
                why_held = await self._free_to_begin()
                if not why_held:
                    return proved
                await self.turnover.stop_new()
                self._look_later()
                return e.Held(detail=why_held)
            case Effect.HAND_OVER:
                return await self.turnover.hand_over()
            case Effect.WATCH_TRIAL:
                self._watching = True
                self.judge()
            case Effect.CONFIRM:
                await self.turnover.confirm()
            case Effect.DISCARD:
                self.fetching.discard()
                return e.Reverted()
            case Effect.STOP_NEW:
                await self.turnover.stop_new()
                return e.Reverted()
            case Effect.RESTORE:
                return await self.turnover.restore()
            case Effect.GIVE_UP:
                await self.turnover.give_up()
        return None

    async def _free_to_begin(self) -> str:
        """What holds the update after its proof, where it was taken in the middle of that; its worker waits for the end of it, for a while."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + _WARM_S * self._scale
        if self._deadline is not None:
            end_s = min(end_s, self._deadline.when() - _WARM_S / 3)
        while (why_held := self._holding.why(self.update)) and loop.time() < end_s:
            await asyncio.sleep(_WARM_POLL_S)
        return why_held

    def _look_later(self) -> None:
        """A worker was started for nothing: the next is, after a wait that grows with each. Who locks for short times, again and again, must not have one started each time."""
        digest, times = self._held_in_proof
        times = times + 1 if digest == self.update.digest else 1
        self._held_in_proof = (self.update.digest, times)
        wait_s = backoff.delay_s("update", times, self._draw(), scale=self._scale)
        self._looks_again_s = self._clock.boot_s() + wait_s

    def _begins(self) -> str:
        """What takes over right now: too late for a lock."""
        update = self.update
        return f"{update.model} {update.version}" if update.state == "trial" and not self._watching else ""

    def _record(self) -> None:
        """Says what became of the update; of a start after it was said already, only how things stand."""
        data = self._word()
        said = {**data, "code": self.update.code, "since": self.update.since}
        if not self.update.model or self._store.get("said") == msgspec.to_builtins(said):
            self._on_change("", {})
            return
        quiet = self.failures.was_said(self.update)
        took = self.fetching.fetched.of(self.update.digest)
        if took and self.update.state != "fetch":
            data = {**data, "fetched": took, **({"source": "import"} if "carried_files" in took else {})}
        if self.update.at_boot:
            ended = self.failures.of(self.update.digest).get(self.update.penalty, 0)
            data = {**data, "at_boot": True, "ended_so": ended}
        self._on_change("" if quiet else self.update.code, {} if quiet else data)
        # Behind the event: power that fails between the two has it said twice, and never not at all.
        self._store.put("said", said)

    def _word(self) -> dict[str, Any]:
        update = self.update
        return {
            "model": update.model, "digest": update.digest, "version": update.version, "variant": update.variant,
            "state": update.state, "attempt": update.attempt, "arm": update.arm, "rollout": update.rollout,
            "stage": update.stage, "detail": update.detail, "failed_in": update.failed_in,
        }  # fmt: skip

    def _take_for_said(self) -> None:
        """An older agent left no note of what it said: of an update at rest, that it did."""
        if self._store.get("said") is None and self.update.resting:
            with contextlib.suppress(Degraded):
                # Without room for the note it is said once more.
                self._store.put("said", {**self._word(), "code": self.update.code, "since": self.update.since})

    def _counts(self, failed: Update) -> bool:
        """Whether the failure is held against the bundle."""
        if failed.code == "crash_loop" and not self._slots.whole(failed.digest, failed.variant):
            # This device's own copy rotted: it is fetched again.
            return False
        try:
            # Another variant is taken at once, without a wait.
            return not self.fetching.has_another_variant(failed)
        except (AgentError, ContractError, OSError) as error:
            log.warning("no look at other variants", extra=kv(model=failed.model, detail=str(error)))
            return True

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
        serves = generation.models.get(self.update.model)
        if serves is None or serves.digest != self.update.digest:
            # Only the bundle that answers can be judged, whatever the pointer file says.
            return
        elapsed_s = self._clock.boot_s() - generation.listening_s
        manifest = self.fetching.manifest or self._slots.manifest(self.update.digest)
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
            if self.update.state == "revert" and self.turnover.ordered_back() is not None:
                # It goes anyway: what comes back is being brought up, and its end must not end that.
                return True
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

    def held_back(self, model: str, digest: str, version: str) -> str:
        """What would hold an update to this bundle back once it is here; empty for nothing."""
        return self._holding.why(Update(model=model, digest=digest, version=version))

    def make_way(self, why: str) -> None:
        """What is under way makes way for another model's update, or for a way back. Its files stay for its next turn, while this agent lives."""
        if self.update.state != "revert":
            self.turnover.parked = self.update.digest
            self.feed(e.Yielded(detail=why))

    def fetch_anew(self) -> None:
        """There is another source of what is being fetched: the courier under way makes way for one that knows it."""
        if self.update.state != "fetch" or self._owed or self._task is None:
            return
        self._task.cancel()
        self._task = asyncio.get_running_loop().create_task(
            self._carry_out((Effect.FETCH_MANIFEST,)), name="update-fetch"
        )

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
        with self._store.transaction():
            self._store.put("update", given_up)
            self.failures.penalise(given_up)
        self.update = given_up
        self._record()
        return True

    def why(self) -> why.Facts:
        """What is known here of the update, for ``core.why``."""
        update, now = self.update, self._clock.instant()
        boot_s = self._clock.boot_s()
        generation = self._serving.generation_of(update.model)
        began_s = generation.listening_s if generation is not None and generation.listening_s is not None else boot_s
        counts = self._serving.counts(update.model)
        spent = self.failures.spent()
        return why.Facts(
            update=update,
            since_s=why.ago_s(update.since, now),
            left_s=self._deadline.when() - asyncio.get_running_loop().time() if self._deadline is not None and not update.resting else None,
            wait_s=self.failures.wait_s(update.digest),
            spent=update.digest in spent,
            beside=tuple(
                why.Ended(
                    update=one, since_s=why.ago_s(one.since, now), wait_s=self.failures.wait_s(one.digest), spent=one.digest in spent
                )
                for one in self._endings.beside(update.model)
            ),
            trial=(counts.answered, self.rules.inferences, max(0.0, self.rules.duration_s - (boot_s - began_s))),
        )  # fmt: skip

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
            self._arm()

    def cancel(self, who: str, model: str = "") -> tuple[Update, ...]:
        """A person ends the update under way, or else what waits for its next try; it is not tried again before a pardon.

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
            self._order(e.Cancelled(detail=f"cancelled by {who}"))
            return (self.update,)
        ended = (update, *self._endings.beside(update.model))
        waits = [one for one in ended if one.resting and one.code and self.failures.wait_s(one.digest) > 0]
        waits = [one for one in waits if model in ("", one.model)]
        if not waits:
            of_it = f" of {model}" if model else ""
            raise Rejected("nothing_to_cancel", f"no update{of_it} is under way, and none waits for its next try")
        with self._store.transaction():
            for one in waits:
                self.failures.hold(one.digest, "cancelled")
        return tuple(waits)

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
        why_held = self._holding.order(update, despite_locks=despite_locks)
        self._looks_again_s = 0.0
        self._look_at_holds()
        return update, why_held

    def order_revert(self, model: ids.ModelName) -> Slot:
        """A person wants the previous bundle back; what is under way makes way first. Returns the slot that comes back.

        Raises:
            Rejected: ``no_previous`` or ``busy``.
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
        ordered = e.RevertOrdered(model=model, digest=going.digest, version=going.version, variant=going.variant)
        if on_trial or self.at_rest:
            self._order(ordered)
        else:
            self.returning.owe(ordered)
            self._go_back_first()
        return back
