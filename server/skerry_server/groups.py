"""Groups: what a group runs, and its document composed from the tables.

The tables are the truth; a document is derived. Whoever changes something that the document shows calls ``touch`` in the same
transaction: it composes the document anew, gives it the next generation and counts the group's bell up. The orchestrator then
publishes the stored bytes and rings. So after a crash between any two steps the database still says what to publish.
"""

from __future__ import annotations

from typing import Any

import msgspec
from skerry_contract import group as g
from skerry_contract import ids, misfit
from skerry_contract import manifest as m
from skerry_contract.errors import Malformed
from sqlalchemy import Connection, insert, select, update

from skerry_server import audit, versions
from skerry_server.core.rollout import OFFERING
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.errors import Conflict, Invalid, NotFound

RUNNABLE = ("approved", "deprecated")


def require(conn: Connection, name: str) -> dict[str, Any]:
    """The group's row. Raises ``Malformed`` for a name that cannot be, ``NotFound`` when there is none."""
    row = conn.execute(select(t.groups).where(t.groups.c.name == ids.group_name(name))).mappings().first()
    if row is None:
        raise NotFound("group", name)
    return dict(row)


def put(
    conn: Connection,
    *,
    name: str,
    settings: dict[str, Any] | None,
    actor: str,
    now_ms: int,
    version: int | None = None,
) -> bool:
    """Makes a group, or changes its settings; returns whether it was made.

    Args:
        version: of the settings that the caller read, 0 for no group; None to change whatever is there.

    Raises:
        Malformed: a name outside the grammar. Invalid: settings that no device would take.
        Conflict: the settings have changed since ``version``.
    """
    ids.group_name(name)
    checked = None if settings is None else check_settings(settings)
    row = conn.execute(select(t.groups).where(t.groups.c.name == name).with_for_update()).mappings().first()
    now = {"settings": None if row is None else row["settings"]}
    versions.expect(conn, f"group:{name}", wanted=version, present=0 if row is None else row["version"], now=now)
    if row is not None and (checked is None or checked == row["settings"]):
        return False
    if row is None:
        conn.execute(
            insert(t.groups).values(name=name, generation=0, settings=checked or {}, created_ms=now_ms, version=1)
        )
    else:
        change = update(t.groups).where(t.groups.c.name == name)
        conn.execute(change.values(settings=checked, version=row["version"] + 1))
    touch(conn, name)
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action="group.create" if row is None else "group.settings",
        subject=f"group:{name}",
        before=None if row is None else row["settings"],
        after=checked or {},
    )
    return row is None


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they are stored: those named, checked by the contract itself.

    Raises:
        Invalid: unknown names, wrong types, values out of range.
    """
    known = g.Settings.__struct_fields__
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise Invalid("bad_settings", f"settings: unknown {', '.join(unknown)}; there are {', '.join(known)}")
    try:
        whole = msgspec.convert(settings, g.Settings)
        g.encode(g.GroupDocument(schema=g.SCHEMA, group="check", generation=1, settings=whole))
    except msgspec.ValidationError as error:
        place, words = misfit.words(error, g.Settings, settings)
        raise Invalid("bad_settings", f"settings.{place}: {words}") from None
    except Malformed as error:
        raise Invalid("bad_settings", f"settings: {error}") from None
    strange = sorted(set(whole.networks) - g.NETWORKS)
    if strange:
        names = ", ".join(sorted(g.NETWORKS))
        raise Invalid("bad_settings", f"settings.networks: wanted some of {names}, got {', '.join(strange)}")
    return dict(settings)


def assign_first(conn: Connection, *, name: str, model: str, digest: str, actor: str, now_ms: int) -> None:
    """Gives a group the first bundle of a model, at once and to everyone.

    Raises:
        Conflict: the group runs the model already, or a rollout of it is under way, or the bundle is not approved.
    """
    require(conn, name)
    ids.model_name(model)
    runnable(conn, digest, model=model, states=("approved",))
    if active_rollout(conn, name, model) is not None:
        raise Conflict("rollout_active", f"a rollout of {model!r} in {name!r} is under way")
    c = t.group_models.c
    held = conn.execute(select(c.stable).where(c.group == name, c.model == model)).scalar()
    if held == digest:
        return
    if held is not None:
        raise Conflict(
            "already_assigned", f"{name!r} runs {model!r} already; start a rollout to change it", stable=held
        )
    conn.execute(insert(t.group_models).values(group=name, model=model, stable=digest))
    touch(conn, name)
    after = {"model": model, "stable": digest}
    audit.record(conn, at_ms=now_ms, actor=actor, action="group.assign", subject=f"group:{name}", after=after)


def set_shadow(conn: Connection, *, name: str, model: str, digest: str | None, actor: str, now_ms: int) -> None:
    """Puts a bundle in the shadow of what a group runs of a model, on every device that can; None ends it.

    Raises:
        NotFound: no such group or bundle, or the group does not run the model. Conflict: not approved, another model's, or the
            stable bundle itself.
    """
    require(conn, name)
    ids.model_name(model)
    c = t.group_models.c
    row = (
        conn.execute(select(t.group_models).where(c.group == name, c.model == model).with_for_update())
        .mappings()
        .first()
    )
    if row is None:
        raise NotFound("model of the group", model)
    if digest is not None:
        runnable(conn, digest, model=model)
        if digest == row["stable"]:
            raise Conflict("already_stable", f"{name!r} runs this bundle; wanted another for its shadow")
    if digest == row["shadow"]:
        return
    conn.execute(update(t.group_models).where(c.group == name, c.model == model).values(shadow=digest))
    touch(conn, name)
    audit.record(
        conn, at_ms=now_ms, actor=actor, action="group.shadow", subject=f"group:{name}",
        before={"model": model, "shadow": row["shadow"]}, after={"model": model, "shadow": digest},
    )  # fmt: skip


def runnable(conn: Connection, digest: str, *, model: str, states: tuple[str, ...] = RUNNABLE) -> dict[str, Any]:
    """The row of a bundle that devices may be told to run.

    Raises:
        NotFound: no such bundle. Conflict: another model's, or not approved.
    """
    row = conn.execute(select(t.bundles).where(t.bundles.c.digest == ids.bundle_digest(digest))).mappings().first()
    if row is None:
        raise NotFound("bundle", digest)
    if row["model"] != model:
        raise Conflict("wrong_model", f"the bundle is of model {row['model']!r}, not {model!r}")
    if row["state"] not in states:
        raise Conflict(
            "not_approved",
            f"{model} {row['version']} is {row['state']}; wanted {' or '.join(states)}",
            state=row["state"],
        )
    return dict(row)


def active_rollout(conn: Connection, name: str, model: str) -> str | None:
    """Id of the rollout that has this model of this group, or None."""
    c = t.rollouts.c
    ended = ("completed", "rolled_back", "aborted")
    query = select(c.id).where(c.group == name, c.model == model, c.state.not_in(ended))
    found = conn.execute(query).scalar()
    return None if found is None else str(found)


def touch(conn: Connection, name: str) -> int:
    """Composes the group's document anew as the next generation and counts its bell up; returns the generation.

    When nothing a device sees has changed, nothing is written.
    """
    row = require(conn, name)
    generation = int(row["generation"]) + 1
    document = compose(conn, name, generation, row["settings"])
    if row["published"] is not None:
        old = g.parse(row["published"])
        if msgspec.structs.replace(old, generation=generation) == document:
            return int(row["generation"])
    change = update(t.groups).where(t.groups.c.name == name)
    conn.execute(change.values(generation=generation, published=g.encode(document)))
    queries.bump_bell(conn, f"g/{name}")
    return generation


def touch_who_run(conn: Connection, digests: list[str]) -> None:
    """The catalog lists other bundles: composes the documents of groups that run their models anew, for what must be passed through."""
    if not digests:
        return
    models = select(t.bundles.c.model).where(t.bundles.c.digest.in_(digests))
    query = select(t.group_models.c.group).where(t.group_models.c.model.in_(models)).distinct()
    for name in sorted(conn.execute(query).scalars()):
        touch(conn, name)


def compose(conn: Connection, name: str, generation: int, settings: dict[str, Any]) -> g.GroupDocument:
    """The group's document as the tables say it now. Reads only."""
    models = conn.execute(select(t.group_models).where(t.group_models.c.group == name)).mappings().all()
    c = t.rollouts.c
    query = select(t.rollouts).where(c.group == name, c.state.in_(sorted(OFFERING)))
    rollouts = {row["model"]: row for row in conn.execute(query).mappings()}
    query_pins = (
        select(t.pins.c.device, t.pins.c.model, t.pins.c.digest)
        .join(t.devices, t.devices.c.id == t.pins.c.device)
        .where(t.devices.c.group == name, t.devices.c.status == "enrolled")
    )
    pins = conn.execute(query_pins).all()
    digests = {row["stable"] for row in models} | {row["candidate"] for row in rollouts.values()}
    digests |= {row[name] for row in models for name in ("fallback", "shadow") if row[name]} | {
        row.digest for row in pins
    }
    targets = _targets(conn, digests)
    plans: dict[str, g.ModelPlan] = {}
    for row in models:
        rollout = rollouts.get(row["model"])
        plans[row["model"]] = g.ModelPlan(
            stable=targets[row["stable"]],
            fallback=targets[row["fallback"]] if row["fallback"] else None,
            rollout=None if rollout is None else _rollout_part(dict(rollout), targets),
            shadow=targets[row["shadow"]] if row["shadow"] else None,
            via=_via(
                conn,
                row["model"],
                {
                    row["stable"],
                    *([row["fallback"]] if row["fallback"] else []),
                    *([rollout["candidate"]] if rollout is not None else []),
                    *(pin.digest for pin in pins if pin.model == row["model"]),
                },
            ),
        )
    pinned: dict[str, dict[str, g.Target]] = {}
    for pin in pins:
        pinned.setdefault(g.pin_key(name, ids.DeviceId(pin.device)), {})[pin.model] = targets[pin.digest]
    found = msgspec.convert(settings, g.Settings)
    requires = (("pins",) if pinned else ()) + (("canary",) if rollouts else ())
    requires += tuple(rule for rule in ("windows", "networks", "opens_at", "fetch_windows") if getattr(found, rule))
    return g.GroupDocument(
        schema=g.SCHEMA,
        group=name,
        generation=generation,
        requires=tuple(sorted(requires)),
        models=plans,
        pins=pinned,
        settings=found,
    )


