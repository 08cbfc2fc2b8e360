"""The control socket: HTTP/1.1 over a unix socket in the state folder, for the person and the exporter on the device.

``GET /skerry/v1/status``, ``GET /metrics``, ``POST /skerry/v1/sync``, ``.../revert``, ``.../cancel``, ``.../flush``, ``.../reload``, ``.../throttle``. Who may open the folder (mode 0700)
may ask. One request per connection: the clients are tools, not loads.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from skerry_agent.asking import Answer, ask
from skerry_agent.errors import AgentError
from skerry_agent.logs import kv
from skerry_agent.socket_path import short

__all__ = ["MAX_BODY", "Answer", "ControlServer", "Handler", "ask"]

log = logging.getLogger(__name__)

MAX_BODY = 64 * 1024
_TIMEOUT_S = 10.0


Handler = Callable[[dict[str, Any]], Awaitable[Answer]]
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    500: "Internal Server Error",
}


class ControlServer:
    """Serves handlers by (method, path). Each gets the JSON object of the body, empty when there is none."""

    def __init__(self, path: Path, handlers: dict[tuple[str, str], Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Binds, replacing a socket that a killed agent left behind."""
        self._path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with short(self._path) as address:
            sock.bind(address)
        self._path.chmod(0o600)
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=MAX_BODY)

    async def stop(self) -> None:
        """Closes the socket and removes its file."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                answer = await self._answer(reader)
            raw = isinstance(answer.body, bytes)
            body = answer.body if raw else msgspec.json.encode(answer.body)
            kind = "text/plain; version=0.0.4; charset=utf-8" if raw else "application/json"
            writer.write(
                f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Error')}\r\nContent-Type: {kind}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                + body
            )
            await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.LimitOverrunError:
            return _refusal(400, "the request's head is too long")
        first, *lines = head.split("\r\n")
        parts = first.split(" ")
        if len(parts) != 3:
            return _refusal(400, f"wanted METHOD PATH HTTP/1.1, got {first[:80]!r}")
        method, path = parts[0], parts[1].partition("?")[0]
        length = 0
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip().lower() == "content-length":
                text = value.strip()
                if not text.isdigit() or int(text) > MAX_BODY:
                    return _refusal(400, f"Content-Length: wanted 0 to {MAX_BODY}, got {text[:40]!r}")
                length = int(text)
        body = await reader.readexactly(length)
        handler = self._handlers.get((method, path))
        if handler is None:
            known = any(path == other for _, other in self._handlers)
            return _refusal(405 if known else 404, f"there is no {method} {path[:100]}")
        try:
            value = msgspec.json.decode(body) if body else {}
        except msgspec.DecodeError as error:
            return _refusal(400, f"body: no JSON: {error}")
        if not isinstance(value, dict):
            return _refusal(400, f"body: wanted an object, got {type(value).__name__}")
        try:
            return await handler(value)
        except AgentError as error:
            return Answer(500, {"error": str(error), "code": error.code})
        except Exception:
            # A bug of ours: the person learns that there was one, the log which.
            log.exception("control request failed", extra=kv(method=method, path=path[:100]))
            return _refusal(500, "the agent failed to answer; its log says why")


def _refusal(status: int, text: str) -> Answer:
    return Answer(status, {"error": text})
