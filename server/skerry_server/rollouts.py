"""Rollouts in the database: making one, gathering its evidence, and carrying out what was decided about it.

``core.rollout`` decides; this module reads what it needs and writes what it said. Each move writes the rollout, the decision with
its evidence, the audit row, the group document and its bell in the caller's one transaction, under the row's version: of two
that move the same rollout at once, the second is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
from skerry_contract import group as g
from skerry_contract import histogram as h
from skerry_contract import ids
from skerry_contract import manifest as m
from sqlalchemy import Connection, and_, case, delete, func, insert, select, update

from skerry_server import audit, groups, reports
from skerry_server.core import cuts, eligibility
from skerry_server.core import plan as p
from skerry_server.core import rollout as core
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.errors import Conflict, Invalid, NotFound

MAX_CONTROLS = 2000
SILENT_NAMED = 5
"""Devices that fell silent which a decision names; it always counts all of them."""
SALT_DRAWS = 64
SALT_DRAWS_UP_TO = 10_000
"""In a larger fleet the salt is drawn once: trying many would take longer than it saves."""

_EVERYONE = {g.ANY_STRATUM: g.EVERYONE}


def require(conn: Connection, rollout: str) -> dict[str, Any]:
    """The rollout's row. Raises ``NotFound``."""
    row = conn.execute(select(t.rollouts).where(t.rollouts.c.id == rollout)).mappings().first()
    if row is None:
        raise NotFound("rollout", rollout)
    return dict(row)


def require_version(conn: Connection, rollout: str, version: int) -> None:
    """Raises ``Conflict`` when the rollout has moved on since that version."""
    found = require(conn, rollout)["version"]
    if found != version:
        raise Conflict("moved_on", f"rollout {rollout!r} has changed since", version=found)


def create(
    conn: Connection,
    *,
    group: str,
    model: str,
    candidate: str,
    plan: object,
    rollout_id: str | None,
    actor: str,
    now_ms: int,
    seen_s: float,
    floors: Mapping[str, str],
) -> dict[str, Any]:
    """Makes a rollout and starts its first stage; returns its row.

    A group that does not run the model yet has nothing to compare with: the plan then becomes one stage of everyone.

    Args:
        floors: model -> lowest version that devices may activate; they would refuse a candidate below it.

    Raises:
        NotFound: no such group or bundle. Conflict: bundle not approved, below its floor, already stable, model taken, id used.
        Invalid: the plan, with every fault in it.
    """
    try:
        wanted = p.read_plan(plan)
    except p.BadPlan as error:
        raise Invalid("bad_plan", "; ".join(error.faults), faults=list(error.faults)) from None
    groups.require(conn, group)
    ids.model_name(model)
    bundle = groups.runnable(conn, candidate, model=model, states=("approved",))
    floor = floors.get(model)
    if floor is not None and ids.version_key(bundle["version"]) < ids.version_key(floor):
        raise Conflict("below_floor", f"{model} {bundle['version']} is below the floor {floor}", floor=floor)
    taken = groups.active_rollout(conn, group, model)
    if taken is not None:
        raise Conflict("rollout_active", f"rollout {taken!r} of {model!r} in {group!r} is under way", rollout=taken)
    name = ids.rollout_id(rollout_id or f"r-{model[:40]}-{secrets.token_hex(4)}")
    if conn.execute(select(t.rollouts.c.id).where(t.rollouts.c.id == name)).first():
        raise Conflict("id_taken", f"a rollout {name!r} is or was there")
    c = t.group_models.c
    stable = conn.execute(select(c.stable).where(c.group == group, c.model == model)).scalar()
    if stable == candidate:
        raise Conflict("already_stable", f"{group!r} runs {model} {bundle['version']} already")
    if stable is None:
        wanted = p.whole_fleet(wanted)
        conn.execute(insert(t.group_models).values(group=group, model=model, stable=candidate))
    known = eligible(conn, group=group, model=model, manifest=m.parse(bundle["manifest"]), now_ms=now_ms, seen_s=seen_s)
    row = {
        "id": name,
        "group": group,
        "model": model,
        "stable": stable or candidate,
        "candidate": candidate,
        "salt": _salt(known, wanted.stages[0], stratified=wanted.stratified),
        "plan": wanted.to_builtins(),
        "state": "draft",
        "stage": 0,
        "stage_since_ms": now_ms,
        "entered_ms": now_ms,
        "cuts": {},
        "created_by": actor,
        "created_ms": now_ms,
        "version": 1,
        "reason": "",
    }
    conn.execute(insert(t.rollouts).values(**row))
    first = " (the model's first bundle here: one stage of everyone)" if stable is None else ""
    decision = core.Decision(
        action="start", verdict="", reason=f"started by {actor}{first}", evidence={"eligible": len(known)}
    )
    carry_out(conn, name, decision, actor=actor, now_ms=now_ms, seen_s=seen_s, version=1)
    return require(conn, name)


