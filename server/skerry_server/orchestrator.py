"""The loop that moves rollouts: read evidence, ask ``core.rollout``, write, publish, ring. In that order.

One decision is one transaction: decision, rollout, audit row, group document, bell. Publishing and ringing follow from what the
database then says, so a crash between any two steps is made good by the next tick of the next process. The loop never dies of
one bad rollout or of a repository that refuses: it logs, counts, and looks again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, select

from skerry_server import judging, presence, registry, rollouts
from skerry_server.config import Rollouts as Pace
from skerry_server.core import rollout as core
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from skerry_server.errors import Conflict
from skerry_server.publication import Bell, Publication

log = logging.getLogger(__name__)

ACTOR = "system:orchestrator"
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
    ) -> None:
        """Args:
        observe_tick: called after every tick with its seconds and whether it went well.
        """
        self._engine = engine
        self._publication = publication
        self._bell = bell
        self._pace = pace
        self._now_ms = now_ms
        self._observe = observe_tick
        self._due = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
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
        self._publication.publish(self._bell)
        if time.monotonic() >= self._resign_at:
            self._resign_at = time.monotonic() + self._pace.resign_s
            self._publication.resign()
        return stored

    def _look(self, rollout: str) -> bool:
        now_ms = self._now_ms()
        with reading(self._engine) as conn:
            row = rollouts.require(conn, rollout)
            value, evidence = rollouts.value(row), rollouts.gather(conn, row)
            listed = registry.require(conn, row["candidate"])["state"] != "retired"
            withdrawn = None if listed else withdraw(value, evidence)
            judge = value.plan.judge
            before = None if judge is None else judging.last(conn, rollout, value.stage)
            look = None
            running = value.state == "running" and withdrawn is None
            if judge is not None and running and judging.is_due(judge, before, now_ms):
                look = judging.take(conn, row, value.plan, before, now_ms=now_ms)
            newest = look or before
            decision = withdrawn or core.decide(value, evidence, now_ms, None if newest is None else newest.ruling)
            last = rollouts.last_decision(conn, rollout)
        is_news = decision.action != "hold" or _is_news(decision, last)
        if look is None and not is_news:
            return False
        try:
            with writing(self._engine) as conn:
                if look is not None:
                    rollouts.require_version(conn, rollout, row["version"])
                    judging.keep(conn, rollout, look)
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
