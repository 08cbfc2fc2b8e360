"""Explains answers beside the answering: chosen rows into windows, and single ones on request (``POST /skerry/v1/explain``).

A thread of its own, of low priority, does it while no request is in work, some rows in one run of the model, and sleeps after
each run so that it has at most ``BUDGET`` of one processor. Of an audit class all are to be explained: their rows wait up to
``MOST_AUDITED_BYTES``, of a share only ``MOST_WAITING``. What does not fit is dropped and counted: of the rows that were chosen
(``explain.chosen``) each ends as explained (``explain.rows``) or dropped (``explain.dropped``), in this window or in a later
one of the same key; a killed worker takes along what it had not explained.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from skerry_runtime import explain
from skerry_runtime.errors import BadInput
from skerry_runtime.tensors import DTYPES, Tensors

from skerry_agent.worker import http1, oip
from skerry_agent.worker.attributing import open_part
from skerry_agent.worker.choosing import Row
from skerry_agent.worker.intake import SMALL
from skerry_agent.worker.model import Model
from skerry_agent.worker.spans import Parent, Spans

log = logging.getLogger(__name__)

BUDGET = 0.05
MOST_WAITING = 256
"""Rows of a share, of all models."""
MOST_AUDITED_BYTES = 4 << 20
"""Of rows of audit classes that wait, of all models: 8,000 rows of 30 features, as many as a ring holds by default."""
MOST_TOGETHER = 512
"""Rows of the model's own batch: each row that is explained is one, and one more for each of its features."""
_RUN_NS = 10_000_000
"""How long one run may take, about, where the last one's pace holds: what a client asks waits for it."""
_ROW_BYTES = 300
"""What a row that waits takes beside its values."""
MOST_ASKED = 8
_IDLE_S = 0.02
_LONGEST_PAUSE_S = 5.0
_NICE = 10
_RETRY_LATER = b"Retry-After: 1\r\n"
_PREDICTION = re.compile(r"([a-z0-9][a-z0-9-]{0,62}-[0-9a-f]{10}-)([0-9a-f]{1,16})")

Done = Callable[[bytes], None]
Found = list[explain.Explanation | Exception]
Finish = Callable[[Found, int], None]
"""Gets what came of each row, and what all of them took, ns."""


class Loop(Protocol):
    """What is needed of the event loop."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> object:
        """See asyncio."""


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``id`` of a prediction that is still remembered, with the ``row`` of a request with several; or ``model`` and ``inputs``."""

    id: str = ""
    row: int = 0
    model: str = ""
    inputs: msgspec.Raw = msgspec.Raw()


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


_decoder = msgspec.json.Decoder(_Asked)


def asked_of(body: bytes) -> set[str]:
    """The model that a question is about, as far as it says so; none when it cannot be read."""
    try:
        asked = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return set()
    parts = _PREDICTION.fullmatch(asked.id)
    name = asked.model or (parts[1][:-12] if parts else "")
    return {name} if name else set()


