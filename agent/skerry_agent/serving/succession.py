"""Which generation serves, how the next takes over, and what happens when one dies.

``start`` brings up the next beside the present one and waits for its proof; ``switch`` lets it listen and drains the old one, whose
connections are passed on; a generation that dies is started again after a growing wait, one that hangs is killed first. Rings
that a dead worker left are folded by the next living one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from skerry_agent import workerwire as ww
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.core import backoff, liveness
from skerry_agent.core.effects import Arm
from skerry_agent.core.trial import Counts
from skerry_agent.errors import AgentError, Degraded, Rejected
from skerry_agent.leftovers import Roll
from skerry_agent.logs import kv
from skerry_agent.serving.generation import Generation, counts_of, exit_words, start_message, take_health
from skerry_agent.serving.rings import Rings, book_of
from skerry_agent.serving.unruly import OnUnruly, Replacing
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Store
from skerry_agent.workers import WORKER, Worker, runtime_fault, spawn

log = logging.getLogger(__name__)

_BACKLOG = 1024
_FORMER_S = 10.0
"""A worker whose supervisor was killed answers for at most 5 s and goes."""
_LONGEST_TICK_S = 1.0
_STEADY_S = 60.0
"""A worker that lived so long had no part in the failures before it."""


class Serving:
    """The generations of this agent.

    Args:
        roll: the record of living workers.
        on_health: a report of the serving generation came.
        on_crash: the serving generation died by itself; answers whether ``Serving`` shall start it again.
        on_unruly: the serving generation leaks or spins; answers whether somebody else replaces it.
        on_start: a worker proved these models, or could not, and why; called before ``start`` returns or raises.
        on_records: the outbox grew.
        on_fault: the store cannot be used any more.
        draw: uniform in [0, 1).
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        slots: Slots,
        clock: Clock,
        listeners: Sequence[socket.socket],
        roll: Roll,
        *,
        on_health: Callable[[Generation], None],
        on_crash: Callable[[Generation, int], bool],
        on_unruly: OnUnruly,
        on_start: Callable[[Mapping[str, Slot], AgentError | None], None],
        on_records: Callable[[], None],
        on_fault: Callable[[Degraded], None],
        draw: Callable[[], float],
        worker_command: Sequence[str] = WORKER,
    ) -> None:
        self._config = config
        self._store = store
        self._slots = slots
        self._clock = clock
        self._listeners = listeners
        self._roll = roll
        self._on_health = on_health
        self._on_crash = on_crash
        self._on_start = on_start
        self._draw = draw
        self._worker_command = worker_command
        self._rings = Rings(config.state_dir / "rings", store, clock, on_records=on_records, on_fault=on_fault)
        self._alive: list[Generation] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._orphans: deque[tuple[bytes, int]] = deque()
        self._flushes: dict[int, asyncio.Event] = {}
        self._failures = 0
        self._number = 0
        self._replacing = Replacing(
            config, clock, draw, on_unruly=on_unruly, replace=self._replace, background=self._background
        )
        self._ticked_s = self._began_s = clock.boot_s()
        self.window_s = 300.0
        self.current: Generation | None = None
        self.before: dict[str, Counts] = {}
        self.stopping = False

    # --- what runs ---------------------------------------------------------------------------------------------------

    def models(self) -> dict[str, Slot]:
        """What answers requests now, per model; empty while nothing does."""
        return dict(self.current.models) if self.current is not None else {}

    def answering(self) -> bool:
        """Whether a live worker listens."""
        return self.current is not None and self.current.worker.alive and not self.current.hung

    def counts(self, model: str) -> Counts:
        """Counts of the serving generation for a model."""
        health = self.current.health if self.current is not None else None
        return counts_of(health.models.get(model)) if health is not None else Counts()

    def current_counts(self) -> bool:
        """Whether ``counts`` say how things stand now; not of a worker that is silent or stuck in an inference."""
        generation = self.current
        if generation is None or generation.health is None or not self.answering():
            return False
        return liveness.speaks_for_now(_life(generation), self._limits())

    async def start(self, models: Mapping[str, Slot], *, timeout_s: float) -> Generation:
        """Starts the next generation and waits until it has loaded and proved its models. It does not listen yet.

        Raises:
            Rejected: with the code that the worker gave, ``runtime_crashed`` when it died, ``start_timeout``.
            Degraded: ``process_not_started`` when this device has no process, memory or descriptor left for it.
        """
        number = self._next_number()
        rings = {name: self._rings.path(number, name) for name in models}
        ready: asyncio.Future[ww.Ready] = asyncio.get_running_loop().create_future()
        # A failure that nobody awaits any more (a start that was given up) is no error of the loop.
        ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        holder: list[Generation] = []
        worker = await spawn(
            self._listeners, lambda message, fd: self._take(holder[0], message, fd), command=self._worker_command
        )
        self._roll.add(worker.pid)
        generation = Generation(number=number, models=dict(models), rings=rings, worker=worker, ready=ready)
        generation.books.update(map(book_of, rings.values()))
        holder.append(generation)
        self._alive.append(generation)
        self._background(self._watch(generation))
        worker.send(
            start_message(generation, self._slots, self._config, window_s=self.window_s, boot_id=self._clock.boot_id)
        )
        try:
            found = await asyncio.wait_for(asyncio.shield(ready), timeout_s)
        except TimeoutError:
            await self.retire(generation)
            raise Rejected("start_timeout", f"not ready after {timeout_s:g} s") from None
        except AgentError as error:
            await self.retire(generation)
            found_out = await self._found_out(models, error)
            self._on_start(models, found_out)
            raise found_out from None
        except asyncio.CancelledError:
            self._background(self.retire(generation))
            raise
        generation.proofs = {proved.name: proved for proved in found.models}
        self._on_start(models, None)
        return generation

    async def _found_out(self, models: Mapping[str, Slot], error: AgentError) -> AgentError:
        """Of a worker that died without a word: the runtime's fault when that does not work with the smallest model either."""
        if error.code != "runtime_crashed" or error.model:
            return error
        for model, slot in sorted(models.items()):
            variant = self._slots.variant(slot)
            fault = await runtime_fault(variant.runtime) if variant is not None else ""
            if variant is not None and fault:
                return Rejected("runtime_missing", f"{model}: {variant.runtime}: {fault}", model=model)
        return error

    def _next_number(self) -> int:
        """Names the next generation's rings as no ring was ever named."""
        floor = max(self._number, self._rings.highest())
        try:
            self._number = self._store.count_up("worker_generation", floor)
        except Degraded as error:
            # A full disk must not keep a worker from coming back; the rings' files and rows hold the number meanwhile.
            log.error("generation not stored", extra=kv(code=error.code, detail=error.detail))
            self._number = max(floor, int(self._store.get("worker_generation", 0))) + 1
        return self._number

    async def switch(self, new: Generation) -> None:
        """Lets ``new`` answer, and drains what answered before. Returns when the old worker is gone.

        Raises:
            Rejected: ``runtime_crashed`` when ``new`` died in between.
        """
        old = self.current
        if not new.worker.alive:
            raise Rejected("runtime_crashed", f"generation {new.number} died before it could listen")
        if old is not None and old.health is not None:
            self.before = {name: counts_of(health) for name, health in old.health.models.items()}
        elif old is None:
            self.before = {}
        # Bound since the start, and refusing until now: nobody is left waiting for a first bundle.
        for listener in self._listeners:
            listener.listen(_BACKLOG)
        new.worker.send(ww.Listen(books=self._rings.books(without=new.books)))
        new.listening_s = self._clock.boot_s()
        new.silent_s = 0.0
        self.current = new
        self._take_up_keys(new)
        while self._orphans:
            head, fd = self._orphans.popleft()
            self._relay(new, head, fd)
        self.recover()
        if old is not None and old.worker.alive:
            # On its own: a drain goes on when whoever asked for it has changed his mind.
            await asyncio.shield(self._background(self._drain(old)))

    async def _drain(self, old: Generation) -> None:
        old.leaving = True
        deadline_s = self._config.timing.drain_s
        old.worker.send(ww.Drain(deadline_s=deadline_s))
        try:
            await asyncio.wait_for(asyncio.shield(old.worker.exited), deadline_s + 5.0)
        except TimeoutError:
            log.warning("old generation did not leave", extra=kv(generation=old.number))
            old.worker.kill()
            await asyncio.shield(old.worker.exited)

    async def retire(self, generation: Generation) -> None:
        """Ends a generation that does not listen."""
        generation.leaving = True
        await generation.worker.end(grace_s=2.0)

    async def clear(self) -> None:
        """Serves nothing any more."""
        generation, self.current = self.current, None
        if generation is not None and generation.worker.alive:
            await self.retire(generation)

    async def stop(self) -> None:
        """Ends all; what was counted is folded and committed first."""
        self.stopping = True
        for generation in list(self._alive):
            generation.leaving = True
        await asyncio.gather(*(g.worker.end(grace_s=self._config.timing.drain_s) for g in list(self._alive)))
        self._rings.retry()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._orphans:
            os.close(self._orphans.popleft()[1])

    def rekey(self, model: str, *, arm: Arm, rollout: str, stage: int) -> None:
        """Counts ``model`` under another key from now on."""
        generation = self.current
        if generation is None or model not in generation.models:
            return
        old = generation.rings[model]
        serial = int(Path(old).stem.rsplit("-", 1)[1]) + 1
        ring = self._rings.path(generation.number, model, serial)
        generation.former.add(old)
        generation.rings[model] = ring
        generation.books.add(book_of(ring))
        generation.models[model] = msgspec.structs.replace(
            generation.models[model], arm=arm, rollout=rollout, stage=stage
        )
        generation.worker.send(ww.Rekey(model=model, ring=ring, arm=arm, rollout=rollout, stage=stage))

    def commit(self, worker: Worker, cut: ww.WindowCut) -> None:
        """Stores a window of a process that answers nobody, and tells it."""
        self._rings.commit(worker, cut)

    def forget(self, ring: str) -> None:
        """The positions of such a process are of no use any more."""
        self._rings.remove(ring)

    def _take_up_keys(self, generation: Generation) -> None:
        """Counts under the keys that were given while the generation was starting: the pointer file has them."""
        for model, slot in list(generation.models.items()):
            pointers = self._slots.pointers(model)
            now = pointers.active or pointers.confirmed
            if now is None or now.digest != slot.digest:
                continue
            if (now.arm, now.rollout, now.stage) != (slot.arm, slot.rollout, slot.stage):
                self.rekey(model, arm=now.arm, rollout=now.rollout, stage=now.stage)

    async def flush(self, timeout_s: float = 5.0) -> bool:
        """Asks the serving worker for everything counted so far. False when it does not answer in time."""
        if self.current is None or not self.current.worker.alive:
            return False
        number = max(self._flushes, default=0) + 1
        self._flushes[number] = asyncio.Event()
        self.current.worker.send(ww.Flush(id=number))
        try:
            await asyncio.wait_for(self._flushes[number].wait(), timeout_s)
            return True
        except TimeoutError:
            return False
        finally:
            del self._flushes[number]

    # --- what comes from workers -------------------------------------------------------------------------------------

    def _take(self, generation: Generation, message: Any, fd: int | None) -> None:
        match message:
            case ww.Ready():
                if not generation.ready.done():
                    self._note_memory(generation, message)
                    generation.ready.set_result(message)
            case ww.Failed():
                if not generation.ready.done():
                    detail = f"{message.model}: {message.detail}"
                    generation.ready.set_exception(Rejected(message.code, detail, model=message.model))
            case ww.WindowCut():
                self._rings.commit(generation.worker, message)
            case ww.Health():
                take_health(generation, message)
                if generation is self.current:
                    self._on_health(generation)
            case ww.Conn() if fd is not None:
                self._pass_on(generation, message.head, fd)
                fd = None
            case ww.Conn():
                self._rings.count_lost("connections_cut", 1)
            case ww.Cut(connections=connections):
                self._rings.count_lost("connections_cut", connections)
            case ww.Rekeyed():
                generation.former.discard(message.ring)
                self._rings.remove(message.ring)
            case ww.Recovered():
                if self._rings.recovered(message):
                    generation.recovering.discard(message.ring)
            case ww.BookClosed():
                generation.books.discard(message.book)
                self._rings.book_closed(message)
            case ww.Flushed():
                waiter = self._flushes.get(message.id)
                if waiter is not None:
                    waiter.set()
            case ww.Drained():
                generation.drained.set()
                self._rings.count_lost("connections_cut", message.unpassed)
            case _:
                pass
        if fd is not None:
            os.close(fd)

    def _note_memory(self, generation: Generation, ready: ww.Ready) -> None:
        variants = (self._slots.variant(slot) for slot in generation.models.values())
        generation.needs_mb = sum(float(variant.needs.rss_mb) for variant in variants if variant is not None)
        generation.ready_mb = ready.own_mb
        generation.most_mb = liveness.allowed_mb(
            base_mb=ready.base_mb, ready_mb=ready.own_mb, needs_mb=generation.needs_mb,
            slack_mb=self._config.limits.leak_slack_mb,
        )  # fmt: skip

    def tick(self) -> None:
        """Ends workers that hang, replaces those that leak or spin, tries again what could not be stored, looks for rings whose worker is gone by now.

        Called about every half second.
        """
        self._end_unfit()
        if self._clock.boot_s() - self._began_s > _FORMER_S:
            self._roll.end_former()
        self._rings.retry()
        self.recover()

    def _end_unfit(self) -> None:
        now_s = self._clock.boot_s()
        # What passed while this loop stood still, or the device slept, is no silence of the worker.
        passed_s, self._ticked_s = min(now_s - self._ticked_s, _LONGEST_TICK_S), now_s
        generation = self.current
        if generation is None or generation.leaving or not self.answering():
            return
        generation.silent_s += passed_s
        why = liveness.judge_liveness(_life(generation), self._limits())
        if why:
            log.error("worker hangs", extra=kv(generation=generation.number, pid=generation.worker.pid, detail=why))
            generation.hung = why
            # From here on it is a crash like any other.
            generation.worker.kill()
            return
        self._replacing.look(generation)

    async def _replace(self, old: Generation) -> None:
        """Hands over to another generation of the same models. Where it cannot be started, ``old`` is killed and started again."""
        new: Generation | None = None
        try:
            new = await self.start(old.models, timeout_s=180.0)
            if self.current is old and not self.stopping:
                await self.switch(new)
        except AgentError as error:
            log.error("successor does not start", extra=kv(code=error.code, detail=error.detail, generation=old.number))
            if self.current is old and not self.stopping:
                old.worker.kill()
        if new is not None and new is not self.current:
            await self.retire(new)

    def _limits(self) -> liveness.Limits:
        timing = self._config.timing
        return liveness.Limits(
            silent_s=timing.silent_s, inference_s=timing.inference_s, interval_s=timing.health_interval_s
        )

    def _pass_on(self, generation: Generation, head: bytes, fd: int) -> None:
        heir = self.current
        if heir is not None and heir is not generation and heir.worker.alive:
            self._relay(heir, head, fd)
        else:
            self._orphans.append((head, fd))

    def _relay(self, heir: Generation, head: bytes, fd: int) -> None:
        heir.worker.send(ww.Conn(head=head), fd)
        os.close(fd)

    # --- death and what it leaves ------------------------------------------------------------------------------------

    async def _watch(self, generation: Generation) -> None:
        code = await asyncio.shield(generation.worker.exited)
        self._roll.remove(generation.worker.pid)
        generation.worker.close()
        self._alive.remove(generation)
        if not generation.ready.done():
            generation.ready.set_exception(
                Rejected("runtime_crashed", f"the worker ended with {exit_words(code)} while loading")
            )
        if generation is not self.current or generation.leaving or self.stopping:
            self._clean_up(generation)
            self.recover()
            return
        log.error(
            "worker died", extra=kv(generation=generation.number, pid=generation.worker.pid, exit=exit_words(code))
        )
        lived_s = self._clock.boot_s() - (generation.listening_s or self._clock.boot_s())
        self._failures = 1 if lived_s >= _STEADY_S else self._failures + 1
        try:
            again = self._on_crash(generation, code)
        except Exception:
            # Whatever could not be written down: something must serve.
            log.exception("crash not recorded", extra=kv(generation=generation.number))
            again = True
        if again:
            self._background(self._start_again(generation, generation.models))
        self._clean_up(generation)

    def _clean_up(self, generation: Generation) -> None:
        for ring in generation.owned_rings:
            if self._rings.spent(ring):
                self._rings.remove(ring)

    async def _start_again(self, dead: Generation | None, models: dict[str, Slot]) -> None:
        while self.current is dead and not self.stopping:
            wait_s = backoff.delay_s("worker", self._failures, self._draw(), scale=self._config.timing.backoff_scale)
            await asyncio.sleep(wait_s)
            if self.current is not dead or self.stopping:
                return
            new: Generation | None = None
            try:
                new = await self.start(models, timeout_s=180.0)
                if self.current is dead:
                    await self.switch(new)
            except AgentError as error:
                self._failures += 1
                log.error(
                    "worker does not start", extra=kv(code=error.code, detail=error.detail, failures=self._failures)
                )
                if error.code == "runtime_missing" and error.model in models and len(models) > 1:
                    # It keeps no other model down; the plan brings it back when it can run.
                    models = {name: slot for name, slot in models.items() if name != error.model}
            except Exception:
                # A bug, or a fault without a name: this loop is all that brings the models back.
                self._failures += 1
                log.exception("worker does not start", extra=kv(failures=self._failures))
            if new is not None and new is not self.current:
                await self.retire(new)

    def start_later(self, models: Mapping[str, Slot]) -> None:
        """Keeps trying to start models that did not start at once."""
        self._failures += 1
        self._background(self._start_again(None, dict(models)))

    def recover(self) -> None:
        """Lets the serving worker fold the rings that no living worker owns."""
        generation = self.current
        if generation is None or not generation.worker.alive or generation.leaving:
            return
        owned = {ring for other in self._alive for ring in other.owned_rings}
        for ring, start in self._rings.left_behind(owned):
            generation.recovering.add(ring)
            generation.worker.send(ww.Recover(ring=ring, start=start))
            log.info("ring left behind", extra=kv(ring=Path(ring).name, folded_by=generation.number))
        # Behind the rings: what a dead worker had not yet taken into its book is in there.
        written = {book for other in self._alive for book in other.books}
        for book, start in self._rings.books_left_behind(written, recovering=generation.recovering):
            generation.books.add(book)
            generation.worker.send(ww.AdoptBook(book=book, start=start))

    def _background(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work failed", exc_info=error)


def _life(generation: Generation) -> liveness.Life:
    health = generation.health
    return liveness.Life(
        silent_s=generation.silent_s,
        busy_s=health.busy_s if health is not None else 0.0,
        expected_s=health.expected_s if health is not None else 0.0,
    )
