"""Orders to one device: try again what it gave up, or end the update under way.

An order is a row of the audit, and its number that row's: the device reads the newest of each kind in ``/self`` after its bell, obeys a
number once, and says so with an event ``order``. An order that no device took within ``LIFE_MS`` is over: what a person wanted
last week is not done to a device that comes out of a drawer.
"""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

from skerry_contract import ids
from sqlalchemy import Connection, select

from skerry_server import audit
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.errors import Conflict, NotFound

Kind = Literal["retry", "cancel"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
LIFE_MS: Final = 7 * 86_400_000
_EVENTS = 100


def give(conn: Connection, *, device: str, kind: Kind, reason: str, actor: str, now_ms: int) -> dict[str, Any]:
    """Orders it; the device's bell is rung. Every order is a new one: the device obeys the newest of its kind.

    Raises:
        NotFound: no such device. Conflict: it is revoked, and so will never ask what is wanted of it.
    """
    query = select(t.devices.c.status).where(t.devices.c.id == ids.device_id(device)).with_for_update()
    row = conn.execute(query).first()
    if row is None:
        raise NotFound("device", device)
    if row.status == "revoked":
        raise Conflict("revoked", f"device {device!r} is revoked: it is not heard any more")
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action=f"device.{kind}",
        subject=f"device:{device}",
        after={"expires_ms": now_ms + LIFE_MS},
        reason=reason,
    )
    queries.bump_bell(conn, f"d/{device}")
    (made,) = audit.about(conn, f"device:{device}", action=f"device.{kind}", limit=1)
    return _shape(kind, made, None)


def standing(conn: Connection, device: str, now_ms: int) -> dict[str, int]:
    """Kind -> number of the newest order that a device may still obey."""
    found: dict[str, int] = {}
    for kind in KINDS:
        for row in audit.about(conn, f"device:{device}", action=f"device.{kind}", limit=1):
            if row["at_ms"] + LIFE_MS > now_ms:
                found[kind] = int(row["id"])
    return found


def listed(conn: Connection, device: str) -> list[dict[str, Any]]:
    """The newest order of each kind, and when the device said that it obeyed it."""
    c = t.events.c
    query = select(c.received_ms, c.code, c.data).where(c.device == device, c.name == "order")
    told = {
        (row.data or {}).get("number"): row
        for row in reversed(conn.execute(query.order_by(c.id.desc()).limit(_EVENTS)).all())
    }
    found = []
    for kind in KINDS:
        for row in audit.about(conn, f"device:{device}", action=f"device.{kind}", limit=1):
            found.append(_shape(kind, row, told.get(row["id"])))
    return found


def _shape(kind: Kind, row: dict[str, Any], told: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "number": row["id"],
        "actor": row["actor"],
        "at_ms": row["at_ms"],
        "reason": row["reason"],
        "expires_ms": row["at_ms"] + LIFE_MS,
        "obeyed_ms": None if told is None else told.received_ms,
        "code": "" if told is None else told.code,
    }
