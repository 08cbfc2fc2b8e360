"""What is told of a model since its worker began: the windows that were cut are added up here, the one under way is looked at beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from skerry_contract import histogram as h
from skerry_contract import window as w

from skerry_agent import workerwire as ww
from skerry_agent.worker import ring as r
from skerry_agent.worker.fold import Fold, LatencyFold


class Totals(NamedTuple):
    """Everything counted since the recorder was made.

    Attributes:
        answered_ns: of answered requests, by part as ``ring.TIMES`` names them.
        unanswered_ns: of all others, in all.
        last_ms: wall clock of the latest request, milliseconds since 1970; 0 before the first.
    """

    counts: w.Counts
    answered_ns: dict[str, int]
    unanswered_ns: int
    last_ms: int


class Past:
    """All windows of a recorder that were cut.

    Attributes:
        unanswered_ns: what requests took that got no answer, of the window under way as well.
    """

    def __init__(self) -> None:
        self._counts = w.Counts()
        self._total = LatencyFold()
        self._ns = dict.fromkeys(r.TIMES, 0)
        self._last_ms = 0
        self.unanswered_ns = 0

    def add(self, done: Fold, end_ms: int) -> None:
        """Adds a window. ``end_ms``: wall clock of its end."""
        self._counts = _add(self._counts, done.counts())
        self._total.merge(done.latency["total_ns"])
        for part, fold in done.latency.items():
            self._ns[part] += fold.total
        self._last_ms = end_ms

    def totals(self, now: Fold, last_ms: int) -> Totals:
        """With the window under way. ``last_ms``: wall clock of its latest request, 0 before its first."""
        return Totals(
            counts=_add(self._counts, now.counts()),
            answered_ns={part: before + now.latency[part].total for part, before in self._ns.items()},
            unanswered_ns=self.unanswered_ns,
            last_ms=last_ms or self._last_ms,
        )

    def health(self, now: Fold, since_s: float) -> ww.ModelHealth:
        """With the window under way, as the supervisor wants it."""
        counts = _add(self._counts, now.counts())
        total = LatencyFold()
        total.merge(self._total)
        total.merge(now.latency["total_ns"])
        histogram = total.result()
        p95 = h.quantile(histogram, 0.95)
        return ww.ModelHealth(
            ok=counts.ok,
            invalid=counts.invalid,
            failed=counts.failed,
            shed=counts.shed,
            p95_ms=None if p95 is None else p95 / 1e6,
            since_s=since_s,
            latency=below(histogram, ww.LATENCY_MS) if histogram.n else (),
            latency_s=histogram.total / 1e9,
        )


def below(histogram: h.Exponential, bounds_ms: Sequence[float]) -> tuple[int, ...]:
    """How many of nanoseconds were at most each bound: those whose whole bucket is.

    >>> below(h.exponential_of([0, 1_000_000, 3_000_000]), (0.5, 2.0, 10.0))
    (1, 2, 3)
    """
    width = 2.0**-histogram.scale
    upper_ms = [
        2.0 ** ((i + 1) * width) / 1e6 for i in range(histogram.offset, histogram.offset + len(histogram.counts))
    ]
    return tuple(
        histogram.zero + sum(n for n, upper in zip(histogram.counts, upper_ms, strict=True) if upper <= bound)
        for bound in bounds_ms
    )


def _add(a: w.Counts, b: w.Counts) -> w.Counts:
    return w.Counts(**{name: getattr(a, name) + getattr(b, name) for name in a.__struct_fields__})
