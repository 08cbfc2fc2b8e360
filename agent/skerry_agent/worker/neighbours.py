"""A question of one worker to another: the answer of a fallback model, labels of another cell's predictions.

The asker makes a pair of sockets, gives one end away like a client's connection (``passing``), marked as its own, and speaks HTTP on
the other. So the supervisor finds the model's worker, wakes it when it sleeps, lets the question wait within the same
bounds and turns it away like any other; and whoever answers knows that no client stands behind it: no gate is asked, and an
inference is not counted, since the asker counts it. What has no answer within ``LONGEST_S`` has none.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import msgspec

from skerry_agent import workerwire as ww
from skerry_agent.channel import Channel
from skerry_agent.worker import calls, http1, intake, oip
from skerry_agent.worker.feedback import Feedback
from skerry_agent.worker.inference import Done, InferenceService
from skerry_agent.worker.model import Model
from skerry_agent.worker.recorder import Recorder

log = logging.getLogger(__name__)

LONGEST_S = 20.0
MOST = 64
"""Questions at a time; more are not asked."""
_LENGTH = re.compile(rb"\r\nContent-Length: ([0-9]+)\r\n")
_JSON_LENGTH = re.compile(rb"\r\nInference-Header-Content-Length: ([0-9]+)\r\n")
_RETRY = re.compile(rb"\r\nRetry-After: ([0-9]+)\r\n")


class Reply(msgspec.Struct, frozen=True):
    """What a neighbour said. ``json_length``: -1 when all of the body is JSON; ``retry_s``: 0 when nothing was said of it."""

    status: int
    body: bytes
    json_length: int = -1
    retry_s: int = 0

    def error(self) -> str:
        """Why it did not do what it was asked."""
        try:
            return str(msgspec.json.decode(self.body)["error"])
        except (msgspec.DecodeError, KeyError, TypeError):
            return f"status {self.status}"


class Neighbours:
    """Asks other workers.

    Attributes:
        models: that other workers serve, and their versions.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._tasks: set[asyncio.Task[None]] = set()
        self.models: Mapping[str, str] = {}

    def ask(
        self, model: str, path: str, body: bytes, on_reply: Callable[[Reply | None], None], json_length: int = -1
    ) -> None:
        """Asks the worker of ``model``; ``on_reply`` is called in the loop, with None when there was no answer."""
        if len(self._tasks) >= MOST:
            asyncio.get_running_loop().call_soon(on_reply, None)
            return
        head = f"POST {path} HTTP/1.1\r\nHost: neighbour\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        if json_length >= 0:
            head += f"Inference-Header-Content-Length: {json_length}\r\n"
        task = asyncio.get_running_loop().create_task(self._ask(model, head.encode() + b"\r\n", body, on_reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, model: str, head: bytes, body: bytes, on_reply: Callable[[Reply | None], None]) -> None:
        found: Reply | None = None
        try:
            async with asyncio.timeout(LONGEST_S):
                found = await self._talk(model, head, body)
        except (TimeoutError, OSError, asyncio.IncompleteReadError, ValueError) as error:
            log.warning("no answer from the worker of model=%s error=%s", model, type(error).__name__)
        on_reply(found)

    async def _talk(self, model: str, head: bytes, body: bytes) -> Reply:
        ours, theirs = socket.socketpair()
        with theirs:
            self._channel.send(ww.Conn(model=model, own=True), theirs.fileno())
        ours.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            writer.write(head)
            writer.write(body)
            said = await reader.readuntil(b"\r\n\r\n")
            length, json_length, retry = (pattern.search(said) for pattern in (_LENGTH, _JSON_LENGTH, _RETRY))
            if length is None:
                raise ValueError("a reply without its length")
            return Reply(
                int(said[9:12]),
                await reader.readexactly(int(length[1])),
                int(json_length[1]) if json_length else -1,
                int(retry[1]) if retry else 0,
            )
        finally:
            writer.close()


class Answerer:
    """Answers what other workers ask, on connections that are theirs; see ``server.Handler``."""

    def __init__(self, models: Mapping[str, Model], service: InferenceService, feedback: Feedback) -> None:
        self._models = dict(models)
        self._service = service
        self._feedback = feedback
        self._quiet: dict[str, Model] = {}

    def refuse(self, names: Iterable[str]) -> None:
        """These models are served no more, to neighbours neither."""
        for name in names:
            self._models.pop(name, None)

    def handle(self, request: http1.Request, done: Done, _asker: object) -> bytes | None:
        """See ``server.Handler``."""
        match request.head.path.decode("ascii", "replace").split("/"):
            case ["", "fallback", name, tensors] if name in self._models:
                model = self._quiet.get(name)
                if model is None:
                    model = self._quiet[name] = _quiet(self._models[name])
                if calls.tensors_of(model.manifest) != tensors:
                    return http1.reply(503, oip.error_body("its tensors are not the same"), close=True)
                return self._service.answer(model, request, done)
            case ["", "feedback"]:
                return self._feedback.answer(request, done)
        return http1.reply(503, oip.error_body("it is not served any more"), close=True)

    def begin(self, _head: http1.Head, _asker: object) -> int:
        """See ``server.Handler``: who asks has judged it."""
        return intake.MOST_BODY

    def space(self, refusal: bytes, _done: Done, _asker: object) -> bytes:
        """See ``server.Handler``."""
        return refusal


class _Uncounted:
    """In the place of a recorder."""

    prediction_prefix = b""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows

    def ok(self, *_: Any) -> None:
        """Counts nothing."""

    def other(self, *_: Any) -> None:
        """Counts nothing."""


def _quiet(model: Model) -> Model:
    """The model as it answers for another one: uncounted, no step of any stream, and by itself or not at all."""
    found = copy.copy(model)
    found.recorder = cast(Recorder, _Uncounted(model.recorder.max_rows))
    found.tee = found.streams = found.go_on = found.fallback = found.clients = None
    found.no_fallback, found.fallback_tensors = "it answers for another already", ""
    return found
