"""All that serves: the cells, which of them takes new connections, and what goes from one to another.

Models that want a worker of their own (``isolate``) have a cell each, all others share one. Behind one address the *front* takes new
connections: the shared cell while it answers, else another. A request for a model of another cell goes there with its
connection (``passing``). Updates, trials, crashes and restarts of one cell touch no other. Rings that a dead worker left are
folded by a living one of the same cell, or the front's.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skerry_agent import at_rest
from skerry_agent import workerwire as ww
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.core.effects import Arm
from skerry_agent.core.recent import Recent
from skerry_agent.core.trial import Counts
from skerry_agent.errors import AgentError, Degraded
from skerry_agent.leftovers import Roll
from skerry_agent.logs import kv
from skerry_agent.readings import Readings
from skerry_agent.serving.generation import Generation, counts_of
from skerry_agent.serving.on_demand import OnDemand
from skerry_agent.serving.passing import Passing
from skerry_agent.serving.recovering import Recovering
from skerry_agent.serving.rings import Rings
from skerry_agent.serving.site import Site
from skerry_agent.serving.spare import Spare
from skerry_agent.serving.succession import Cell, ensure_alive, retire
from skerry_agent.serving.unruly import OnUnruly
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Store
from skerry_agent.workers import WORKER, spawn

log = logging.getLogger(__name__)

_LAST_S = 5.0
"""What is left to a worker once its requests are answered: to fold, and to send that."""
_FORMER_S = 10.0
"""A worker whose supervisor was killed answers for at most 5 s and goes."""


@dataclass(kw_only=True, slots=True)
class Launch:
    """What is to serve next, proved and not listening yet.

    Attributes:
        new: cells that get another generation. Of the others what serves goes on.
        rest: models that are loaded on demand and wait for a request.
        names: of all cells that are to be.
    """

    new: dict[Cell, Generation]
    rest: dict[OnDemand, dict[str, Slot]]
    names: frozenset[str]

    @property
    def alive(self) -> bool:
        """Whether no worker of it died."""
        return all(generation.worker.alive for generation in self.new.values())


class Serving:
    """The cells of this agent.

    Args:
        roll: the record of living workers.
        on_health: a report of a serving generation came.
        on_crash: a serving generation died by itself; answers whether ``Serving`` shall start it again.
        on_unruly: a serving generation leaks or spins; answers whether somebody else replaces it.
        on_start: a worker proved these models, or could not, and why; called before ``start`` returns or raises.
        on_records: the outbox grew.
        on_fault: the store cannot be used any more.
        draw: uniform in [0, 1).

    Attributes:
        before: by model, what the generation before the serving one counted of late.
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
        on_start: Callable[[Mapping[str, Slot], AgentError | None, Mapping[str, ww.Proved]], None],
        on_records: Callable[[], None],
        on_fault: Callable[[Degraded], None],
        draw: Callable[[], float],
        worker_command: Sequence[str] = WORKER,
    ) -> None:
        self._readings = Readings(config.state_dir, interval_s=config.telemetry.readings_s, clock_s=clock.boot_s)
        rings = Rings(
            config.state_dir / "rings",
            store,
            clock,
            commit_s=config.timing.commit_s,
            on_records=on_records,
            on_fault=on_fault,
            readings=self._readings,
        )
        rings.seal = at_rest.seal_of(config)
        spare = Spare(
            lambda hear: spawn(listeners, hear, command=worker_command), roll, wanted=config.pool.warm,
            room_mb=config.limits.memory_reserve_mb,
        )  # fmt: skip
        self.site = Site(
            config=config, store=store, slots=slots, clock=clock, listeners=listeners, roll=roll, rings=rings, draw=draw,
            spare=spare, on_health=on_health, on_crash=on_crash, on_unruly=on_unruly, on_start=on_start,
        )  # fmt: skip
        self.cells: dict[str, Cell] = {}
        self.passing = Passing(self.site, self.cells, self.cell_of, self.front)
        self.recovering = Recovering(self.site, self.cells, self.cell_of, self.front)
        self.site.on_connection = self.passing.take
        self.site.on_took = self.passing.took
        self.site.on_change = self._changed
        self.site.on_flushed = self._flushed
        self.site.elsewhere = self._elsewhere
        self.site.set_apart = self.set_apart
        self.before: dict[str, Counts] = {}
        self._coming: dict[str, str] = {}
        self._flushes: dict[int, asyncio.Event] = {}
        self._began_s = clock.boot_s()

    # --- what runs ---------------------------------------------------------------------------------------------------

    def front(self) -> Cell | None:
        """The cell that takes new connections: the shared one while it answers, else another."""
        answering = sorted((cell.name, cell) for cell in self.cells.values() if cell.answering())
        return answering[0][1] if answering else None

    def cell_of(self, model: str) -> Cell | None:
        """The cell in which a model is served; one that answers before one whose worker died."""
        found = [cell for cell in self.cells.values() if model in cell.models()]
        return next((cell for cell in found if cell.served()), found[0] if found else None)

    def generation_of(self, model: str) -> Generation | None:
        """The generation that serves a model, or served it until it died."""
        cell = self.cell_of(model)
        return cell.current if cell is not None else None

    def generations(self) -> list[Generation]:
        """The serving generation of each cell, the shared cell's first; those that died and are not replaced yet among them."""
        return [cell.current for _, cell in sorted(self.cells.items()) if cell.current is not None]

    def models(self) -> dict[str, Slot]:
        """What answers requests now, per model; empty while nothing does."""
        cells = sorted(self.cells.values(), key=Cell.served)
        return {name: slot for cell in cells for name, slot in cell.models().items()}

    def trying(self) -> dict[str, Slot]:
        """What is being started and has not served yet, per model."""
        return {name: slot for cell in self.cells.values() for name, slot in cell.trying.items()}

    def on_demand(self) -> dict[str, OnDemand]:
        """Cells whose worker comes and goes, by the name of their model."""
        return {name: cell for name, cell in self.cells.items() if isinstance(cell, OnDemand)}

    def answering(self, model: str = "") -> bool:
        """Whether a live worker serves the model; without one: whether each cell has one, and there is a cell."""
        if model:
            cell = self.cell_of(model)
            refused = cell is not None and cell.current is not None and model in cell.current.refused
            return cell is not None and cell.served() and not refused
        return bool(self.models()) and all(cell.served() for cell in self.cells.values())

    def runs(self, models: Mapping[str, Slot]) -> bool:
        """Whether sound workers serve exactly these bundles, each in its cell."""
        groups = self._split(models)
        return self.cells.keys() == groups.keys() and all(self.cells[n].runs(group) for n, group in groups.items())

    def counts(self, model: str) -> Counts:
        """Counts of the serving generation for a model."""
        generation = self.generation_of(model)
        health = generation.health if generation is not None else None
        return counts_of(health.models.get(model)) if health is not None else Counts()

    def current_counts(self, model: str) -> bool:
        """Whether ``counts`` say how things stand now; not of a worker that is silent or stuck in an inference."""
        cell = self.cell_of(model)
        return cell is not None and cell.speaks_for_now()

    # --- change ------------------------------------------------------------------------------------------------------

    def _cell(self, name: str) -> Cell:
        found = self.cells.get(name)
        if found is not None:
            return found
        return (OnDemand if name in self.site.config.pool.on_demand else Cell)(name, self.site)

    def _split(self, models: Mapping[str, Slot]) -> dict[str, dict[str, Slot]]:
        """Which models share a cell: by its name."""
        groups: dict[str, dict[str, Slot]] = {}
        for model, slot in models.items():
            manifest = self.site.slots.manifest(slot.digest)
            alone = slot.digest in self.site.apart or (manifest is not None and manifest.isolate)
            on_demand = model in self.site.config.pool.on_demand
            groups.setdefault(model if alone or on_demand else "", {})[model] = slot
        if groups and groups.keys() <= set(self.site.config.pool.on_demand):
            # Somebody has to take connections while all others sleep.
            groups[""] = {}
        return groups

    async def start(
        self, models: Mapping[str, Slot], *, timeout_s: float, anew: bool = False, awake: str = ""
    ) -> Launch:
        """Starts what is to serve next and waits until it has loaded and proved its models. It does not listen yet.

        Args:
            models: all that are to be served. A cell that runs just its part of them soundly goes on.
            anew: every cell gets another generation.
            awake: a model that is started now, also when it is loaded on demand: whether it can be is what matters.

        Raises:
            Rejected: with the code that the worker gave, ``runtime_crashed`` when it died, ``start_timeout``.
            Degraded: ``process_not_started`` when this device has no process, memory or descriptor left for it.
        """
        groups = self._split(models)
        starts: dict[Cell, asyncio.Task[Generation]] = {}
        rest: dict[OnDemand, dict[str, Slot]] = {}
        for name, group in groups.items():
            cell = self._cell(name)
            if cell.runs(group) and not anew:
                continue
            idle = awake not in group and all(slot.standing != "trial" for slot in group.values())
            if isinstance(cell, OnDemand) and idle:
                rest[cell] = group
            elif anew or not cell.runs(group):
                starts[cell] = asyncio.get_running_loop().create_task(cell.start(group, timeout_s=timeout_s))
        try:
            await asyncio.gather(*starts.values())
        except BaseException:
            for task in starts.values():
                task.cancel()
            await asyncio.gather(*starts.values(), return_exceptions=True)
            for task in starts.values():
                if not task.cancelled() and task.exception() is None:
                    self.site.background(retire(task.result()))
            raise
        new = {cell: task.result() for cell, task in starts.items()}
        return Launch(new=new, rest=rest, names=frozenset(groups))

    async def switch(self, launch: Launch) -> None:
        """Lets it answer, and drains what answered before. Returns when the old workers are gone.

        Raises:
            Rejected: ``runtime_crashed`` when a worker of it died in between; nothing has changed then.
        """
        for generation in launch.new.values():
            ensure_alive(generation)
        self._remember(launch)
        gone = [self.cells.pop(name) for name in self.cells.keys() - launch.names]
        gone += [
            other for cell in (*launch.new, *launch.rest) if (other := self.cells.get(cell.name)) not in (None, cell)
        ]
        self._coming = {m: s.version for generation in launch.new.values() for m, s in generation.models.items()}
        left: list[tuple[Cell, Generation | None]] = []
        for cell, generation in launch.new.items():
            self.cells[cell.name] = cell
            left.append((cell, cell.take_over(generation, accept=cell.name == min(launch.names))))
        for sleeper, group in launch.rest.items():
            self.cells[sleeper.name] = sleeper
            left.append((sleeper, sleeper.rest(group)))
        for cell in gone:
            cell.ended = True
            left.append((cell, cell.current))
        drains = [cell.drain(old) for cell, old in left if old is not None and old.worker.alive]
        self._coming = {}
        self._changed()
        if drains:
            # On their own: a drain goes on when whoever asked for it has changed his mind.
            await asyncio.shield(self.site.background(_all(drains)))
        for cell, generation in launch.new.items():
            # What was kept loaded, and answers again, was started long ago: the spare may have died since.
            cell.refill_spare(generation.models)

    def _remember(self, launch: Launch) -> None:
        for generation in launch.new.values():
            for model in generation.models:
                old = self.generation_of(model)
                if old is None:
                    self.before.pop(model, None)
                elif old.health is not None:
                    counts, recent = counts_of(old.health.models.get(model)), old.recent.get(model, Recent())
                    self.before[model] = recent.of_late(self.site.clock.boot_s(), counts, ww.LATENCY_MS)

    def fits(self, launch: Launch, models: Mapping[str, Slot]) -> bool:
        """Whether a launch that waited still is what it takes to serve these, with what serves now."""
        groups = self._split(models)
        if not launch.alive or launch.names != groups.keys():
            return False
        coming = {cell.name: generation.models for cell, generation in launch.new.items()}
        coming |= {cell.name: group for cell, group in launch.rest.items()}
        for name, group in groups.items():
            found = coming.get(name)
            if found is None:
                if name not in self.cells or not self.cells[name].runs(group):
                    return False
            elif {n: s.digest for n, s in found.items()} != {n: s.digest for n, s in group.items()}:
                return False
        return True

    async def retire(self, launch: Launch) -> None:
        """Ends what of it does not serve."""
        for cell, generation in launch.new.items():
            if generation is not cell.current:
                await retire(generation)

    def start_later(self, models: Mapping[str, Slot]) -> None:
        """Keeps trying to start models that did not start at once, each cell on its own. What answers goes on."""
        for name, group in self._split(models).items():
            self.cells[name] = cell = self._cell(name)
            if not cell.served():
                cell.start_later(group)

    def set_apart(self, model: str, slot: Slot) -> None:
        """Gives a model that brings the others down a cell of its own, until it runs as another bundle."""
        log.error("model gets a worker of its own", extra=kv(model=model, version=slot.version, digest=slot.digest))
        self.site.apart.add(slot.digest)
        self.start_later({model: slot})

    async def clear(self) -> None:
        """Serves nothing any more."""
        for name in list(self.cells):
            cell = self.cells.pop(name)
            cell.ended = True
            await cell.clear()

    async def stop(self) -> None:
        """Ends all; what was counted is folded and committed first."""
        site = self.site
        site.stopping = True
        for generation in list(site.alive):
            generation.leaving = True
        await asyncio.gather(*(g.worker.end(_LAST_S, finish_s=site.config.timing.drain_s) for g in list(site.alive)))
        await site.spare.close()
        site.rings.retry()
        for task in list(site.tasks):
            task.cancel()
        await asyncio.gather(*site.tasks, return_exceptions=True)
        self.passing.close()

    def rekey(self, model: str, *, arm: Arm, rollout: str, stage: int) -> None:
        """Counts ``model`` under another key from now on."""
        cell = self.cell_of(model)
        if cell is not None:
            cell.rekey(model, arm=arm, rollout=rollout, stage=stage)

    def refuse(self, model: str, digest: str) -> None:
        """No worker answers for that bundle of a model any more, whether or not another one can take its place yet."""
        for generation in self.site.alive:
            slot = generation.models.get(model)
            if slot is not None and slot.digest == digest and model not in generation.refused:
                generation.refused.add(model)
                generation.worker.send(ww.Refuse(models=(model,)))

    def throttle(self, rate: float) -> None:
        """Lets so many inferences per second through from now on, whichever worker answers; 0: no bound."""
        self.site.throttle = rate
        for generation in self.site.alive:
            generation.worker.send(ww.Throttle(rate=rate))

    def sample(self, rate: float) -> bool:
        """Keeps that share of answers whole from now on, whichever worker answers; 0: none. Whether that is another one than before."""
        site = self.site
        if rate == site.sample_rate:
            return False
        site.sample_rate = rate
        rules = at_rest.sampling_rules(site.config, rate, site.rings.kept_this_hour())
        for generation in site.alive:
            generation.worker.send(ww.Sample(rules=rules))
        return True

    # --- counts ------------------------------------------------------------------------------------------------------

    async def flush(self, timeout_s: float = 5.0) -> bool:
        """Asks the serving workers for everything counted so far. False when one does not answer in time, or there is none."""
        asked = []
        for generation in self.generations():
            if not generation.worker.alive:
                return False
            number = max(self._flushes, default=0) + 1
            self._flushes[number] = asyncio.Event()
            asked.append(number)
            generation.worker.send(ww.Flush(id=number))
        try:
            await asyncio.wait_for(asyncio.gather(*(self._flushes[number].wait() for number in asked)), timeout_s)
            return bool(asked)
        except TimeoutError:
            return False
        finally:
            for number in asked:
                del self._flushes[number]

    def _flushed(self, number: int) -> None:
        waiter = self._flushes.get(number)
        if waiter is not None:
            waiter.set()

    def configure(self, config: Config) -> None:
        """Goes on with another configuration; a worker that runs keeps what it was started with."""
        self.site.config = config

    def tick(self) -> None:
        """Looks after every cell, tries again what could not be stored, looks for rings whose worker is gone by now.

        Called about every half second.
        """
        for cell in list(self.cells.values()):
            cell.tick()
        if self.site.clock.boot_s() - self._began_s > _FORMER_S:
            self.site.roll.end_former()
        self._readings.tick()
        self.site.rings.retry()
        self.passing.tick()
        self.recovering.recover()

    # --- who takes connections ---------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """Tells every worker whether it takes new connections and what others serve; hands on what waited."""
        if self.site.stopping:
            return
        front = self.front()
        for cell in self.cells.values():
            generation = cell.current
            if generation is None or not cell.answering() or generation.leaving:
                continue
            elsewhere = self._elsewhere(generation)
            if elsewhere != generation.elsewhere:
                generation.elsewhere = elsewhere
                generation.worker.send(ww.Elsewhere(models=elsewhere))
            if generation.accepting != (cell is front):
                generation.accepting = cell is front
                generation.worker.send(ww.Accept(on=generation.accepting))
        self.passing.hand_on()
        self.recovering.recover()

    def _elsewhere(self, generation: Generation) -> dict[str, str]:
        """Models that other cells serve, or will when the change under way is done, and their versions."""
        versions = {model: slot.version for model, slot in self.models().items()} | self._coming
        return {model: version for model, version in sorted(versions.items()) if model not in generation.models}


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    await asyncio.gather(*work)
