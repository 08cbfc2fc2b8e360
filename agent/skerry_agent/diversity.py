"""How different the requests of each client are, over all workers and their lives: a client that copies a model never asks the same twice.

Workers tell registers of what came since they last did (``Health.clients``); here they merge, a day at a time, counted from the first
report. A client whose requests were more different in a day than ``access.distinct_most`` is told once that day. What
a killed worker had not told yet is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from skerry_contract import histogram as h

from skerry_agent.clock import Clock

DAY_S = 86_400.0
MOST = 64
REST = "other"


class Diversity:
    """See the module.

    Args:
        most: different requests of one client in a day; 0: any.
        on_event: takes name, code and data of an event.
    """

    def __init__(
        self, clock: Clock, *, most: Callable[[], int], on_event: Callable[[str, str, dict[str, Any]], None]
    ) -> None:
        self._clock = clock
        self._most = most
        self._on_event = on_event
        self._began_s: float | None = None
        self._registers: dict[str, bytes] = {}
        self._told: set[str] = set()

    def take(self, clients: Mapping[str, bytes]) -> None:
        """A worker's report."""
        if not clients:
            return
        now_s = self._clock.boot_s()
        if self._began_s is None or now_s - self._began_s >= DAY_S:
            self._began_s = now_s
            self._registers.clear()
            self._told.clear()
        for name, registers in clients.items():
            known = name in self._registers or len(self._registers) < MOST
            client = name if known else REST
            self._registers[client] = h.merge_distinct(self._registers.get(client, b""), registers)
        self._judge()

    def counts(self) -> dict[str, int]:
        """About how many different requests each client made, this day so far."""
        return {name: round(h.distinct_estimate(found)) for name, found in sorted(self._registers.items())}

    def _judge(self) -> None:
        most = self._most()
        if not most:
            return
        for name, n in self.counts().items():
            if n > most and name not in self._told:
                self._told.add(name)
                self._on_event("access", "requests_too_different", {"client": name, "distinct": n, "most": most})
