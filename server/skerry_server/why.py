"""Gathers what is recorded about one device and asks ``core.why``: what it should run, what it runs, and why. Reads only.

Each answer names its evidence: the ids of audit rows, of the device's events and of the rollout's decisions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from skerry_contract import group as g
from skerry_contract import ids
from skerry_contract import manifest as m
from sqlalchemy import Connection, func, select

from skerry_server import audit, device_orders, devices, groups, looks, presence, rollouts
from skerry_server.core import cuts, eligibility
from skerry_server.core import plan as p
from skerry_server.core import rollout as moves
from skerry_server.core import why as core
from skerry_server.db import queries
from skerry_server.db import tables as t

EVENTS = 300
"""The device's newest events that are read; a busy device leaves about ten per update."""
EVIDENCE = 5
"""Ids of each kind that an answer names, the newest."""
STAGES_UP_TO = 10_000
"""In a larger group the stage that will take a device is not worked out: it means reading all of its devices."""


def explain(
    conn: Connection, device: str, *, roles: Mapping[str, int], now_ms: int, seen_s: float, grace_s: float = math.inf
) -> dict[str, Any]:
    """The whole answer for one device, as builtins.

    Args:
        roles: version per TUF role as the repository serves it now.
        seen_s: as for a rollout's eligible devices.
        grace_s: how long after its end a device's certificate is renewed.

    Raises:
        Malformed: an id that cannot be. NotFound: no such device.
    """
    row = devices.require(conn, device)
    group = groups.require(conn, row["group"])
    document = g.parse(group["published"]) if group["published"] is not None else None
    revoked = _audited(conn, f"device:{device}", "device.revoke")
    known = core.Device(
        id=device,
        group=row["group"],
        online=bool(row["online"]),
        since=_since(row, now_ms),
        generation=row["generation"],
        published=int(group["generation"]),
        lacks=_lacks(document, row),
        revoked=_revoked(row, revoked, now_ms),
        runtimes=_runtimes(row["state"] or {}),
        settings=document.settings if document is not None else g.Settings(),
        lacks_certificate=_certificate(row, now_ms, grace_s),
    )
    events = _events(conn, device)
    worker_events = _events(conn, device, "worker")
    forgiven = device_orders.forgiven_by(conn, device)
    models = [
        _model(conn, row, known, document, name, events, worker_events, forgiven, now_ms=now_ms, seen_s=seen_s)
        for name in _names(document, row)
    ]
    if revoked:
        for one in models:
            one["evidence"]["audit"] = sorted({*one["evidence"]["audit"], revoked[0]["id"]})
    return {
        "device": device,
        "at_ms": now_ms,
        "orders": device_orders.listed(conn, device, row["group"]),
        "group": row["group"],
        "stratum": row["stratum"],
        "status": row["status"],
        "online": bool(row["online"]),
        "seen_ms": row["seen_ms"],
        "offline_since_ms": None if row["online"] else row["gone_ms"],
        "models": models,
        "behind": _behind(conn, row, known, roles),
    }


def _names(document: g.GroupDocument | None, row: Mapping[str, Any]) -> list[str]:
    pins: Mapping[str, Any] = {}
    if document is not None:
        pins = document.pins.get(g.pin_key(document.group, ids.DeviceId(row["id"])), {})
    # A state of an older release may name any number.
    running = sorted(row["running"] or {})[: presence.MOST_MODELS]
    return sorted({*(document.models if document is not None else ()), *pins, *running})


