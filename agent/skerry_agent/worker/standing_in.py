"""The answer of a fallback model that another worker serves: asked for, made the reply of the model that was asked, counted there.

It is the same as where both live in one worker (``calls``, ``inference``), but for the way that it takes.
"""

from __future__ import annotations

from time import monotonic_ns
from typing import Any

import msgspec

from skerry_agent.worker import calls, http1, oip
from skerry_agent.worker import ring as r
from skerry_agent.worker.inference import Done
from skerry_agent.worker.model import Model
from skerry_agent.worker.neighbours import Neighbours, Reply


class _Answer(msgspec.Struct):
    model_name: str
    model_version: str
    id: str
    outputs: msgspec.Raw
    parameters: dict[str, Any] | None = None


class StandingIn:
    """See the module."""

    def __init__(self, neighbours: Neighbours) -> None:
        self._neighbours = neighbours

    def answer(
        self,
        model: Model,
        request: http1.Request,
        asked: oip.InferRequest,
        rows: int,
        start: int,
        flags: int,
        unserved: calls.Unserved,
        done: Done,
    ) -> bool:
        """Asks the fallback of ``model`` for the answer. False when no other worker serves it."""
        name = model.manifest.fallback
        if not model.fallback_tensors or name not in self._neighbours.models:
            return False
        head = request.head
        begun = monotonic_ns()

        def reply(said: Reply | None) -> None:
            if said is not None and said.status == 200:
                done(self._answered(model, head, asked, rows, (start, begun), flags, unserved, said))
            elif said is not None and said.status == 400:
                now = monotonic_ns()
                model.recorder.other(r.INVALID, now - start, now, flags, unserved.kinds)
                done(http1.reply(400, oip.error_body(said.error()), close=not head.keep_alive))
            else:
                now = monotonic_ns()
                model.recorder.other(r.SHED, now - start, now, flags, unserved.kinds)
                why = said.error() if said is not None else "it did not answer"
                error = oip.error_body(f"{unserved.why}; {name} should answer instead: {why}")
                wait_s = said.retry_s if said is not None else 0
                done(http1.reply(503, error, close=not head.keep_alive, extra=http1.retry_after(max(1, wait_s))))

        path = f"/fallback/{name}/{model.fallback_tensors}"
        self._neighbours.ask(name, path, request.body, reply, head.json_length)
        return True

    def _answered(
        self,
        model: Model,
        head: http1.Head,
        asked: oip.InferRequest,
        rows: int,
        times: tuple[int, int],
        flags: int,
        unserved: calls.Unserved,
        said: Reply,
    ) -> bytes:
        text = said.body if said.json_length < 0 else said.body[: said.json_length]
        answer = msgspec.json.decode(text, type=_Answer)
        answer.parameters = {**(answer.parameters or {}), **calls.notes_of(model, unserved.why)}
        body, extra, kind = msgspec.json.encode(answer), calls.header_of(model), b"application/json"
        if said.json_length >= 0:
            extra += b"Inference-Header-Content-Length: %d\r\n" % len(body)
            body, kind = body + said.body[said.json_length :], b"application/octet-stream"
        start, begun = times
        now = monotonic_ns()
        model.recorder.ok(
            asked.inputs, calls.unknown_outputs(model, rows), rows, now - start, 0, 0, now - begun, now,
            flags | r.FALLBACK, 0, unserved.kinds, unserved.age_ms,
        )  # fmt: skip
        if head.client and model.clients is not None:
            model.clients.add(head.client, asked.inputs, rows)
        return http1.reply(200, body, close=not head.keep_alive, content_type=kind, extra=extra)
