"""The worker's life: what each message of the supervisor does, and how it ends.

It ends in one of four ways, all of which answer what is in work first: ``drain`` (connections are passed on), ``stop`` and
SIGTERM (connections are closed), and the end of the control channel, which means that the supervisor is gone: then nothing
can be sent, and the rings keep what was counted for the next worker to recover.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence

from skerry_runtime import engines
from skerry_runtime.errors import Degraded

from skerry_agent import workerwire as ww
from skerry_agent.channel import Channel
from skerry_agent.worker import http1
from skerry_agent.worker.access import Asker, Gate, peer_name
from skerry_agent.worker.book import Book
from skerry_agent.worker.distinct import Clients, Distinct
from skerry_agent.worker.explaining import Explaining, asked_of
from skerry_agent.worker.feedback import Feedback, Rules, models_of
from skerry_agent.worker.generation import CannotServe, key_of, load_generation
from skerry_agent.worker.handover import Handover
from skerry_agent.worker.inference import InferenceService
from skerry_agent.worker.memory import give_back, own_mb
from skerry_agent.worker.model import Model
from skerry_agent.worker.neighbours import Answerer, Neighbours
from skerry_agent.worker.passing import Passing
from skerry_agent.worker.recovery import recover
from skerry_agent.worker.resources import rss_kb
from skerry_agent.worker.routes import Routes
from skerry_agent.worker.sampling import Sampling
from skerry_agent.worker.server import Server
from skerry_agent.worker.spans import Spans
from skerry_agent.worker.splitting import Splitting
from skerry_agent.worker.standing_in import StandingIn
from skerry_agent.worker.tee import Tee
from skerry_agent.worker.telling import Telling

log = logging.getLogger(__name__)

FINISH_S = 5.0
"""How long requests in work may take once the worker is told to stop, by whom it is not told how long."""
_POLL_S = 0.005
GIVEN_BACK_BYTES = 8 << 20


class Worker:
    """One worker process. Make it inside the running event loop, then await ``run``."""

    def __init__(self, control: socket.socket, listeners: Sequence[socket.socket]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listeners = listeners
        self._over = asyncio.Event()
        self._status = 0
        self._models: dict[str, Model] = {}
        self._served: dict[str, ww.Served] = {}
        self._start: ww.Start | None = None
        self._service: InferenceService | None = None
        self._server: Server | None = None
        self._feedback: Feedback | None = None
        self._spans: Spans | None = None
        self._explaining: Explaining | None = None
        self._answerer: Answerer | None = None
        self._refused: frozenset[str] = frozenset()
        self._sampling: Sampling | None = None
        self._passing: Passing | None = None
        self._routes: Routes | None = None
        self._clients: Clients | None = None
        self._since = time.monotonic()
        self._folds = 0
        self._ending: asyncio.Task[None] | None = None
        self._channel = Channel(control, self._on_message, self._on_eof)
        self._telling = Telling(self._loop, self._channel.send)
        self._neighbours = Neighbours(self._channel)
        self._loop.add_signal_handler(signal.SIGTERM, self._on_stop)
        # A terminal's Ctrl-C reaches the whole process group; the supervisor decides what it means.
        self._loop.add_signal_handler(signal.SIGINT, lambda: None)

    async def run(self) -> int:
        """Serves until told to end; the process's exit status."""
        await self._over.wait()
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)
        self._telling.end()
        await self._channel.flushed()
        self._channel.close()
        return self._status

    # --- messages ---------------------------------------------------------------------------------------------------

    def _on_message(self, message: ww.ToWorker, fd: int | None) -> None:
        match message:
            case ww.Conn():
                self._adopt(fd, message)
                return
            case ww.Feed():
                self._show(message, fd)
                return
            case ww.Warm(runtimes=runtimes):
                self._warm(runtimes)
            case ww.Start():
                self._load(message, fd)
            case ww.Listen():
                self._listen(message)
            case ww.Accept(on=on):
                if self._server is not None:
                    self._server.accept(on)
            case ww.Elsewhere(models=models):
                if self._passing is not None and self._feedback is not None and self._routes is not None:
                    self._passing.know(models)
                    self._feedback.elsewhere = frozenset(models)
                    self._routes.elsewhere = models
                    self._neighbours.models = models
            case ww.Refuse(models=models):
                self._refuse(models)
            case ww.Drain(deadline_s=deadline_s):
                self._end(self._drain(deadline_s))
            case ww.Rekey():
                self._rekey(message)
            case ww.Committed(ring=ring, upto=upto):
                for model in self._models.values():
                    model.recorder.committed(ring, upto)
                if self._feedback is not None:
                    self._feedback.committed(ring, upto)
            case ww.AdoptBook(book=book, start=start):
                self._folds += 1
                if self._feedback is not None:
                    self._feedback.adopt(book, start)
            case ww.Recover():
                self._folds += 1
                cut, recovered = recover(message, boot_id=self._start.boot_id if self._start else "")
                if cut is not None:
                    self._channel.send(cut)
                self._channel.send(recovered)
            case ww.Flush(id=number):
                self._folds += 1
                self._cut()
                self._channel.send(ww.Flushed(id=number))
            case ww.Throttle(rate=rate):
                self._throttle(rate)
            case ww.Stop(finish_s=finish_s):
                self._end(self._finish(finish_s or FINISH_S))
            case ww.Sample(rules=rules):
                self._sample_by(rules)
        if fd is not None:
            os.close(fd)

    def _sample_by(self, rules: ww.SamplingRules) -> None:
        if self._sampling is None:
            return
        self._folds += 1
        self._sampling.follow(rules)
        for name, model in self._models.items():
            model.recorder.sample_with(self._sampling.taker(name))

    def _on_eof(self) -> None:
        log.warning("supervisor gone; finishing inflight=%s", self._inflight)
        self._on_stop()

    def _on_stop(self) -> None:
        self._end(self._finish(FINISH_S))

    def _warm(self, runtimes: tuple[str, ...]) -> None:
        for runtime in runtimes:
            try:
                engines.check_health(runtime)
            except Degraded as error:
                # The model that wants it will say so.
                log.info("not warmed runtime=%s code=%s", runtime, error.code)

    def _load(self, start: ww.Start, note: int | None) -> None:
        self._start = start
        base_mb = own_mb()
        try:
            self._models, proved = load_generation(
                start, send=self._channel.send, later=self._loop.call_soon, note=note
            )
        except CannotServe as error:
            log.error("cannot serve model=%s code=%s detail=%s", error.model, error.code, error.detail)
            self._channel.send(ww.Failed(model=error.model, code=error.code, detail=error.detail))
            self._status = 1
            self._over.set()
            return
        self._served = {served.name: served for served in start.models}
        self._service = InferenceService(
            self._loop,
            max_inflight=start.max_inflight,
            inline_below_us=start.inline_below_us,
            max_wait_s=start.max_wait_s,
        )
        self._feedback = Feedback(
            {name: model.recorder for name, model in self._models.items()},
            Rules(max_age_s=start.label_age_s, books=start.label_books),
            boot_id=start.boot_id,
            send=self._channel.send,
            loop=self._loop,
            on_matched=self._matched,
        )
        if start.access.distinct:
            names = sorted({tensor.name for model in self._models.values() for tensor in model.manifest.inputs})
            self._clients = Clients(names)
            for model in self._models.values():
                model.recorder.count_distinct(Distinct([tensor.name for tensor in model.manifest.inputs]))
                model.clients = self._clients
        if start.otlp_endpoint:
            self._spans = Spans(start.otlp_endpoint, start.trace_share, device=start.device)
        service = self._service
        self._sampling = sampling = Sampling(self._models, start.sampling, send=self._channel.send)
        self._explaining = Explaining(
            self._models, self._loop, busy=lambda: service.inflight > 0, on_audit=sampling.audited, spans=self._spans
        )
        for name, model in self._models.items():
            model.recorder.show(explain=self._explaining.taker(name), sample=sampling.taker(name))
        self._service.stand_in = StandingIn(self._neighbours).answer
        labels = Splitting(self._feedback, self._neighbours)
        routes = self._routes = Routes(
            self._models, self._service, labels, self._explaining, spans=self._spans, generation=start.generation
        )
        self._throttle(start.throttle)
        if start.access.distinct or any(model.streams is not None for model in self._models.values()):
            routes.name_of = self._name_of
        self._server = Server(self._routes, max_held_bytes=self._routes.most_held)
        self._server.neighbours = self._answerer = Answerer(self._models, self._service, self._feedback)
        self._refuse(start.refused)
        self._passing = Passing(
            self._server, self._channel, lambda body: models_of(body) or asked_of(body), lambda: routes.gate
        )
        # What was loaded stays for good: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        self._channel.send(ww.Ready(pid=os.getpid(), models=proved, base_mb=base_mb, own_mb=own_mb()))
        self._every(start.fold_interval_s or start.window_s, self._cut)
        self._every(start.health_interval_s, self._report)

    def _refuse(self, names: Iterable[str]) -> None:
        """Answers no more for these models: neither who asks for them, nor through another model or worker."""
        self._refused = refused = self._refused | frozenset(names)
        if self._routes is None or self._answerer is None or self._explaining is None:
            # Still loading: it is asked again then.
            return
        self._routes.refuse(refused)
        self._answerer.refuse(refused)
        self._explaining.refused |= refused
        for model in self._models.values():
            if model.fallback is not None and model.fallback.name in refused:
                model.fallback, model.no_fallback = None, "it is not served any more"

    def _listen(self, message: ww.Listen) -> None:
        if self._server is None or self._feedback is None:
            raise RuntimeError("listen before ready")
        self._feedback.expect(message.books)
        self._since = time.monotonic()
        self._server.accept(message.accept)
        for model in self._models.values():
            model.cold = message.cold
        if message.cold_ms:
            for model in self._models.values():
                model.recorder.cold_ms = message.cold_ms
                model.recorder.tally("cold_ms_max", message.cold_ms)
        for listener in self._listeners:
            self._server.listen(listener)

    def _throttle(self, rate: float) -> None:
        if self._routes is None or self._start is None:
            return
        gate = self._routes.gate or Gate(self._start.access, rate)
        gate.throttle(rate)
        self._routes.gate = None if gate.idle else gate

    def _name_of(self, head: http1.Head, asker: Asker) -> str:
        gate = self._routes.gate if self._routes is not None else None
        return (gate.name_of(head, asker) if gate is not None else "") or peer_name(asker)

    def _adopt(self, fd: int | None, message: ww.Conn) -> None:
        if fd is None:
            self._channel.send(ww.Cut(connections=1))
            self._took(message)
            return
        sock = socket.socket(fileno=fd)
        if self._server is None or self._passing is None:
            sock.close()
            raise RuntimeError("conn before ready")
        if message.model:
            self._passing.watch()
        self._server.adopt(
            sock,
            message.head,
            settled=bool(message.model),
            waited=message.waited,
            retry_s=message.retry_s,
            own=message.own,
        )
        self._took(message)

    def _took(self, message: ww.Conn) -> None:
        if message.id:
            self._channel.send(ww.Took(id=message.id))

    def _show(self, message: ww.Feed, fd: int | None) -> None:
        """From now on a share of the model's requests goes to the shadow at the descriptor's other end; without one, none."""
        model = self._models.get(message.model)
        if model is not None and model.tee is not None:
            model.tee.close()
            model.tee = None
        if fd is None:
            return
        sock = socket.socket(fileno=fd)
        if model is None:
            sock.close()
            return
        model.tee = Tee(sock, message.share, model.recorder, self._loop)

    def _matched(self, book: Book, position: int, truth: int, predicted: int) -> None:
        model = self._models.get(book.header.key.model)
        # A label of what another bundle answered says nothing about this pair of bundles.
        if model is not None and model.tee is not None and book.header.key.bundle == model.recorder.key.bundle:
            model.tee.label(book.header.token, position, truth, predicted)
        if truth != predicted and self._sampling is not None:
            self._sampling.disagreed(f"{book.header.key.model}-{book.header.token}-", position)

    def _rekey(self, message: ww.Rekey) -> None:
        recorder = self._models[message.model].recorder
        if self._explaining is not None:
            recorder.fold()
            self._explaining.abandon(message.model)
        old, book = recorder.ring.path, recorder.book
        key = key_of(self._served[message.model], arm=message.arm, rollout=message.rollout, stage=message.stage)
        upto = recorder.rekey(key, message.ring)
        if book is not None and self._feedback is not None:
            self._feedback.keep(book)
        self._channel.send(ww.Rekeyed(model=message.model, ring=old, upto=upto))

    # --- timers -----------------------------------------------------------------------------------------------------

    def _every(self, interval_s: float, act: Callable[[], None]) -> None:
        def again() -> None:
            if self._over.is_set():
                return
            act()
            self._loop.call_later(interval_s, again)

        self._loop.call_later(interval_s, again)

    def _cut(self) -> None:
        for model in self._models.values():
            model.recorder.cut()
        if self._feedback is not None:
            self._feedback.cut()

    def _last_cut(self) -> None:
        if self._explaining is not None:
            for model in self._models.values():
                model.recorder.fold()
            self._explaining.leave()
        self._cut()

    def _report(self) -> None:
        for model in self._models.values():
            model.recorder.cut_if_slept()
            model.forget_quiet()
        self._tidy()
        since_s = time.monotonic() - self._since
        busy_s, expected_s = self._service.under_way_s() if self._service is not None else (0.0, 0.0)
        self._channel.send(
            ww.Health(
                models={name: model.recorder.health(since_s) for name, model in self._models.items()},
                inflight=self._inflight,
                rss_mb=rss_kb() * 1024 / 1e6,
                busy_s=busy_s,
                expected_s=expected_s,
                at_s=time.monotonic(),
                own_mb=own_mb(),
                cpu_s=time.process_time(),
                spans_sent=self._spans.sent if self._spans is not None else 0,
                spans_dropped=self._spans.dropped if self._spans is not None else 0,
                clients=self._clients.take() if self._clients is not None else {},
                work=self._folds + (self._server.work if self._server is not None else 0),
                held_mb=self._held_bytes / 1e6,
            )
        )

    @property
    def _inflight(self) -> int:
        return self._service.inflight if self._service is not None else 0

    def _tidy(self) -> None:
        """Gives back what large requests took, once they are answered: it is not to be held against the model."""
        server, service = self._server, self._service
        if server is None or service is None or self._held_bytes > GIVEN_BACK_BYTES:
            return
        if max(server.peak, service.reading_peak) > GIVEN_BACK_BYTES:
            server.peak = service.reading_peak = 0
            give_back()

    @property
    def _held_bytes(self) -> int:
        """What of its memory is its clients': requests not yet answered, and what large ones are being made into."""
        server, service = self._server, self._service
        return 0 if server is None or service is None else server.held + service.reading_bytes

    # --- endings ----------------------------------------------------------------------------------------------------

    def _end(self, how: Coroutine[object, object, None]) -> None:
        if self._ending is not None:
            # The first ending wins; a stop in the middle of a drain changes nothing that matters.
            how.close()
            return
        self._ending = self._loop.create_task(how)

    async def _drain(self, deadline_s: float) -> None:
        unpassed = 0
        if self._feedback is not None:
            self._feedback.leave()
        if self._server is not None:
            handover = Handover(self._server, self._channel)
            unpassed = await handover.run(deadline_s)
            log.info("drained passed=%s unpassed=%s", handover.passed, unpassed)
        self._last_cut()
        self._report()
        self._channel.send(ww.Drained(unpassed=unpassed))
        self._over.set()

    async def _finish(self, finish_s: float) -> None:
        server = self._server
        if self._feedback is not None:
            self._feedback.leave()
        if server is not None:
            server.stop_accepting()
            end = self._loop.time() + finish_s
            while self._loop.time() < end and any(c.busy or c.unsent for c in server.connections):
                await asyncio.sleep(_POLL_S)
            server.close()
        self._last_cut()
        self._over.set()
