"""Routes: the deltas that devices could use, and what became of each."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from skerry_server import deltas, registry
from skerry_server.api.bodies import Route
from skerry_server.api.context import After, Ctx, Limit, Operator, Viewer, page, read_cursor
from skerry_server.core.deltas import State
from skerry_server.db.engine import reading, writing

router = APIRouter(prefix="/api/v1/deltas", tags=["bundles"], route_class=Route)


class Again(BaseModel):
    """Which: of one model, or all."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = Field(default=None, max_length=63)


@router.get("", summary="Deltas from files that devices run to files that they are given, with what each saves")
def list_deltas(
    context: Ctx,
    _caller: Viewer,
    model: Annotated[str | None, Query(max_length=63)] = None,
    state: State | None = None,
    after: After = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    """`state`: waiting, making, ready, useless (saves too little, so it is not kept), failed (see `detail`). `share` is of the whole file."""
    last = read_cursor(after, str, str)
    with reading(context.engine) as conn:
        if model is not None:
            registry.require_model(conn, model)
        key = None if last is None else (last[0], last[1])
        items = deltas.page(conn, model=model, state=state, after=key, limit=limit)
    return page(items, limit, *((items[-1]["from"], items[-1]["to"]) if items else ()))


@router.post("/retry", summary="Try again what failed or saved too little")
def retry(context: Ctx, caller: Operator, wish: Again | None = None) -> dict[str, Any]:
    model = wish.model if wish is not None else None
    with writing(context.engine) as conn:
        if model is not None:
            registry.require_model(conn, model)
        waiting = deltas.retry(conn, model=model, actor=caller.actor, now_ms=context.now_ms())
    return {"waiting": waiting}
