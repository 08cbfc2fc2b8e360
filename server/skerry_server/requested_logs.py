"""Logs of devices: an operator asks, the device reads so in ``/self`` after its bell, and sends its last lines once.

A request ends by the device's answer, by an answer that cannot be taken (``fault``), or by its age. At most one waits per device,
and of a device the newest ``KEPT`` are kept, whatever became of them. What devices send is theirs: it is kept as bytes, bounded
packed and unpacked, and never read here but as text.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

from skerry_contract import ids
from sqlalchemy import Connection, delete, insert, select, update

from skerry_server import audit, devices
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.errors import Conflict, Invalid, NotFound, Refused, TooLarge

KEPT: Final = 3
MOST_BYTES: Final = 128 * 1024
"""Of an answer as it is sent: gzip."""
MOST_TEXT_BYTES: Final = 1 << 20
LIFE_MS: Final = 24 * 3_600_000
"""A device that is away may answer so much later."""
_GZIP = 31
_MOST_NUMBER = (1 << 63) - 1
_c = t.log_requests.c


def ask(conn: Connection, *, device: str, actor: str, now_ms: int) -> tuple[dict[str, Any], bool]:
    """Asks a device for its log: the request, and whether it was asked before and still waits. Its bell is rung.

    Raises:
        NotFound: no such device. Conflict: it is revoked, and so will never ask what is wanted of it.
    """
    query = select(t.devices.c.status).where(t.devices.c.id == ids.device_id(device)).with_for_update()
    row = conn.execute(query).first()
    if row is None:
        raise NotFound("device", device)
    if row.status == "revoked":
        raise Conflict("revoked", f"device {device!r} is revoked: it is not heard any more")
    number = waiting(conn, device, now_ms)
    repeated = number is not None
    if number is None:
        made = insert(t.log_requests).values(
            device=device, asked_by=actor[:100], asked_ms=now_ms, expires_ms=now_ms + LIFE_MS, fault="", size=0
        )
        number = int(conn.execute(made.returning(_c.id)).scalar_one())
        newest = select(_c.id).where(_c.device == device).order_by(_c.id.desc()).limit(KEPT)
        kept = conn.execute(newest).scalars().all()
        conn.execute(delete(t.log_requests).where(_c.device == device, _c.id.not_in(kept)))
        audit.record(
            conn,
            at_ms=now_ms,
            actor=actor,
            action="device.logs.ask",
            subject=f"device:{device}",
            after={"request": number, "expires_ms": now_ms + LIFE_MS},
        )
    # Also the second time: the first ring may have been missed.
    queries.bump_bell(conn, f"d/{device}")
    return find(conn, device=device, number=number, now_ms=now_ms), repeated


def waiting(conn: Connection, device: str, now_ms: int) -> int | None:
    """The number of the request that waits for this device's answer."""
    query = select(_c.id).where(_c.device == device, _c.ended_ms.is_(None), _c.expires_ms > now_ms)
    found = conn.execute(query.order_by(_c.id.desc()).limit(1)).scalar()
    return None if found is None else int(found)


def take(conn: Connection, *, device: str, number: int, body: bytes, now_ms: int) -> Refused | None:
    """Takes a device's answer, or says why not; a refusal that ends the request is recorded in the same transaction."""
    row = _row(conn, device, number)
    if row is None:
        return NotFound("log request", f"{device}/{number}")
    if row["ended_ms"] is not None:
        return Conflict("answered", f"log request {number} has its answer already")
    if row["expires_ms"] <= now_ms:
        return Conflict("request_ended", f"log request {number} has ended, its life is {LIFE_MS // 3_600_000} h")
    refusal, size = _judge(body)
    conn.execute(
        update(t.log_requests)
        .where(_c.id == number)
        .values(ended_ms=now_ms, fault=refusal.code if refusal else "", size=size, body=None if refusal else body)
    )
    audit.record(
        conn,
        at_ms=now_ms,
        actor=f"device:{device}",
        action="device.logs.answer",
        subject=f"device:{device}",
        after={"request": number, "bytes": size, **({"fault": refusal.code} if refusal else {})},
    )
    return refusal


def _judge(body: bytes) -> tuple[Refused | None, int]:
    if len(body) > MOST_BYTES:
        return TooLarge("log", MOST_BYTES), 0
    opened = zlib.decompressobj(_GZIP)
    try:
        text = opened.decompress(body, MOST_TEXT_BYTES + 1)
    except zlib.error as error:
        return Invalid("bad_logs", f"body: wanted gzip: {error}"), 0
    if len(text) > MOST_TEXT_BYTES:
        return TooLarge("log, unpacked", MOST_TEXT_BYTES), 0
    if not opened.eof or opened.unused_data:
        return Invalid("bad_logs", "body: wanted one whole gzip member"), 0
    return None, len(text)


def find(conn: Connection, *, device: str, number: int, now_ms: int) -> dict[str, Any]:
    """One request with its ``state``: waiting, answered, failed, expired or revoked; with ``lines`` when it is answered.

    Raises:
        NotFound: no such device or request; older ones make room for newer.
    """
    held = devices.require(conn, device)
    row = _row(conn, device, number)
    if row is None:
        raise NotFound("log request", f"{device}/{number}")
    return _shape(row, held, now_ms) | {"online": held["online"], "seen_ms": held["seen_ms"], "lines": _lines(row)}


def listed(conn: Connection, *, device: str, now_ms: int) -> list[dict[str, Any]]:
    """The requests that are kept of a device, oldest first, without lines. Raises ``NotFound``: no such device."""
    held = devices.require(conn, device)
    rows = conn.execute(select(t.log_requests).where(_c.device == device).order_by(_c.id)).mappings()
    return [_shape(dict(row), held, now_ms) for row in rows]


def _row(conn: Connection, device: str, number: int) -> dict[str, Any] | None:
    if not 0 < number <= _MOST_NUMBER:
        return None
    row = conn.execute(select(t.log_requests).where(_c.id == number, _c.device == device)).mappings().first()
    return None if row is None else dict(row)


def _shape(row: dict[str, Any], held: dict[str, Any], now_ms: int) -> dict[str, Any]:
    return {
        "number": row["id"],
        "device": row["device"],
        "state": _state(row, held["status"] == "revoked", now_ms),
        "asked_by": row["asked_by"],
        "asked_ms": row["asked_ms"],
        "expires_ms": row["expires_ms"],
        "ended_ms": row["ended_ms"],
        "fault": row["fault"],
        "bytes": row["size"],
    }


def _state(row: dict[str, Any], revoked: bool, now_ms: int) -> str:
    if row["ended_ms"] is not None:
        return "failed" if row["fault"] else "answered"
    if revoked:
        return "revoked"
    return "expired" if row["expires_ms"] <= now_ms else "waiting"


def _lines(row: dict[str, Any]) -> list[str] | None:
    if row["body"] is None:
        return None
    text = zlib.decompressobj(_GZIP).decompress(row["body"], MOST_TEXT_BYTES).decode("utf-8", "replace")
    return [line for line in text.split("\n") if line]
