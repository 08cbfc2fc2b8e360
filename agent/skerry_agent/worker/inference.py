"""One inference, timed and counted, and where it runs.

A request that should take less than ``Start.inline_below_us`` is answered on the event loop's own thread: handing it to a
thread and back costs 120 us (measured), several times what a small model needs. A longer one runs in the single inference
thread (runtimes release the GIL while they compute), so that health checks, small models and the control channel stay
prompt; there requests queue. What is too much is shed at once with 503 (``backlog``).

Every request for a known model ends in exactly one record, written before its reply is sent.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from time import monotonic_ns
from typing import Protocol

from skerry_runtime.errors import BadInput, Violation
from skerry_runtime.runner import Inference
from skerry_runtime.tensors import Tensors

from skerry_agent.worker import calls, http1, oip
from skerry_agent.worker import ring as r
from skerry_agent.worker.backlog import Backlog
from skerry_agent.worker.feedback import digest_of
from skerry_agent.worker.model import Model

log = logging.getLogger(__name__)

Done = Callable[[bytes], None]


class Loop(Protocol):
    """What is needed of the event loop."""

    def call_soon(self, callback: Callable[[], None]) -> object:
        """See asyncio."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> object:
        """See asyncio."""


StandIn = Callable[[Model, http1.Request, oip.InferRequest, int, int, int, calls.Unserved, Done], bool]


class InferenceService:
    """Answers inference requests of all models of a generation.

    Attributes:
        stand_in: asks the worker that serves a fallback model; see ``standing_in``.
    """

    def __init__(self, loop: Loop, *, max_inflight: int, inline_below_us: float, max_wait_s: float) -> None:
        self._loop = loop
        self._inline_below_us = inline_below_us
        self._backlog = Backlog(loop, most=max_inflight, longest_us=max_wait_s * 1e6)
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._under_way: tuple[int, float] | None = None
        self.stand_in: StandIn | None = None

    @property
    def inflight(self) -> int:
        """Requests accepted for the inference thread and not yet answered."""
        return self._backlog.queued

    def under_way_s(self) -> tuple[float, float]:
        """(how long the inference in the thread has taken, what it should take), seconds; zeros without one."""
        found = self._under_way
        return (0.0, 0.0) if found is None else ((monotonic_ns() - found[0]) / 1e9, found[1])

    def answer(self, model: Model, request: http1.Request, done: Done) -> bytes | None:
        """Answers one request: returns the reply's bytes, or None and calls ``done`` with them later, in the loop."""
        start = monotonic_ns()
        head = request.head
        flags = r.RETRY if head.attempt > 1 else 0
        call: calls.Call | None = None
        wait_us = self._backlog.full(at_once=model.expected_us(1) < self._inline_below_us)
        if wait_us:
            # Before it is read: under a burst, what is shed must cost next to nothing.
            return _shed(model, head, start, flags, wait_us)
        try:
            asked = oip.parse_request(request.body, head.json_length)
            rows = _rows(asked.inputs, model.recorder.max_rows)
            if model.special or asked.more is not None or asked.ages is not None or head.kinds:
                call = calls.prepare(model, asked)
                call.kinds |= head.kinds
                flags |= call.flags
        except BadInput as error:
            return _refuse(model, head, start, flags, error)
        except calls.Unserved as error:
            stand_in = self.stand_in
            if stand_in is not None and stand_in(model, request, asked, rows, start, flags, error, done):
                return None
            return _unserved(model, head, start, flags, error)
        except Exception as error:
            # A bug of ours. The client gets its answer and the request is counted, like one that the runtime failed.
            return _fail(model, head, start, flags, error)
        doing = model if call is None else call.answerer
        takes_us = doing.expected_us(rows) if call is None else doing.expected_us(rows) + call.more_us
        # Requests of a stream keep their order: behind one that waits for the thread, the next waits too.
        if takes_us < self._inline_below_us and not (doing.streams is not None and self.inflight):
            wait_us = self._backlog.at_once(takes_us)
            if wait_us:
                return _shed(model, head, start, flags, wait_us)
            try:
                result = model.infer(asked.inputs) if call is None else call.run()
            except Exception as error:
                return _fail(model, head, start, flags, error)
            return _reply(model, head, asked, rows, result, (start, 0), flags, call)
        wait_us = self._backlog.enter(takes_us, min(self.under_way_s()) * 1e6)
        if wait_us:
            return _shed(model, head, start, flags, wait_us)
        self._jobs.put(lambda: self._run(model, head, asked, rows, takes_us, start, flags, done, call))
        if self._thread is None:
            # A daemon: an inference that hangs must not keep the process from exiting.
            self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
            self._thread.start()
        return None

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    def _run(
        self,
        model: Model,
        head: http1.Head,
        asked: oip.InferRequest,
        rows: int,
        takes_us: float,
        start: int,
        flags: int,
        done: Done,
        call: calls.Call | None,
    ) -> None:
        begun = monotonic_ns()
        self._under_way = begun, takes_us / 1e6
        result: Inference | Exception
        try:
            result = model.infer(asked.inputs) if call is None else call.run()
        except Exception as error:
            result = error
        self._under_way = None
        self._loop.call_soon_threadsafe(
            self._finish, model, head, asked, rows, takes_us, result, (start, begun - start), flags, done, call
        )

    def _finish(
        self,
        model: Model,
        head: http1.Head,
        asked: oip.InferRequest,
        rows: int,
        takes_us: float,
        result: Inference | Exception,
        times: tuple[int, int],
        flags: int,
        done: Done,
        call: calls.Call | None,
    ) -> None:
        self._backlog.leave(takes_us)
        if isinstance(result, Exception):
            done(_fail(model, head, times[0], flags, result))
        else:
            done(_reply(model, head, asked, rows, result, times, flags, call))