def _salt(known: list[cuts.Eligible], stage: p.Stage, *, stratified: bool) -> str:
    draws = SALT_DRAWS if len(known) <= SALT_DRAWS_UP_TO else 1
    k = stage.devices if stage.devices is not None else cuts.share_of(len(known), stage.share or 0)
    return cuts.choose_salt(known, [secrets.token_hex(16) for _ in range(draws)], k, stratified=stratified)


def eligible(
    conn: Connection, *, group: str, model: str, manifest: m.Manifest, now_ms: int, seen_s: float
) -> list[cuts.Eligible]:
    """The devices a stage may count on: enrolled, heard of within ``seen_s``, not pinned, with a variant that fits."""
    c = t.devices.c
    pinned = select(t.pins.c.device).where(t.pins.c.model == model)
    query = select(c.id, c.stratum, c.online, c.seen_ms, c.state).where(
        c.group == group, c.status == "enrolled", c.seen_ms.is_not(None), c.id.not_in(pinned)
    )
    since = now_ms - int(seen_s * 1000)
    return [
        cuts.Eligible(device=ids.DeviceId(row.id), stratum=row.stratum, online=row.online)
        for row in conn.execute(query)
        if (row.online or row.seen_ms >= since) and eligibility.has_variant(manifest, row.state or {})
    ]


def value(row: Mapping[str, Any]) -> core.Rollout:
    """The row as ``core`` reads it."""
    return core.Rollout(
        id=row["id"],
        state=row["state"],
        stage=row["stage"],
        stage_since_ms=row["stage_since_ms"],
        plan=p.read_plan(row["plan"]),
        first=row["stable"] == row["candidate"],
    )


def gather(conn: Connection, row: Mapping[str, Any]) -> core.Evidence:
    """The recorded evidence of the stage now running. Reads only."""
    c = t.devices.c
    pinned = select(t.pins.c.device).where(t.pins.c.model == row["model"])
    query = select(c.id, c.stratum, c.online, c.running, c.seen_ms, c.gone_ms).where(
        c.group == row["group"], c.status == "enrolled", c.id.not_in(pinned)
    )
    cut = g.Rollout(
        id=row["id"], stage=row["stage"], candidate=g.Target(digest="", version=""), salt=row["salt"], cuts=row["cuts"]
    )
    told = reports.of_rollout(conn, row)
    reverted: dict[str, int] = {}
    for code in told.went_back.values():
        reverted[code] = reverted.get(code, 0) + 1
    # A resumed stage goes on with what was counted in it, and with who has fallen silent in it. A device that was online when
    # the server or its broker ended sends no will: until it speaks again it counts as online, but not as confirmed.
    entered_ms = row["entered_ms"]
    fresh_ms = max(entered_ms, queries.server_session_since(conn))
    silent: list[str] = []
    names = ("candidates", "online", "unheard", "confirmed", "confirmed_on_golden", "trial", "unable", "still")
    n = dict.fromkeys(names, 0)
    for device in conn.execute(query.order_by(c.id)):
        running = (device.running or {}).get(row["model"]) or {}
        answers = running.get("digest") == row["candidate"]
        n["still"] += bool(device.online and answers)
        if not g.is_candidate(cut, ids.DeviceId(device.id), device.stratum):
            continue
        n["candidates"] += 1
        if not device.online:
            if device.id not in told.unable and (device.gone_ms or 0) >= entered_ms:
                silent.append(device.id)
            continue
        n["online"] += 1
        heard = (device.seen_ms or 0) >= fresh_ms
        n["unheard"] += not heard
        if heard and answers and running.get("state") in ("confirmed", "confirmed_on_golden", "trial"):
            n[running["state"]] += 1
        elif not answers and device.id in told.unable:
            n["unable"] += 1
    counts, p95_ms = _counts(conn, row)
    return core.Evidence(
        candidates=n["candidates"],
        online=n["online"],
        silent=len(silent),
        silent_ids=tuple(silent[:SILENT_NAMED]),
        confirmed=n["confirmed"],
        on_golden=n["confirmed_on_golden"],
        unheard=n["unheard"],
        on_trial=n["trial"],
        unable=n["unable"],
        still=n["still"],
        reverted=reverted,
        disbelieved=told.disbelieved,
        p95_ms=p95_ms,
        **counts,
    )


