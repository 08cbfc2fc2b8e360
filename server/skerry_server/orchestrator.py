"""The loop that moves rollouts: read evidence, ask ``core.rollout``, write, publish, ring. In that order.

One decision is one transaction: decision, rollout, audit row, group document, bell. Publishing and ringing follow from what the
database then says, so a crash between any two steps is made good by the next tick of the next process. The loop never dies of
one bad rollout or of a repository that refuses: it logs, counts, and looks again.

Nor does a judge that raises take the gates, the deadline or the way back with it: the rollout is decided without a ruling, so that
nothing passes, and the reason names the fault.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine, select

from skerry_server import judging, looks, presence, registry, rollouts, upkeep
from skerry_server.config import Rollouts as Pace
from skerry_server.core import rollout as core
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from skerry_server.errors import Conflict
from skerry_server.publication import Bell, Publication

log = logging.getLogger(__name__)

ACTOR = "system:orchestrator"
MOST_FAULT = 300
"""Characters of a fault of the judge that a reason repeats."""
MOVING = ("running", "paused", "completing", "rolling_back")


class Orchestrator:
    """Runs in a thread of its own. ``wake`` makes it look at once, from any thread."""

    def __init__(
        self,
        engine: Engine,
        publication: Publication,
        bell: Bell,
        pace: Pace,
        now_ms: Callable[[], int],
        observe_tick: Callable[[float, bool], Any],
        observe_fault: Callable[[str], Any] = lambda _part: None,
    ) -> None:
        """Args:
        observe_tick: called after every tick with its seconds and whether it went well.
        observe_fault: called with ``judge`` or ``rollout`` for each rollout whose part of that name raised.
        """
        self._engine = engine
        self._publication = publication
        self._bell = bell
        self._pace = pace
        self._now_ms = now_ms
        self._observe = observe_tick
        self._observe_fault = observe_fault
        self._due = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._upkeep = upkeep.Upkeep(engine, publication)
        self._resign_at = 0.0
        self._expired_session_ms = 0
        self.last_tick = 0.0
        """Monotonic time of the last tick that went well; 0 before the first."""

    def start(self) -> None:
        """Begins ticking."""
        self._thread = threading.Thread(target=self._run, name="orchestrator", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the tick under way."""
        self._stopping.set()
        self._due.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def wake(self) -> None:
        """Something changed: tick now."""
        self._due.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            begun = time.monotonic()
            well = True
            try:
                self.tick()
                self.last_tick = time.monotonic()
            except Exception:
                # The loop outlives anything one tick meets; the tick is counted as failed and shows in /readyz.
                log.exception("tick failed")
                well = False
            self._observe(time.monotonic() - begun, well)
            self._due.wait(self._pace.tick_s)
            self._due.clear()

    def _expire(self) -> None:
        """Once per session with the broker, when every device that lives has spoken: the silent ones are offline."""
        now_ms = self._now_ms()
        with reading(self._engine) as conn:
            since_ms = queries.server_session_since(conn)
        if since_ms in (0, self._expired_session_ms) or now_ms - since_ms < self._pace.speak_s * 1000:
            return
        with writing(self._engine) as conn:
            gone = presence.expire(conn, before_ms=since_ms, now_ms=now_ms)
        self._expired_session_ms = since_ms
        if gone:
            log.warning("devices not heard of since the broker came back devices=%s", gone)

    def tick(self) -> int:
        """One look at everything; returns how many decisions were stored."""
        self._expire()
        with reading(self._engine) as conn:
            query = select(t.rollouts.c.id).where(t.rollouts.c.state.in_(MOVING)).order_by(t.rollouts.c.created_ms)
            moving = list(conn.execute(query).scalars())
        stored = 0
        for rollout in moving:
            try:
                stored += self._look(rollout)
            except Exception:
                log.exception("rollout failed rollout=%s", rollout)
                self._observe_fault("rollout")
        self._publication.publish(self._bell)
        if time.monotonic() >= self._resign_at:
            self._resign_at = time.monotonic() + self._pace.resign_s
            self._publication.resign()
        self._upkeep.look(self._now_ms())
        return stored

    def _look(self, rollout: str) -> bool:
        now_ms = self._now_ms()
        with reading(self._engine) as conn:
            row = rollouts.require(conn, rollout)
            value, evidence = rollouts.value(row), rollouts.gather(conn, row)
            listed = registry.require(conn, row["candidate"])["state"] != "retired"
            withdrawn = None if listed else withdraw(value, evidence)
            last = rollouts.last_decision(conn, rollout)
            # The judge comes last in this transaction: a statement of it that fails may make the rest of it unusable.
            before, look, fault = self._judge(conn, row, value, now_ms=now_ms, takes=withdrawn is None)
        newest = None if fault else look or before
        ruling = None if newest is None else newest.ruling
        decision = withdrawn or core.decide(value, evidence, now_ms, ruling, fault=fault)
        is_news = decision.action != "hold" or _is_news(decision, last)
        if look is None and not is_news:
            return False
        try:
            with writing(self._engine) as conn:
                if look is not None:
                    rollouts.require_version(conn, rollout, row["version"])
                    looks.keep(conn, rollout, look)
                if not is_news:
                    return False
                rollouts.carry_out(
                    conn,
                    rollout,
                    decision,
                    actor=ACTOR,
                    now_ms=now_ms,
                    seen_s=self._pace.seen_s,
                    version=row["version"],
                )
        except Conflict as error:
            # Somebody moved it between the look and the write: the next tick looks again.
            log.info("decision dropped rollout=%s why=%s", rollout, error.code)
            return False
        log.info(
            "decision rollout=%s stage=%s action=%s verdict=%s reason=%r",
            rollout,
            row["stage"],
            decision.action,
            decision.verdict,
            decision.reason,
        )
        return True

    def _judge(
        self, conn: Connection, row: dict[str, Any], value: core.Rollout, *, now_ms: int, takes: bool
    ) -> tuple[looks.Taken | None, looks.Taken | None, str]:
        """The look before, the next one where it is time for it, and what went wrong; nothing that the judge raises leaves this."""
        judge = value.plan.judge
        if judge is None:
            return None, None, ""
        try:
            before = looks.last(conn, row["id"], value.stage)
            look = None
            if takes and value.state == "running" and judging.is_due(judge, before, now_ms):
                look = judging.take(conn, row, value.plan, before, now_ms=now_ms)
        except Exception as error:
            # Whatever it is: what a device sent must not hold gates and deadline.
            log.exception("judge failed rollout=%s stage=%s", row["id"], value.stage)
            self._observe_fault("judge")
            said = str(error) if isinstance(error, looks.UnreadableLook) else f"{type(error).__name__}: {error}"
            return None, None, said[:MOST_FAULT]
        return before, look, ""


def withdraw(rollout: core.Rollout, evidence: core.Evidence) -> core.Decision | None:
    """What becomes of a rollout whose candidate no catalog lists any more; None when it has been dealt with.

    Devices refuse the candidate from now on, and those that run it must not be the only ones: the rollout goes back. A
    model's first bundle has none to go back to, so that its rollout waits for a person.
    """
    why = "the signed catalog no longer lists the candidate"
    if rollout.state not in core.OFFERING:
        return None
    if not rollout.first:
        return core.Decision(action="roll_back", verdict="", reason=why, evidence=evidence.to_builtins())
    if rollout.state == "paused":
        return None
    reason = f"{why}, and it is the model's first bundle here: abort, and start with another"
    return core.Decision(action="pause", verdict="", reason=reason, evidence=evidence.to_builtins())


def _is_news(decision: core.Decision, last: dict[str, Any] | None) -> bool:
    """Whether a hold says something that the last stored decision did not: numbers alone are no news."""
    if last is None or last["action"] != "hold":
        return True
    return (last["verdict"], tuple((last["evidence"] or {}).get("missing", ()))) != (decision.verdict, decision.missing)
