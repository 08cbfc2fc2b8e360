"""Orders to a device: try again what it gave up, or end the update under way; and, to the server, to renew its certificate.

An order is a row of the audit. Its number is the wall time in ms, more than any number before it of its device and that one's group: a server that
was restored from a backup never gives a number that a device has obeyed already. The device reads the newest of each kind in
``/self`` after its bell, obeys a number once, and says so with an event ``order``. A whole group can be ordered to try again: one
row, which every device of the group reads. An order that no device took within ``LIFE_MS`` is over: what a person wanted last week is not
done to a device that comes out of a drawer.

``renew`` counts when a device whose certificate ended too long ago asks for another; told of it, the device asks at once. It says nothing about
bundles, and ``retry`` lets nobody back in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

from skerry_contract import ids
from sqlalchemy import Connection, func, select

from skerry_server import audit, groups
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.errors import Conflict, NotFound

Kind = Literal["retry", "cancel", "renew"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
LIFE_MS: Final = 7 * 86_400_000
_EVENTS = 100


def give(conn: Connection, *, device: str, kind: Kind, reason: str, actor: str, now_ms: int) -> dict[str, Any]:
    """Orders it; the device's bell is rung. Every order is a new one: the device obeys the newest of its kind.

    Raises:
        NotFound: no such device. Conflict: it is revoked, and so will never ask what is wanted of it.
    """
    query = (
        select(t.devices.c.status, t.devices.c.group).where(t.devices.c.id == ids.device_id(device)).with_for_update()
    )
    row = conn.execute(query).first()
    if row is None:
        raise NotFound("device", device)
    if row.status == "revoked":
        raise Conflict("revoked", f"device {device!r} is revoked: it is not heard any more")
    _record(conn, f"device:{device}", kind, beside=f"group:{row.group}", reason=reason, actor=actor, now_ms=now_ms)
    queries.bump_bell(conn, f"d/{device}")
    (made,) = audit.about(conn, f"device:{device}", action=_action("device", kind), limit=1)
    return _shape(kind, made, None)


def give_group(conn: Connection, *, group: str, reason: str, actor: str, now_ms: int) -> dict[str, Any]:
    """Orders every device of the group to try again what it gave up; the group's bell is rung.

    Returns:
        The order, with ``devices``: how many are enrolled in the group now.

    Raises:
        NotFound: no such group.
    """
    groups.require(conn, group)
    _record(conn, f"group:{group}", "retry", reason=reason, actor=actor, now_ms=now_ms)
    queries.bump_bell(conn, f"g/{group}")
    (made,) = audit.about(conn, f"group:{group}", action="group.retry", limit=1)
    c = t.devices.c
    count = select(func.count()).select_from(t.devices).where(c.group == group, c.status == "enrolled")
    return _shape("retry", made, None) | {"devices": conn.execute(count).scalar_one()}


def _record(
    conn: Connection, subject: str, kind: Kind, *, reason: str, actor: str, now_ms: int, beside: str = ""
) -> None:
    """``beside``: the group whose orders the device obeys as well. A device that hears several obeys them by their numbers."""
    of = subject.partition(":")[0]
    action = _action(of, kind)
    actions = [(subject, _action(of, one)) for one in KINDS] + ([(beside, "group.retry")] if beside else [])
    before = [row for about, done in actions for row in audit.about(conn, about, action=done, limit=1)]
    number = max([now_ms, *(_number(row) + 1 for row in before)])
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action=action,
        subject=subject,
        after={"expires_ms": now_ms + LIFE_MS, "number": number},
        reason=reason,
    )


def standing(conn: Connection, device: str, group: str, now_ms: int) -> dict[str, int]:
    """Kind -> number of the newest order that the device of that group may still obey."""
    return {
        kind: _number(row)
        for kind in KINDS
        if (row := _newest(conn, device, group, kind)) is not None and row["at_ms"] + LIFE_MS > now_ms
    }


def may_renew(conn: Connection, device: str, now_ms: int) -> bool:
    """Whether an operator's word stands that the device may renew a certificate that ended too long ago."""
    rows = audit.about(conn, f"device:{device}", action=_action("device", "renew"), limit=1)
    return any(row["at_ms"] + LIFE_MS > now_ms for row in rows)


def listed(conn: Connection, device: str, group: str) -> list[dict[str, Any]]:
    """The newest order of each kind, and when the device said that it obeyed it."""
    told = {
        (str(row.data.get("kind")), row.data.get("number")): row for row in reversed(_told(conn, device)) if row.data
    }
    newest = {kind: _newest(conn, device, group, kind) for kind in KINDS}
    found = [_shape(kind, row, told.get((kind, _number(row)))) for kind, row in newest.items() if row is not None]
    order = newest["renew"]
    renewed = audit.about(conn, f"device:{device}", action="device.renew", limit=1) if order is not None else []
    if order is not None and renewed and renewed[0]["id"] > order["id"]:
        # That it renewed is its word, whether or not it said so too.
        found = [one | {"obeyed_ms": renewed[0]["at_ms"]} if one["kind"] == "renew" else one for one in found]
    return found


def forgiven_by(conn: Connection, device: str) -> int:
    """Id of the newest event by which the device said that it obeyed a ``retry``; 0 for none."""
    return next((row.id for row in _told(conn, device) if (row.data or {}).get("kind") == "retry" and not row.code), 0)


def _told(conn: Connection, device: str) -> Sequence[Any]:
    """What the device said of orders, newest first."""
    c = t.events.c
    query = select(c.id, c.received_ms, c.code, c.data).where(c.device == device, c.name == "order")
    return conn.execute(query.order_by(c.id.desc()).limit(_EVENTS)).all()


def _newest(conn: Connection, device: str, group: str, kind: Kind) -> dict[str, Any] | None:
    rows = audit.about(conn, f"device:{device}", action=_action("device", kind), limit=1)
    if kind == "retry":
        rows += audit.about(conn, f"group:{group}", action="group.retry", limit=1)
    # By when it was given: numbers follow a clock that somebody may have set back.
    return max(rows, key=lambda row: row["id"], default=None)


def _action(of: str, kind: Kind) -> str:
    # ``device.renew`` is what is recorded when the certificate was renewed.
    return f"{of}.renew_order" if kind == "renew" else f"{of}.{kind}"


def _number(row: Mapping[str, Any]) -> int:
    """An order that was given before orders had numbers of their own has its row's."""
    return int((row["after"] or {}).get("number") or row["id"])


def _shape(kind: Kind, row: dict[str, Any], told: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "number": _number(row),
        "of": row["subject"],
        "actor": row["actor"],
        "at_ms": row["at_ms"],
        "reason": row["reason"],
        "expires_ms": row["at_ms"] + LIFE_MS,
        "obeyed_ms": None if told is None else told.received_ms,
        "code": "" if told is None else told.code,
    }
