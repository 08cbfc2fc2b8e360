"""Looks in the database: reading the evidence of a stage for ``core.judge``, keeping what it said, saying it again.

A look is stored with everything it rests on, in the transaction of the decision that follows from it. The design is not stored: it
is made from the plan, the frozen list of the stage and the bundle, none of which change; a memory names the design it belongs to.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from skerry_contract import histogram as h
from skerry_contract import manifest as m
from sqlalchemy import Connection, Text, func, insert, select, type_coerce

from skerry_server import evidence, reports
from skerry_server.core import judge as j
from skerry_server.core import judge_plan
from skerry_server.core import plan as p
from skerry_server.db import tables as t

SMALLEST_P95 = 20
"""Requests of a device behind a p95; with fewer it has none."""
ACCURACY_DROP = 0.05
"""How far below its validated accuracy a candidate may be where its bundle does not say."""

MOST_EXPLAINED = 50
"""Looks that are recomputed for one question. One takes 0.03 to 0.1 s with 2,010 devices, in the process that takes what devices send."""


class UnreadableLook(Exception):
    """A look is stored that this release cannot read. Names it, and what is wrong."""

    def __init__(self, rollout: str, stage: int, number: int, cause: Exception) -> None:
        self.number, self.why = number, f"{type(cause).__name__}: {cause}"
        super().__init__(
            f"the stored look {number} of stage {stage + 1} of rollout {rollout} cannot be read: {self.why}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """A look, new or stored. ``at_ms``: by the server's clock."""

    stage: int
    at_ms: int
    look: j.Look
    ruling: j.Ruling
    memory: j.Memory


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


def last(conn: Connection, rollout: str, stage: int) -> Taken | None:
    """The newest look at a stage.

    Raises:
        UnreadableLook: the judge cannot go on from it.
    """
    c = t.looks.c
    query = select(*_LOOK).where(c.rollout == rollout, c.stage == stage).order_by(c.number.desc()).limit(1)
    row = conn.execute(query).mappings().first()
    return None if row is None else _taken(dict(row))


def standing(conn: Connection, rollout: str, stage: int) -> tuple[j.Ruling | None, str]:
    """What the judge last said of a stage, and why that cannot be told: the two as ``core.rollout.decide`` takes them.

    For all who show how a rollout stands: a stored look that cannot be read is a fault of this one rollout, not of the question.
    """
    try:
        taken = last(conn, rollout, stage)
    except UnreadableLook as error:
        return None, str(error)
    return None if taken is None else taken.ruling, ""


def newest_stage(conn: Connection, rollout: str) -> int:
    """The last stage that was looked at; 0 when none was."""
    return int(
        conn.execute(
            select(func.coalesce(func.max(t.looks.c.stage), 0)).where(t.looks.c.rollout == rollout)
        ).scalar_one()
    )


def all_of(conn: Connection, rollout: str, stage: int) -> list[Taken]:
    """Every look at a stage, oldest first."""
    c = t.looks.c
    query = select(*_LOOK).where(c.rollout == rollout, c.stage == stage).order_by(c.number)
    return [_taken(dict(row)) for row in conn.execute(query).mappings()]


def is_due(judge: judge_plan.Judge, before: Taken | None, now_ms: int) -> bool:
    """Whether it is time for the next look."""
    return before is None or now_ms - before.at_ms >= judge.look_s * 1000


def take(conn: Connection, row: Mapping[str, Any], plan: p.Plan, before: Taken | None, *, now_ms: int) -> Taken | None:
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
    taken = Taken(stage=stage, at_ms=now_ms, look=look, ruling=ruling, memory=memory)
    # A look that could not be read again would stop every later one, and the page: it is never stored.
    again = _taken(_stored(row["id"], taken) | {"ruling": msgspec.json.decode(_bytes(ruling))})
    if again.look != look or again.memory != memory or _bytes(again.ruling) != _bytes(ruling):
        raise ValueError(f"look {look.number} would not be read as it was written")
    return taken


def keep(conn: Connection, rollout: str, taken: Taken) -> None:
    """Stores a look, in the caller's transaction."""
    conn.execute(insert(t.looks).values(**_stored(rollout, taken)))


