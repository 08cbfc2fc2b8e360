"""Routes: what devices counted."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from skerry_contract import wire
from skerry_contract.errors import ContractError

from skerry_server.anchors import Anchors
from skerry_server.api.bodies import Route
from skerry_server.api.context import After, Ctx, Engineer, Limit, Viewer, cursor, page, read_cursor
from skerry_server.db import queries
from skerry_server.db.engine import reading

router = APIRouter(prefix="/api/v1/telemetry", tags=["telemetry"], route_class=Route)

_KINDS = (str, str, str, str, str, str, int)
_STREAM = ("device", "epoch", "upto", "records", "duplicates", "conflicts", "tombstoned")


@router.get("/counts", summary="Requests by outcome per device and bundle, and what was taken from each outbox")
def counts(
    context: Ctx,
    _caller: Viewer,
    model: Annotated[str | None, Query(max_length=63)] = None,
    bundle: Annotated[str | None, Query(max_length=64)] = None,
    device: Annotated[str | None, Query(max_length=63)] = None,
    after: After = None,
    streams_after: After = None,
    limit: Limit = 1000,
) -> dict[str, Any]:
    """Two lists in one answer, of one moment: `items` continue after `next`, `streams` after `streams_next`."""
    last = read_cursor(after, *_KINDS)
    last_stream = read_cursor(streams_after, str, str)
    with reading(context.engine) as conn:
        rows = queries.counts_page(conn, model=model, bundle=bundle, device=device, after=last, limit=limit)
        streams = queries.streams_page(
            conn, device=device, after=None if last_stream is None else (last_stream[0], last_stream[1]), limit=limit
        )
    key = [rows[-1]._mapping[name] for name in queries.COUNT_KEY] if len(rows) >= limit else None
    return {
        "items": [dict(row._mapping) for row in rows],
        "next": None if key is None else cursor(*key),
        "streams": [{name: row._mapping[name] for name in _STREAM} for row in streams],
        "streams_next": cursor(streams[-1].device, streams[-1].epoch) if len(streams) >= limit else None,
    }


@router.get("/samples", summary="Single answers that devices kept whole, oldest first")
def samples(
    context: Ctx,
    _caller: Engineer,
    model: Annotated[str | None, Query(max_length=63)] = None,
    bundle: Annotated[str | None, Query(max_length=64)] = None,
    device: Annotated[str | None, Query(max_length=63)] = None,
    after: After = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    """Values of single requests, and so for engineers: features marked as personal data are not among them."""
    last = read_cursor(after, int)
    with reading(context.engine) as conn:
        rows = queries.samples_page(
            conn, model=model, bundle=bundle, device=device, after=None if last is None else last[0], limit=limit
        )
        boots = Anchors(conn, context.now_ms())
        boots.load({row.device for row in rows})
    items = [
        {"id": row.id, "device": row.device, "received_ms": row.received_ms, **_sample(row, boots)} for row in rows
    ]
    return page(items, limit, *((items[-1]["id"],) if items else ()))


def _sample(row: Any, boots: Anchors) -> dict[str, Any]:
    """A sample as JSON has it: null for what is no number, no field for what JSON has no word for."""
    try:
        found = wire.decode(wire.Sample, row.body)
        at_ms, timed = boots.place(row.device, found.at, received_ms=row.received_ms)
        fields = {
            "prediction_id": found.id,
            "at_ms": at_ms,
            "timed": timed,
            "why": found.why,
            "model": found.key.model,
            "bundle": found.key.bundle,
            "arm": found.key.arm,
            "rollout": found.key.rollout,
            "inputs": found.inputs,
            "outputs": found.outputs,
            "attributions": found.extra.get("attributions", {}),
        }
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(fields))
    except (ContractError, TypeError, ValueError, msgspec.MsgspecError):
        return {"unreadable": True}
    return plain
