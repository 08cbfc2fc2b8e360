"""Routes for machines that watch this server. No token: they say nothing about devices."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from skerry_server.api.bodies import Route
from skerry_server.api.context import Ctx
from skerry_server.telemetry import CONTENT_TYPE

router = APIRouter(tags=["health"], route_class=Route)


@router.get("/healthz", summary="Whether the process answers")
def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Whether every part is well; 503 otherwise")
def readyz(context: Ctx) -> JSONResponse:
    parts: dict[str, Any] = context.probe()
    ready = all(parts.values())
    return JSONResponse({"ready": ready, "parts": parts}, status_code=200 if ready else 503)


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics(context: Ctx) -> Response:
    return Response(context.telemetry.text(), media_type=CONTENT_TYPE)
