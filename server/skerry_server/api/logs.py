"""Routes: a device's log, asked for by an operator."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from skerry_server import requested_logs
from skerry_server.api.bodies import Route
from skerry_server.api.context import Ctx, Operator
from skerry_server.db.engine import reading, writing

router = APIRouter(prefix="/api/v1/devices/{device}/logs", tags=["devices"], route_class=Route)


@router.post("", summary="Ask a device for the last lines of its log", status_code=202)
def ask(context: Ctx, caller: Operator, device: str) -> dict[str, Any]:
    """One request waits at a time: a second one before the answer is the first one again, `repeated`."""
    with writing(context.engine) as conn:
        found, repeated = requested_logs.ask(conn, device=device, actor=caller.actor, now_ms=context.now_ms())
    context.wake()
    return found | {"repeated": repeated}


@router.get("", summary="The requests for a device's log that are kept, oldest first")
def list_requests(context: Ctx, _caller: Operator, device: str) -> dict[str, Any]:
    with reading(context.engine) as conn:
        return {"items": requested_logs.listed(conn, device=device, now_ms=context.now_ms()), "next": None}


@router.get("/{number}", summary="One request for a device's log, with the lines once they came")
def get_request(context: Ctx, _caller: Operator, device: str, number: int) -> dict[str, Any]:
    """`state`: waiting, answered, failed (see `fault`), expired, revoked. `lines` are as the device sent them."""
    with reading(context.engine) as conn:
        return requested_logs.find(conn, device=device, number=number, now_ms=context.now_ms())
