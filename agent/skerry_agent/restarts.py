"""An agent that dies soon after each start, with a confirmed bundle: the bundle before it comes back.

Deaths of a worker are counted by the supervisor that lives on. This counts the supervisor's own: a bundle may take all memory there is,
or the machine, with it. Who watches the agent starts it again each time, for ever; so it has to find out by itself that it is going in
circles. Counted are starts in a row that found no update under way (one that is, has a limit of its own) and of which none lasted
``LASTED_S``, nor ended in order.
"""

from __future__ import annotations

import logging

from skerry_agent.clock import Clock
from skerry_agent.core.lifecycle import CRASHES
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.store import Store

log = logging.getLogger(__name__)

LASTED_S = 60.0


class Restarts:
    """See the module. ``scale``: of ``LASTED_S``.

    Attributes:
        in_a_row: starts before this one that did not last.
    """

    def __init__(self, store: Store, clock: Clock, *, scale: float) -> None:
        self._store = store
        self._clock = clock
        self._began_s = clock.boot_s()
        self._lasts_s = LASTED_S * scale
        self._open = True
        self.in_a_row = 0

    def began(self, *, at_rest: bool) -> bool:
        """Counts this start. Whether so many in a row did not last that what was confirmed last is to blame."""
        self.in_a_row = int(self._store.get("short_starts", 0)) if at_rest else 0
        self._put(self.in_a_row + 1 if at_rest else 0)
        if self.in_a_row:
            log.warning("the agent ended soon after its start", extra=kv(in_a_row=self.in_a_row))
        return self.in_a_row > 0 and self.in_a_row % CRASHES == 0

    def tick(self) -> None:
        """It has lasted."""
        if self._open and self._clock.boot_s() - self._began_s >= self._lasts_s:
            self.ended()

    def ended(self) -> None:
        """It ends in order, or has lasted: nothing is counted any more."""
        if self._open:
            self._open = False
            self._put(0)

    def _put(self, number: int) -> None:
        try:
            if int(self._store.get("short_starts", 0)) != number:
                self._store.put("short_starts", number)
        except Degraded as error:
            # A full disk, say: no reason not to start.
            log.warning("start not counted", extra=kv(code=error.code, detail=error.detail))
