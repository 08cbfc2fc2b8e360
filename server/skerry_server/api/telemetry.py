"""Routes: what devices counted."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from skerry_server.api.context import After, Ctx, Limit, Viewer, cursor, read_cursor
from skerry_server.db import queries
from skerry_server.db.engine import reading

router = APIRouter(prefix="/api/v1/telemetry", tags=["telemetry"])

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
