"""One inference, timed and counted, and where it runs.

A request that should take less than ``Start.inline_below_us`` is answered on the event loop's own thread: handing it to a
thread and back costs 120 us (measured), several times what a small model needs. A longer one runs in the single inference
thread (runtimes release the GIL while they compute), so that health checks, small models and the control channel stay
prompt; there requests queue. What is too much is shed at once with 503 (``backlog``). A large request is read in a thread of its
own first, within what its model can take (``intake``): however it is made, the loop goes on.

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

from skerry_agent.worker import calls, http1, intake, oip
from skerry_agent.worker import ring as r
from skerry_agent.worker.backlog import Backlog
from skerry_agent.worker.feedback import digest_of
from skerry_agent.worker.intake import SMALL, small
from skerry_agent.worker.model import Model

log = logging.getLogger(__name__)

Done = Callable[[bytes], None]
Read = tuple[int, oip.InferRequest]
"""When a request came, and what was read."""
MOST_READING = 16
"""Large requests that wait to be read."""
OBJECTS = 20
"""So many times the size of its text a request may take while it is decoded: two bytes become a number of 24 in a list."""
_READING_US = 1e6


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
        reading_bytes: memory that the large requests now being read may take for a moment; reading_peak: the most of it since it was
            last set to 0.
    """

    def __init__(self, loop: Loop, *, max_inflight: int, inline_below_us: float, max_wait_s: float) -> None:
        self._loop = loop
        self._inline_below_us = inline_below_us
        self._backlog = Backlog(loop, most=max_inflight, longest_us=max_wait_s * 1e6)
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._under_way: tuple[int, float] | None = None
        self._large: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None
        self._reading = self.reading_bytes = self.reading_peak = 0
        self.stand_in: StandIn | None = None

    @property
    def inflight(self) -> int:
        """Requests accepted for a thread and not yet answered."""
        return self._backlog.queued + self._reading

    def foresee(self, model: Model, head: http1.Head) -> bytes | None:
        """The answer to a request of which only the header block has come, where it can be but a refusal."""
        start = monotonic_ns()
        wait_us = self._backlog.full(at_once=model.expected_us(1) < self._inline_below_us)
        if not wait_us and self._reading >= MOST_READING:
            wait_us = _READING_US
        return _shed(model, head, start, r.RETRY if head.attempt > 1 else 0, wait_us) if wait_us else None

    def under_way_s(self) -> tuple[float, float]:
        """(how long the inference in the thread has taken, what it should take), seconds; zeros without one."""
        found = self._under_way
        return (0.0, 0.0) if found is None else ((monotonic_ns() - found[0]) / 1e9, found[1])

    def answer(self, model: Model, request: http1.Request, done: Done, read: Read | None = None) -> bytes | None:
        """Answers one request: returns the reply's bytes, or None and calls ``done`` with them later, in the loop.

        Args:
            read: what a large request was found to be.
        """
        start = monotonic_ns()
        head = request.head
        flags = r.RETRY if head.attempt > 1 else 0
        call: calls.Call | None = None
        wait_us = self._backlog.full(at_once=model.expected_us(1) < self._inline_below_us)
        if wait_us:
            # Before it is read: under a burst, what is shed must cost next to nothing.
            return _shed(model, head, start, flags, wait_us)
        try:
            if read is not None:
                start, asked = read
            elif head.encoding or len(request.body) > SMALL:
                plain = small(request)
                if plain is None:
                    return self._read(model, request, start, flags, done)
                request, head = plain, plain.head
                asked = oip.parse_request(request.body, head.json_length)
            else:
                asked = oip.parse_request(request.body, head.json_length)
            rows = _rows(asked.inputs, model.recorder.max_rows)
            if model.special or asked.more is not None or asked.ages is not None or head.kinds:
                call = calls.prepare(model, asked, head.client)
                call.kinds |= head.kinds
                flags |= call.flags
        except BadInput as error:
            return _refuse(model, head, start, flags, error)
        except http1.Refused as error:
            return _undecoded(model, head, start, flags, error)
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
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="inference", daemon=True)
            self._thread.start()
        return None

    def _read(self, model: Model, request: http1.Request, start: int, flags: int, done: Done) -> bytes | None:
        """Has a large request read by the thread for that, and answers it then."""
        if self._reading >= MOST_READING:
            return _shed(model, request.head, start, flags, _READING_US)
        self._reading += 1
        # What it is inflated to is known afterwards.
        size = model.takes.body_bytes if request.head.encoding else len(request.body)
        cost = size if request.head.json_length >= 0 else OBJECTS * size
        self.reading_bytes += cost
        self.reading_peak = max(self.reading_peak, self.reading_bytes)

        def read() -> None:
            found: tuple[http1.Request, Read] | Exception
            try:
                plain = intake.plain(request, model.takes.body_bytes)
                found = plain, (start, oip.parse_request(plain.body, plain.head.json_length, model.takes))
            except Exception as error:
                # Its traceback would hold this frame, and so the request, until the collector comes.
                found = error.with_traceback(None)
            self._loop.call_soon_threadsafe(go_on, found)

        def go_on(found: tuple[http1.Request, Read] | Exception) -> None:
            self._reading -= 1
            self.reading_bytes -= cost
            reply: bytes | None
            if isinstance(found, http1.Refused):
                reply = _undecoded(model, request.head, start, flags, found)
            elif isinstance(found, Exception):
                reply = _fail(model, request.head, start, flags, found)
            else:
                reply = self.answer(model, found[0], done, found[1])
            if reply is not None:
                done(reply)

        self._large.put(read)
        if self._reader is None:
            self._reader = threading.Thread(target=_work, args=(self._large,), name="reading", daemon=True)
            self._reader.start()
        return None

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


def _work(jobs: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()


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


def _undecoded(model: Model, head: http1.Head, start: int, flags: int, error: http1.Refused) -> bytes:
    now = monotonic_ns()
    model.recorder.other(r.INVALID, now - start, now, flags)
    return http1.reply(error.status, oip.error_body(error.message), close=not head.keep_alive)


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
