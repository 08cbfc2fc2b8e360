"""How far two rows of counts are apart, and how surprising that is: the statistics below ``drift``.

Every function takes counts of the same bins (or integer moments of the same quantization) of now and of a reference and
returns numbers; none decides. All p-values take rows as independent. Rows of one device seldom are, so a p-value alone is
never a reason: ``drift`` asks for an effect besides, and for persistence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from skerry_contract import histogram as h

from skerry_server.core import special

PSEUDO_COUNT = 0.5
"""Added to every bin that either side fills (Jeffreys), so that an empty bin has a logarithm."""


class Psi(NamedTuple):
    """The population stability index.

    Attributes:
        value: as it is.
        corrected: without what chance alone gives, ``(bins - 1) * (1/n + 1/m)``; may be below 0.
        p: chance of such a value, or a greater, when nothing has changed.
    """

    value: float
    corrected: float
    p: float


class Tested(NamedTuple):
    """An effect and its p-value."""

    effect: float
    p: float


def psi(now: Sequence[int], reference: Sequence[int]) -> Psi:
    """The population stability index of two rows of counts.

    Sum over the bins of ``(a - b) * ln(a / b)`` with shares ``a`` of now and ``b`` of the reference. When both come from one
    distribution, ``psi / (1/n + 1/m)`` is about chi-square with ``bins - 1`` degrees of freedom (Yurdakul, "Statistical
    properties of population stability index", 2018, theorem 3.2), hence its expectation and its p-value. Bins that are
    empty on both sides are no bins; ``PSEUDO_COUNT`` goes to each of the others.

    >>> found = psi([250, 250, 250, 250], [25, 25, 25, 25])
    >>> round(found.value, 6), found.p > 0.9
    (0.0, True)
    >>> round(psi([400, 300, 200, 100], [100, 200, 300, 400]).corrected, 2)
    0.9

    Raises:
        ValueError: when the rows differ in length or one counts nothing.
    """
    kept = [(a, b) for a, b in zip(now, reference, strict=True) if a or b]
    n, m = sum(now), sum(reference)
    if not n or not m:
        raise ValueError("wanted rows that count something")
    spread = PSEUDO_COUNT * len(kept)
    value = 0.0
    for a, b in kept:
        share, expected = (a + PSEUDO_COUNT) / (n + spread), (b + PSEUDO_COUNT) / (m + spread)
        value += (share - expected) * math.log(share / expected)
    chance = 1 / n + 1 / m
    freedom = len(kept) - 1
    p = float(special.chdtrc(freedom, value / chance)) if freedom else 1.0
    return Psi(value, value - freedom * chance, p)


def jensen_shannon(now: Sequence[int], reference: Sequence[int]) -> float:
    """Jensen-Shannon distance in base 2: 0 for equal shares, 1 for rows without a common bin.

    >>> jensen_shannon([1, 0], [0, 1])
    1.0
    """
    n, m = sum(now), sum(reference)
    divergence = 0.0
    for a, b in zip(now, reference, strict=True):
        share, expected = a / n, b / m
        middle = (share + expected) / 2
        for part in (share, expected):
            if part:
                divergence += part * math.log2(part / middle) / 2
    return math.sqrt(min(1.0, max(0.0, divergence)))


def kolmogorov_smirnov(now: Sequence[int], reference: Sequence[int]) -> Tested:
    """The Kolmogorov-Smirnov statistic as far as ordered bins show it, with its asymptotic p-value.

    The two distribution functions are known at the edges only, so it is a lower bound of the statistic of the raw values,
    and the p-value an upper bound of theirs: it errs on the side of "nothing has changed".

    >>> kolmogorov_smirnov([10, 0], [5, 5]).effect
    0.5
    """
    n, m = sum(now), sum(reference)
    found, seen, expected = 0.0, 0, 0
    for a, b in zip(now, reference, strict=True):
        seen, expected = seen + a, expected + b
        found = max(found, abs(seen / n - expected / m))
    return Tested(found, float(special.kolmogorov(math.sqrt(n * m / (n + m)) * found)))


def mean_shift(now: h.Moments, reference: h.Moments) -> Tested | None:
    """How far the mean has moved, in standard deviations of the reference; None below two values on a side.

    The p-value is Welch's with the normal distribution. A reference that never varies gives the shift in units of the
    feature's ``scale``.
    """
    if now.n < 2 or reference.n < 2:
        return None
    difference = now.total / now.n - reference.total / reference.n
    spread, before = _variance(now), _variance(reference)
    error = math.sqrt(spread / now.n + before / reference.n)
    unit = math.sqrt(before) or float(1 << h.Q_BITS)
    if not error:
        return Tested(difference / unit, 0.0 if difference else 1.0)
    return Tested(difference / unit, 2 * float(special.ndtr(-abs(difference) / error)))


def _variance(moments: h.Moments) -> float:
    n = moments.n
    return max(0, n * moments.squares - moments.total**2) / (n * (n - 1))


def rate_change(hits: int, n: int, hits_before: int, m: int) -> Tested:
    """Difference of two shares, ``hits / n - hits_before / m``, with the pooled two-sided z-test.

    >>> rate_change(0, 100, 0, 100)
    Tested(effect=0.0, p=1.0)
    """
    difference = hits / n - hits_before / m
    pooled = (hits + hits_before) / (n + m)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    return Tested(difference, 2 * float(special.ndtr(-abs(difference) / error)) if error else 1.0)


def excess_rate(hits: int, n: int, tolerated: float) -> Tested:
    """A share, and the binomial chance of so many hits or more when the true share is ``tolerated``."""
    return Tested(hits / n, float(special.bdtrc(hits - 1, n, tolerated)) if hits else 1.0)


def benjamini_hochberg(p_values: Sequence[float], rate: float) -> float:
    """The greatest p-value that is rejected at this false discovery rate; -1 when none is.

    Benjamini and Hochberg, "Controlling the false discovery rate", 1995: of the ordered p-values the last that is at most
    ``rate * rank / count``.

    >>> benjamini_hochberg([0.001, 0.02, 0.9], 0.05)
    0.02
    >>> benjamini_hochberg([0.4, 0.9], 0.05)
    -1.0
    """
    found = -1.0
    for rank, p in enumerate(sorted(p_values), 1):
        if p <= rate * rank / len(p_values):
            found = p
    return found
