"""Absolute limits, for fleets so small that chance alone could make any comparison come out.

A rate fails when a mixture e-value against its limit reaches 1/alpha: that may be looked at as often as one likes (Ville's
inequality; Robbins 1970; the mixture is a Beta(1/2, 1/2), and only rates above the limit count). It takes the trials as independent, which
those of one device are not quite: the reason why such a verdict is marked ``uncontrolled``. It passes, at the planned end only, when
the one-sided 95 % Clopper-Pearson bound is below the limit.
"""

from __future__ import annotations

import math

from skerry_server.core import special
from skerry_server.core.judge_bounds import CONFIDENCE


def log_evidence(events: int, trials: int, limit: float) -> float:
    """Natural logarithm of the e-value that a rate is above its limit; at most 0 when the observed rate is not.

    >>> log_evidence(1, 100, 0.05) <= 0, log_evidence(30, 100, 0.05) > 20
    (True, True)
    """
    if not 0 < limit < 1:
        return math.inf if limit <= 0 < events else 0.0
    if trials == 0 or events <= limit * trials:
        return 0.0
    mixture = float(special.betaln(0.5 + events, 0.5 + trials - events) - special.betaln(0.5, 0.5))
    return mixture - events * math.log(limit) - (trials - events) * math.log1p(-limit)


def fails(events: int, trials: int, limit: float, alpha: float) -> bool:
    """Whether a rate is above its limit, at a chance of error of alpha over all looks together."""
    return log_evidence(events, trials, limit) >= -math.log(alpha)


def upper_rate(events: int, trials: int) -> float:
    """One-sided 95 % Clopper-Pearson upper bound of a rate; 1 without trials.

    >>> round(upper_rate(0, 59), 3)
    0.05
    """
    if events >= trials:
        return 1.0
    return float(special.betaincinv(events + 1, trials - events, CONFIDENCE))
