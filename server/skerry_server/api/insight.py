"""Routes: what profiles and labels say about a model: drift and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query
from skerry_contract import ids

from skerry_server import attributions, findings, outcomes, registry, shadowing
from skerry_server.api.bodies import Route
from skerry_server.api.context import After, Context, Ctx, Limit, Viewer, page, read_cursor
from skerry_server.db.engine import reading
from skerry_server.errors import NotFound

router = APIRouter(prefix="/api/v1", tags=["insight"], route_class=Route)

Model = Annotated[str | None, Query(max_length=63)]
Time = Annotated[int | None, Query(ge=0, le=1 << 53, description="Milliseconds since 1970")]


@router.get("/drift", summary="The last look for drift at each bundle, with what is open")
def drift(
    context: Ctx, _caller: Viewer, model: Model = None, after: After = None, limit: Limit = 100
) -> dict[str, Any]:
    """`verdict`: DRIFT, STEADY or NO_DATA, with a reason. Each finding says which feature or output, since when, and by how much."""
    last = read_cursor(after, str, str)
    with reading(context.engine) as conn:
        if model is not None:
            registry.require_model(conn, model)
        items = findings.evaluations_page(
            conn, model=model, after=None if last is None else (last[0], last[1]), limit=limit
        )
    return page(items, limit, *((items[-1]["model"], items[-1]["bundle"]) if items else ()))


@router.get("/drift/{digest}", summary="One bundle: every number of the last look, and all findings, closed ones too")
def drift_of(context: Ctx, _caller: Viewer, digest: str) -> dict[str, Any]:
    ids.bundle_digest(digest)
    with reading(context.engine) as conn:
        found = findings.evaluation_of(conn, digest)
        if found is None:
            raise NotFound("look for drift at bundle", digest)
        # A feature that moves and that the model leans on is another matter than one that it ignores.
        (explained,) = attributions.of(conn, [digest], from_ms=found["from_ms"] or 0, upto_ms=1 << 53) or [{}]
    return found | {"attributions": explained.get("variants", [])}


def _counted(
    context: Context,
    listed: Callable[..., list[dict[str, Any]]],
    model: str | None,
    since_ms: int | None,
    until_ms: int | None,
    after: str | None,
    limit: int,
) -> dict[str, Any]:
    """A page of what was counted of bundles, by (model, bundle), in the buckets that begin within ``[since_ms, until_ms)``."""
    last = read_cursor(after, str, str)
    with reading(context.engine) as conn:
        if model is not None:
            registry.require_model(conn, model)
        items = listed(
            conn,
            model=model,
            from_ms=since_ms or 0,
            upto_ms=until_ms if until_ms is not None else 1 << 53,
            after=None if last is None else (last[0], last[1]),
            limit=limit,
        )
    return page(items, limit, *((items[-1]["model"], items[-1]["bundle"]) if items else ()))


@router.get("/accuracy", summary="Accuracy of each bundle from labels with intervals, and a marked estimate beside it")
def accuracy(
    context: Ctx,
    _caller: Viewer,
    model: Model = None,
    since_ms: Time = None,
    until_ms: Time = None,
    after: After = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    """Of the buckets that begin within `[since_ms, until_ms)`; all without bounds. `estimate` is CBPE and never a measurement."""
    return _counted(context, outcomes.accuracy_page, model, since_ms, until_ms, after, limit)


@router.get(
    "/attributions", summary="What features had to do with the answers of each bundle, and how many were explained"
)
def attributed(
    context: Ctx,
    _caller: Viewer,
    model: Model = None,
    since_ms: Time = None,
    until_ms: Time = None,
    after: After = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    """Of the buckets that begin within `[since_ms, until_ms)`; all without bounds. `mean` is the mean absolute attribution of the explained
    rows: of probability where `unit` says so, else in the variant's own scale; `share` is of the sum of all means.
    """
    return _counted(context, attributions.page, model, since_ms, until_ms, after, limit)


@router.get("/shadows", summary="Candidates in shadow beside what answered, paired by request, all devices added up")
def shadows(
    context: Ctx,
    _caller: Viewer,
    model: Annotated[str, Query(max_length=63)],
    after: After = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    """`p` is McNemar's exact test of the labelled pairs in which only one was right; differences of latency are per pair."""
    last = read_cursor(after, str, str)
    with reading(context.engine) as conn:
        registry.require_model(conn, model)
        cursor = None if last is None else (last[0], last[1])
        items = shadowing.comparisons(conn, model, after=cursor, limit=limit)
    return page(items, limit, *((items[-1]["candidate"], items[-1]["bundle"]) if items else ()))