class Explaining:
    """Not thread-safe: every call comes from the event loop's thread.

    Args:
        busy: whether requests are in work.
        on_audit: hears of each explained row of an audit class: model, row, attributions by feature, none of them personal.
        spans: of explanations whose requests are traced; None for none.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        loop: Loop,
        *,
        busy: Callable[[], bool],
        on_audit: Callable[[str, Row, dict[str, float]], None] = lambda *_: None,
        budget: float = BUDGET,
        spans: Spans | None = None,
    ) -> None:
        self._models = models
        self.refused: frozenset[str] = frozenset()
        self._loop = loop
        self._busy = busy
        self._on_audit = on_audit
        self._budget = budget
        self._spans = spans
        self._jobs: queue.PriorityQueue[tuple[int, int, explain.Occluder, Tensors, Finish]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._waiting: dict[str, int] = dict.fromkeys(models, 0)
        self._lives: dict[str, int] = dict.fromkeys(models, 0)
        self._asked = 0
        self._chosen: deque[tuple[str, Row]] = deque()
        self._shares = 0
        """Rows among them that no audit wants."""
        self._audited_bytes = 0
        self._running = False
        self._pace_ns = dict.fromkeys(models, 0)
        """What a row took in the last run."""

    # --- chosen rows ------------------------------------------------------------------------------------------------

    def taker(self, name: str) -> Callable[[list[Row]], int] | None:
        """What takes a model's chosen rows; None when nothing of it is ever explained."""
        model = self._models[name]
        plan = model.recorder.plan
        if plan.explain is None:
            return None
        try:
            if not plan.complete:
                raise explain.NotExplainable("not all inputs are watched, so a record does not hold what was asked")
            model.attributing.occluder  # noqa: B018 - whether it can be had
        except explain.NotExplainable as error:
            log.warning("chosen rows are not explained model=%s why=%s", name, error)
            return None
        return lambda rows: self._take(name, rows)

    def _take(self, name: str, rows: list[Row]) -> int:
        taken = 0
        for row in rows:
            size = _ROW_BYTES + row.values.nbytes
            if self._audits(name, row):
                if self._audited_bytes + size > MOST_AUDITED_BYTES:
                    continue
                self._audited_bytes += size
            elif self._shares < MOST_WAITING:
                self._shares += 1
            else:
                continue
            self._chosen.append((name, row))
            taken += 1
        self._waiting[name] += taken
        self._run()
        return taken

    def _audits(self, name: str, row: Row) -> bool:
        wanted = self._models[name].recorder.plan.explain
        return wanted is not None and row.predicted in wanted.audit

    def _out(self, name: str, row: Row) -> None:
        """A row waits no longer."""
        if self._audits(name, row):
            self._audited_bytes -= _ROW_BYTES + row.values.nbytes
        else:
            self._shares -= 1

    def _run(self) -> None:
        """Gives the thread the next rows of one model, unless it has some."""
        if self._running or not self._chosen:
            return
        name = self._chosen[0][0]
        model, life = self._models[name], self._lives[name]
        occluder = model.attributing.occluder
        most = MOST_TOGETHER // (1 + len(occluder.features)) if occluder.batched else 1
        if self._pace_ns[name]:
            most = min(most, _RUN_NS // self._pace_ns[name])
        rows: list[Row] = []
        while self._chosen and self._chosen[0][0] == name and (not rows or len(rows) < most):
            row = self._chosen.popleft()[1]
            self._out(name, row)
            rows.append(row)
        self._running = True
        inputs = inputs_of(model, np.stack([row.values for row in rows]))
        self._put(1, occluder, inputs, lambda found, took_ns: self._ran(name, life, rows, found, took_ns))

    def _ran(self, name: str, life: int, rows: list[Row], found: Found, took_ns: int) -> None:
        self._running = False
        self._pace_ns[name] = took_ns // len(rows)
        if life == self._lives[name]:  # else counted as dropped, under the key they were answered under
            self._waiting[name] -= len(rows)
            self._explained(name, list(zip(rows, found, strict=True)), took_ns // len(rows))
        self._run()

    def _explained(self, name: str, pairs: list[tuple[Row, explain.Explanation | Exception]], took_ns: int) -> None:
        model = self._models[name]
        occluder, attributions = model.attributing.occluder, []
        for row, found in pairs:
            audited = self._audits(name, row)
            if self._spans is not None:
                parent = self._spans.request_at(model, row.position)
                self._spans.explained(model, parent, took_ns, "audit" if audited else "share", found)
            if isinstance(found, Exception):
                log.warning("row not explained model=%s error=%s", name, type(found).__name__)
                continue
            attributions.append(found.attributions)
            if audited:
                self._on_audit(name, row, open_part(model.manifest, occluder, found)[0])
        if attributions:
            model.recorder.explained(occluder.features, np.stack(attributions), occluder.scale)
        if len(attributions) < len(pairs):
            model.recorder.tally("explain.dropped", len(pairs) - len(attributions))

    def abandon(self, name: str) -> None:
        """Drops what waits, before the model's key changes: it must count under the key it was answered under."""
        if self._waiting[name]:
            self._models[name].recorder.tally("explain.dropped", self._waiting[name])
        self._waiting[name] = 0
        self._lives[name] += 1
        left = [(other, row) for other, row in self._chosen if other != name]
        for other, row in self._chosen:
            if other == name:
                self._out(name, row)
        self._chosen = deque(left)

    def leave(self) -> None:
        """Drops all that waits: the worker goes."""
        for name in self._models:
            self.abandon(name)

    # --- on request -------------------------------------------------------------------------------------------------

    def answer(self, request: http1.Request, done: Done, models: tuple[str, ...] = ()) -> bytes | None:
        """``POST /skerry/v1/explain``: the reply's bytes, or None and ``done`` is called with them later.

        Args:
            models: about which this client may ask; empty for all.
        """
        close = not request.head.keep_alive
        try:
            model, inputs = self._question(request.body)
            if models and model.name not in models:
                raise _Refused(403, f"explain: not for a client of {', '.join(models)}")
            occluder = model.attributing.occluder
            if self._asked >= MOST_ASKED:
                body = oip.error_body(f"{MOST_ASKED} explanations are in work already")
                return http1.reply(503, body, close=close, extra=_RETRY_LATER)
        except _Refused as error:
            return http1.reply(error.status, oip.error_body(str(error)), close=close)
        except explain.NotExplainable as error:
            return http1.reply(400, oip.error_body(f"{model.name}: cannot be explained: {error}"), close=close)
        except BadInput as error:
            return http1.reply(400, oip.error_body(str(error)), close=close)
        self._asked += 1
        parent = self._spans.parent_of(request.head.traceparent) if self._spans is not None else None
        self._put(
            0, occluder, inputs, lambda found, took_ns: self._reply(model, found[0], took_ns, parent, close, done)
        )
        return None

    def _question(self, body: bytes) -> tuple[Model, Tensors]:
        try:
            asked = _decoder.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _Refused(400, f"explain: {error}") from None
        if bool(asked.id) == bool(bytes(asked.inputs)):
            raise _Refused(400, "explain: wanted the id of a prediction, or inputs")
        if asked.id:
            return self._remembered(asked)
        model = self._model(asked.model)
        text = b'{"inputs":%b}' % bytes(asked.inputs)
        found = oip.parse_request(text, -1, model.takes if len(text) > SMALL else None).inputs
        if any(array.shape[:1] != (1,) for array in found.values()):
            raise _Refused(400, "explain: wanted inputs of one row")
        violation = model.runner.guard.check(found)
        if violation is not None:
            raise BadInput(violation)
        return model, found

    def _model(self, name: str) -> Model:
        if not name and len(self._models) == 1:
            (name,) = self._models
        if name not in self._models or name in self.refused:
            raise _Refused(404 if name else 400, f"explain: wanted the model, one of {', '.join(self._models)}")
        return self._models[name]

    def _remembered(self, asked: _Asked) -> tuple[Model, Tensors]:
        parts = _PREDICTION.fullmatch(asked.id)
        prefix = parts[1].encode() if parts else b""
        for model in self._models.values():
            recorder = model.recorder
            if parts and prefix == recorder.prediction_prefix:
                if not recorder.plan.complete:
                    raise explain.NotExplainable("not all inputs are watched, so a record does not hold what was asked")
                try:
                    values = recorder.values_of(int(parts[2], 16), asked.row)
                except LookupError as error:
                    raise _Refused(404, f"explain: {asked.id}: {error}") from None
                return model, inputs_of(model, values)
        raise _Refused(404, f"explain: {asked.id[:100]}: no such prediction, or not of a model that answers now")

    def _reply(
        self,
        model: Model,
        found: explain.Explanation | Exception,
        took_ns: int,
        parent: Parent | None,
        close: bool,
        done: Done,
    ) -> None:
        self._asked -= 1
        if self._spans is not None:
            self._spans.explained(model, parent, took_ns, "asked", found)
        if isinstance(found, Exception):
            status = 400 if isinstance(found, BadInput) else 500
            done(http1.reply(status, oip.error_body(f"{model.name}: {found}"), close=close))
            return
        model.recorder.tally("explain.asked", 1)
        told = msgspec.to_builtins(model.attributing.tell(found))
        answer = {"model": model.name, "version": model.version, **told}
        done(http1.reply(200, msgspec.json.encode(answer), close=close))

    # --- the thread -------------------------------------------------------------------------------------------------

    def _put(self, order: int, occluder: explain.Occluder, inputs: Tensors, finish: Finish) -> None:
        self._jobs.put((order, next(self._numbers), occluder, inputs, finish))
        if self._thread is None:
            # A daemon: a model that hangs must not keep the process from exiting.
            self._thread = threading.Thread(target=self._work, name="explaining", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while True:
            order, _, occluder, inputs, finish = self._jobs.get()
            while order and self._busy():
                time.sleep(_IDLE_S)
            before, begun_ns = time.thread_time(), time.monotonic_ns()
            found = occluder.explain_each(inputs)
            used = time.thread_time() - before
            try:
                self._loop.call_soon_threadsafe(finish, found, time.monotonic_ns() - begun_ns)
            except RuntimeError:
                return  # the loop is closed: the worker is gone
            time.sleep(min(_LONGEST_PAUSE_S, used * (1 / self._budget - 1)))


def inputs_of(model: Model, values: npt.NDArray[np.floating]) -> Tensors:
    """Inputs of what records hold, of one or of several rows. Only of a plan that is ``complete``."""
    found: Tensors = {}
    at, values = 0, np.atleast_2d(values)
    for name in dict.fromkeys(f.input for f in model.recorder.plan.features):
        tensor = next(t for t in model.manifest.inputs if t.name == name)
        width = tensor.shape[-1] if len(tensor.shape) == 2 else 1
        part = values[:, at : at + width].astype(DTYPES[tensor.datatype])
        found[name] = part if len(tensor.shape) == 2 else part.reshape(len(values))
        at += width
    return found