def _counts(conn: Connection, row: Mapping[str, Any]) -> tuple[dict[str, int], float | None]:
    c = t.evidence.c
    # A window says by itself which rollout it belongs to: only the group's own devices are believed.
    mine = select(t.devices.c.id).where(t.devices.c.group == row["group"], t.devices.c.status == "enrolled")
    where = (
        c.rollout == row["id"],
        c.stage == row["stage"],
        c.arm == "candidate",
        c.bundle == row["candidate"],
        c.device.in_(mine),
    )
    sums = select(*(func.coalesce(func.sum(c[name]), 0) for name in ("ok", "invalid", "failed", "shed"))).where(*where)
    ok, invalid, failed, shed = conn.execute(sums).one()
    latency = h.Exponential()
    for packed in conn.execute(select(c.latency).where(*where)).scalars():
        latency = h.merge_exponential(latency, msgspec.msgpack.decode(packed, type=h.Exponential))
    p95_ns = h.quantile(latency, 0.95)
    counts = {"ok": int(ok), "invalid": int(invalid), "failed": int(failed), "shed": int(shed)}
    return counts, None if p95_ns is None else p95_ns / 1e6


def carry_out(
    conn: Connection,
    rollout: str,
    decision: core.Decision,
    *,
    actor: str,
    now_ms: int,
    seen_s: float,
    version: int | None = None,
) -> dict[str, Any]:
    """Does what was decided: rollout, decision, audit row, group document and bell, all in the caller's transaction.

    Args:
        version: of the row that the decision was made about; None for a person's command, which means the present one.

    Raises:
        Conflict: the rollout has moved on since, or has no such transition from its state.
    """
    if version is not None:
        require_version(conn, rollout, version)
    row = require(conn, rollout)
    try:
        state = core.transition(row["state"], decision.action, first=row["stable"] == row["candidate"])
    except core.NotAllowed as error:
        raise Conflict("not_allowed", str(error), state=row["state"]) from None
    plan = p.read_plan(row["plan"])
    resumed: dict[str, Any] = {}
    if decision.action == "resume":
        silent = int(decision.evidence.get("silent", 0))
        resumed, note = _resume(conn, row, plan, silent=silent, now_ms=now_ms, seen_s=seen_s)
        decision = replace(decision, reason=decision.reason + note)
    conn.execute(
        insert(t.decisions).values(
            rollout=rollout,
            at_ms=now_ms,
            stage=row["stage"],
            action=decision.action,
            verdict=decision.verdict,
            reason=decision.reason,
            evidence=decision.evidence | ({"missing": list(decision.missing)} if decision.missing else {}),
        )
    )
    if decision.action == "hold":
        return row
    changes: dict[str, Any] = {"state": state, "reason": decision.reason, "version": row["version"] + 1}
    if decision.action in ("start", "advance"):
        stage = 0 if decision.action == "start" else row["stage"] + 1
        changes |= _enter(conn, row, plan, stage, now_ms=now_ms, seen_s=seen_s)
    elif decision.action == "complete" and row["state"] == "running":
        changes |= {"stage": len(plan.stages), "stage_since_ms": now_ms, "entered_ms": now_ms}
        changes["cuts"] = cuts.grow(row["cuts"], _EVERYONE)
    elif decision.action == "resume":
        changes |= resumed
    elif decision.action in ("complete", "roll_back"):
        changes["stage_since_ms"] = now_ms
    if state in ("completed", "rolled_back", "aborted"):
        changes["ended_ms"] = now_ms
    where = (t.group_models.c.group == row["group"], t.group_models.c.model == row["model"])
    if state == "completed":
        change = update(t.group_models).where(*where)
        conn.execute(change.values(stable=row["candidate"], version=t.group_models.c.version + 1))
    if state == "aborted" and row["stable"] == row["candidate"]:
        # The model's first bundle is withdrawn: the group has none again.
        conn.execute(delete(t.group_models).where(*where))
    conn.execute(update(t.rollouts).where(t.rollouts.c.id == rollout).values(**changes))
    groups.touch(conn, row["group"])
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action=f"rollout.{decision.action}",
        subject=f"rollout:{rollout}",
        before={"state": row["state"], "stage": row["stage"], "cuts": row["cuts"]},
        after={name: changes.get(name, row[name]) for name in ("state", "stage", "cuts")},
        reason=decision.reason,
    )
    return row | changes


