"""One cell: which generation serves in it, how the next takes over, and what happens when one dies.

``start`` brings up the next beside the present one and waits for its proof; ``take_over`` lets it listen, ``drain`` ends the old one,
whose connections are passed on; a generation that dies is started again after a growing wait, one that hangs is killed first,
one that leaks or spins is replaced. No cell waits for another.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from skerry_agent import at_rest
from skerry_agent import workerwire as ww
from skerry_agent.core import backoff, liveness
from skerry_agent.core.effects import Arm
from skerry_agent.errors import AgentError, Rejected
from skerry_agent.logs import kv
from skerry_agent.serving.generation import Generation, exit_words, life_of, start_message
from skerry_agent.serving.hearing import hear
from skerry_agent.serving.notes import Note
from skerry_agent.serving.rings import book_of
from skerry_agent.serving.site import Site
from skerry_agent.serving.unruly import Replacing
from skerry_agent.slots import Slot
from skerry_agent.workers import runtime_fault

log = logging.getLogger(__name__)

_BACKLOG = 1024
_LONGEST_TICK_S = 1.0
_STEADY_S = 60.0
"""A worker that lived so long had no part in the failures before it."""
START_S = 180.0
_PATIENCE = 3
"""Starts in a row that fail before a model that is named for it goes on alone."""
_OF_THIS_DEVICE = frozenset({"start_timeout", "not_enough_memory"})
"""A busy or small moment, no model's fault."""


