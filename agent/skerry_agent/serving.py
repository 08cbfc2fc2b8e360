"""The generations: which worker serves, how the next takes over, what happens when one dies.

A generation is the set of models that one worker serves. ``start`` brings up the next beside the present one and waits for
its proof; ``switch`` lets it listen and drains the old one, whose connections are passed on; a generation that dies is
started again after a growing wait. Recorder rings that a dead worker left are folded by the next living one. Every
window goes to the store with its ring position in one transaction, and only then the worker may reuse the slots.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from skerry_contract import window as w
from skerry_contract import wire

from skerry_agent import workerwire as ww
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.core import backoff
from skerry_agent.core.effects import Arm
from skerry_agent.core.trial import Counts
from skerry_agent.errors import AgentError, Degraded, Rejected
from skerry_agent.logs import kv
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Entry, RingAt, Store
from skerry_agent.workers import WORKER, Worker, spawn

log = logging.getLogger(__name__)

_BACKLOG = 1024
_STEADY_S = 60.0
"""A worker that lived so long had no part in the failures before it."""
_RING_POSITIONS = struct.Struct("<QQ")
_RING_POSITIONS_AT = 16
"""Where a ring says how far it was written and, as far as its worker heard, committed."""


@dataclass(kw_only=True, slots=True)
class Generation:
    """One worker and what it serves.

    Attributes:
        rings: model -> ring it counts in now; former: rings it gave up by a rekey.
        health: counts since it listens; None before the first report.
        listening_s: when it began to listen, seconds since boot; None before.
    """

    number: int
    models: dict[str, Slot]
    rings: dict[str, str]
    worker: Worker
    ready: asyncio.Future[ww.Ready]
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    former: set[str] = field(default_factory=set)
    recovering: set[str] = field(default_factory=set)
    health: ww.Health | None = None
    proofs: dict[str, ww.Proved] = field(default_factory=dict)
    listening_s: float | None = None
    leaving: bool = False

    @property
    def owned_rings(self) -> set[str]:
        """Rings that this worker may still write or fold."""
        return {*self.rings.values(), *self.former, *self.recovering}


class Serving:
    """See the module.

    Args:
        on_health: a report of the serving generation came.
        on_crash: the serving generation died by itself; answers whether ``Serving`` shall start it again.
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
        listener: socket.socket,
        *,
        on_health: Callable[[Generation], None],
        on_crash: Callable[[Generation, int], bool],
        on_records: Callable[[], None],
        on_fault: Callable[[Degraded], None],
        draw: Callable[[], float],
        worker_command: Sequence[str] = WORKER,
    ) -> None:
        self._config = config
        self._store = store
        self._slots = slots
        self._clock = clock
        self._listener = listener
        self._on_health = on_health
        self._on_crash = on_crash
        self._on_records = on_records
        self._on_fault = on_fault
        self._draw = draw
        self._worker_command = worker_command
        self._rings = config.state_dir / "rings"
        self._rings.mkdir(exist_ok=True, mode=0o700)
        self._alive: list[Generation] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._orphans: deque[tuple[bytes, int]] = deque()
        self._unstored: deque[tuple[Generation, ww.WindowCut]] = deque()
        self._flushes: dict[int, asyncio.Event] = {}
        self._failures = 0
        self._number = 0
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
        return self.current is not None and self.current.worker.alive

    def counts(self, model: str) -> Counts:
        """Counts of the serving generation for a model."""
        health = self.current.health if self.current is not None else None
        return _counts(health.models.get(model)) if health is not None else Counts()

    async def start(self, models: Mapping[str, Slot], *, timeout_s: float) -> Generation:
        """Starts the next generation and waits until it has loaded and proved its models. It does not listen yet.

        Raises:
            Rejected: with the code that the worker gave, ``runtime_crashed`` when it died, ``start_timeout``.
            Degraded: ``worker_not_started`` when this device has no process, memory or descriptor left for it.
        """
        number = self._next_number()
        rings = {name: str(self._rings / f"{number}-{name}-0.ring") for name in models}
        ready: asyncio.Future[ww.Ready] = asyncio.get_running_loop().create_future()
        # A failure that nobody awaits any more (a start that was given up) is no error of the loop.
        ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        holder: list[Generation] = []
        try:
            worker = await spawn(
                self._listener, lambda message, fd: self._take(holder[0], message, fd), command=self._worker_command
            )
        except OSError as error:
            raise Degraded("worker_not_started", str(error), advice="free memory or processes on the device") from error
        generation = Generation(number=number, models=dict(models), rings=rings, worker=worker, ready=ready)
        holder.append(generation)
        self._alive.append(generation)
        self._background(self._watch(generation))
        worker.send(self._start_message(generation))
        try:
            found = await asyncio.wait_for(asyncio.shield(ready), timeout_s)
        except TimeoutError:
            await self.retire(generation)
            raise Rejected("start_timeout", f"not ready after {timeout_s:g} s") from None
        except AgentError:
            await self.retire(generation)
            raise
        except asyncio.CancelledError:
            self._background(self.retire(generation))
            raise
        generation.proofs = {proved.name: proved for proved in found.models}
        return generation

    def _next_number(self) -> int:
        """Names the next generation's rings as no ring was ever named."""
        floor = max(self._number, self._highest_ring())
        try:
            self._number = self._store.count_up("worker_generation", floor)
        except Degraded as error:
            # A full disk must not keep a worker from coming back; the rings' files and rows hold the number meanwhile.
            log.error("generation not stored", extra=kv(code=error.code, detail=error.detail))
            self._number = max(floor, int(self._store.get("worker_generation", 0))) + 1
        return self._number

    def _start_message(self, generation: Generation) -> ww.Start:
        return ww.Start(
            generation=generation.number,
            models=tuple(
                ww.Served(
                    name=name,
                    version=slot.version,
                    digest=slot.digest,
                    variant=slot.variant,
                    path=str(self._slots.path(slot.digest)),
                    ring=generation.rings[name],
                    arm=slot.arm,
                    rollout=slot.rollout,
                    stage=slot.stage,
                )
                for name, slot in sorted(generation.models.items())
            ),
            window_s=self.window_s,
            fold_interval_s=self._config.timing.fold_interval_s,
            health_interval_s=self._config.timing.health_interval_s,
            max_inflight=self._config.limits.max_inflight,
            boot_id=self._clock.boot_id,
        )

    async def switch(self, new: Generation) -> None:
        """Lets ``new`` answer, and drains what answered before. Returns when the old worker is gone.

        Raises:
            Rejected: ``runtime_crashed`` when ``new`` died in between.
        """
        old = self.current
        if not new.worker.alive:
            raise Rejected("runtime_crashed", f"generation {new.number} died before it could listen")
        if old is not None and old.health is not None:
            self.before = {name: _counts(health) for name, health in old.health.models.items()}
        elif old is None:
            self.before = {}
        # Bound since the start, and refusing until now: nobody is left waiting for a first bundle.
        self._listener.listen(_BACKLOG)
        new.worker.send(ww.Listen())
        new.listening_s = self._clock.boot_s()
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
        self._retry_unstored()
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
        ring = str(self._rings / f"{generation.number}-{model}-{serial}.ring")
        generation.former.add(old)
        generation.rings[model] = ring
        generation.models[model] = msgspec.structs.replace(
            generation.models[model], arm=arm, rollout=rollout, stage=stage
        )
        generation.worker.send(ww.Rekey(model=model, ring=ring, arm=arm, rollout=rollout, stage=stage))

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
                    generation.ready.set_result(message)
            case ww.Failed():
                if not generation.ready.done():
                    generation.ready.set_exception(Rejected(message.code, f"{message.model}: {message.detail}"))
            case ww.WindowCut():
                self._commit(generation, message)
            case ww.Health():
                generation.health = message
                if generation is self.current:
                    self._on_health(generation)
            case ww.Conn() if fd is not None:
                self._pass_on(generation, message.head, fd)
                fd = None
            case ww.Rekeyed():
                generation.former.discard(message.ring)
                self._remove_ring(message.ring)
            case ww.Recovered():
                self._recovered(generation, message)
            case ww.Flushed():
                waiter = self._flushes.get(message.id)
                if waiter is not None:
                    waiter.set()
            case ww.Drained():
                generation.drained.set()
                self._count_lost("connections_cut", message.unpassed)
            case _:
                pass
        if fd is not None:
            os.close(fd)

    def _commit(self, generation: Generation, cut: ww.WindowCut) -> None:
        if self._unstored:
            self._unstored.append((generation, cut))
            self._retry_unstored()
            return
        try:
            self._store_window(generation, cut)
        except Degraded as error:
            log.error("window not stored", extra=kv(code=error.code, detail=error.detail, advice=error.advice))
            self._unstored.append((generation, cut))
            if error.code == "store_damaged":
                self._on_fault(error)

    def _store_window(self, generation: Generation, cut: ww.WindowCut) -> None:
        key = wire.decode(w.Window, cut.body, max_bytes=wire.MAX_INFLATED_BYTES).key
        entry = Entry(kind="window", body=cut.body, key="/".join(str(part) for part in key), inferences=cut.inferences)
        committed = self._store.ring_upto(cut.ring)
        if committed is not None and cut.start < committed:
            # Sent twice: by a worker that did not hear of the commit, and by its heir. The first one counts.
            log.warning("window known", extra=kv(ring=cut.ring, start=cut.start, upto=cut.upto, committed=committed))
        else:
            self._store.append([entry], [RingAt(ring=cut.ring, upto=cut.upto)])
            self._on_records()
        generation.worker.send(ww.Committed(ring=cut.ring, upto=cut.upto))

    def _retry_unstored(self) -> None:
        try:
            while self._unstored:
                try:
                    self._store_window(*self._unstored[0])
                except Degraded:
                    self._store.compact(self._clock.instant())
                    return
                self._unstored.popleft()
        except Degraded as error:
            # No room to make room either, or a lock: the windows wait here, and in their rings, for the next try.
            if error.code == "store_damaged":
                self._on_fault(error)

    def tick(self) -> None:
        """Tries again what could not be stored."""
        self._retry_unstored()

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
        generation.worker.close()
        self._alive.remove(generation)
        if not generation.ready.done():
            generation.ready.set_exception(
                Rejected("runtime_crashed", f"the worker ended with {_exit(code)} while loading")
            )
        for ring in generation.owned_rings:
            if self._spent(Path(ring)):
                self._remove_ring(ring)
        if generation is not self.current or generation.leaving or self.stopping:
            self.recover()
            return
        log.error("worker died", extra=kv(generation=generation.number, pid=generation.worker.pid, exit=_exit(code)))
        lived_s = self._clock.boot_s() - (generation.listening_s or self._clock.boot_s())
        self._failures = 1 if lived_s >= _STEADY_S else self._failures + 1
        if self._on_crash(generation, code):
            self._background(self._start_again(generation, generation.models))

    async def _start_again(self, dead: Generation | None, models: dict[str, Slot]) -> None:
        while self.current is dead and not self.stopping:
            wait_s = backoff.delay_s("worker", self._failures, self._draw(), scale=self._config.timing.backoff_scale)
            await asyncio.sleep(wait_s)
            if self.current is not dead or self.stopping:
                return
            try:
                new = await self.start(models, timeout_s=180.0)
                if self.current is not dead:
                    await self.retire(new)
                    return
                await self.switch(new)
            except AgentError as error:
                self._failures += 1
                log.error(
                    "worker does not start", extra=kv(code=error.code, detail=error.detail, failures=self._failures)
                )

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
        for path in sorted(self._rings.glob("*.ring")):
            ring = str(path)
            if ring in owned:
                continue
            if self._spent(path):
                self._remove_ring(ring)
                continue
            generation.recovering.add(ring)
            # What waits to be stored was folded already: the heir goes on behind it.
            waiting = max((cut.upto for _, cut in self._unstored if cut.ring == ring), default=0)
            generation.worker.send(ww.Recover(ring=ring, start=max(waiting, self._positions(path)[1])))
            log.info("ring left behind", extra=kv(ring=path.name, folded_by=generation.number))

    def _positions(self, path: Path) -> tuple[int, int]:
        """(written, committed) of a ring; (-1, 0) when it cannot be read."""
        try:
            with open(path, "rb") as file:
                file.seek(_RING_POSITIONS_AT)
                written, noted = _RING_POSITIONS.unpack(file.read(_RING_POSITIONS.size))
        except (OSError, struct.error):
            return -1, 0
        known = self._store.ring_upto(str(path))
        # Without a row the store may be younger than the ring (it was damaged): the worker's own note is the next best.
        return int(written), int(noted) if known is None else known

    def _spent(self, path: Path) -> bool:
        written, committed = self._positions(path)
        return not path.exists() or (written == committed and not self._owes(str(path)))

    def _owes(self, ring: str) -> bool:
        return any(cut.ring == ring for _, cut in self._unstored)

    def _recovered(self, generation: Generation, message: ww.Recovered) -> None:
        generation.recovering.discard(message.ring)
        self._count_lost("records_overwritten", message.lost)
        if message.damage:
            self._count_lost("rings_damaged", 1)
            log.error("ring damaged", extra=kv(ring=Path(message.ring).name, detail=message.damage))
        self._remove_ring(message.ring)

    def _remove_ring(self, ring: str) -> None:
        if self._owes(ring):
            return
        # The file first: a position without a ring is harmless, a ring without a position is counted again.
        Path(ring).unlink(missing_ok=True)
        try:
            self._store.forget_ring(ring)
        except Degraded as error:
            log.warning("ring position stays", extra=kv(ring=Path(ring).name, code=error.code, detail=error.detail))

    def _count_lost(self, cause: str, n: int) -> None:
        if n == 0:
            return
        try:
            self._store.count_lost(cause, n)
        except Degraded as error:
            log.error("loss not counted", extra=kv(cause=cause, n=n, code=error.code, detail=error.detail))

    def _highest_ring(self) -> int:
        names = [path.name for path in self._rings.glob("*.ring")] + [Path(ring).name for ring in self._store.rings()]
        numbers = [name.partition("-")[0] for name in names]
        return max((int(number) for number in numbers if number.isdigit()), default=0)

    def _background(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _counts(health: ww.ModelHealth | None) -> Counts:
    if health is None:
        return Counts()
    return Counts(ok=health.ok, invalid=health.invalid, failed=health.failed, shed=health.shed, p95_ms=health.p95_ms)


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