def _resume(
    conn: Connection, row: Mapping[str, Any], plan: p.Plan, *, silent: int, now_ms: int, seen_s: float
) -> tuple[dict[str, Any], str]:
    """What a resumed stage changes, and what its decision says of that.

    A canary may have been revoked, or nobody was there to be cut when the stage began: it is cut again, and cuts only grow. The judge's
    list is frozen, and devices that join it later would be compared over another time than the others. So where too few of the list are
    left for the judge, the same stage begins anew as a further one: new list, new evidence, new looks; those so far stay as they are.

    Args:
        silent: candidates that fell silent since the stage began. A new stage would forget them, so they hold the old one.
    """
    stage, judge = int(row["stage"]), plan.judge
    known, placed = _place(conn, row, plan, stage, now_ms=now_ms, seen_s=seen_s)
    changes: dict[str, Any] = {"stage_since_ms": now_ms, "cuts": placed}
    if judge is None or not plan.is_judged(stage):
        return changes, ""
    d, v = t.rollout_devices.c, t.devices.c
    pinned = select(t.pins.c.device).where(t.pins.c.model == row["model"])
    here = case((and_(v.status == "enrolled", v.group == row["group"], v.id.not_in(pinned)), 1), else_=0)
    query = select(d.arm, func.count(), func.sum(here)).join_from(t.rollout_devices, t.devices, v.id == d.device)
    query = query.where(d.rollout == row["id"], d.stage == stage).group_by(d.arm)
    found = {arm: (int(of), int(left)) for arm, of, left in conn.execute(query)}
    (candidates, candidates_left), (controls, controls_left) = (
        found.get(arm, (0, 0)) for arm in ("candidate", "control")
    )
    # A fleet too small to compare is judged on its candidates alone, however few there were.
    least = min(judge.min_devices, max(1, candidates)) if judge.small_fleet else judge.min_devices
    least_controls = 0 if judge.small_fleet else judge.min_devices
    if candidates_left >= least and controls_left >= least_controls:
        return changes, ""
    cut = g.Rollout(id=row["id"], stage=stage, candidate=g.Target(digest="", version=""), salt=row["salt"], cuts=placed)
    inside = sum(g.is_candidate(cut, one.device, one.stratum) for one in known)
    left = f"; of the judge's list {candidates_left} of {candidates} candidates and {controls_left} of {controls} controls are left"
    if silent:
        return (
            changes,
            f"{left}, and {silent} silent still hold the stage: resume once more when they are back, revoked or pinned",
        )
    if inside < least or len(known) - inside < least_controls:
        return changes, (
            f"{left}, and of the devices there are now too few for another ({inside} and {len(known) - inside}): the stage cannot "
            "pass. Resume once more when there are more, or start a new rollout"
        )
    longer = p.begun_anew(plan, stage)
    if longer is None:
        return changes, f"{left}, and the plan has no room to begin the stage anew: only a new rollout helps"
    changes = _enter(conn, row, longer, stage + 1, now_ms=now_ms, seen_s=seen_s) | {"plan": longer.to_builtins()}
    return changes, f"{left}, so stage {stage + 1} begins anew as stage {stage + 2}, with a new list and new counts"


