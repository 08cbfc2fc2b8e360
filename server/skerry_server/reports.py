"""What devices say of a rollout's candidate, and of their workers' deaths: one row per rollout and device, kept when events are taken.

Owns the table ``rollout_reports``. A rollout is looked at every few seconds, and a device may send as many events as it likes: what a
look reads must not grow with them. Leaves what a code means to ``core.eligibility`` and what follows to ``core.rollout`` and the judge.

**Who is believed.** A device takes the candidate when its hash lies below the cut, and cuts only grow: so a device that went back from it,
or refused it, is below the cut, or was frozen as a candidate of a stage and changed its stratum since. What any other device says of the
candidate cannot be; it is counted and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from skerry_contract import group as g
from skerry_contract import ids
from sqlalchemy import ColumnElement, Connection, Insert, and_, case, func, literal_column, select, update

from skerry_server.core import eligibility
from skerry_server.core import rollout as core
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.bulk import Many

CRASHES = ("runtime_crashed", "worker_hung")
"""Codes of a worker's event: the process died, or was killed because it no longer answered."""


class TakenEvent(NamedTuple):
    """An event of a device, committed. ``at_ms``: when it was, as ``anchors`` places it; ``received_ms``: the server's clock."""

    device: str
    received_ms: int
    at_ms: int
    name: str
    code: str
    data: dict[str, Any]


_WENT_WITH = frozenset({"runtime_crashed", "trial_crashed"})
_CONFIRMED = ("confirmed", "confirmed_on_golden")
_AT_BOOT = "@boot"
"""Behind such a code as it is stored: the agent itself went with it, for the first time on that device. It is taken back when the device
confirms the bundle later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reports:
    """What is known of a rollout.

    Attributes:
        went_back: candidate -> code with which it last went back from the bundle or refused it. A single device whose agent went
            without a word once is not among them.
        unable: candidates that said that they cannot run it, and have not run it since.
        disbelieved: devices of the group that say they went back from it, and are no candidates.
        crashed: device of either arm -> when its worker last crashed or hung with the model, by the server's clock.
    """

    went_back: dict[str, str]
    unable: frozenset[str]
    disbelieved: int
    crashed: dict[str, int]


def fold(connection: Connection, events: Sequence[TakenEvent]) -> None:
    """Adds what the events say to the rollouts under way in the groups of their devices, within the caller's transaction."""
    told = [
        e
        for e in events
        if (e.name == "update" and (e.code or _answers(e))) or (e.name == "worker" and e.code in CRASHES)
    ]
    if not told:
        return
    r, v = t.rollouts.c, t.devices.c
    query = (
        select(v.id.label("device"), r.id, r.model, r.candidate)
        .join_from(t.rollouts, t.devices, v.group == r.group)
        .where(v.id.in_(sorted({event.device for event in told})), r.state.in_(sorted(core.ACTIVE)))
    )
    moving: dict[str, list[Any]] = {}
    for row in connection.execute(query):
        moving.setdefault(row.device, []).append(row)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    able: dict[str, set[str]] = {}
    confirmed: dict[str, set[str]] = {}
    for event in told:
        for rollout in moving.get(event.device, ()):
            key = (rollout.id, event.device)
            if _answers(event) and _is_about(event, rollout):
                # It is able now: from here on it is missed when it falls silent.
                able.setdefault(rollout.id, set()).add(event.device)
                held = rows.get(key, {})
                held["unable"] = ""
                if event.data["state"] in _CONFIRMED:
                    # It was the power: the bundle runs there.
                    confirmed.setdefault(rollout.id, set()).add(event.device)
                    if _is_soft(held.get("went_back", "")):
                        held["went_back"] = ""
                continue
            news = _news(event, rollout)
            if news:
                nothing = {"rollout": key[0], "device": key[1], "went_back": "", "unable": "", "crashed_ms": 0}
                mine = rows.setdefault(key, nothing)
                if not (_is_soft(news.get("went_back", "")) and mine["went_back"] and not _is_soft(mine["went_back"])):
                    mine.update(news)
    c = t.rollout_reports.c
    for name, devices in able.items():
        unable = update(t.rollout_reports).where(c.rollout == name, c.device.in_(sorted(devices)), c.unable != "")
        connection.execute(unable.values(unable=""))
    for name, devices in confirmed.items():
        alone = update(t.rollout_reports).where(c.rollout == name, c.device.in_(sorted(devices)))
        connection.execute(alone.where(c.went_back.endswith(_AT_BOOT, autoescape=True)).values(went_back=""))
    _REPORTS.run(connection, list(rows.values()))


