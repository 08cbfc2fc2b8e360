"""Rings and label books that no living worker owns any more: which serving worker folds them, and goes on with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from skerry_agent import workerwire as ww
from skerry_agent.logs import kv
from skerry_agent.serving.generation import Generation
from skerry_agent.serving.passing import CellOf
from skerry_agent.serving.rings import model_of
from skerry_agent.serving.site import Site
from skerry_agent.serving.succession import Cell

log = logging.getLogger(__name__)


class Recovering:
    """See the module. The arguments are ``cells.Serving``'s."""

    def __init__(
        self, site: Site, cells: Mapping[str, Cell], cell_of: CellOf, front: Callable[[], Cell | None]
    ) -> None:
        self._site = site
        self._cells = cells
        self._cell_of = cell_of
        self._front = front

    def recover(self) -> None:
        """Lets the serving workers fold the rings that no living worker owns."""
        if not any(True for _ in self._hands()):
            return
        alive, rings = self._site.alive, self._site.rings
        owned = {ring for other in alive for ring in other.owned_rings}
        for ring, start in rings.left_behind(owned):
            heir = self._heir(ring)
            if heir is not None:
                heir.recovering.add(ring)
                heir.worker.send(ww.Recover(ring=ring, start=start))
                log.info("ring left behind", extra=kv(ring=Path(ring).name, folded_by=heir.number))
        # Behind the rings: what a dead worker had not yet taken into its book is in there.
        written = {book for other in alive for book in other.books}
        recovering = {ring for other in alive for ring in other.recovering}
        for book, start in rings.books_left_behind(written, recovering=recovering):
            heir = self._heir(book)
            if heir is not None:
                heir.books.add(book)
                heir.worker.send(ww.AdoptBook(book=book, start=start))

    def _heir(self, ring: str) -> Generation | None:
        """Who folds what is left of a model: its own cell, since labels for it come there; else the front."""
        cell = self._cell_of(model_of(ring))
        if cell is None or (cell.resting and ring.endswith(".ring")):
            cell = self._front()
        own = cell.current if cell is not None else None
        return own if own is not None and own in self._hands() else None

    def _hands(self) -> Iterator[Generation]:
        for cell in self._cells.values():
            generation = cell.current
            if generation is not None and cell.answering() and not generation.leaving:
                yield generation