def _model(
    conn: Connection,
    row: Mapping[str, Any],
    device: core.Device,
    document: g.GroupDocument | None,
    name: str,
    events: Sequence[Mapping[str, Any]],
    worker_events: Sequence[Mapping[str, Any]],
    forgiven: int,
    *,
    now_ms: int,
    seen_s: float,
) -> dict[str, Any]:
    assigned = None
    if document is not None and row["status"] == "enrolled":
        assigned = g.assign(document, ids.DeviceId(row["id"]), name, row["stratum"])
    running = dict((row["running"] or {}).get(name) or {})
    reported = (row["state"] or {}).get("update") or {}
    update = dict(reported) if reported.get("model") == name else {}
    if update and (progress := (row["state"] or {}).get("progress")):
        update["progress"] = dict(progress)
    manifest = _manifest(conn, assigned.digest) if assigned is not None else None
    pin = _pin(conn, row["id"], name) if assigned is not None and assigned.reason == "pin" else []
    course = _course(conn, row, name, now_ms=now_ms, seen_s=seen_s)
    failure = _failure(events, assigned.digest, forgiven) if assigned is not None else None
    silence = (
        None
        if running
        else _silence(events, [one for one in worker_events if one["received_ms"] >= (row["gone_ms"] or 0)], name)
    )
    told = core.explain(
        device,
        core.Model(
            name=name,
            assigned=assigned,
            running=running,
            update=update,
            failure=failure,
            course=course,
            silence=silence,
            wants=_wants(manifest),
            fits=manifest is None or eligibility.has_variant(manifest, row["state"] or {}),
            pinned_by=_by(pin, now_ms),
        ),
    )
    about = about_it(events, name)
    ids_of = [one["id"] for one in pin]
    if course is not None:
        ids_of += [one["id"] for one in _audited(conn, f"rollout:{course.id}")]
    else:
        ids_of += [one["id"] for one in _audited(conn, f"group:{row['group']}", "group.assign")]
    return {
        "model": name,
        "state": told.state,
        "because": told.because,
        "assignment": told.assignment,
        "waits_for": told.waits_for,
        "do": told.do,
        "since_ms": _since_ms(told.state, row, about_it(events, name), update, running, failure, silence),
        "assigned": None if assigned is None else _assigned(conn, assigned, row["id"]),
        "running": running or None,
        "update": {
            key: update[key] for key in ("digest", "state", "code", "detail", "attempt", "progress") if key in update
        }
        or None,
        "failure": None if failure is None else _told(failure),
        "evidence": {
            "audit": sorted(ids_of),
            "events": sorted(
                {
                    *(event["id"] for event in about[:EVIDENCE]),
                    *([failure.event] if failure else []),
                    *([silence.event] if silence else []),
                }
            ),
            "decisions": [] if course is None else _decisions(conn, course.id),
        },
    }


def about_it(events: Sequence[Mapping[str, Any]], model: str) -> list[Mapping[str, Any]]:
    """Those of one model."""
    return [event for event in events if (event["data"] or {}).get("model") == model]


def _since_ms(
    state: core.State,
    row: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    update: Mapping[str, Any],
    running: Mapping[str, Any],
    failure: core.Failure | None,
    silence: core.Silence | None,
) -> int | None:
    """When the server first heard that it is so; None where nobody said. ``events``: of the model, newest first."""
    if state == "offline":
        ms = row["gone_ms"] or row["seen_ms"]
        return None if ms is None else int(ms)
    if state in ("refused", "reverted", "retrying", "unfit"):
        return None if failure is None else failure.at_ms
    if state == "stopped":
        return None if silence is None else silence.at_ms
    wanted = (update.get("digest"), update.get("state"))
    if state in ("as_assigned", "waiting_for_stage", "on_trial"):
        wanted = (running.get("digest"), running.get("state"))
    elif state != "updating":
        return None
    for event in events:
        if (event["data"].get("digest"), event["data"].get("state")) == wanted:
            return int(event["received_ms"])
    return None


def _assigned(conn: Connection, assigned: g.Assignment, device: str) -> dict[str, Any]:
    frozen = None
    if assigned.rollout:
        c = t.rollout_devices.c
        query = select(c.arm).where(c.rollout == assigned.rollout, c.device == device).order_by(c.stage.desc()).limit(1)
        frozen = conn.execute(query).scalar()
    return {
        "digest": assigned.digest,
        "version": assigned.version,
        "reason": assigned.reason,
        "arm": assigned.arm,
        "rollout": assigned.rollout,
        "stage": assigned.stage if assigned.rollout else None,
        # The list that the judge compares was frozen when the stage began; a device that came later is in none.
        "judged_as": frozen,
    }


def _told(failure: core.Failure) -> dict[str, Any]:
    return {
        "event": failure.event,
        "received_ms": failure.at_ms,
        "code": failure.code,
        "means": core.MEANINGS.get(failure.code, ""),
        "detail": failure.detail,
        "failed_in": failure.failed_in,
    }


def _failure(events: Sequence[Mapping[str, Any]], digest: str, forgiven: int) -> core.Failure | None:
    """The newest thing said against the bundle, unless it was confirmed since.

    Args:
        events: newest first; forgiven: the event by which the device said that it obeyed a ``retry``.
    """
    for event in events:
        data = event["data"] or {}
        if data.get("digest") != digest:
            continue
        if data.get("state") in ("confirmed", "confirmed_on_golden"):
            return None
        if event["code"]:
            return core.Failure(
                event=event["id"],
                at_ms=event["received_ms"],
                code=event["code"],
                detail=str(data.get("detail") or ""),
                failed_in=str(data.get("failed_in") or ""),
                forgiven=event["id"] < forgiven,
            )
    return None


