"""Spans of local inferences, sent to an OpenTelemetry collector by OTLP/HTTP in JSON, when the configuration names one.

A request's W3C ``traceparent`` says whose trace it belongs to and whether that is sampled; of requests without one a share begins a
trace of its own. Off the way of the answer: a request leaves a small tuple in a bounded queue, from what its ring slot says; a
thread makes spans of it and sends them. What does not fit, or is not taken, is dropped and counted. An explanation that was asked for is
traced as a request is; one of a chosen row, made later beside the answering, is a child of its request's span where that is traced.

Own code and not ``opentelemetry-sdk``: that with its exporter takes 14.9 MB and 0.2 s of CPU at import (measured), all of what a worker may
take above its runtime; this takes what ``http.client`` does, and only where it is configured.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
from skerry_contract import __version__

from skerry_agent.worker import http1
from skerry_agent.worker import ring as r
from skerry_agent.worker.inference import Done
from skerry_agent.worker.model import Model
from skerry_agent.worker.recorder import Recorder

log = logging.getLogger(__name__)

QUEUE = 4096
BATCH = 256
INTERVAL_S = 2.0
_TIMEOUT_S = 5.0
_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SERVER, INTERNAL = 2, 1
_ERROR = 2
_ROWS = 64
"""Of one request whose explanations find its span."""
_OUTCOMES = {r.OK: "ok", r.INVALID: "invalid", r.FAILED: "failed", r.SHED: "shed"}

Answer = Callable[[Model, http1.Request, Done], bytes | None]


class Parent(NamedTuple):
    """Whose child a span is. ``span`` is empty for the root of a trace."""

    trace: str
    span: str
    sampled: bool


def parse_traceparent(text: bytes) -> Parent | None:
    """Reads the header (W3C Trace Context, 3.2); None for one that must be ignored.

    >>> parse_traceparent(b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    Parent(trace='0af7651916cd43dd8448eb211c80319c', span='b7ad6b7169203331', sampled=True)
    >>> parse_traceparent(b"00-00000000000000000000000000000000-b7ad6b7169203331-01")
    """
    found = _PARENT.fullmatch(text.strip())
    if found is None or found[1] == b"ff" or (found[1] == b"00" and found[5]):
        return None
    if not found[2].strip(b"0") or not found[3].strip(b"0"):
        return None
    return Parent(found[2].decode(), found[3].decode(), bool(int(found[4], 16) & 1))


class Traced(NamedTuple):
    """One request, as its slot says. Times in nanoseconds; ``end_ns`` of the wall clock; ``own``: the span's id."""

    parent: Parent
    own: str
    model: str
    version: str
    digest: str
    arm: str
    outcome: str
    end_ns: int
    total_ns: int
    queue_ns: int
    transform_ns: int
    infer_ns: int
    explain_ns: int = 0


class Explained(NamedTuple):
    """One explanation; ``why`` it was made: asked, share or audit. Times as in ``Traced``."""

    parent: Parent
    model: str
    version: str
    digest: str
    arm: str
    why: str
    failed: bool
    end_ns: int
    took_ns: int


class Named(Protocol):
    """What is needed of a model."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def version(self) -> str:
        """Of the bundle that answers."""

    @property
    def recorder(self) -> Recorder:
        """What counts its requests."""


class Draw(Protocol):
    """What is needed of a random generator."""

    def random(self) -> float:
        """Uniform in [0, 1)."""

    def getrandbits(self, k: int) -> int:
        """``k`` random bits."""


class Spans:
    """Collects and sends. Requests come from the event loop's thread.

    Args:
        endpoint: of the collector, with path; ``http`` or ``https``.
        share: of the requests without a ``traceparent`` that are traced.
        device: name of the resource; service: what sends; kind: of the requests' spans.

    Attributes:
        sent, dropped: requests whose spans the collector took, and that were given up.
    """

    def __init__(
        self,
        endpoint: str,
        share: float,
        *,
        device: str = "",
        draw: Draw | None = None,
        service: str = "skerry-agent",
        kind: int = SERVER,
    ) -> None:
        self.sent = self.dropped = 0
        self._share = share
        self._draw = draw or random.Random()
        self._kind = kind
        self._queue: deque[Traced | Explained] = deque()
        self._explainable: dict[tuple[str, int], Parent] = {}
        self._wake = threading.Event()
        self._over = False
        self._url = urllib.parse.urlsplit(endpoint)
        self._resource = _attributes({"service.name": service, "service.version": __version__, "host.name": device})
        self._thread = threading.Thread(target=self._send_on, name="spans", daemon=True)
        self._thread.start()

    def watching(self, answer: Answer) -> Answer:
        """Answers as ``answer`` does, and takes note of what is to be traced."""

        def watched(model: Model, request: http1.Request, done: Done) -> bytes | None:
            parent = self.parent_of(request.head.traceparent)
            if parent is None:
                return answer(model, request, done)

            def later(reply: bytes) -> None:
                self.note(model, parent, model.explain_ns)
                model.explain_ns = 0
                done(reply)

            reply = answer(model, request, later)
            if reply is not None:
                self.note(model, parent, model.explain_ns)
                model.explain_ns = 0
            return reply

        return watched

    def parent_of(self, header: bytes) -> Parent | None:
        """Whose child a request with this ``traceparent`` is; None for a request that is not traced."""
        if header:
            found = parse_traceparent(header)
            if found is not None:
                return found if found.sampled else None
        if self._draw.random() < self._share:
            return Parent(f"{self._draw.getrandbits(128):032x}", "", True)
        return None

    def note(self, model: Named, parent: Parent, explain_ns: int = 0) -> None:
        """Takes note of the request that the model's recorder counted last."""
        # The request's record was the last thing that was written, in this thread, a moment ago.
        ring = model.recorder.ring
        position = ring.written - 1
        while position > 0 and ring.meta[position % ring.capacity]["outcome"] == r.ROW:
            position -= 1
        slot = ring.meta[position % ring.capacity]
        own = self._id()
        if model.recorder.plan.explain is not None:
            # Rows of it may be explained later, beside the answering.
            for at in range(position, min(ring.written, position + _ROWS)):
                self._explainable[ring.path, at] = Parent(parent.trace, own, True)
            while len(self._explainable) > QUEUE:
                del self._explainable[next(iter(self._explainable))]
        key = model.recorder.key
        total, queue, transform, infer = (int(slot[name]) for name in r.TIMES)
        self._put(
            Traced(
                parent, own, model.name, model.version, key.bundle, key.arm, _OUTCOMES.get(int(slot["outcome"]), "ok"),
                time.time_ns(), total, queue, transform, infer, explain_ns,
            )
        )  # fmt: skip

    def request_at(self, model: Named, position: int) -> Parent | None:
        """The span of the request that a row was part of, once; None when it is not traced, or was long ago."""
        return self._explainable.pop((model.recorder.ring.path, position), None)

    def explained(self, model: Named, parent: Parent | None, took_ns: int, why: str, found: object) -> None:
        """Takes note of an explanation that was made beside the answering, and is over; without a parent it is not traced."""
        if parent is None:
            return
        key = model.recorder.key
        failed = isinstance(found, Exception)
        self._put(
            Explained(parent, model.name, model.version, key.bundle, key.arm, why, failed, time.time_ns(), took_ns)
        )

    def _put(self, one: Traced | Explained) -> None:
        if len(self._queue) >= QUEUE:
            self.dropped += 1
            return
        self._queue.append(one)
        if len(self._queue) >= BATCH:
            self._wake.set()

    # --- the thread --------------------------------------------------------------------------------------------------

    def close(self, timeout_s: float = 2.0) -> None:
        """Sends what is left, if the collector takes it soon."""
        self._over = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _send_on(self) -> None:
        while True:
            self._wake.wait(INTERVAL_S)
            self._wake.clear()
            over = self._over
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
                if self._send(batch):
                    self.sent += len(batch)
                else:
                    self.dropped += len(batch)
                    break
            if over:
                return

    def _send(self, batch: list[Traced | Explained]) -> bool:
        # Only a worker that traces needs these.
        import http.client
        import ssl

        body = msgspec.json.encode(self.document(batch))
        secure = self._url.scheme == "https"
        host, port = self._url.hostname or "", self._url.port or (443 if secure else 80)
        connection: http.client.HTTPConnection
        if secure:
            connection = http.client.HTTPSConnection(
                host, port, timeout=_TIMEOUT_S, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", self._url.path or "/v1/traces", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read(65536)
            if answer.status >= 300:
                log.warning("spans refused status=%s", answer.status)
            return answer.status < 300
        except (OSError, http.client.HTTPException) as error:
            log.warning("spans not sent error=%s", error)
            return False
        finally:
            connection.close()

    def document(self, batch: list[Traced | Explained]) -> dict[str, object]:
        """An OTLP ``ExportTraceServiceRequest`` as JSON says it: ids in hexadecimal digits, 64-bit numbers as text."""
        spans = [span for one in batch for span in self._spans(one)]
        scope = {"name": "skerry_agent.worker", "version": __version__}
        return {
            "resourceSpans": [
                {"resource": {"attributes": self._resource}, "scopeSpans": [{"scope": scope, "spans": spans}]}
            ]
        }

    def _spans(self, one: Traced | Explained) -> list[dict[str, object]]:
        if isinstance(one, Explained):
            return [self._explanation(one)]
        own = one.own
        start_ns = one.end_ns - one.total_ns
        told = {
            "skerry.model": one.model, "skerry.version": one.version, "skerry.bundle": one.digest, "skerry.arm": one.arm,
            "skerry.outcome": one.outcome,
        }  # fmt: skip
        found = [_span(one.parent, own, f"infer {one.model}", self._kind, start_ns, one.end_ns, told)]
        if one.outcome in ("failed", "shed"):
            found[0]["status"] = {"code": _ERROR, "message": one.outcome}
        # Their lengths are measured; where they lie within the request is not: one after the other, as they happen.
        at_ns = start_ns
        parts = (
            ("queue", one.queue_ns),
            ("transform", one.transform_ns),
            ("infer", one.infer_ns),
            ("explain", one.explain_ns),
        )
        for name, took_ns in parts:
            if took_ns:
                parent = Parent(one.parent.trace, own, True)
                found.append(_span(parent, self._id(), name, INTERNAL, at_ns, at_ns + took_ns, {}))
                at_ns += took_ns
        return found

    def _explanation(self, one: Explained) -> dict[str, object]:
        told = {
            "skerry.model": one.model, "skerry.version": one.version, "skerry.bundle": one.digest, "skerry.arm": one.arm,
            "skerry.why": one.why,
        }  # fmt: skip
        # One that was asked for by itself is a request of its own.
        kind = SERVER if one.why == "asked" else INTERNAL
        start_ns = one.end_ns - one.took_ns
        found = _span(one.parent, self._id(), f"explain {one.model}", kind, start_ns, one.end_ns, told)
        if one.failed:
            found["status"] = {"code": _ERROR, "message": "failed"}
        return found

    def _id(self) -> str:
        return f"{self._draw.getrandbits(64) or 1:016x}"


def _span(
    parent: Parent, own: str, name: str, kind: int, start_ns: int, end_ns: int, told: dict[str, str]
) -> dict[str, object]:
    found: dict[str, object] = {
        "traceId": parent.trace, "spanId": own, "name": name, "kind": kind, "startTimeUnixNano": str(start_ns),
        "endTimeUnixNano": str(end_ns), "attributes": _attributes(told),
    }  # fmt: skip
    if parent.span:
        found["parentSpanId"] = parent.span
    return found


def _attributes(values: dict[str, str]) -> list[dict[str, object]]:
    return [{"key": key, "value": {"stringValue": value}} for key, value in values.items() if value]
