"""Requests for models of other workers: their connections are given away, with the bytes read so far.

A connection goes at a request boundary, as in a hand-over: nothing in work, every byte of the last reply in the kernel. It goes as
soon as the head of the request says whose it is; labels go when the request is whole. Who gets such a connection answers that
request itself, and the next one may send the connection back.
"""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Callable, Iterable

from skerry_contract import window as w

from skerry_agent import workerwire as ww
from skerry_agent.channel import Channel
from skerry_agent.worker import http1, intake, oip
from skerry_agent.worker.access import Gate
from skerry_agent.worker.server import Connection, Server

_POLL_S = 0.002
_CACHED_PATHS = 256
ABOUT_MODELS = (b"/skerry/v1/feedback", b"/skerry/v1/explain")
_KINDS = {waited: 1 << w.GUARD_KINDS.index(f"load.{waited}") for waited in ("cold", "waiting")}


class Passing:
    """Decides of each request whether it is another worker's.

    Args:
        models_of: models that the body of a request is about, labels or a question.
        gate: what requests must pass first. Who may not ask a model here wakes none elsewhere.
    """

    def __init__(
        self,
        server: Server,
        channel: Channel,
        models_of: Callable[[bytes], set[str]],
        gate: Callable[[], Gate | None],
    ) -> None:
        self._gate = gate
        self._server = server
        self._channel = channel
        self._models_of = models_of
        self._loop = asyncio.get_running_loop()
        self._models: frozenset[str] = frozenset()
        self._paths: dict[bytes, str] = {}
        self._going: set[Connection] = set()
        self.passed = 0

    def know(self, models: Iterable[str]) -> None:
        """Notes which models are served elsewhere."""
        self._models = frozenset(models)
        self._paths.clear()
        self.watch()

    def watch(self) -> None:
        """Looks at every request from now on; without it, requests are spared the look."""
        self._server.passing = self

    def takes(self, connection: Connection, found: http1.Request | http1.Incomplete) -> bool:
        """Whether the request is not to be answered like any other: its connection goes away, or it is turned away."""
        head = found.head
        if head is None:
            return False
        request = found if isinstance(found, http1.Request) else None
        if connection.settled:
            if request is None:
                return False
            connection.settled = False
            retry_s, connection.retry_s = connection.retry_s, 0
            if retry_s == 0:
                connection.kinds = _KINDS.get(connection.waited, 0)
                return False
            body = oip.error_body("the model is not ready")
            extra = b"Retry-After: %d\r\n" % retry_s
            connection.answer(request, http1.reply(503, body, close=not head.keep_alive, extra=extra))
            return True
        model = self._paths.get(head.path)
        if model is None:
            model = self._model_in(head.path)
        gate = self._gate()
        if head.path in ABOUT_MODELS and request is not None and head.method == "POST":
            if gate is None or gate.lets_by(head, connection, ""):
                about = self._about(request)
                model = about.pop() if len(about) == 1 and about <= self._models else ""
        if not model or (gate is not None and not gate.lets_by(head, connection, model)):
            return False
        self._going.add(connection)
        self._give(connection, model)
        return True

    def _about(self, request: http1.Request) -> set[str]:
        try:
            return self._models_of(intake.plain(request, intake.LEAST_BODY).body)
        except http1.Refused:
            # Whoever answers here says so.
            return set()

    def _model_in(self, path: bytes) -> str:
        parts = path.split(b"/")
        name = ""
        if parts[1:3] == [b"v2", b"models"] and len(parts) > 3:
            asked = urllib.parse.unquote(parts[3].decode("utf-8", "replace"))
            name = asked if asked in self._models else ""
        if len(self._paths) < _CACHED_PATHS:
            self._paths[path] = name
        return name

    def _give(self, connection: Connection, model: str) -> None:
        if connection not in self._going or connection not in self._server.connections:
            self._going.discard(connection)
            return
        if not connection.at_boundary:
            # A pipelined reply before it is still on its way.
            self._loop.call_later(_POLL_S, self._give, connection, model)
            return
        self._going.discard(connection)
        self._channel.send(ww.Conn(head=connection.unanswered(), model=model), connection.fileno())
        connection.abandon()
        self.passed += 1
