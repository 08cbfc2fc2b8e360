"""A model in this process: what an application calls."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import numpy as np
from skerry_runtime.errors import BadInput, Violation
from skerry_runtime.policies import KIND, NO_AGES, Ages

from skerry_agent import appwire
from skerry_agent import workerwire as ww
from skerry_agent.errors import AgentError, Degraded, Rejected, Transient
from skerry_agent.sdk.connection import Connection
from skerry_agent.sdk.live import Answer, Live, age_of, arrays_of, key_of, label_of, named_of, rows_of
from skerry_agent.sdk.loading import Loaded
from skerry_agent.worker import ring as r
from skerry_agent.worker.feedback import Feedback, Rules
from skerry_agent.worker.plan import plan_of
from skerry_agent.worker.recorder import Recorder

if TYPE_CHECKING:
    from skerry_agent.worker.spans import Spans

SOCKET_VARIABLE = "SKERRY_APPS_SOCKET"
DEFAULT_SOCKET = "/run/skerry-agent/apps.sock"
LOAD_S = 180.0
"""How long the first bundle may take to load and to prove itself."""
_FINAL = frozenset({"not_allowed", "other_protocol"})
_LABELS_S = 15.0


class Model:
    """A confirmed bundle, running here. Made by ``open``; a context manager.

    Every method may be called from any thread. Inferences of one ``Model`` happen one after the other; ``open`` it twice to
    compute on two cores. Nothing here is a coroutine: with asyncio use ``await asyncio.to_thread(model.infer, inputs)``, or
    call it directly where the model takes less time than the way to a thread (about 100 us).

    Attributes:
        name: of the model.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._news = threading.Condition()
        self._live: Live | None = None
        self._barred: AgentError | None = None
        self._error: AgentError | None = None
        self._closed = ""
        self._feedback: Feedback | None = None
        self._spans: Spans | None = None
        self._recorders: dict[str, Recorder] = {}
        self._timers: list[tuple[float, Any, tuple[Any, ...]]] = []
        self._folds: list[Any] = []
        _open.add(self)
        self._connection = Connection(path, self)
        self._connection.start()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what applications call --------------------------------------------------------------------------------------

    def infer(
        self,
        inputs: Mapping[str, Any],
        *,
        age_ms: float | None = None,
        stream: int | str | None = None,
        begin: bool = False,
        end: bool = False,
        explain: bool = False,
        traceparent: str = "",
    ) -> Answer:
        """One inference, guarded, transformed, timed and counted.

        Args:
            inputs: by name as the manifest declares them; arrays of its datatypes, or lists, which are converted.
            age_ms: how old the values are, for a manifest that says what stale ones do.
            stream: of a stateful model, whose inferences of one stream follow each other; without one each stands alone.
            begin, end: this is the first or the last of its stream.
            explain: say what the answer hangs on, ``Answer.explanation``; one row, of a model whose manifest has ``explanations.medians``.
            traceparent: W3C; whose trace this inference belongs to, where the agent's configuration names a collector.

        Raises:
            BadInput: guard or policy refuses them; counted as invalid. So it is where the manifest wants another model to
                answer instead: none is in here.
            EngineFailed: a transform or the runtime failed; counted as failed.
            Degraded: ``closed`` or ``forked``: this model answers no more; ``below_forced_floor``: not before a permitted version
                is confirmed here.
        """
        asked = monotonic_ns()
        with self._lock:
            live = self._live
            if live is None:
                raise Degraded(self._closed or "closed", f"{self.name}: not open in this process")
            if self._barred is not None:
                raise Degraded(self._barred.code, self._barred.detail)
            start = monotonic_ns()
            kinds, oldest_ms = live.kinds, -1
            told, explain_ns = None, 0
            try:
                if type(inputs) is not dict:
                    inputs = named_of(inputs)
                if type(traceparent) is not str:
                    raise BadInput(Violation("traceparent", type(traceparent).__name__, "a text"))
                for value in inputs.values():
                    if type(value) is not np.ndarray:
                        inputs = arrays_of(inputs, live.dtypes)
                        break
                rows = rows_of(inputs, live.max_rows)
                if live.special or age_ms is not None or stream is not None:
                    ages = NO_AGES if age_ms is None else Ages(age_of(age_ms))
                    oldest_ms = ages.oldest_ms()
                    judged = live.judge(inputs, ages)
                    kinds |= judged.kinds
                    if judged.fallback is not None:
                        raise BadInput(judged.fallback)
                    result = live.special_infer(judged.inputs, stream, begin, end)
                else:
                    result = live.infer(inputs)  # type: ignore[arg-type]  # converted above
                if explain:
                    begun = monotonic_ns()
                    told = live.explain(inputs, explain)
                    explain_ns = monotonic_ns() - begun
                    live.recorder.tally("explain.asked", 1)
            except Exception as error:
                now = monotonic_ns()
                if isinstance(error, BadInput):
                    live.other(r.INVALID, now - asked, now, 0, kinds | KIND.get(error.violation.kind, 0))
                else:
                    live.other(r.FAILED, now - asked, now, 0, kinds)
                if self._spans is not None:
                    self._trace(self._spans, live, traceparent, explain_ns)
                raise
            outputs = result.outputs
            position = live.recorder.ring.written
            now = monotonic_ns()
            live.recorder.ok(
                inputs, outputs, rows, now - asked, start - asked, result.transform_ns, result.infer_ns, now, 0, 0, kinds, oldest_ms,
            )  # fmt: skip
            if self._spans is not None:
                self._trace(self._spans, live, traceparent, explain_ns)
        return Answer(outputs, live, position, told)

    def _trace(self, spans: Spans, live: Live, traceparent: str, explain_ns: int) -> None:
        parent = spans.parent_of(traceparent.encode("ascii", "replace"))
        if parent is not None:
            spans.note(live, parent, explain_ns)

    def feedback(self, prediction_id: str, label: str | int, *, row: int | None = None) -> str:
        """Says what was right: a late label, counted under the bundle and key that had answered.

        Args:
            prediction_id: of an ``Answer`` of this ``Model``.
            label: a class by name or index.
            row: of an inference with several rows.

        Returns:
            ``matched``, ``late``, ``unknown``, ``duplicate`` or ``conflicting``.

        Raises:
            Rejected: ``invalid_label``: no such class, a row is wanted, or what was given is none of these types; ``other_life``: the prediction is of another process or
                an earlier one; tell it to the agent's own endpoint, ``POST /skerry/v1/feedback``. Neither is counted.
            Transient: ``labels_busy``: it cannot be counted now.
        """
        label, row = label_of(prediction_id, label, row)
        end_s = time.monotonic() + _LABELS_S
        while True:
            with self._lock:
                if self._live is None or self._feedback is None:
                    raise Degraded(self._closed or "closed", f"{self.name}: not open in this process")
                if not self._feedback.knows(prediction_id):
                    raise Rejected(
                        "other_life", f"{prediction_id[:100]!r} is no prediction of this process",
                        advice="POST it to /skerry/v1/feedback of the agent's local endpoint",
                    )  # fmt: skip
                found = self._feedback.take(prediction_id, label, row)
            if found is not None:
                outcome, error = found
                if outcome == "invalid":
                    raise Rejected("invalid_label", error)
                return outcome
            if time.monotonic() > end_s:
                raise Transient("labels_busy", "the agent's store takes no labels now")
            self._connection.wake()
            time.sleep(0.01)

    @property
    def version(self) -> str:
        """Of the bundle that answers now."""
        live = self._live
        return live.version if live is not None else ""

    @property
    def digest(self) -> str:
        """Of the bundle that answers now."""
        live = self._live
        return live.digest if live is not None else ""

    def inputs(self) -> dict[str, np.dtype[Any]]:
        """Datatypes of the inputs of the bundle that answers now, by name."""
        live = self._live
        return {} if live is None else {name: np.dtype(kind) for name, kind in live.dtypes.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of those inputs; -1 for any size."""
        live = self._live
        return {} if live is None else {tensor.name: tensor.shape for tensor in live.loaded.manifest.inputs}

    def status(self) -> dict[str, Any]:
        """What runs, whether the agent is there, and what was last refused: for people and health checks."""
        live, error = self._live, self._error
        return {
            "model": self.name,
            "version": live.version if live else "",
            "digest": live.digest if live else "",
            "arm": live.served.arm if live else "",
            "connected": not self._connection.away,
            "error": None if error is None else {"code": error.code, "detail": error.detail},
        }

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Hands everything counted so far to the agent. False when that is not in its store in time."""
        self.cut()
        self._connection.wake()
        with self._news:
            return self._news.wait_for(lambda: self._connection.ledger.empty and not self._connection.away, timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Counts what is left and ends. Without an agent it ends too: the ring file keeps what was counted."""
        if self._closed:
            return
        self.flush(0.0 if self._connection.away else timeout_s)
        with self._lock:
            live, self._live, self._closed = self._live, None, "closed"
            if live is not None:
                live.recorder.cut()
                live.recorder.ring.close()
            if self._feedback is not None:
                self._feedback.cut()
                self._feedback.close()
            spans, self._spans = self._spans, None
        if spans is not None:
            spans.close(timeout_s)
        _open.discard(self)
        self._connection.stop(timeout_s)

    # --- what the connection calls -----------------------------------------------------------------------------------

    def running(self) -> ww.Served | None:
        """See ``connection.Owner``."""
        return self._live.served if self._live is not None else None

    def loaded(self, welcome: appwire.Welcome, served: ww.Served, found: Loaded) -> None:
        """See ``connection.Owner``."""
        recorder = Recorder(
            key_of(served), plan_of(found.manifest), ring=served.ring, boot_id=welcome.boot_id, send=self._take, later=self._later,
            predictions=welcome.label_predictions if welcome.label_age_s > 0 else 0,
        )  # fmt: skip
        with self._lock:
            if self._closed:
                return
            if self._feedback is None:
                self._feedback = Feedback(
                    self._recorders, Rules(max_age_s=welcome.label_age_s, books=welcome.label_books), boot_id=welcome.boot_id,
                    send=self._take, loop=self,
                )  # fmt: skip
            if self._spans is None and welcome.otlp_endpoint:
                self._spans = _spans(welcome)
            old = self._live
            if old is not None:
                self._leave(old)
            self._recorders[self.name] = recorder
            self._live = Live(served, found, recorder)
            self._error = self._barred = None
        self._connection.wake()
        self.changed()

    def rekey(self, served: ww.Served) -> None:
        """See ``connection.Owner``."""
        with self._lock:
            live = self._live
            if live is None:
                return
            recorder = live.recorder
            before, book = recorder.ring.path, recorder.book
            upto = recorder.rekey(key_of(served), served.ring)
            if book is not None and self._feedback is not None:
                self._feedback.keep(book)
            self._end(before, upto)
            self._live = Live(served, live.loaded, recorder)
        self._connection.wake()

    def _leave(self, old: Live) -> None:
        recorder = old.recorder
        recorder.cut()
        upto, path = recorder.ring.written, recorder.ring.path
        recorder.ring.close()
        if recorder.book is not None and self._feedback is not None:
            self._feedback.keep(recorder.book)
        self._end(path, upto)

    def _end(self, path: str, upto: int) -> None:
        file = self._connection.ledger.files.get(path)
        if file is not None:
            file.hold()
            file.upto = upto

    def greeted(self) -> None:
        """See ``connection.Owner``."""
        self._error = None

    def failed(self, error: AgentError) -> None:
        """See ``connection.Owner``."""
        self._error = error
        if error.code == "below_forced_floor":
            self._barred = error
        self.changed()

    def committed(self, path: str, upto: int) -> None:
        """See ``connection.Owner``."""
        with self._lock:
            for recorder in self._recorders.values():
                recorder.committed(path, upto)
            if self._feedback is not None:
                self._feedback.committed(path, upto)

    def cut(self) -> None:
        """See ``connection.Owner``."""
        with self._lock:
            if self._live is None:
                return
            self._live.recorder.cut()
            if self._feedback is not None:
                self._feedback.cut()

    def fold(self) -> None:
        """See ``connection.Owner``."""
        with self._lock:
            folds, self._folds = self._folds, []
            if self._live is not None:
                for act in folds:
                    act()

    def changed(self) -> None:
        """See ``connection.Owner``."""
        with self._news:
            self._news.notify_all()

    # --- what recorder and feedback call, under the lock -------------------------------------------------------------

    def _take(self, message: Any) -> None:
        self._connection.ledger.take(message)
        self._connection.wake()

    def _later(self, act: Any) -> None:
        self._folds.append(act)
        self._connection.post(self.fold)

    def call_later(self, delay: float, callback: Any, *args: Any) -> object:
        """The loop that ``Feedback`` wants; only indexes for clients' own ids use it, and here are none."""
        self._timers.append((delay, callback, args))
        return None

    # --- waiting -----------------------------------------------------------------------------------------------------

    def wait_open(self, wait_s: float) -> None:
        """Waits for the first bundle. Raises why there is none."""
        end_s = time.monotonic() + wait_s
        last_s = time.monotonic() + max(wait_s, LOAD_S)

        def settled() -> bool:
            error = self._error
            now_s = time.monotonic()
            if self._live is not None:
                return True
            return error is not None and (error.code in _FINAL or now_s >= end_s)

        with self._news:
            while not settled() and time.monotonic() < last_s:
                self._news.wait(0.05)
        if self._live is None:
            raise self._error or Transient("load_timeout", f"{self.name} did not load within {LOAD_S:g} s")

    def forked(self) -> None:
        """In the child of a fork: nothing is counted here, the parent goes on."""
        self._lock = threading.Lock()
        # Its thread is the parent's.
        self._live, self._spans, self._closed = None, None, "forked"
        self._connection.abandon()


def open(model: str, *, socket: str | Path | None = None, wait_s: float = 0.0) -> Model:  # noqa: A001 - as in gzip
    """Loads the bundle that is confirmed on this device, and proves it.

    Args:
        model: its name.
        socket: the agent's ``apps.socket``; else of the environment's ``SKERRY_APPS_SOCKET``, else ``/run/skerry-agent/apps.sock``.
        wait_s: how long to wait for an agent, or for a model to be confirmed. Loading may take up to 180 s besides.

    Raises:
        Degraded: ``not_running`` (no agent there), ``unknown_model``, ``not_confirmed``, ``runtime_missing``, ``not_allowed``, or what the
            bundle lacks.
        Rejected: it does not prove itself here, ``golden_failed`` and the like.
        Transient: ``load_timeout``.
    """
    path = Path(socket or os.environ.get(SOCKET_VARIABLE, "") or DEFAULT_SOCKET)
    found = Model(model, path)
    try:
        found.wait_open(wait_s)
    except BaseException:
        found.close(0.0)
        raise
    return found


def _spans(welcome: appwire.Welcome) -> Spans:
    # Only an application that is traced needs it.
    from skerry_agent.worker.spans import INTERNAL, Spans

    return Spans(welcome.otlp_endpoint, welcome.trace_share, device=welcome.device, service="skerry-sdk", kind=INTERNAL)


_open: weakref.WeakSet[Model] = weakref.WeakSet()


def _after_fork() -> None:
    for model in list(_open):
        model.forked()


os.register_at_fork(after_in_child=_after_fork)
