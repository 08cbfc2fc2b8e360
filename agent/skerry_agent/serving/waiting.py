"""Windows that wait to be stored, in their order. Where they become many, neighbours of one ring and key are made one.

A store without room may stay so for weeks, while windows arrive each minute: what waits takes as much memory as there are
rings and keys, not as there are minutes. No inference is lost by it, and each span of a ring is still covered once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
from skerry_contract import window as w
from skerry_contract import wire
from skerry_contract.errors import ContractError

from skerry_agent import workerwire as ww
from skerry_agent.core import merging
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.store import Entry

log = logging.getLogger(__name__)

MANY = 256
"""Of so many at least some are made one."""


class Hears(Protocol):
    """Is told what is committed."""

    def send(self, message: ww.Message, fd: int | None = None) -> None:
        """Sends a message; dropped when nobody hears it."""


@dataclass(frozen=True, slots=True)
class Held:
    """A window that waits, and who is told once it is stored."""

    worker: Hears
    cut: ww.WindowCut
    entry: Entry


class Waiting:
    """See the module. The first come first.

    Args:
        committed: how far a ring is stored; None when nothing of it is.
    """

    def __init__(self, committed: Callable[[str], int | None]) -> None:
        self._committed = committed
        self._held: list[Held] = []
        self._many = MANY

    def __len__(self) -> int:
        return len(self._held)

    def add(self, worker: Hears, cut: ww.WindowCut, entry: Entry) -> None:
        """One more."""
        self._held.append(Held(worker, cut, entry))
        if len(self._held) >= self._many:
            before = len(self._held)
            try:
                stored = {ring: self._committed(ring) or 0 for ring in {one.cut.ring for one in self._held}}
            except Degraded as error:
                log.warning("waiting windows not merged", extra=kv(code=error.code, detail=error.detail))
                return
            self._held = _squeezed(self._held, stored)
            # What cannot be made one is not looked at again before there is as much beside it.
            self._many = max(MANY, 2 * len(self._held))
            log.warning("waiting windows merged", extra=kv(windows=before, left=len(self._held)))

    def first(self, n: int) -> list[Held]:
        """The first ones, at most ``n``."""
        return self._held[:n]

    def take(self, n: int) -> None:
        """The first ``n`` are stored, or known already."""
        del self._held[:n]
        self._many = max(MANY, 2 * len(self._held))

    def owes(self, ring: str) -> bool:
        """Whether a window of that ring waits."""
        return any(held.cut.ring == ring for held in self._held)

    def upto(self, ring: str) -> int:
        """How far the windows of that ring that wait reach; 0 for none."""
        return max((held.cut.upto for held in self._held if held.cut.ring == ring), default=0)


def _squeezed(held: list[Held], reached: dict[str, int]) -> list[Held]:
    """The same spans in fewer windows, each at the place of its first. ``reached``: how far each ring is stored."""
    runs: list[list[Held]] = []
    last: dict[str, list[Held]] = {}
    for one in held:
        ring = one.cut.ring
        run = last.get(ring)
        if one.cut.start < reached[ring]:
            # Sent twice: whoever stores it sees that it is known, and must not give up with it what is not.
            runs.append([one])
            continue
        reached[ring] = one.cut.upto
        if run is not None and _continues(run[-1], one):
            run.append(one)
        else:
            last[ring] = run = [one]
            runs.append(run)
    return [one for run in runs for one in _joined(run)]


def _continues(before: Held, after: Held) -> bool:
    return before.entry.key == after.entry.key and after.cut.start == before.cut.upto


def _joined(run: list[Held]) -> list[Held]:
    if len(run) == 1:
        return run
    try:
        windows = [wire.decode(w.Window, one.entry.body, max_bytes=wire.MAX_INFLATED_BYTES) for one in run]
        merged = [(wire.encode(window), n) for window, n in merging.merge_some(windows)]
    except (ValueError, ContractError) as error:
        log.warning("windows cannot merge", extra=kv(code="unmergeable", key=run[0].entry.key, detail=str(error)))
        return run
    found = []
    for body, n in merged:
        some, run = run[:n], run[n:]
        if n == 1:
            found += some
            continue
        inferences = sum(one.entry.inferences for one in some)
        cut = msgspec.structs.replace(some[0].cut, upto=some[-1].cut.upto, body=b"", inferences=inferences)
        # A ring has one writer at a time: whoever sent the last of it is the one that still may wish to know.
        found.append(
            Held(some[-1].worker, cut, msgspec.structs.replace(some[0].entry, body=body, inferences=inferences))
        )
    return found