class Cell:
    """The generations that serve one set of models, one after the other.

    Args:
        name: of the model that has the cell for itself; empty for the cell of all others.

    Attributes:
        current: the generation that serves, or served until it died; None before the first.
        start_s: what the last start took, seconds; 0 before it.
        trying: what ``start_later`` tries to start.
        ended: nothing is served here any more.
    """

    def __init__(self, name: str, site: Site) -> None:
        self.name = name
        self.current: Generation | None = None
        self.start_s = 0.0
        self.ended = False
        self.trying: dict[str, Slot] = {}
        self._site = site
        self.failures = 0
        self._turn = 0
        self._ticked_s = site.clock.boot_s()
        self._replacing = Replacing(
            site.config, site.clock, site.draw, on_unruly=site.on_unruly, replace=self._replace,
            background=site.background,
        )  # fmt: skip

    # --- what runs ---------------------------------------------------------------------------------------------------

    def models(self) -> dict[str, Slot]:
        """What answers requests here now, per model; empty while nothing does."""
        return dict(self.current.models) if self.current is not None else {}

    def answering(self) -> bool:
        """Whether a live worker serves."""
        return self.current is not None and self.current.worker.alive and not self.current.hung

    @property
    def resting(self) -> bool:
        """Whether it has no worker until a request wants one."""
        return False

    def served(self) -> bool:
        """Whether a request would be answered."""
        return self.answering() or self.resting

    def cold(self) -> ww.Cold:
        """The starts for which requests have waited, those of its former workers among them."""
        return ww.Cold()

    def wake(self) -> bool:
        """A request wants a worker that is not there. Whether it is started for that request."""
        return False

    def runs(self, models: Mapping[str, Slot]) -> bool:
        """Whether a sound worker serves exactly these bundles."""
        generation = self.current
        if generation is None or not self.answering() or generation.unruly:
            return False
        return {n: s.digest for n, s in generation.models.items()} == {n: s.digest for n, s in models.items()}

    def speaks_for_now(self) -> bool:
        """Whether its last report says how things stand now; not of a worker that is silent or stuck in an inference."""
        generation = self.current
        if generation is None or generation.health is None or not self.answering():
            return False
        return liveness.speaks_for_now(life_of(generation), self._limits())

    # --- starting ----------------------------------------------------------------------------------------------------

    async def start(self, models: Mapping[str, Slot], *, timeout_s: float) -> Generation:
        """Starts the next generation and waits until it has loaded and proved its models. It does not listen yet.

        Raises:
            AgentError: an encrypted bundle could not be opened.
            Rejected: with the code that the worker gave, ``runtime_crashed`` when it died, ``start_timeout``.
            Degraded: ``process_not_started`` when this device has no process, memory or descriptor left for it.
        """
        site = self._site
        began_s = site.clock.boot_s()
        try:
            await site.open_bundles([(slot.digest, slot.variant) for slot in models.values()])
        except AgentError as error:
            site.on_start(models, error, {})
            raise
        number = site.next_number()
        rings = {name: site.rings.path(number, name) for name in models}
        ready: asyncio.Future[ww.Ready] = asyncio.get_running_loop().create_future()
        # A failure that nobody awaits any more (a start that was given up) is no error of the loop.
        ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        holder: list[Generation] = []
        worker = await site.spare.take(lambda message, fd: self._hear(holder[0], message, fd))
        generation = Generation(
            number=number, cell=self.name, models=dict(models), rings=rings, worker=worker, ready=ready,
            note=Note(tuple(sorted(models))),
        )  # fmt: skip
        generation.books.update(map(book_of, rings.values()))
        holder.append(generation)
        site.alive.append(generation)
        site.background(self._watch(generation))
        message = start_message(
            generation,
            site.slots,
            site.config,
            window_s=site.window_s,
            boot_id=site.clock.boot_id,
            throttle=site.throttle,
            device=str(site.store.get("device", "")),
            sampling=at_rest.sampling_rules(site.config, site.sample_rate, site.rings.kept_this_hour()),
        )
        worker.send(message, generation.note.fd)
        try:
            found = await asyncio.wait_for(asyncio.shield(ready), timeout_s)
        except TimeoutError:
            await retire(generation)
            raise Rejected("start_timeout", f"not ready after {timeout_s:g} s", model=generation.only) from None
        except AgentError as error:
            await retire(generation)
            found_out = await self._found_out(generation, error)
            site.on_start(models, found_out, {})
            raise found_out from None
        except asyncio.CancelledError:
            site.background(retire(generation))
            raise
        generation.proofs = {proved.name: proved for proved in found.models}
        self.start_s = site.clock.boot_s() - began_s
        self.refill_spare(models)
        site.on_start(models, None, generation.proofs)
        return generation

    def refill_spare(self, models: Mapping[str, Slot]) -> None:
        """Has a worker started ahead, where there shall be one and is none, with the runtimes of these."""
        variants = (self._site.slots.variant(slot) for slot in models.values())
        self._site.spare.refill_soon(tuple(sorted({variant.runtime for variant in variants if variant is not None})))

    def _hear(self, generation: Generation, message: Any, fd: int | None) -> None:
        hear(self._site, generation, message, fd, serves=generation is self.current)

    async def _found_out(self, generation: Generation, error: AgentError) -> AgentError:
        """Of a worker that died without a word: the runtime's fault when that does not work with the smallest model either."""
        if error.code != "runtime_crashed" or error.model:
            return error
        for model, slot in sorted(generation.models.items()):
            variant = self._site.slots.variant(slot)
            fault = await runtime_fault(variant.runtime) if variant is not None else ""
            if variant is not None and fault:
                return Rejected("runtime_missing", f"{model}: {variant.runtime}: {fault}", model=model)
        # While it loaded one model it can only have died of that one.
        model = generation.loading or generation.only
        return Rejected(error.code, error.detail, model=model) if model else error

    def take_over(self, new: Generation, *, accept: bool) -> Generation | None:
        """Lets ``new`` answer. Returns what answered before, which is to be drained."""
        old, site = self.current, self._site
        # Bound since the start, and refusing until now: nobody is left waiting for a first bundle.
        for listener in site.listeners:
            listener.listen(_BACKLOG)
        books = site.rings.books(without=new.books, models=new.models)
        new.elsewhere = site.elsewhere(new)
        if new.elsewhere:
            # Before it hears of the first request.
            new.worker.send(ww.Elsewhere(models=new.elsewhere))
        new.worker.send(ww.Listen(books=books, accept=accept, cold_ms=new.cold_ms, cold=self.cold()))
        new.accepting = accept
        new.listening_s = site.clock.boot_s()
        site.rings.granted(new.rings.values())
        new.silent_s = 0.0
        self.current, self.trying = new, {}
        self._take_up_keys(new)
        return old

    async def drain(self, old: Generation) -> None:
        """Ends a generation that answered; its connections are passed on."""
        old.leaving = True
        deadline_s = self._site.config.timing.drain_s
        old.worker.send(ww.Drain(deadline_s=deadline_s))
        try:
            await asyncio.wait_for(asyncio.shield(old.worker.exited), deadline_s + 5.0)
        except TimeoutError:
            log.warning("old generation did not leave", extra=kv(generation=old.number))
            old.worker.kill()
            await asyncio.shield(old.worker.exited)

    async def switch(self, new: Generation) -> None:
        """Lets ``new`` answer and drains what answered before. Returns when the old worker is gone.

        Raises:
            Rejected: ``runtime_crashed`` when ``new`` died in between.
        """
        ensure_alive(new)
        old = self.take_over(new, accept=False)
        self._site.on_change()
        if old is not None and old.worker.alive:
            # On its own: a drain goes on when whoever asked for it has changed his mind.
            await asyncio.shield(self._site.background(self.drain(old)))

    async def clear(self) -> None:
        """Serves nothing any more."""
        generation, self.current = self.current, None
        if generation is not None and generation.worker.alive:
            await retire(generation)

    # --- keys --------------------------------------------------------------------------------------------------------

    def rekey(self, model: str, *, arm: Arm, rollout: str, stage: int) -> None:
        """Counts ``model`` under another key from now on."""
        generation = self.current
        if generation is None or model not in generation.models:
            return
        old = generation.rings[model]
        serial = int(Path(old).stem.rsplit("-", 1)[1]) + 1
        ring = self._site.rings.path(generation.number, model, serial)
        generation.former.add(old)
        generation.rings[model] = ring
        generation.books.add(book_of(ring))
        generation.models[model] = msgspec.structs.replace(
            generation.models[model], arm=arm, rollout=rollout, stage=stage
        )
        generation.worker.send(ww.Rekey(model=model, ring=ring, arm=arm, rollout=rollout, stage=stage))

    def _take_up_keys(self, generation: Generation) -> None:
        """Counts under the keys that were given while the generation was starting: the pointer file has them."""
        for model, slot in list(generation.models.items()):
            pointers = self._site.slots.pointers(model)
            now = pointers.active or pointers.confirmed
            if now is None or now.digest != slot.digest:
                continue
            if (now.arm, now.rollout, now.stage) != (slot.arm, slot.rollout, slot.stage):
                self.rekey(model, arm=now.arm, rollout=now.rollout, stage=now.stage)

    # --- what does not go on -----------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Ends its worker when it hangs, replaces it when it leaks or spins."""
        now_s = self._site.clock.boot_s()
        # What passed while this loop stood still, or the device slept, is no silence of the worker.
        passed_s, self._ticked_s = min(now_s - self._ticked_s, _LONGEST_TICK_S), now_s
        generation = self.current
        if generation is None or generation.leaving or not self.answering():
            return
        generation.silent_s += passed_s
        why = liveness.judge_liveness(life_of(generation), self._limits())
        if why:
            log.error("worker hangs", extra=kv(generation=generation.number, pid=generation.worker.pid, detail=why))
            generation.hung = why
            # From here on it is a crash like any other.
            generation.worker.kill()
            return
        self._replacing.look(generation)

    def _limits(self) -> liveness.Limits:
        timing = self._site.config.timing
        return liveness.Limits(
            silent_s=timing.silent_s, inference_s=timing.inference_s, interval_s=timing.health_interval_s
        )

    async def _replace(self, old: Generation) -> None:
        """Hands over to another generation of the same models. Where it cannot be started, ``old`` is killed and started again."""
        new: Generation | None = None
        try:
            new = await self.start(old.models, timeout_s=START_S)
            if self.current is old and not self._site.stopping:
                await self.switch(new)
        except AgentError as error:
            log.error("successor does not start", extra=kv(code=error.code, detail=error.detail, generation=old.number))
            if self.current is old and not self._site.stopping:
                old.worker.kill()
        if new is not None and new is not self.current:
            await retire(new)

    async def _watch(self, generation: Generation) -> None:
        site = self._site
        code = await asyncio.shield(generation.worker.exited)
        site.roll.remove(generation.worker.pid)
        generation.worker.close()
        site.alive.remove(generation)
        generation.gone = True
        generation.suspects = generation.note.suspects()
        generation.note.close()
        if not generation.ready.done():
            generation.ready.set_exception(
                Rejected("runtime_crashed", f"the worker ended with {exit_words(code)} while loading")
            )
        if generation is not self.current or generation.leaving or site.stopping:
            self._clean_up(generation, code)
            site.on_change()
            return
        log.error(
            "worker died",
            extra=kv(
                generation=generation.number,
                pid=generation.worker.pid,
                exit=exit_words(code),
                suspects=generation.suspects,
            ),
        )
        now_s = site.clock.boot_s()
        lived_s = now_s - (now_s if generation.listening_s is None else generation.listening_s)
        self.failures = 1 if lived_s >= _STEADY_S else self.failures + 1
        try:
            again = site.on_crash(generation, code)
        except Exception:
            # Whatever could not be written down: something must serve.
            log.exception("crash not recorded", extra=kv(generation=generation.number))
            again = True
        if again:
            models = {n: s for n, s in generation.models.items() if n == self.name or s.digest not in site.apart}
            site.background(self._start_again(generation, models))
        self._clean_up(generation, code)
        site.on_change()

    def _clean_up(self, generation: Generation, code: int) -> None:
        rings = self._site.rings
        rings.retry()
        if code != 0 and generation.listening_s is not None and generation.health is not None:
            # A ring that lay in memory went with its worker, which had no time to cut a last window.
            for name, ring in generation.rings.items():
                found = generation.health.models.get(name)
                rings.went_along(ring, found.ok if found is not None else 0)
        for ring in generation.owned_rings:
            if rings.spent(ring):
                rings.remove(ring)

    async def _start_again(self, dead: Generation | None, models: dict[str, Slot]) -> None:
        site, turn = self._site, self._turn

        def wanted() -> bool:
            return self.current is dead and turn == self._turn and not site.stopping and not self.ended

        while wanted():
            failures = max(1, self.failures)
            await asyncio.sleep(
                backoff.delay_s("worker", failures, site.draw(), scale=site.config.timing.backoff_scale)
            )
            if not wanted():
                return
            new: Generation | None = None
            try:
                new = await self.start(models, timeout_s=START_S)
                if wanted():
                    await self.switch(new)
            except AgentError as error:
                self.failures += 1
                log.error(
                    "worker does not start", extra=kv(code=error.code, detail=error.detail, failures=self.failures)
                )
                site.on_not_started(models, error)
                models = self._without_culprit(models, error)
            except Exception:
                # A bug, or a fault without a name: this loop is all that brings the models back.
                self.failures += 1
                log.exception("worker does not start", extra=kv(failures=self.failures))
            if new is not None and new is not self.current:
                await retire(new)

    def _without_culprit(self, models: dict[str, Slot], error: AgentError) -> dict[str, Slot]:
        """What is tried next: a model that cannot be started keeps no other one down."""
        culprit = models.get(error.model)
        if culprit is None or len(models) == 1:
            return models
        if error.code != "runtime_missing":
            # Of a runtime that is missing the plan brings it back when it can run.
            if error.code in _OF_THIS_DEVICE or self.failures < _PATIENCE:
                return models
            self._site.set_apart(error.model, culprit)
        rest = {name: slot for name, slot in models.items() if name != error.model}
        self.trying = rest if self.current is None else {}
        return rest

    def start_later(self, models: Mapping[str, Slot]) -> None:
        """Keeps trying to start models that did not start at once; what was tried or served here before is given up."""
        self.failures += 1
        self._turn += 1
        self.current, self.trying = None, dict(models)
        self._site.background(self._start_again(None, dict(models)))

    def retry_s(self) -> int:
        """What a client that cannot be served here should wait, seconds: what the last start took."""
        return max(1, math.ceil(self.start_s))


def ensure_alive(new: Generation) -> None:
    """Raises ``Rejected`` with ``runtime_crashed`` when a generation died before it could listen."""
    if not new.worker.alive:
        raise Rejected("runtime_crashed", f"generation {new.number} died before it could listen", model=new.only)


async def retire(generation: Generation) -> None:
    """Ends a generation that does not listen."""
    generation.leaving = True
    await generation.worker.end(grace_s=2.0)
