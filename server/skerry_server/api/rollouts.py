"""Routes: rollouts and their decisions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select, tuple_

from skerry_server import looks, recomputing, rollouts, versions
from skerry_server.api.bodies import Route
from skerry_server.api.context import After, Ctx, Limit, Operator, Viewer, page, read_cursor
from skerry_server.core import rollout as core
from skerry_server.core.plan import BadPlan, read_new_plan
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from skerry_server.errors import Invalid

router = APIRouter(prefix="/api/v1/rollouts", tags=["rollouts"], route_class=Route)


class NewRollout(BaseModel):
    """A candidate to bring to a group by stages."""

    model_config = ConfigDict(extra="forbid")
    group: str
    model: str
    candidate: str = Field(description="Digest of an approved bundle")
    stages: list[dict[str, Any]] = Field(
        description="Each: devices or share (of the eligible), min_devices, min_inferences, min_seconds, max_seconds"
    )
    gates: dict[str, Any] = Field(
        default={},
        description="max_error_rate, latency_p95_ms, max_invalid_rate, max_reverts, require (trial or golden)",
    )
    stratified: bool = False
    judge: dict[str, Any] | None = Field(
        default=None,
        description="Compares candidates with controls: guardrails (name to alpha, margin, limit, min_n, past), look_s, end_s or "
        "end_labels, half_s, min_devices, guard_s, silent_s, small_fleet",
    )
    id: str | None = None


class Why(BaseModel):
    """The person's reason, kept with the decision."""

    model_config = ConfigDict(extra="forbid")
    reason: str = Field(default="", max_length=2000)
    version: int | None = Field(default=None, description="Of the rollout that was read; 409 when it has changed")


@router.post("", summary="Make a rollout and start its first stage", status_code=201)
def create(context: Ctx, caller: Operator, wanted: NewRollout) -> dict[str, Any]:
    plan = {"stages": wanted.stages, "gates": wanted.gates, "stratified": wanted.stratified, "judge": wanted.judge}
    try:
        read_new_plan(plan)
    except BadPlan as error:
        raise Invalid("bad_plan", "; ".join(error.faults), faults=list(error.faults)) from None
    floors = context.publication.floors()
    with writing(context.engine) as conn:
        row = rollouts.create(
            conn,
            group=wanted.group,
            model=wanted.model,
            candidate=wanted.candidate,
            plan=plan,
            rollout_id=wanted.id,
            actor=caller.actor,
            now_ms=context.now_ms(),
            seen_s=context.settings.rollout.seen_s,
            floors=floors,
        )
    context.wake()
    return row


