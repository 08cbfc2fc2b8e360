"""How long an update has lain ready, over restarts and boots: what bounds it must not begin anew with each of them.

Noted on disk now and then; where the wall clock is synchronised, that counts too (``core.lifecycle.lain_s``).
"""

from __future__ import annotations

import logging

import msgspec

from skerry_agent.clock import Clock
from skerry_agent.core import lifecycle
from skerry_agent.core.lifecycle import Update
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.store import Store

log = logging.getLogger(__name__)

NOTED_EVERY_S = 900.0
_KEY = "lain"


class Readiness:
    """See the module."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._noted_s = float("-inf")

    def lain_s(self, update: Update) -> float:
        """How long the update has lain in its state."""
        return lifecycle.lain_s(self._before_s(update), update.since, self._clock.instant())

    def _before_s(self, update: Update) -> float:
        """What the boots before this one add up to."""
        note = self._store.get(_KEY, {})
        if note.get("since") != msgspec.to_builtins(update.since):
            return 0.0
        return float(note["before_s"] if note["boot_id"] == self._clock.boot_id else note["lain_s"])

    def tick(self, update: Update) -> None:
        """Notes it when it is time."""
        if update.state == "ready" and self._clock.boot_s() - self._noted_s >= NOTED_EVERY_S:
            self.note(update)

    def note(self, update: Update) -> None:
        """Notes it now: the agent began or ends."""
        if update.state != "ready":
            return
        self._noted_s = self._clock.boot_s()
        said = {
            "since": msgspec.to_builtins(update.since), "boot_id": self._clock.boot_id, "before_s": self._before_s(update),
            "lain_s": self.lain_s(update),
        }  # fmt: skip
        try:
            self._store.put(_KEY, said)
        except Degraded as error:
            log.warning("time not noted", extra=kv(code=error.code, detail=error.detail))