def _silence(
    events: Sequence[Mapping[str, Any]], worker_events: Sequence[Mapping[str, Any]], model: str
) -> core.Silence | None:
    """The newest word of a bundle of the model that does not start, or that a forced floor stopped, unless one was confirmed since.

    Args:
        worker_events: of the device's present life: before it, what did not start may have started since.
    """
    for event in sorted([*events, *worker_events], key=lambda one: one["id"], reverse=True):
        data = event["data"] or {}
        loaded = data.get("models")
        digest = (
            loaded.get(model)
            if isinstance(loaded, dict)
            else data.get("digest")
            if data.get("model") == model
            else None
        )
        if digest is None:
            continue
        if data.get("state") in ("confirmed", "confirmed_on_golden"):
            return None
        if event["code"] and (isinstance(loaded, dict) or event["code"] == "below_forced_floor"):
            return core.Silence(
                event=event["id"], at_ms=event["received_ms"], digest=str(digest), code=event["code"],
                detail=str(data.get("detail") or ""),
            )  # fmt: skip
    return None


def _course(conn: Connection, row: Mapping[str, Any], model: str, *, now_ms: int, seen_s: float) -> core.Course | None:
    c = t.rollouts.c
    query = select(t.rollouts).where(c.group == row["group"], c.model == model)
    found = conn.execute(query.order_by(c.created_ms.desc(), c.id.desc()).limit(1)).mappings().first()
    if found is None:
        return None
    rollout = dict(found)
    plan = p.read_plan(rollout["plan"])
    part = _cut(rollout, rollout["cuts"])
    salt = bytes.fromhex(rollout["salt"])
    return core.Course(
        id=rollout["id"],
        state=rollout["state"],
        candidate=rollout["candidate"],
        version=_version(conn, rollout["candidate"]),
        stage=rollout["stage"],
        stages=len(plan.stages),
        reason=rollout["reason"],
        held=_held(conn, rollout, now_ms),
        joins=_joins(conn, rollout, plan, row, now_ms=now_ms, seen_s=seen_s),
        share=g.hash64(salt, row["id"]) / g.EVERYONE,
        cut=g.cut_for(part, row["stratum"]) / g.EVERYONE,
    )


def _held(conn: Connection, rollout: Mapping[str, Any], now_ms: int) -> str:
    """What holds the stage that runs, as it stands now: a stored decision keeps the numbers of its time."""
    if rollout["state"] not in ("running", "completing"):
        return ""
    ruling, fault = looks.standing(conn, rollout["id"], rollout["stage"])
    decision = moves.decide(rollouts.value(rollout), rollouts.gather(conn, rollout), now_ms, ruling, fault=fault)
    return decision.reason if decision.action == "hold" else ""


def _cut(rollout: Mapping[str, Any], placed: Mapping[str, str]) -> g.Rollout:
    target = g.Target(digest="", version="")
    return g.Rollout(
        id=rollout["id"], stage=rollout["stage"], candidate=target, salt=rollout["salt"], cuts=dict(placed)
    )


def _joins(
    conn: Connection, rollout: Mapping[str, Any], plan: p.Plan, row: Mapping[str, Any], *, now_ms: int, seen_s: float
) -> int | None:
    """The later stage that takes the device, were each cut now."""
    identity = ids.DeviceId(row["id"])
    if rollout["state"] not in ("running", "paused") or g.is_candidate(
        _cut(rollout, rollout["cuts"]), identity, row["stratum"]
    ):
        return None
    count = select(func.count()).select_from(t.devices).where(t.devices.c.group == row["group"])
    if conn.execute(count).scalar_one() > STAGES_UP_TO:
        return None
    manifest = _manifest(conn, rollout["candidate"])
    if manifest is None:
        return None
    known = rollouts.eligible(
        conn, group=row["group"], model=rollout["model"], manifest=manifest, now_ms=now_ms, seen_s=seen_s
    )
    placed: Mapping[str, str] = rollout["cuts"]
    for number in range(rollout["stage"] + 1, len(plan.stages)):
        spec = plan.stages[number]
        placed = cuts.plan_cuts(
            known, rollout["salt"], devices=spec.devices, share=spec.share, stratified=plan.stratified, old=placed
        )
        if g.is_candidate(_cut(rollout, placed), identity, row["stratum"]):
            return number
    return len(plan.stages)


