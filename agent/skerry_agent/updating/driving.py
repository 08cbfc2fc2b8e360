"""Drives the lifecycle's table: takes events, stores the state that follows, and has its effects done.

The effects themselves are ``steps``'. One update at a time. ``feed`` is called in the loop; effects that take time run as one task
whose outcome is fed again. A change of state from outside (withdrawn, crashed, deadline) cancels that task first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
from skerry_contract.errors import ContractError

from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.core import effects as e
from skerry_agent.core import lifecycle
from skerry_agent.core.effects import Effect
from skerry_agent.core.lifecycle import Update
from skerry_agent.downloads import Downloads
from skerry_agent.endings import Endings
from skerry_agent.errand import Errands
from skerry_agent.errors import AgentError, Degraded
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
from skerry_agent.serving import Serving
from skerry_agent.slots import Slots
from skerry_agent.store import Store
from skerry_agent.turnover import Turnover
from skerry_agent.updating.beginning import Beginning
from skerry_agent.updating.deadlines import Deadline
from skerry_agent.updating.settling import Settling
from skerry_agent.updating.steps import Steps
from skerry_agent.updating.telling import Telling
from skerry_agent.updating.watching import TrialRules, Watching

log = logging.getLogger(__name__)


class Driving:
    """See the module. ``Updating`` is what else comes to it from outside.

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
        slots.in_use = lambda: {
            slot.digest for found in (serving.trying(), serving.models()) for slot in found.values()
        }
        self._on_rest = on_rest
        self._on_fault = on_fault
        self._owed: deque[e.Event] = deque()
        self._task: asyncio.Task[None] | None = None
        self._others: set[asyncio.Task[None]] = set()
        self._up = False
        self.returning = Returning(store, slots)
        self.failures = Failures(store, clock, draw, config.timing.backoff_scale)
        self._readiness = Readiness(store, clock)
        self._deadline = Deadline(clock, self._readiness, drain_s=config.timing.drain_s, overdue=self._overdue)
        self._settling = Settling(slots, clock, draw=draw, scale=config.timing.backoff_scale)
        self._endings = Endings(store)
        self.rules = TrialRules()
        self.update = msgspec.convert(store.get("update", {}), Update)
        self.fetching = Fetching(
            config, store, slots, errands, runtimes, self.failures, update=lambda: self.update,
            errand_input=errand_input, progress=FetchProgress(clock, on_progress, config.timing.backoff_scale),
            downloads=Downloads(errands, clock, networks, max_kib_s=lambda: self.rules.max_kib_s),
            parked=lambda: self.turnover.parked,
        )  # fmt: skip
        self.turnover = Turnover(
            config, slots, serving, runtimes, restoring, self.failures, update=lambda: self.update, draw=draw
        )
        self._watching = Watching(
            slots, serving, clock, update=lambda: self.update, manifest=lambda: self.fetching.manifest
        )
        holding.begins = self._watching.begins
        self._beginning = Beginning(
            holding, clock, update=lambda: self.update, draw=draw, scale=config.timing.backoff_scale
        )
        self._telling = Telling(store, clock, self.failures, self._endings, self.fetching.fetched, on_change=on_change)
        self._telling.take_for_said(self.update)
        self._steps = Steps(
            slots, self.fetching, self.turnover, self._beginning, self._watching, self._telling, update=lambda: self.update,
            deadline_s=self._deadline.when_s, judge=self.judge,
        )  # fmt: skip

    def configure(self, config: Config) -> None:
        """Goes on with another configuration."""
        self._deadline.drain_s = config.timing.drain_s
        self.fetching.configure(config)
        self.turnover.configure(config)

    def apply(self, rules: TrialRules) -> None:
        """Goes by other rules, in a trial that runs already too."""
        before, self.rules = self.rules, rules
        if self.update.state == "trial" and rules.duration_s != before.duration_s:
            # One that is over by the new rules alone has not been silent for that.
            self._deadline.arm(self.update, trial_s=rules.duration_s, at_least_s=lifecycle.TRIAL_OVER_S)

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
        self._telling.tick()
        self._go_back_first()
        if self._settling.tick() and self.at_rest:
            self._on_rest()
        self._holding.tick()
        self._look_at_holds()
        self._readiness.tick(self.update)
        self.judge()
        self.turnover.standby.tick()

    def _look_at_holds(self) -> None:
        event = None if self._owed else self._beginning.look()
        if event is not None:
            self.feed(event)

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
        penalise = Effect.PENALISE in effects and self._steps.counts(after)
        effects = tuple(effect for effect in effects if effect is not Effect.PENALISE)
        with self._store.transaction():
            self._store.put("update", after)
            if penalise:
                # With the state: power that fails behind it must not forget a person's word or a bad bundle's only attempt.
                self.failures.penalise(after)
            self.failures.rested(after)
            kept = isinstance(event, (e.TrialKept, e.TrialQuiet)) and after.state in lifecycle.CONFIRMED
            given_up = before.state == "revert" and lifecycle.steps_back(before) and not lifecycle.steps_back(after)
            if kept or given_up:
                # Confirmed, or still: a way back that is given up holds nothing against what had to go.
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
            self._watching.on = False
            self._deadline.arm(after, trial_s=self.rules.duration_s)
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
                event = await self._steps.do(effect)
            except AgentError as error:
                if effect is Effect.CONFIRM:
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

    def _overdue(self) -> None:
        if self.update.state == "trial":
            # The trial's own rules come first. What this process slept through is still to be read.
            self.judge()
            if self.update.state != "trial":
                return
            if self._deadline.last_look():
                return
        if self.update.state == "fetch" and (left_s := self.fetching.downloads.left_s()) > 0:
            # It gets further. How long that takes is a matter of its size and of the rate that the group allows.
            self._deadline.go_on(left_s)
            return
        self.feed(e.Deadline())

    def judge(self) -> None:
        """Looks at the trial's counts; called with every health report and at the end of its time."""
        event = None if self._owed else self._watching.judge(self.rules)
        if event is not None:
            self.feed(event)

    async def stop(self, *, in_order: bool = False) -> None:
        """Leaves the update where it is: the next start finds its stored state. What was with a worker, and is ended in order, says so."""
        self._deadline.cancel()
        before = self._task
        self._readiness.note(self.update)
        if in_order:
            self.feed(e.Stopped())
            if self._task is not None and self._task is not before:
                # It only says so.
                await asyncio.gather(self._task, return_exceptions=True)
        self._deadline.cancel()
        tasks = [task for task in (before, self._task, *self._others) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