@router.get("", summary="List rollouts, oldest first")
def list_rollouts(
    context: Ctx,
    _caller: Viewer,
    group: Annotated[str | None, Query(max_length=63)] = None,
    model: Annotated[str | None, Query(max_length=63)] = None,
    state: Annotated[str | None, Query(max_length=20)] = None,
    after: After = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    c = t.rollouts.c
    query = select(t.rollouts).order_by(c.created_ms, c.id).limit(limit)
    for column, wanted in ((c.group, group), (c.model, model), (c.state, state)):
        if wanted is not None:
            query = query.where(column == wanted)
    last = read_cursor(after, int, str)
    if last is not None:
        query = query.where(tuple_(c.created_ms, c.id) > tuple_(*last))
    with reading(context.engine) as conn:
        items = [dict(row) for row in conn.execute(query).mappings()]
    return page(items, limit, *((items[-1]["created_ms"], items[-1]["id"]) if items else ()))


@router.get("/{rollout}", summary="One rollout, with the verdict as it stands now")
def get_rollout(context: Ctx, _caller: Viewer, rollout: str) -> dict[str, Any]:
    """`now` is computed for this answer and stored nowhere; stored decisions are under `/decisions`."""
    with reading(context.engine) as conn:
        row = rollouts.require(conn, rollout)
        ruling, fault = looks.standing(conn, rollout, row["stage"])
        found = core.decide(rollouts.value(row), rollouts.gather(conn, row), context.now_ms(), ruling, fault=fault)
        frozen = rollouts.arms(conn, rollout, row["stage"])
    now = {"action": found.action, "verdict": found.verdict, "reason": found.reason, "evidence": found.evidence}
    return row | {"now": now, "devices": frozen}


@router.get("/{rollout}/decisions", summary="Every decision with its evidence, oldest first")
def decisions(context: Ctx, _caller: Viewer, rollout: str, after: After = None, limit: Limit = 100) -> dict[str, Any]:
    (last,) = read_cursor(after, int) or (0,)
    c = t.decisions.c
    with reading(context.engine) as conn:
        rollouts.require(conn, rollout)
        query = select(t.decisions).where(c.rollout == rollout, c.id > last).order_by(c.id).limit(limit)
        items = [dict(row) for row in conn.execute(query).mappings()]
    return page(items, limit, items[-1]["id"] if items else 0)


@router.get("/{rollout}/looks", summary="Every look of the judge with its ruling, oldest first")
def list_looks(context: Ctx, _caller: Viewer, rollout: str, after: After = None, limit: Limit = 100) -> dict[str, Any]:
    last = read_cursor(after, int, int) or (-1, 0)
    c = t.looks.c
    with reading(context.engine) as conn:
        rollouts.require(conn, rollout)
        query = select(c.stage, c.number, c.at_ms, c.information, c.ruling)
        query = query.where(c.rollout == rollout, tuple_(c.stage, c.number) > tuple_(*last))
        items = [dict(row) for row in conn.execute(query.order_by(c.stage, c.number).limit(limit)).mappings()]
    return page(items, limit, *((items[-1]["stage"], items[-1]["number"]) if items else ()))


@router.get(
    "/{rollout}/explain", summary="Recompute the judge's rulings on a stage from stored evidence, 50 looks at most"
)
def explain(
    context: Ctx,
    _caller: Viewer,
    rollout: str,
    stage: Annotated[int | None, Query(ge=0)] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=recomputing.MOST_EXPLAINED)] = recomputing.MOST_EXPLAINED,
) -> dict[str, Any]:
    """`identical` says whether each of these looks gives the stored ruling again, byte for byte, from its evidence and what the look
    before it left; a look that is not has `recomputed` or a `fault`. `ruling` is of the stage's newest look, `count` how many it has.
    Without `stage`: the last judged; name it to ask on with `after`.
    """
    (last,) = read_cursor(after, int) or (0,)
    with reading(context.engine) as conn:
        row = rollouts.require(conn, rollout)
        wanted = looks.newest_stage(conn, rollout) if stage is None else stage
        found = recomputing.explain(conn, row, wanted, after=last, limit=limit)
    # Recomputing takes seconds: no transaction waits for it.
    return found.to_builtins() | {"state": row["state"], "reason": row["reason"]}


@router.post("/{rollout}/pause", summary="Stay where it is")
def pause(context: Ctx, caller: Operator, rollout: str, why: Why | None = None) -> dict[str, Any]:
    return _command(context, caller.actor, rollout, "pause", why)


@router.post("/{rollout}/resume", summary="Go on after a pause")
def resume(context: Ctx, caller: Operator, rollout: str, why: Why | None = None) -> dict[str, Any]:
    return _command(context, caller.actor, rollout, "resume", why)


@router.post(
    "/{rollout}/rollback", summary="Every device goes back to the stable bundle; ends when none online has the other"
)
def rollback(context: Ctx, caller: Operator, rollout: str, why: Why | None = None) -> dict[str, Any]:
    return _command(context, caller.actor, rollout, "roll_back", why)


@router.post("/{rollout}/abort", summary="End it now: every device goes back to the stable bundle")
def abort(context: Ctx, caller: Operator, rollout: str, why: Why | None = None) -> dict[str, Any]:
    return _command(context, caller.actor, rollout, "abort", why)


def _command(context: Ctx, actor: str, rollout: str, action: core.Action, why: Why | None) -> dict[str, Any]:
    with writing(context.engine) as conn:
        if why is not None and why.version is not None:
            conn.execute(select(t.rollouts.c.id).where(t.rollouts.c.id == rollout).with_for_update())
            row = rollouts.require(conn, rollout)
            now = {name: row[name] for name in ("state", "stage", "reason")}
            versions.expect(conn, f"rollout:{rollout}", wanted=why.version, present=row["version"], now=now)
        row = rollouts.command(
            conn,
            rollout,
            action,
            reason=why.reason if why else "",
            actor=actor,
            now_ms=context.now_ms(),
            seen_s=context.settings.rollout.seen_s,
        )
    context.wake()
    return row
