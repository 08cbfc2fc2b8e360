"""Pointers that the disk took no note of are noted later, by tries that grow rarer; until then nothing new is taken up."""

from __future__ import annotations

from collections.abc import Callable

from skerry_agent.clock import Clock
from skerry_agent.core import backoff
from skerry_agent.slots import Slots


class Settling:
    """See the module.

    Args:
        draw: uniform in [0, 1), for the waits.
        scale: of the waits.
    """

    def __init__(self, slots: Slots, clock: Clock, *, draw: Callable[[], float], scale: float) -> None:
        self._slots = slots
        self._clock = clock
        self._draw = draw
        self._scale = scale
        self._unsettled, self._settle_s = 0, 0.0

    def tick(self) -> bool:
        """Tries when it is time. Returns whether the disk took it just now."""
        if not self._slots.unwritten:
            self._unsettled = 0
            return False
        if self._clock.boot_s() < self._settle_s:
            return False
        self._unsettled += 1
        self._settle_s = self._clock.boot_s() + backoff.delay_s(
            "worker", self._unsettled, self._draw(), scale=self._scale
        )
        return self._slots.settle()