def _behind(conn: Connection, row: Mapping[str, Any], device: core.Device, roles: Mapping[str, int]) -> dict[str, Any]:
    state = row["state"] or {}
    told = state.get("tuf") or {}
    epoch = str(state.get("epoch") or "")
    c = t.streams.c
    stream = conn.execute(select(c.upto, c.last_ms).where(c.device == row["id"], c.epoch == epoch)).first()
    return {
        "group_document": {"device": device.generation, "server": device.published},
        "metadata": {role: {"device": told.get(role), "server": version} for role, version in sorted(roles.items())},
        "records": {
            "epoch": epoch,
            "reported": state.get("seq"),
            "committed": None if stream is None else int(stream.upto),
            "last_ms": None if stream is None else stream.last_ms,
        },
        "lost": state.get("lost") or {},
        "refused_messages": queries.ingest_counts(conn, device=row["id"]),
    }


def _events(conn: Connection, device: str, name: str = "update") -> list[dict[str, Any]]:
    c = t.events.c
    query = select(c.id, c.received_ms, c.code, c.data).where(c.device == device, c.name == name)
    return [dict(row) for row in conn.execute(query.order_by(c.id.desc()).limit(EVENTS)).mappings()]


def _decisions(conn: Connection, rollout: str) -> list[int]:
    c = t.decisions.c
    query = select(c.id).where(c.rollout == rollout).order_by(c.id.desc()).limit(EVIDENCE)
    return sorted(conn.execute(query).scalars())


def _audited(conn: Connection, subject: str, action: str = "") -> list[dict[str, Any]]:
    """The newest audit rows about a thing, newest first."""
    return audit.about(conn, subject, action=action, limit=EVIDENCE)


def _pin(conn: Connection, device: str, model: str) -> list[dict[str, Any]]:
    rows = _audited(conn, f"device:{device}", "device.pin")
    return [row for row in rows if (row["after"] or {}).get("model") == model][:1]


def _by(rows: Sequence[Mapping[str, Any]], now_ms: int) -> str:
    if not rows:
        return ""
    newest = rows[0]
    why = f": {newest['reason']}" if newest["reason"] else ""
    return f" by {newest['actor']} {_when(newest['at_ms'], now_ms)}{why}"


def _revoked(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], now_ms: int) -> str:
    if row["status"] != "revoked":
        return ""
    return _by(rows, now_ms).strip() or "(who did it is not recorded)"


def _since(row: Mapping[str, Any], now_ms: int) -> str:
    if row["online"]:
        return ""
    if row["seen_ms"] is None:
        return "and has never been heard of"
    return f"since {_when(row['gone_ms'] or row['seen_ms'], now_ms)}"


def _when(ms: int, now_ms: int) -> str:
    stamp = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(ms / 1000))
    left = max(0, now_ms - ms) // 1000
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if left >= size:
            return f"{stamp} ({left // size} {unit} ago)"
    return f"{stamp} ({left} s ago)"


def _certificate(row: Mapping[str, Any], now_ms: int, grace_s: float) -> str:
    ended_ms = row["certificate_expires_ms"]
    if row["status"] != "enrolled" or ended_ms is None or now_ms - ended_ms <= grace_s * 1000:
        return ""
    return (
        f"its certificate ended {_when(ended_ms, now_ms)}, longer ago than the {grace_s / 86_400:g} days of grace: "
        f"`skerry device renew {row['id']} --reason WHY` lets it renew it within the next week"
    )


def _lacks(document: g.GroupDocument | None, row: Mapping[str, Any]) -> tuple[str, ...]:
    abilities = (row["state"] or {}).get("abilities")
    if document is None or not abilities:
        return ()
    return g.missing_abilities(document, frozenset(abilities))


def _runtimes(state: Mapping[str, Any]) -> str:
    names = [f"{name} {version}".strip() for name, version in sorted((state.get("runtimes") or {}).items())]
    return f"{', '.join(names) or 'no runtime'} on {state.get('arch') or 'an architecture that it did not name'}"


def _wants(manifest: m.Manifest | None) -> str:
    if manifest is None:
        return ""
    wanted = [
        variant.runtime + (f" on {' or '.join(variant.arch)}" if variant.arch else "") for variant in manifest.variants
    ]
    return ", ".join(dict.fromkeys(wanted))


def _manifest(conn: Connection, digest: str) -> m.Manifest | None:
    found = conn.execute(select(t.bundles.c.manifest).where(t.bundles.c.digest == digest)).scalar()
    return None if found is None else m.parse(found)


def _version(conn: Connection, digest: str) -> str:
    return str(conn.execute(select(t.bundles.c.version).where(t.bundles.c.digest == digest)).scalar() or digest[:12])
