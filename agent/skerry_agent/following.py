"""Carries out the plan: takes up, changes or rekeys what the group's document assigns to this device.

``core.plan`` says what follows from the document and what runs; here it is asked, and its steps go to ``updating``, the slots
and the shadows.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from skerry_contract import group, ids

from skerry_agent.clock import Clock
from skerry_agent.core import admission, lifecycle, turns
from skerry_agent.core import effects as e
from skerry_agent.core.lifecycle import Update
from skerry_agent.core.plan import Change, Keep, Rekey, Running, Step, plan
from skerry_agent.errors import Degraded
from skerry_agent.identity import Identity
from skerry_agent.orders import Orders
from skerry_agent.runtimes import Runtimes
from skerry_agent.serving import Serving
from skerry_agent.shadowing import Shadowing
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Store
from skerry_agent.updating import Updating

_MOST_PAIRS = 64


class Following:
    """See the module.

    Args:
        stratum: this device's, which a share of a rollout is drawn in.
        ready: whether anything may be taken up now.
        on_event: something to tell the server: name, code, data.
        ask_sync: asks for a sync soon.
    """

    def __init__(
        self,
        identity: Identity,
        store: Store,
        slots: Slots,
        clock: Clock,
        runtimes: Runtimes,
        serving: Serving,
        orders: Orders,
        updating: Updating,
        shadowing: Shadowing,
        *,
        stratum: str,
        ready: Callable[[], bool],
        on_event: Callable[[str, str, dict[str, Any]], None],
        ask_sync: Callable[[], None],
    ) -> None:
        self._identity = identity
        self._store = store
        self._slots = slots
        self._clock = clock
        self._runtimes = runtimes
        self._serving = serving
        self._orders = orders
        self._updating = updating
        self._shadowing = shadowing
        self._stratum = stratum
        self._ready = ready
        self._on_event = on_event
        self._ask_sync = ask_sync
        # Which bundles made way for which, the latest.
        self._made_way: dict[tuple[str, str], None] = {}
        self._again: asyncio.TimerHandle | None = None

    def look(self) -> None:
        """Asks what follows from the document now, and does it; looks again when the first bundle that waits may be tried again."""
        self._look()
        if self._again is not None:
            self._again.cancel()
        wait_s = self._updating.failures.next_try_s() if self._updating.update.resting else None
        if wait_s is not None:
            self._again = asyncio.get_running_loop().call_later(wait_s + 0.05, self._ask_sync)

    def lacks(self) -> str:
        """What the document requires and this agent does not know, in words; empty for nothing."""
        document = self._orders.document
        return ", ".join(group.missing_abilities(document)) if document is not None else ""

    def _look(self) -> None:
        document = self._orders.document
        if document is None or not self._ready() or self._updating.returning.owed is not None:
            return
        refused, waiting = self._updating.failures.refused()
        update = self._updating.update
        # What a worker serves, or served until it died: that it is being restarted does not mean that its bundle must be
        # fetched. Before the first one, what the pointer file says. A slot found damaged runs only until it ends.
        answering = {**self._serving.trying(), **self._serving.models()} or {
            name: slot for name in self._slots.models() if (slot := self._slots.answering(name)) is not None
        }
        running = {
            name: Running(
                digest=slot.digest,
                arm=slot.arm,
                rollout=slot.rollout,
                stage=slot.stage,
                confirmed=self._confirmed(name),
            )
            for name, slot in answering.items()
            if not self.must_be_replaced(name, slot)
        }
        if not update.resting and update.state != "revert":
            running[update.model] = Running(
                digest=update.digest,
                arm=update.arm,
                rollout=update.rollout,
                stage=update.stage,
                confirmed=self._confirmed(update.model),
            )
        steps = plan(document, self._identity.device, self._stratum, running, refused)
        for step in sorted(steps, key=self._place, reverse=True):
            match step:
                case Keep(why="agent_too_old"):
                    self._too_old()
                case Rekey():
                    self._rekey(step)
                case Change():
                    self._change(step, waiting)
                case Keep(why="not_assigned") if step.model == update.model and not update.resting:
                    # What nobody gives any more is not taken up; what answers goes on.
                    self._updating.feed(e.Withdrawn())
                case _:
                    pass
        if group.missing_abilities(document):
            return
        device, stratum = self._identity.device, self._stratum
        shadows = {model: group.shadow_of(document, device, model, stratum) for model in answering}
        followed = {model: found for model, found in shadows.items() if found is not None}
        self._shadowing.follow(followed, self._orders.settings)
        if self._updating.at_rest:
            # Once the shadows are known. What was refused for good, or is wanted no more, makes room; nothing may ever be confirmed again.
            wanted = {step.digest for step in steps if isinstance(step, Change)}
            if self._updating.turnover.parked not in wanted:
                self._updating.turnover.parked = ""
            self._slots.collect({*wanted, *self._updating.failures.may_come(), self._updating.turnover.parked})

    def _confirmed(self, model: str) -> str:
        slot = self._slots.pointers(model).confirmed
        return slot.version if slot is not None else ""

    def must_be_replaced(self, model: str, slot: Slot) -> bool:
        """Whether the plan takes its bundle up again: no worker has it and its files were damaged, or its runtime does not work any more.

        Of the latter in a variant that runs.
        """
        manifest, variant = self._slots.manifest(slot.digest), self._slots.variant(slot)
        if manifest is None or variant is None:
            cell = self._serving.cell_of(model)
            return cell is None or not cell.answering()
        if not self._runtimes.lacks(variant):
            return False
        # A live worker goes on with what it has loaded, unless something else can take its place.
        answer = self._updating.fetching.admission(manifest, slot.digest)
        return not self._serving.answering(model) or isinstance(answer, admission.Admit)

    def _too_old(self) -> None:
        lacking = self.lacks()
        if self._store.get("too_old") == lacking:
            return
        with contextlib.suppress(Degraded):
            # Without room for the note it is said again; that keeps nobody from going on.
            self._store.put("too_old", lacking)
        told = {"detail": f"the group document requires {lacking}", "state": "idle"}
        self._on_event("update", "agent_too_old", told)

    def _rekey(self, step: Rekey) -> None:
        update = self._updating.update
        under_way = not update.resting and update.model == step.model
        if under_way and update.state != "trial":
            # The key of a bundle that does not serve yet is looked up again when it does.
            return
        self._slots.rekey(step.model, arm=step.arm, rollout=step.rollout, stage=step.stage)
        self._serving.rekey(step.model, arm=step.arm, rollout=step.rollout, stage=step.stage)
        if under_way:
            self._updating.feed(e.Rekeyed(arm=step.arm, rollout=step.rollout, stage=step.stage))

    def _is_held(self, step: Step) -> bool:
        return isinstance(step, Change) and bool(self._updating.held_back(step.model, step.digest, step.version))

    def _leads_back(self, step: Step) -> bool:
        """Whether the group's document orders a lower version than what answers: its operator wants something to end."""
        answering = self._slots.answering(step.model)
        if not isinstance(step, Change) or answering is None:
            return False
        return ids.version_key(step.version) < ids.version_key(answering.version)

    def _turn(self, step: Step) -> int:
        return turns.turn(held=self._is_held(step), back=self._leads_back(step))

    def _place(self, step: Step) -> tuple[int, bool]:
        """By its turn; of two alike what made way comes behind."""
        is_back_in_turn = isinstance(step, Change) and step.digest == self._updating.turnover.parked
        return self._turn(step), not is_back_in_turn

    def _goes_before(self, step: Change, update: Update) -> bool:
        """Whether the update under way, of another model, makes way."""
        answering = self._slots.answering(update.model)
        back = answering is not None and ids.version_key(update.version) < ids.version_key(answering.version)
        # For the same one only once: where there is no room for both in part, each would throw away what came of the other.
        again = (update.digest, step.digest) in self._made_way
        in_it_s = 0.0 if again else lifecycle.lain_s(0.0, update.since, self._clock.instant())
        return turns.makes_way(update.state, back=back, comes=self._turn(step), in_it_s=in_it_s)

    def _change(self, step: Change, waiting: set[str]) -> None:
        update = self._updating.update
        if not self._updating.at_rest:
            if update.model == step.model and update.digest != step.digest:
                self._updating.feed(e.Withdrawn())
            elif update.model != step.model and step.digest not in waiting and self._goes_before(step, update):
                if self._updating.fetching.lacks_room(step.digest):
                    # It would be refused again, and what lies ready would be checked anew each time.
                    return
                self._made_way = dict([*self._made_way.items(), ((update.digest, step.digest), None)][-_MOST_PAIRS:])
                self._updating.make_way(f"for {step.model} {step.version}")
            return
        if step.digest in waiting or self._slots.unwritten:
            return
        self._updating.feed(
            e.Assigned(
                model=step.model, digest=step.digest, version=step.version, arm=step.arm, rollout=step.rollout,
                stage=step.stage, attempt=self._updating.failures.attempt_of(step.digest), moves=self._updating.failures.moves_of(step.digest),
            )
        )  # fmt: skip