def _enter(
    conn: Connection, row: Mapping[str, Any], plan: p.Plan, stage: int, *, now_ms: int, seen_s: float
) -> dict[str, Any]:
    """Cuts the stage and freezes the list of devices that the judge will compare."""
    known, placed = _place(conn, row, plan, stage, now_ms=now_ms, seen_s=seen_s)
    cut = g.Rollout(id=row["id"], stage=stage, candidate=g.Target(digest="", version=""), salt=row["salt"], cuts=placed)
    salt = bytes.fromhex(row["salt"])
    arms = [(one, g.is_candidate(cut, one.device, one.stratum)) for one in known]
    controls = sorted((one for one, inside in arms if not inside), key=lambda one: g.hash64(salt, one.device))
    frozen = [(one, "candidate") for one, inside in arms if inside] + [
        (one, "control") for one in controls[:MAX_CONTROLS]
    ]
    if frozen:
        conn.execute(
            insert(t.rollout_devices),
            [
                {
                    "rollout": row["id"],
                    "stage": stage,
                    "device": one.device,
                    "arm": arm,
                    "stratum": one.stratum,
                    "online": one.online,
                }
                for one, arm in frozen
            ],
        )
    return {"stage": stage, "stage_since_ms": now_ms, "entered_ms": now_ms, "cuts": placed}


def _place(
    conn: Connection, row: Mapping[str, Any], plan: p.Plan, stage: int, *, now_ms: int, seen_s: float
) -> tuple[list[cuts.Eligible], dict[str, str]]:
    """The devices that a stage may count on now, and the cuts that give it its part of them."""
    bundle = conn.execute(select(t.bundles.c.manifest).where(t.bundles.c.digest == row["candidate"])).scalar_one()
    known = eligible(
        conn, group=row["group"], model=row["model"], manifest=m.parse(bundle), now_ms=now_ms, seen_s=seen_s
    )
    spec = plan.stages[stage]
    placed = cuts.plan_cuts(
        known, row["salt"], devices=spec.devices, share=spec.share, stratified=plan.stratified, old=row["cuts"]
    )
    return known, placed


def command(
    conn: Connection, rollout: str, action: core.Action, *, reason: str, actor: str, now_ms: int, seen_s: float
) -> dict[str, Any]:
    """A person's pause, resume, roll back or abort.

    Raises:
        Conflict: as ``carry_out``, and where there is no bundle to roll back to.
    """
    row = require(conn, rollout)
    is_possible = (row["state"], action) in core.TRANSITIONS
    if action == "roll_back" and is_possible and row["stable"] == row["candidate"]:
        raise Conflict(
            "first_bundle", "this is the model's first bundle here, so there is none to go back to; abort takes it away"
        )
    if action == "resume" and is_possible and row["stage"] >= len(p.read_plan(row["plan"]).stages):
        # It was paused while completing, and goes on there.
        action = "complete"
    evidence = gather(conn, row).to_builtins()
    words = core.COMMANDS.get(action, action)
    decision = core.Decision(action=action, verdict="", reason=reason or f"{words} by {actor}", evidence=evidence)
    return carry_out(conn, rollout, decision, actor=actor, now_ms=now_ms, seen_s=seen_s)


def last_decision(conn: Connection, rollout: str) -> dict[str, Any] | None:
    """The newest decision's row, or None."""
    c = t.decisions.c
    row = (
        conn.execute(select(t.decisions).where(c.rollout == rollout).order_by(c.id.desc()).limit(1)).mappings().first()
    )
    return None if row is None else dict(row)


def arms(conn: Connection, rollout: str, stage: int, *, most: int | None = 10_000) -> dict[str, list[str]]:
    """The frozen list of a stage: arm -> device ids, sorted. A completing rollout shows its last stage's list.

    Args:
        most: devices of both arms that are read, by name; None for all.
    """
    c = t.rollout_devices.c
    newest = select(func.max(c.stage)).where(c.rollout == rollout, c.stage <= stage).scalar_subquery()
    query = select(c.device, c.arm).where(c.rollout == rollout, c.stage == newest).order_by(c.device).limit(most)
    found: dict[str, list[str]] = {"candidate": [], "control": []}
    for row in conn.execute(query):
        found[row.arm].append(row.device)
    return found
