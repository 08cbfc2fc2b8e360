"""What a request of a model should take, by which it is placed and shed.

It begins as what a golden case took, on a device that may have been busy then, or cool. So it follows what requests take: one that lies
within ``USUAL`` of what was expected changes nothing (and costs a comparison); what lies further off pulls by a fifth of the way, and
nothing pulls further than from twice or half as much: a single request that the system held up for a second is forgotten by the next few.
"""

from __future__ import annotations

USUAL = 1.5
_PULL, _FURTHEST = 0.2, 2.0


class Expectation:
    """Of one model. Times are of transforms and runtime.

    Attributes:
        low_ns, high_ns: a request of one row that takes no less and no more changes nothing: ``learn`` need not be called.
    """

    __slots__ = ("_one_us", "_row_us", "high_ns", "low_ns")

    def __init__(self, one_us: float) -> None:
        """Args: ``one_us``: what one row took, microseconds. A further row is expected to take as much."""
        self._expect(one_us)
        self._row_us = self._one_us

    def _expect(self, one_us: float) -> None:
        self._one_us = max(1.0, one_us)
        self.low_ns, self.high_ns = int(self._one_us * 1e3 / USUAL), int(self._one_us * 1e3 * USUAL)

    def us(self, rows: int) -> float:
        """What a request of that many rows should take, microseconds."""
        return self._one_us if rows <= 1 else self._one_us + self._row_us * (rows - 1)

    def learn(self, rows: int, took_ns: int) -> None:
        """Corrects what is expected by what a request took."""
        if rows > 1:
            further_us = max(0.0, took_ns / 1e3 - self._one_us) / (rows - 1)
            self._row_us += _PULL * (further_us - self._row_us)
        elif not self.low_ns <= took_ns <= self.high_ns:
            before_us = self._one_us
            took_us = min(max(took_ns / 1e3, before_us / _FURTHEST), before_us * _FURTHEST)
            self._expect(before_us + _PULL * (took_us - before_us))
