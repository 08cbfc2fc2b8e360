"""The next look at a stage: reading its evidence for ``core.judge``, and asking it.

A look is stored (``looks``) with everything it rests on, in the transaction of the decision that follows from it. The design is not
stored: it is made from the plan, the frozen list of the stage and the bundle, none of which change; a memory names the design it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from skerry_contract import histogram as h
from skerry_contract import manifest as m
from sqlalchemy import Connection, select

from skerry_server import evidence, looks, reports
from skerry_server.core import judge as j
from skerry_server.core import judge_plan
from skerry_server.core import plan as p
from skerry_server.db import tables as t

SMALLEST_P95 = 20
"""Requests of a device behind a p95; with fewer it has none."""
ACCURACY_DROP = 0.05
"""How far below its validated accuracy a candidate may be where its bundle does not say."""


def design(conn: Connection, row: Mapping[str, Any], plan: p.Plan, stage: int) -> j.Design:
    """The design of a stage that is judged."""
    judge = plan.judge
    if judge is None:
        raise ValueError("the plan has no judge")
    c = t.rollout_devices.c
    query = select(c.device, c.stratum, c.arm, c.online).where(c.rollout == row["id"], c.stage == stage)
    # The salt was chosen so that the first candidates are online: among devices online then, and among the others, any
    # division was as likely as another, but not across both.
    units = [
        j.Unit(
            device=frozen.device,
            stratum=f"{'online' if frozen.online else 'offline'} {frozen.stratum}",
            candidate=frozen.arm == "candidate",
        )
        for frozen in conn.execute(query.order_by(c.device))
    ]
    return judge_plan.design_of(
        judge,
        rollout=row["id"],
        stage=stage,
        compared=max(1, plan.compared),
        units=units,
        limits=_limits(conn, row, plan.gates),
    )


def _limits(conn: Connection, row: Mapping[str, Any], gates: p.Gates) -> dict[str, float]:
    packed = conn.execute(select(t.bundles.c.manifest).where(t.bundles.c.digest == row["candidate"])).scalar_one()
    manifest = m.parse(packed)
    found: dict[str, float] = {}
    if manifest.reference is not None and manifest.reference.accuracy is not None:
        drop = manifest.slo.accuracy_drop if manifest.slo.accuracy_drop is not None else ACCURACY_DROP
        found["labelled_errors"] = min(1.0, 1 - manifest.reference.accuracy + drop)
    if gates.max_error_rate is not None:
        found["failures"] = gates.max_error_rate
    if gates.latency_p95_ms is not None:
        found["latency_p95"] = gates.latency_p95_ms
    return found


def is_due(judge: judge_plan.Judge, before: looks.Taken | None, now_ms: int) -> bool:
    """Whether it is time for the next look."""
    return before is None or now_ms - before.at_ms >= judge.look_s * 1000


def take(
    conn: Connection, row: Mapping[str, Any], plan: p.Plan, before: looks.Taken | None, *, now_ms: int
) -> looks.Taken | None:
    """The next look at the stage now running; None when the stage is not judged. Reads only.

    Args:
        before: the look before, None for the first.

    Raises:
        ValueError: the look does not follow the one before.
        UnreadableLook: it could not be read again.
    """
    stage = int(row["stage"])
    if plan.judge is None or not plan.is_judged(stage):
        return None
    made = design(conn, row, plan, stage)
    began_ms = row["entered_ms"]
    readings = read(conn, row, plan.judge, made.units, began_ms=began_ms, now_ms=now_ms)
    labels = _labels(made, readings)
    look = j.Look(
        number=before.look.number + 1 if before else 1,
        information=plan.judge.information((now_ms - began_ms) / 1000, labels),
        readings={rail.name: readings[rail.name] for rail in made.guardrails},
    )
    ruling, memory = j.judge(made, look, before.memory if before else j.Memory())
    taken = looks.Taken(stage=stage, at_ms=now_ms, look=look, ruling=ruling, memory=memory)
    # A look that could not be read again would stop every later one, and the page: it is never stored.
    again = looks.taken_of(looks.stored(row["id"], taken) | {"ruling": msgspec.json.decode(looks.as_bytes(ruling))})
    if again.look != look or again.memory != memory or looks.as_bytes(again.ruling) != looks.as_bytes(ruling):
        raise ValueError(f"look {look.number} would not be read as it was written")
    return taken


# --- evidence -------------------------------------------------------------------------------------------------------------


def read(
    conn: Connection,
    row: Mapping[str, Any],
    judge: judge_plan.Judge,
    units: Sequence[j.Unit],
    *,
    began_ms: int,
    now_ms: int,
) -> dict[str, j.Reading]:
    """One reading per guardrail of what is recorded of a stage, in the order of the units."""
    stage = int(row["stage"])
    wanted = {unit.device: unit.candidate for unit in units}
    bundle = {True: row["candidate"], False: row["stable"]}
    now: dict[str, evidence.Evidence] = {}
    for one in evidence.of_rollout(conn, row["id"], stage):
        inside = wanted.get(one.device)
        if inside is not None and one.bundle == bundle[inside] and (one.arm == "candidate") == inside:
            now[one.device] = one
    pasts = evidence.pasts(conn, row["id"], row["model"], stage)
    held = evidence.held_labels(conn, [row["candidate"], row["stable"]])
    past_latency = _past_latency(conn, row, stage)
    troubled = _troubled(conn, row, judge, stage, began_ms=began_ms, now_ms=now_ms)
    rows: dict[str, list[tuple[int, int, int, int]]] = {name: [] for name in judge_plan.KINDS}
    for unit in units:
        own = now.get(unit.device)
        counts = own.compared() if own else evidence.Compared(0, 0, 0, 0, 0, h.Exponential())
        past = pasts.get(unit.device, evidence.Past())
        mine = held.get((unit.device, bundle[unit.candidate]), evidence.ALL_LABELS)
        before = held.get((unit.device, row["stable"]), evidence.ALL_LABELS)
        rows["labelled_errors"].append(
            (mine.of(counts.labelled), mine.of(counts.wrong), before.of(past.labelled), before.of(past.wrong))
        )
        rows["failures"].append((counts.requests, counts.failed + counts.shed, past.ok + past.failed, past.failed))
        rows["latency_p95"].append((*_level(counts.latency), *_level(past_latency.get(unit.device, h.Exponential()))))
        online = unit.stratum.startswith("online")
        rows["trouble"].append((int(online), int(online and unit.device in troubled), 0, 0))
    pastless = {rail.name for rail in judge.guardrails if not rail.past}
    found: dict[str, j.Reading] = {}
    for name, of_units in rows.items():
        n, x, pre_n, pre_x = (tuple(one[i] for one in of_units) for i in range(4))
        if name in pastless:
            pre_n = pre_x = (0,) * len(of_units)
        found[name] = j.Reading(n=n, x=x, pre_n=pre_n, pre_x=pre_x)
    return found


def _past_latency(conn: Connection, row: Mapping[str, Any], stage: int) -> dict[str, h.Exponential]:
    """Per frozen device the latency it had counted of the stable bundle before the rollout.

    Nothing of the rollout's own earlier stages, in which only one arm ran that bundle.
    """
    c, d = t.evidence.c, t.rollout_devices.c
    frozen = select(d.device).where(d.rollout == row["id"], d.stage == stage)
    query = select(c.device, c.latency).where(
        c.device.in_(frozen),
        c.model == row["model"],
        c.bundle == row["stable"],
        c.rollout != row["id"],
    )
    parts: dict[str, list[h.Exponential]] = {}
    for device, packed in conn.execute(query):
        parts.setdefault(device, []).append(msgspec.msgpack.decode(packed, type=h.Exponential))
    return {device: evidence.merged(found) for device, found in parts.items()}


def _level(latency: h.Exponential) -> tuple[int, int]:
    requests = latency.zero + sum(latency.counts)
    p95_ns = h.quantile(latency, 0.95) if requests >= SMALLEST_P95 else None
    return (requests, j.level_of(p95_ns / 1e6)) if p95_ns else (0, 0)


def _troubled(
    conn: Connection, row: Mapping[str, Any], judge: judge_plan.Judge, stage: int, *, began_ms: int, now_ms: int
) -> set[str]:
    """Frozen devices of which a worker crashed or hung in this stage, and candidates that went back, and frozen devices that fell silent."""
    told = reports.of_rollout(conn, row)
    found = {*told.went_back, *(device for device, at_ms in told.crashed.items() if at_ms >= began_ms)}
    d, v = t.rollout_devices.c, t.devices.c
    frozen = select(d.device).where(d.rollout == row["id"], d.stage == stage)
    since = now_ms - int(judge.silent_s * 1000)
    silent = select(v.id).where(v.id.in_(frozen), v.seen_ms.is_(None) | (v.seen_ms < since))
    return found | set(conn.execute(silent).scalars())


def _labels(made: j.Design, readings: Mapping[str, j.Reading]) -> int:
    return sum(n for unit, n in zip(made.units, readings["labelled_errors"].n, strict=True) if unit.candidate)
