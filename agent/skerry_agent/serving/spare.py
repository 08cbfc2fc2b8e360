"""A worker that is started ahead and waits: it has its interpreter, numpy and the runtimes that are in use, and no model.

The next generation or cell starts in it, whichever comes first, and so needs only to load its models. It costs the memory of a worker
without a model for as long as it waits (``pool.warm``), and is left out where that is not free.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]  # ships no types

from skerry_agent import workerwire as ww
from skerry_agent.errors import Degraded
from skerry_agent.leftovers import Roll
from skerry_agent.logs import kv
from skerry_agent.workers import Worker

log = logging.getLogger(__name__)

_AFTER_S = 2.0
"""A change often starts several workers; the spare comes when they are done."""
_ROOM_MB = 96.0

OnMessage = Callable[[Any, int | None], None]
Spawn = Callable[[OnMessage], Any]


class Spare:
    """See the module.

    Args:
        spawn: starts a worker process.
        room_mb: what must stay free beside it.
    """

    def __init__(self, spawn: Spawn, roll: Roll, *, wanted: bool, room_mb: float) -> None:
        self._spawn = spawn
        self._roll = roll
        self._wanted = wanted
        self._room_mb = room_mb
        self._worker: Worker | None = None
        self._hears: list[OnMessage] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def pid(self) -> int:
        """Of the process that waits; 0 without one."""
        return self._worker.pid if self._worker is not None and self._worker.alive else 0

    async def take(self, on_message: OnMessage) -> Worker:
        """The spare, which from now on is the caller's, or a new worker.

        Raises:
            Degraded: ``process_not_started``.
        """
        worker, self._worker = self._worker, None
        if worker is not None and worker.alive:
            self._hears[0] = on_message
            return worker
        if worker is not None:
            self._roll.remove(worker.pid)
            worker.close()
        found = await self._spawn(on_message)
        assert isinstance(found, Worker)
        self._roll.add(found.pid)
        return found

    def refill_soon(self, runtimes: tuple[str, ...]) -> None:
        """Starts another spare in a while, with these runtimes loaded."""
        if not self._wanted or self._closed or self.pid or self._tasks:
            return
        task = asyncio.get_running_loop().create_task(self._refill(runtimes))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refill(self, runtimes: tuple[str, ...]) -> None:
        await asyncio.sleep(_AFTER_S)
        if self._closed or self.pid or psutil.virtual_memory().available / 1e6 < self._room_mb + _ROOM_MB:
            return
        hears: list[OnMessage] = [lambda _message, _fd: None]

        def hear(message: Any, fd: int | None) -> None:
            # Whose it is by then.
            hears[0](message, fd)

        try:
            worker = await self._spawn(hear)
        except Degraded as error:
            log.warning("no spare worker", extra=kv(code=error.code, detail=error.detail))
            return
        self._roll.add(worker.pid)
        self._worker, self._hears = worker, hears
        worker.send(ww.Warm(runtimes=runtimes))

    async def close(self) -> None:
        """Ends it."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.end(grace_s=2.0)
            self._roll.remove(worker.pid)