def _rows(inputs: Tensors, most: int) -> int:
    for name, array in inputs.items():
        rows = array.shape[0] if array.ndim else 1
        if rows > most:
            raise BadInput(Violation(name, f"{rows} rows", f"at most {most} in one request"))
        return rows
    return 0


def _reply(
    model: Model,
    head: http1.Head,
    asked: oip.InferRequest,
    rows: int,
    result: Inference,
    times: tuple[int, int],
    flags: int,
    call: calls.Call | None,
) -> bytes:
    start, queue_ns = times
    outputs = result.outputs
    doing, notes, kinds, age_ms, extra = model, None, 0, -1, b""
    if call is not None:
        doing, notes, kinds, age_ms, extra = call.answerer, call.notes, call.kinds, call.age_ms, call.header
    took_ns, expectation = result.transform_ns + result.infer_ns, doing.expectation
    if rows > 1 or not expectation.low_ns <= took_ns <= expectation.high_ns:
        expectation.learn(rows, took_ns)
    recorder = model.recorder
    prediction, ident = b"", 0
    if recorder.prediction_prefix and doing is model:
        # Where the record will be, made here and now: nothing else runs between this and ``recorder.ok``.
        prediction = b"%b%x" % (recorder.prediction_prefix, recorder.ring.written)
        extra += b"Skerry-Prediction-Id: %b\r\n" % prediction
        if asked.id:
            ident = digest_of(asked.id)
    try:
        body, json_length = oip.build_response(doing.name, doing.version, asked, outputs, prediction, notes)
    except BadInput as error:
        return _refuse(model, head, start, flags, error)
    except Exception as error:
        return _fail(model, head, start, flags, error)
    if json_length < 0:
        reply = http1.reply(200, body, close=not head.keep_alive, extra=extra)
    else:
        extra += b"Inference-Header-Content-Length: %d\r\n" % json_length
        reply = http1.reply(200, body, close=not head.keep_alive, content_type=b"application/octet-stream", extra=extra)
    if doing is not model:
        outputs = calls.unknown_outputs(model, rows)
    elif model.tee is not None and model.streams is None:
        # A bundle in shadow has no part in the streams: of a stateful model it would see rows without what came before.
        model.tee.offer(asked.inputs, outputs, took_ns, recorder.ring.written)
    now = monotonic_ns()
    recorder.ok(
        asked.inputs,
        outputs,
        rows,
        now - start,
        queue_ns,
        result.transform_ns,
        result.infer_ns,
        now,
        flags,
        ident,
        kinds,
        age_ms,
    )
    if head.client and model.clients is not None:
        model.clients.add(head.client, asked.inputs, rows)
    if call is not None and call.explain_ns:
        model.explain_ns = call.explain_ns
        recorder.tally("explain.asked", 1)
    return reply


def _shed(model: Model, head: http1.Head, start: int, flags: int, wait_us: float) -> bytes:
    now = monotonic_ns()
    model.recorder.other(r.SHED, now - start, now, flags)
    body = oip.error_body(f"too much waits already; come again in {max(1, round(wait_us / 1e3))} ms")
    return http1.reply(503, body, close=not head.keep_alive, extra=http1.retry_after(wait_us / 1e6))


def _refuse(model: Model, head: http1.Head, start: int, flags: int, error: BadInput) -> bytes:
    now = monotonic_ns()
    model.recorder.other(r.INVALID, now - start, now, flags & ~r.FALLBACK, calls.kind_of(error))
    return http1.reply(400, oip.error_body(str(error)), close=not head.keep_alive)


def _unserved(model: Model, head: http1.Head, start: int, flags: int, error: calls.Unserved) -> bytes:
    now = monotonic_ns()
    model.recorder.other(r.SHED, now - start, now, flags, error.kinds)
    return http1.reply(503, oip.error_body(str(error)), close=not head.keep_alive)


def _fail(model: Model, head: http1.Head, start: int, flags: int, error: Exception) -> bytes:
    if isinstance(error, BadInput):
        return _refuse(model, head, start, flags, error)
    now = monotonic_ns()
    model.recorder.other(r.FAILED, now - start, now, flags & ~r.FALLBACK)
    # The runtime's words may quote values of the request: they go to the caller, who sent them, and not to the log.
    log.error(
        "inference failed model=%s error=%s code=%s", model.name, type(error).__name__, getattr(error, "code", "")
    )
    return http1.reply(500, oip.error_body(f"{model.name}: {error}"), close=not head.keep_alive)