def _via(conn: Connection, model: str, digests: set[str]) -> tuple[g.Target, ...]:
    """What the bundles want confirmed before them, and what that wants in turn, as far as it is approved.

    Where the very version is not to be had (it was retired, say), the lowest later one that lies below the bundle: a device asks for the
    version or a later one.
    """
    c = t.bundles.c
    listed: list[g.Target] | None = None
    found: dict[str, g.Target] = {}
    rows = conn.execute(select(c.manifest, c.version).where(c.digest.in_(sorted(digests)))).all()
    ahead = sorted(rows, key=lambda one: ids.version_key(one.version))
    while ahead and len(found) < g.MOST_VIA:
        row = ahead.pop()
        after = m.parse(bytes(row.manifest)).after
        if not after:
            continue
        if listed is None:
            query = select(c.digest, c.version).where(c.model == model, c.state.in_(RUNNABLE))
            known = sorted(conn.execute(query), key=lambda one: ids.version_key(one.version))
            listed = [g.Target(digest=one.digest, version=one.version) for one in known]
        low, high = ids.version_key(after), ids.version_key(row.version)
        first = next((one for one in listed if low <= ids.version_key(one.version) < high), None)
        if first is not None and first.version not in found:
            found[first.version] = first
            ahead += conn.execute(select(c.manifest, c.version).where(c.digest == first.digest)).all()
    return tuple(sorted(found.values(), key=lambda one: ids.version_key(one.version)))


def _rollout_part(row: dict[str, Any], targets: dict[str, g.Target]) -> g.Rollout:
    return g.Rollout(
        id=row["id"], stage=row["stage"], candidate=targets[row["candidate"]], salt=row["salt"], cuts=row["cuts"]
    )


def _targets(conn: Connection, digests: set[str]) -> dict[str, g.Target]:
    c = t.bundles.c
    query = select(c.digest, c.version).where(c.digest.in_(sorted(digests)))
    return {row.digest: g.Target(digest=row.digest, version=row.version) for row in conn.execute(query)}