def _answers(event: TakenEvent) -> bool:
    """Whether the device says that a bundle answers requests there."""
    return event.name == "update" and not event.code and event.data.get("state") in ("trial", *_CONFIRMED)


def _is_soft(code: str) -> bool:
    """Whether a power cut may have been it. What the device found before stays."""
    return code.endswith(_AT_BOOT)


def _is_about(event: TakenEvent, rollout: Any) -> bool:
    return (event.data.get("rollout"), event.data.get("digest")) == (rollout.id, rollout.candidate)


def _news(event: TakenEvent, rollout: Any) -> dict[str, Any]:
    if event.name == "worker":
        models = event.data.get("models")
        return {"crashed_ms": event.received_ms} if isinstance(models, dict) and rollout.model in models else {}
    if not _is_about(event, rollout):
        return {}
    if eligibility.is_verdict_on_bundle(event.code):
        # An agent that went without a word the first time: one power cut, or the bundle. ``of_rollout`` asks whether others say it.
        # Attempts that a bad link ended are none of it; older agents count them in.
        times = event.data.get("ended_so", event.data.get("attempt"))
        once = event.data.get("at_boot") is True and times in (0, 1) and event.code in _WENT_WITH
        return {"went_back": event.code + (_AT_BOOT if once else "")}
    return {"unable": event.code} if eligibility.is_unable(event.code) else {}


def of_rollout(connection: Connection, row: Mapping[str, Any]) -> Reports:
    """What stands of a rollout, given as its row. Reads one row per device that said anything."""
    c, v, d = t.rollout_reports.c, t.devices.c, t.rollout_devices.c
    query = (
        select(c.device, c.went_back, c.unable, c.crashed_ms, v.stratum, v.group)
        .join_from(t.rollout_reports, t.devices, v.id == c.device)
        .where(c.rollout == row["id"])
        .order_by(c.device)
    )
    cut = g.Rollout(
        id=row["id"], stage=row["stage"], candidate=g.Target(digest="", version=""), salt=row["salt"], cuts=row["cuts"]
    )
    went_back: dict[str, str] = {}
    unable: set[str] = set()
    crashed: dict[str, int] = {}
    disbelieved = 0
    frozen: set[str] | None = None
    for one in connection.execute(query):
        if one.crashed_ms:
            crashed[one.device] = one.crashed_ms
        if one.group != row["group"] or not (one.went_back or one.unable):
            continue
        is_candidate = g.is_candidate(cut, ids.DeviceId(one.device), one.stratum)
        if not is_candidate:
            if frozen is None:
                listed = select(d.device).where(d.rollout == row["id"], d.arm == "candidate")
                frozen = set(connection.execute(listed).scalars())
            is_candidate = one.device in frozen
        if not is_candidate:
            disbelieved += bool(one.went_back)
            continue
        if one.went_back:
            went_back[one.device] = one.went_back
        if one.unable:
            unable.add(one.device)
    alone = [device for device, code in went_back.items() if _is_soft(code)]
    if len(alone) == 1:
        # Nobody can tell a power cut from a bundle that brings its device down; two devices, or the same one twice, can.
        del went_back[alone[0]]
    went_back = {device: code.removesuffix(_AT_BOOT) for device, code in went_back.items()}
    return Reports(went_back=went_back, unable=frozenset(unable), disbelieved=disbelieved, crashed=crashed)


def _upsert(connection: Connection) -> Insert:
    fresh = queries.upsert(connection, t.rollout_reports)
    c, new = t.rollout_reports.c, fresh.excluded
    nothing = {"went_back": "''", "unable": "''", "crashed_ms": "0"}
    newer = {n: case((new[n] != literal_column(none), new[n]), else_=c[n]) for n, none in nothing.items()}
    at_boot: ColumnElement[str] = literal_column(f"'{_AT_BOOT}'")
    empty: ColumnElement[str] = literal_column("''")
    told, said = (func.replace(one.went_back, at_boot, empty) for one in (c, new))
    softer = and_(said != new.went_back, told == c.went_back, told != empty)
    newer["went_back"] = case((softer, c.went_back), else_=newer["went_back"])
    statement: Insert = fresh.on_conflict_do_update(index_elements=["rollout", "device"], set_=newer)
    return statement


_REPORTS = Many(_upsert, t.rollout_reports.c.keys())
