"""How large an effect may be, and how large a one would have been seen.

The bound inverts the judge's own test: a ratio is excluded when, with the candidates' foretold events multiplied by it, hardly any
reference assignment has a statistic as small as the observed one. The bound is the smallest excluded ratio above the estimate.
Unlike the test for FAIL, this is no exact statement, since a ratio other than 1 moves the spread of residuals too; where events are few their
residuals are a lattice on which the moved ones would stand out by themselves. So a rate must also be excluded by the
conditional binomial test of the arms' sums (Przyborowski and Wilenski 1940). And since the inverted test is a little too ready to exclude (1,200
simulated stages of unequal, moving devices: 5.4 % at 5 %, 4.6 % at 4 %), it is asked at 4 % for a bound that holds at 5.
"""

from __future__ import annotations

import math

import numpy as np

from skerry_server.core import judge_residuals as res
from skerry_server.core import special
from skerry_server.core.judge_assignments import Assignments, Bools, Floats
from skerry_server.core.judge_values import Kind

CONFIDENCE = 0.95
_ASKED = 0.04
POWER_Z = 0.8416
"""Of the normal distribution at 80 %."""
LARGEST = 64.0
_STEPS = 18


def excluded(kind: Kind, found: res.Columns, assignments: Assignments, ratio: float) -> bool:
    """Whether the data exclude, at 95 % and one-sided, that the candidate's true ratio is ``ratio`` or more."""
    if kind == "rate" and _as_few(found, assignments.candidate, ratio) > 1 - CONFIDENCE:
        return False
    statistics = assignments.sums(res.residuals(kind, found, assignments, ratio).values)
    as_small = int((statistics <= statistics[assignments.observed]).sum())
    level = min(1 - CONFIDENCE, max(_ASKED, 1 / assignments.total))
    return as_small <= level * assignments.total + 1e-9


def _as_few(found: res.Columns, candidate: Bools, ratio: float) -> float:
    """Chance that of all events as few would be the candidates', were ``ratio`` true and nothing but chance at work."""
    # Of the events within reach: those of one odd control would make anybody's look few.
    foretold, x = found.prior.rate * found.fair.n, found.common.x
    ours, all_of_it = ratio * float(foretold[candidate].sum()), float(foretold[~candidate].sum())
    all_of_it += ours
    if all_of_it <= 0:
        return 1.0
    return float(special.bdtr(float(np.floor(x[candidate].sum())), int(x.sum()), ours / all_of_it))


def upper_bound(kind: Kind, found: res.Columns, assignments: Assignments, estimate: float) -> float | None:
    """One-sided 95 % upper bound of the ratio, to about 0.1 %; None when even ``LARGEST`` is not excluded."""
    low, high = max(estimate, 1 / LARGEST), LARGEST
    if not excluded(kind, found, assignments, high):
        return None
    for _ in range(_STEPS):
        if high / low < 1.001:
            break
        middle = math.sqrt(low * high)
        if excluded(kind, found, assignments, middle):
            high = middle
        else:
            low = middle
    return high


def detectable(
    kind: Kind, found: res.Columns, assignments: Assignments, present: res.Residuals, statistics: Floats, alpha: float
) -> float | None:
    """The smallest true ratio that this much data would find with 80 % chance, were all of alpha spent on this look.

    None when nothing can be told yet, or when it is above ``LARGEST``. A normal approximation around the boundary.
    """
    place = int(alpha * assignments.total + 1e-9)
    if kind == "incidence" or place < 1:
        return None
    centre, spread = float(statistics.mean()), float(statistics.std())
    if spread == 0:
        return None
    boundary = float(np.partition(statistics, -place)[-place]) - centre
    candidate = assignments.candidate
    if kind == "level":
        devices = int((candidate & found.seen).sum())
        change = (boundary + POWER_Z * spread) / devices if devices else math.inf
        return math.exp(change) if change < math.log(LARGEST) else None
    prior, k, unsure = present.prior, present.common_factor or 0.0, present.spread
    if prior is None or unsure is None or k <= 0:
        return None
    foretold = k * prior.rate * found.fair.n
    share = float(foretold[candidate].sum()) / float(foretold.sum())

    def seen(ratio: float) -> bool:
        # A worse candidate raises the common factor too, by its share.
        common = foretold * (1 + share * (ratio - 1))
        gain = (np.where(candidate, foretold * ratio, foretold) - common) / (1 + common * unsure)
        moved = float(gain[candidate].sum())
        return moved - share * float(gain.sum()) >= boundary + POWER_Z * spread * math.sqrt(ratio)

    low, high = 1.0, LARGEST
    if not seen(high):
        return None
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if seen(middle) else (middle, high)
    return high
