"""What all cells of an agent share: configuration, store, rings, listening sockets, the numbers of generations, background work."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skerry_agent import workerwire as ww
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.errors import AgentError, Degraded
from skerry_agent.leftovers import Roll
from skerry_agent.logs import kv
from skerry_agent.serving.generation import Generation
from skerry_agent.serving.rings import Rings
from skerry_agent.serving.spare import Spare
from skerry_agent.serving.unruly import OnUnruly
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Store

log = logging.getLogger(__name__)


def _nothing(*_: object) -> None:
    pass


async def _all_open(_: Iterable[tuple[str, str]]) -> None:
    pass


@dataclass(kw_only=True, slots=True)
class Site:
    """See the module.

    Attributes:
        on_health, on_crash, on_unruly, on_start: see ``Serving``.
        on_not_started: what served before, or is loaded on demand, did not start.
        on_connection: a worker gives a connection away: to its heir, or to the cell of the model that it is for.
        on_took: a worker has a connection that was passed to it.
        on_change: a cell has another serving worker, or none; or a worker is gone.
        on_flushed: a worker has sent all it had when it was asked.
        open_bundles: has encrypted bundles, (digest, variant), lie in the clear before a worker is told to load them.
        elsewhere: models that other cells serve, and their versions.
        apart: digests that get a cell of their own although they do not ask for it; set_apart: makes it so.
        sample_rate: share of answers that are kept whole; 0: none, whatever they are.
        throttle: inferences per second of all clients together, of each worker; 0: no bound.
        alive: generations whose process runs, of all cells.
    """

    config: Config
    store: Store
    slots: Slots
    clock: Clock
    listeners: Sequence[socket.socket]
    roll: Roll
    rings: Rings
    draw: Callable[[], float]
    spare: Spare
    on_health: Callable[[Generation], None]
    on_crash: Callable[[Generation, int], bool]
    on_unruly: OnUnruly
    on_start: Callable[[Mapping[str, Slot], AgentError | None, Mapping[str, ww.Proved]], None]
    on_not_started: Callable[[Mapping[str, Slot], AgentError], None] = _nothing
    on_connection: Callable[[Generation, ww.Conn, int], None] = _nothing
    on_took: Callable[[int], None] = _nothing
    on_change: Callable[[], None] = _nothing
    on_flushed: Callable[[int], None] = _nothing
    open_bundles: Callable[[Iterable[tuple[str, str]]], Awaitable[None]] = _all_open
    elsewhere: Callable[[Generation], dict[str, str]] = lambda _: {}
    window_s: float = 300.0
    throttle: float = 0.0
    sample_rate: float = 0.0
    stopping: bool = False
    apart: set[str] = field(default_factory=set)
    set_apart: Callable[[str, Slot], None] = _nothing
    alive: list[Generation] = field(default_factory=list)
    number: int = 0
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def next_number(self) -> int:
        """Names the next generation's rings as no ring was ever named."""
        floor = max(self.number, self.rings.highest())
        try:
            self.number = self.store.count_up("worker_generation", floor)
        except Degraded as error:
            # A full disk must not keep a worker from coming back; the rings' files and rows hold the number meanwhile.
            log.error("generation not stored", extra=kv(code=error.code, detail=error.detail))
            self.number = max(floor, int(self.store.get("worker_generation", 0))) + 1
        return self.number

    def background(self, work: Any) -> asyncio.Task[Any]:
        """Runs a coroutine whose failure is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work failed", exc_info=error)
