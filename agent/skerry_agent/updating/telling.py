"""What is said of an update: what became of it, once, and how things stand with it, to whoever asks.

What was said last is noted in the store: a start after it was said already says nothing new.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from skerry_agent.clock import Clock
from skerry_agent.core import lifecycle, why
from skerry_agent.core.lifecycle import Update
from skerry_agent.endings import Endings
from skerry_agent.errors import Degraded
from skerry_agent.failures import Failures
from skerry_agent.fetched import Fetched
from skerry_agent.logs import kv
from skerry_agent.store import Store

log = logging.getLogger(__name__)

_MOST_OWED = 16
"""So many updates are kept whose word the outbox did not take yet, the latest."""


class Telling:
    """See the module.

    Args:
        fetched: what downloads took.
        on_change: the update or what runs changed: report it; raises ``Degraded`` where the word of it could not be kept.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        failures: Failures,
        endings: Endings,
        fetched: Fetched,
        *,
        on_change: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._failures = failures
        self._endings = endings
        self._fetched = fetched
        self._on_change = on_change
        self._owed: list[Update] = []
        self._held_up = False

    def record(self, update: Update) -> None:
        """Says what became of the update; of a start after it was said already, only how things stand.

        What cannot be kept for the server now is said as soon as it can be; nothing else waits for it.
        """
        kept = [one for one in self._owed if (one.digest, one.attempt) != (update.digest, update.attempt)]
        self._owed = [*kept[1 - _MOST_OWED :], update]
        self._say()

    def _say(self) -> None:
        """What is owed, in its order: of a bundle that was refused nobody else tells, once the next is taken up."""
        while self._owed:
            try:
                self._record(self._owed[0])
            except Degraded as error:
                if not self._held_up:
                    state = self._owed[0].state
                    log.error("update not told", extra=kv(code=error.code, detail=error.detail, state=state))
                self._held_up = True
                return
            self._held_up = False
            del self._owed[0]

    def beside(self, update: Update) -> None:
        """Says what became of one that is not the last; what cannot be kept now is lost."""
        try:
            self._on_change(update.code, self._word(update))
        except Degraded as error:
            log.error("update not told", extra=kv(code=error.code, detail=error.detail, model=update.model))

    def tick(self) -> None:
        """Says what could not be said when it was due."""
        self._say()

    def _record(self, update: Update) -> None:
        data = self._word(update)
        said = {**data, "code": update.code, "since": update.since}
        if not update.model or self._store.get("said") == msgspec.to_builtins(said):
            self._on_change("", {})
            return
        quiet = self._failures.was_said(update)
        took = self._fetched.of(update.digest)
        if took and update.state != "fetch":
            data = {**data, "fetched": took, **({"source": "import"} if "carried_files" in took else {})}
        if update.at_boot:
            ended = self._failures.of(update.digest).get(update.penalty, 0)
            data = {**data, "at_boot": True, "ended_so": ended}
        self._on_change("" if quiet else update.code, {} if quiet else data)
        # Behind the event: power that fails between the two has it said twice, and never not at all.
        with self._store.transaction():
            self._failures.said(update)
            self._store.put("said", said)
            if update.state in lifecycle.CONFIRMED:
                self._fetched.forget()

    def _word(self, update: Update) -> dict[str, Any]:
        return {
            "model": update.model, "digest": update.digest, "version": update.version, "variant": update.variant,
            "state": update.state, "attempt": update.attempt, "arm": update.arm, "rollout": update.rollout,
            "stage": update.stage, "detail": update.detail, "failed_in": update.failed_in,
        }  # fmt: skip

    def take_for_said(self, update: Update) -> None:
        """An older agent left no note of what it said: of an update at rest, that it did."""
        if self._store.get("said") is None and update.resting:
            with contextlib.suppress(Degraded):
                # Without room for the note it is said once more.
                self._store.put("said", {**self._word(update), "code": update.code, "since": update.since})

    def facts(self, update: Update, *, left_s: float | None, trial: tuple[int, int, float]) -> why.Facts:
        """What is known here of the update, for ``core.why``. ``left_s`` and ``trial`` as they stand there."""
        now = self._clock.instant()
        spent = self._failures.spent()
        return why.Facts(
            update=update,
            since_s=why.ago_s(update.since, now),
            left_s=left_s,
            wait_s=self._failures.wait_s(update.digest),
            spent=update.digest in spent,
            beside=tuple(
                why.Ended(
                    update=one, since_s=why.ago_s(one.since, now), wait_s=self._failures.wait_s(one.digest), spent=one.digest in spent
                )
                for one in self._endings.beside(update.model)
            ),
            trial=trial,
        )  # fmt: skip
