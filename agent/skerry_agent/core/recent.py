"""What a generation counted of late: the trial compares the new one with what the old one did lately, not with its whole life.

A worker reports sums since it began. One report in ``EVERY_S`` is kept for ``SPAN_S``; what lies between the oldest kept and the
newest is what was counted of late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from skerry_agent.core.trial import Counts

SPAN_S = 600.0
EVERY_S = 15.0


@dataclass(slots=True)
class Recent:
    """Reports of one generation about one model, thinned."""

    _kept: deque[tuple[float, Counts]] = field(default_factory=deque)

    def hear(self, at_s: float, counts: Counts) -> None:
        """A report. ``at_s``: seconds since boot.

        >>> recent = Recent()
        >>> for minute in range(30):
        ...     recent.hear(60.0 * minute, Counts(ok=100 * minute, failed=50 if minute > 2 else 0))
        >>> of_late = recent.of_late(60.0 * 30, Counts(ok=3000, failed=50))
        >>> of_late.ok, of_late.failed
        (1000, 0)
        """
        if not self._kept or at_s - self._kept[-1][0] >= EVERY_S:
            self._kept.append((at_s, counts))
        self._thin(at_s)

    def _thin(self, at_s: float) -> None:
        while len(self._kept) > 1 and at_s - self._kept[1][0] >= SPAN_S:
            self._kept.popleft()

    def of_late(self, at_s: float, now: Counts, bounds_ms: Sequence[float] = ()) -> Counts:
        """What was counted in the last ``SPAN_S``, or since the generation began. ``bounds_ms``: of ``Counts.latency``."""
        self._thin(at_s)
        if not self._kept or at_s - self._kept[0][0] < SPAN_S:
            return now
        then = self._kept[0][1]
        latency = tuple(b - a for a, b in zip(then.latency or (0,) * len(now.latency), now.latency, strict=False))
        return Counts(
            ok=max(0, now.ok - then.ok), invalid=max(0, now.invalid - then.invalid), failed=max(0, now.failed - then.failed),
            shed=max(0, now.shed - then.shed), p95_ms=_p95_ms(now, latency, max(0, now.ok - then.ok), bounds_ms), latency=latency,
        )  # fmt: skip


def _p95_ms(now: Counts, latency: Sequence[int], answered: int, bounds_ms: Sequence[float]) -> float | None:
    """Of late: the exact one of its whole life while that lies in the same bucket, else the upper end of the bucket.

    >>> life = Counts(ok=1000, p95_ms=3.0)
    >>> _p95_ms(life, (0, 100, 100), 100, (2.5, 5.0, 10.0)), _p95_ms(life, (0, 0, 100), 100, (2.5, 5.0, 10.0))
    (3.0, 10.0)
    """
    if answered == 0:
        return None
    if now.p95_ms is None or len(latency) != len(bounds_ms):
        return now.p95_ms
    lower = 0.0
    for upper, below in zip(bounds_ms, latency, strict=True):
        if below >= 0.95 * answered:
            return now.p95_ms if lower < now.p95_ms <= upper else upper
        lower = upper
    return max(now.p95_ms, lower)
