"""Connections on their way from one worker to another, and those that wait for one.

A connection that a leaving worker gives away goes to its cell's next worker. One with a request for a model of another cell goes to that
cell; the receiver answers that request itself, so that none goes round in circles. Where a cell has no worker, connections
wait, and so does one that was given to a worker which died before it had it. A request waits for ``pool.wait_s`` at most and with
``pool.waiting`` others; then it is answered 503 by whoever takes connections.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from skerry_agent import workerwire as ww
from skerry_agent.serving.generation import Generation
from skerry_agent.serving.site import Site
from skerry_agent.serving.succession import Cell

log = logging.getLogger(__name__)


class _Waiting(msgspec.Struct, kw_only=True):
    """``cell``: by name; ``model``: that the request is for, empty for a connection of a worker that left. ``own``, ``waited``: see ``Conn``."""

    cell: str
    model: str
    head: bytes
    fd: int
    since_s: float
    own: bool = False
    waited: str = ""


class CellOf(Protocol):
    """See ``Serving.cell_of``."""

    def __call__(self, model: str) -> Cell | None:
        """The cell in which a model is served."""


class Passing:
    """See the module.

    Attributes:
        waited: requests that found no worker of their model and waited for one.
        refused: requests that were turned away because their model had no worker.
    """

    def __init__(
        self, site: Site, cells: Mapping[str, Cell], cell_of: CellOf, front: Callable[[], Cell | None]
    ) -> None:
        self._site = site
        self._cells = cells
        self._cell_of = cell_of
        self._front = front
        self._waiting: deque[_Waiting] = deque()
        self._given: dict[int, tuple[_Waiting, Generation]] = {}
        self._number = 0
        self.waited = 0
        self.refused = 0

    def take(self, generation: Generation, message: ww.Conn, fd: int) -> None:
        """Takes a connection that a worker gives away. Owns ``fd`` from here on."""
        one = _Waiting(
            cell=generation.cell, model=message.model, head=message.head, fd=fd, since_s=self._site.clock.boot_s(),
            own=message.own,
        )  # fmt: skip
        if self._send(one, giver=generation):
            return
        full = message.model and sum(bool(w.model) for w in self._waiting) >= self._site.config.pool.waiting
        if not full or not self._turn_away(one):
            self.waited += bool(one.model)
            self._waiting.append(one)

    def took(self, number: int) -> None:
        """A worker has a connection that was given to it."""
        given = self._given.pop(number, None)
        if given is not None:
            os.close(given[0].fd)

    def hand_on(self) -> None:
        """Sends on what waited for a worker that is there now, and what was given to one that died before it had it."""
        for number, (one, heir) in list(self._given.items()):
            if heir.gone:
                del self._given[number]
                self._waiting.append(one)
        for one in list(self._waiting):
            if self._send(one):
                self._waiting.remove(one)

    def tick(self) -> None:
        """Turns away requests that have waited for too long; tries again to wake what others wait for."""
        self.hand_on()
        oldest_s = self._site.clock.boot_s() - self._site.config.pool.wait_s
        for one in list(self._waiting):
            if one.model and one.since_s < oldest_s and self._turn_away(one):
                self._waiting.remove(one)

    def close(self) -> None:
        """Closes what waits."""
        for one in (*self._waiting, *(given[0] for given in self._given.values())):
            os.close(one.fd)
        self._waiting.clear()
        self._given.clear()

    def _send(self, one: _Waiting, giver: Generation | None = None) -> bool:
        cell = self._cell_of(one.model) if one.model else None
        if one.model and cell is None:
            # Nobody serves it, or not any more: whoever takes it says so.
            cell = self._front()
        elif cell is None:
            cell = self._cells.get(one.cell)
            if cell is None or cell.resting:
                cell = self._front()
        heir = cell.current if cell is not None and cell.answering() else None
        if heir is None or heir.leaving or (heir is giver and not one.model):
            if cell is not None and one.model:
                one.waited = "cold" if cell.wake() else one.waited or "waiting"
            return False
        self._relay(heir, one)
        return True

    def _turn_away(self, one: _Waiting) -> bool:
        front, cell = self._front(), self._cell_of(one.model)
        heir = front.current if front is not None else None
        if heir is None:
            return False
        self.refused += 1
        self._relay(heir, one, retry_s=cell.retry_s() if cell is not None else 1)
        return True

    def _relay(self, heir: Generation, one: _Waiting, *, retry_s: int = 0) -> None:
        self._number += 1
        message = ww.Conn(
            head=one.head, model=one.model, waited=one.waited, retry_s=retry_s, own=one.own, id=self._number
        )
        # Its death may not be known here yet: the connection is held until it says that it has it.
        self._given[self._number] = one, heir
        heir.worker.send(message, one.fd)