def explain(
    conn: Connection, row: Mapping[str, Any], stage: int, *, after: int = 0, limit: int = MOST_EXPLAINED
) -> Explained:
    """Looks of a stage to be held against what they rest on. Reads only; ``Explained.to_builtins`` recomputes, which takes longer.

    Args:
        after: number of the look before the first that is wanted.
        limit: as many looks at most.
    """
    c = t.looks.c
    of_stage = (c.rollout == row["id"], c.stage == stage)
    count = conn.execute(select(func.count()).select_from(t.looks).where(*of_stage)).scalar_one()
    # The one before them too: what it left is where the first of them begins.
    query = select(*_LOOK).where(*of_stage, c.number >= after).order_by(c.number).limit(limit + 2)
    rows = [dict(found) for found in conn.execute(query).mappings()]
    first = int(bool(rows) and rows[0]["number"] <= after)
    return Explained(
        rollout=row["id"],
        stage=stage,
        count=count,
        before=rows[0] if first else None,
        rows=rows[first : first + limit],
        is_more=len(rows) > first + limit,
        design=design(conn, row, p.read_plan(row["plan"]), stage) if count else None,
        ruling=standing(conn, row["id"], stage)[0],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """Some stored looks of a stage, as they are stored.

    Attributes:
        count: looks that the stage has in all.
        before: the look before the first of ``rows``; None at the start of the stage, or when it is not there.
        is_more: there are looks after these.
        design: None when the stage was never looked at.
        ruling: of the stage's newest look; None without one, or when it cannot be read.
    """

    rollout: str
    stage: int
    count: int
    before: dict[str, Any] | None
    rows: list[dict[str, Any]]
    is_more: bool
    design: j.Design | None
    ruling: j.Ruling | None

    def to_builtins(self) -> dict[str, Any]:
        """Recomputes each look from what is stored, and says whether the same comes out, byte for byte.

        A look begins from the memory that the look before it left, as it is stored. So all looks of a stage come out the same
        exactly when a replay from the first one does, whoever asks for them in however many parts.
        """
        units = self.design.units if self.design is not None else ()
        looks: list[dict[str, Any]] = []
        before = self.before
        for row in self.rows:
            looks.append(self._look(row, before))
            before = row
        return {
            "rollout": self.rollout,
            "stage": self.stage,
            "looks": looks,
            "count": self.count,
            "next": str(self.rows[-1]["number"]) if self.is_more else None,
            "identical": all(look["identical"] for look in looks),
            "arms": {
                "candidate": [unit.device for unit in units if unit.candidate],
                "control": [unit.device for unit in units if not unit.candidate],
            }
            if units
            else {},
            "ruling": None if self.ruling is None else self.ruling.to_builtins(),
        }

    def _look(self, row: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
        said = {"number": row["number"], "at_ms": row["at_ms"], "information": row["information"]}
        try:
            taken = _taken(row)
        except UnreadableLook as error:
            return said | {"verdict": "", "reasons": [], "identical": False, "fault": f"cannot be read: {error.why}"}
        said |= {"verdict": taken.ruling.verdict, "reasons": list(taken.ruling.reasons)}
        try:
            ruling, memory = self._recomputed(row, taken, before)
        except (UnreadableLook, ValueError, TypeError, ArithmeticError) as error:
            return said | {"identical": False, "fault": f"cannot be recomputed: {error}"}
        if _bytes(ruling) == _bytes(taken.ruling) and _bytes(memory) == _bytes(taken.memory):
            return said | {"identical": True}
        return said | {"identical": False, "recomputed": ruling.to_builtins()}

    def _recomputed(
        self, row: Mapping[str, Any], taken: Taken, before: Mapping[str, Any] | None
    ) -> tuple[j.Ruling, j.Memory]:
        assert self.design is not None
        if taken.look.number != row["number"]:
            raise ValueError(f"what is stored is of look {taken.look.number}")
        if row["number"] == 1:
            return j.judge(self.design, taken.look, j.Memory())
        if before is None or before["number"] != row["number"] - 1:
            raise ValueError("the look before it is missing")
        return j.judge(self.design, taken.look, _taken(before).memory)


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


# --- stored form ------------------------------------------------------------------------------------------------------------


def _bytes(value: j.Ruling | j.Memory) -> bytes:
    return msgspec.json.encode(value.to_builtins(), order="sorted")


def _packed(value: j.Look | j.Memory) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(value))


def _stored(rollout: str, taken: Taken) -> dict[str, Any]:
    return {
        "rollout": rollout,
        "stage": taken.stage,
        "number": taken.look.number,
        "at_ms": taken.at_ms,
        "information": taken.look.information,
        "evidence": _packed(taken.look),
        "ruling": taken.ruling.to_builtins(),
        "memory": _packed(taken.memory),
    }


# As text, where the database gives it so: then JSON that is none shows in ``_taken``, and not while rows are fetched.
_LOOK = tuple(type_coerce(c, Text).label(c.name) if c.name == "ruling" else c for c in t.looks.c)


def _taken(row: Mapping[str, Any]) -> Taken:
    try:
        ruling = row["ruling"]
        return Taken(
            stage=row["stage"],
            at_ms=row["at_ms"],
            look=msgspec.msgpack.decode(zlib.decompress(row["evidence"]), type=j.Look),
            ruling=j.Ruling.from_builtins(json.loads(ruling) if isinstance(ruling, str) else ruling),
            memory=msgspec.msgpack.decode(zlib.decompress(row["memory"]), type=j.Memory),
        )
    except (zlib.error, msgspec.MsgspecError, ValueError, TypeError) as error:
        raise UnreadableLook(row["rollout"], row["stage"], row["number"], error) from error
