"""Around every request: how many bytes it may send, and how long it took. Plain ASGI, so that bodies stream through."""

from __future__ import annotations

import asyncio
import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skerry_server.api import faults
from skerry_server.config import Limits
from skerry_server.telemetry import Telemetry

DEVICE_BODY_BYTES = 64 * 1024
LOG_BODY_BYTES = 192 * 1024
"""More than is taken, so that what is somewhat too long ends its request; far longer bodies are not read at all."""
_MB = 1_000_000


class BodyLimit:
    """Refuses a body that is too long, by its announced length or as soon as it has sent too much, and one that does not come."""

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    def limit(self, path: str) -> int:
        """The most bytes that a request to this path may send."""
        if path.startswith("/device/v1/logs/"):
            return LOG_BODY_BYTES
        if path.startswith("/device/"):
            return DEVICE_BODY_BYTES
        if path.startswith("/api/v1/blobs/"):
            return self._limits.blob_mb * _MB
        return self._limits.body_mb * _MB

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self.limit(scope["path"])
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > limit:
            await faults.answer(413, "too_large", f"body: at most {limit} bytes")(scope, receive, send)
            return
        taken, whole = 0, False
        stall_s = self._limits.stall_s
        # Who may send a blob is asked before it is read; any other body is read first, whoever sends it.
        end = None if scope["path"].startswith("/api/v1/blobs/") else time.monotonic() + 4 * stall_s

        async def counted() -> Message:
            nonlocal taken, whole
            if whole:  # what comes now is the end of the connection, and that may take its time
                return await receive()
            left_s = stall_s if end is None else max(0.0, min(stall_s, end - time.monotonic()))
            try:
                message = await asyncio.wait_for(receive(), left_s)
            except TimeoutError:
                raise HTTPException(408, "body: it did not come in time") from None
            whole = not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > limit:
                raise HTTPException(413, f"body: at most {limit} bytes")
            return message

        await self._app(scope, counted, send)


class Timed:
    """Counts and times requests by route template."""

    def __init__(self, app: ASGIApp, *, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", None)
            if route is None:
                route = "/repository" if scope["path"].startswith("/repository/") and status < 400 else "unmatched"
            # A client may invent methods; labels stay few.
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "PUT", "DELETE") else "other"
            self._telemetry.observe_request(method, route, status, time.perf_counter() - begun)
