"""What a device did more than its own past foretold: one number per unit, in which the arms can be compared.

**Rates** (points 2 and 3 of the design). Each device's rate has a Gamma(a, b) prior, whose mean and variance over devices are
the moments of the pre-period (Böhning and Kuhnert's form of the estimator for unequal exposures; binomial noise taken off).
With P_i events in m_i trials before, the device's own rate is r_i = (a + P_i)/(b + m_i) with relative variance phi_i = 1/(a + P_i).
Since the stage began, X_i of n_i: foretold E_i = r_i n_i; k = sum X / sum E over both arms takes out what is common to all; the
residual is R_i = (X_i - k E_i)/(1 + k E_i (phi_i + tau)), the score of a negative binomial, which bounds the weight of one odd device.
tau is what rates have moved since, by moments of both arms together: a device's past is then worth less. (The simulations
find twice the errors more often with it: 84 % instead of 74 % of rollouts where rates move by a log-sd of 1.)
Without any pre-period every device has the same r, and phi comes from the present, both arms together.

**One odd device**, broken or lying, would else decide alone, or, as a control, hide everything: its events raise k and tau for all, and it is
the first in each assignment that happens to hold it. So no device weighs more than ``SHARE`` of all trials; events beyond ``REACH`` standard deviations
of what is foretold are cut off, for the residual, for k and for the bounds; the oddest ``TRIMMED`` of devices are left out of tau, and count as the
next one.

**Levels.** The device's level, minus what a slope common to all devices foretells from its level before, around the medians of its
stratum; clipped at three robust standard deviations.

**Incidence.** Whether the device is in trouble.

All of this uses the arms in no way, so that under the hypothesis that the candidate changes nothing, arms are exchangeable within
strata and the comparison of ``judge`` is exact. ``ratio`` asks about another hypothesis: that the candidate multiplies the rate.
The candidates' foretold events are then multiplied, and their residuals brought to the scale they would have as controls.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from skerry_server.core.judge_assignments import Assignments, Bools, Floats
from skerry_server.core.judge_values import LEVEL_STEPS, Kind, Reading

SPREADS = 3.0
SHARE = 0.1
REACH, AT_LEAST = 4.0, 2.0
"""Standard deviations, and events on top, since where few are foretold one or two say nothing."""
TRIMMED = 0.02
_NORMAL_MAD = 1.4826
_BITS = 50
_ROUNDS = 12


class Columns:
    """A reading as arrays by unit number, each made when it is first asked for.

    Raises:
        ValueError: a column does not fit the design.
    """

    def __init__(self, reading: Reading, assignments: Assignments) -> None:
        self._reading = reading
        self._order = assignments.order
        for name in ("n", "x", "pre_n", "pre_x"):
            size = len(getattr(reading, name))
            if size != len(self._order) and not (name.startswith("pre_") and size == 0):
                raise ValueError(f"reading: {name} has {size} entries, wanted {len(self._order)}")

    @functools.cached_property
    def n(self) -> Floats:
        """See ``Reading``, as the others."""
        return self._column(self._reading.n)

    @functools.cached_property
    def x(self) -> Floats:
        """Events, levels, or devices in trouble."""
        return self._column(self._reading.x)

    @functools.cached_property
    def pre_n(self) -> Floats:
        """Zeros without a pre-period."""
        return self._column(self._reading.pre_n)

    @functools.cached_property
    def pre_x(self) -> Floats:
        """Zeros without a pre-period."""
        return self._column(self._reading.pre_x)

    @functools.cached_property
    def fair(self) -> Trials:
        """Trials and events of a rate, with no unit heavier than ``SHARE`` of all."""
        return Trials(*_capped(self.n, self.x), *_capped(self.pre_n, self.pre_x))

    @functools.cached_property
    def common(self) -> Common:
        """What a rate's past foretells of the present, were all units alike in what they did since."""
        return _common(self.fair, self.prior, self.prior.rate * self.fair.n)

    @functools.cached_property
    def seen(self) -> Bools:
        """Units with data."""
        found: Bools = self.n > 0
        return found

    @functools.cached_property
    def prior(self) -> Prior:
        """Of a rate."""
        return prior_of(self)

    def _column(self, values: tuple[int, ...]) -> Floats:
        if not values:
            return np.zeros(len(self._order))
        found: Floats = np.array(values, np.float64)[self._order]
        return found


class Trials(NamedTuple):
    """Of a rate, by unit number."""

    n: Floats
    x: Floats
    pre_n: Floats
    pre_x: Floats


class Common(NamedTuple):
    """What units have in common: factor on what their past foretold, relative variance of that, events within reach of it."""

    factor: float
    spread: Floats
    x: Floats


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prior:
    """Own rate and its relative variance per unit; mean and coefficient of variation over devices."""

    rate: Floats
    phi: Floats
    mean: float
    cv: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Residuals:
    """One number per unit, whole multiples of one power of two.

    The rest for rates only. ``spread``: relative variance of each unit's foretold events (phi + tau).
    """

    values: Floats
    spread: Floats | None = None
    common_factor: float | None = None
    prior: Prior | None = None


def residuals(kind: Kind, found: Columns, assignments: Assignments, ratio: float = 1.0) -> Residuals:
    """See the module. ``ratio`` is not used for incidence."""
    if kind == "rate":
        return rates(found, assignments.candidate, ratio)
    if kind == "level":
        return Residuals(values=_exact(levels(found, assignments, ratio)))
    return Residuals(values=np.where(found.seen, found.x, 0.0))


def rates(found: Columns, candidate: Bools, ratio: float = 1.0) -> Residuals:
    """Residuals of a rate."""
    fair, prior = found.fair, found.prior
    alone = prior.rate * fair.n
    if ratio == 1:
        common = found.common
        foretold = alone = common.factor * alone
    else:
        foretold = np.where(candidate, alone * ratio, alone)
        common = _common(fair, prior, foretold)
        alone, foretold = common.factor * alone, common.factor * foretold
    values = (common.x - foretold) / (1 + alone * common.spread)
    if ratio != 1:
        # Variance E (1 + E spread) with E multiplied: back to that of a control with the same device.
        scale = np.sqrt((1 + alone * common.spread) / (ratio * (1 + foretold * common.spread)))
        values = np.where(candidate, values * scale, values)
    return Residuals(
        values=_exact(_tamed(values, candidate)), spread=common.spread, common_factor=common.factor, prior=prior
    )


def _capped(n: Floats, x: Floats) -> tuple[Floats, Floats]:
    """The same rates with no unit above ``SHARE`` of all trials, or above twice its equal part where units are few."""
    heavy = np.sort(n[n > 0])[::-1]
    if not len(heavy):
        return n, x
    share = max(SHARE, 2 / len(heavy))
    rest, most = float(heavy.sum()), float(heavy[0])
    for count, weight in enumerate(heavy):
        # With ``count`` units at the most, it is ``share`` of them and the rest together.
        most = share * rest / (1 - share * count) if share * count < 1 else most
        if most >= weight:
            break
        rest -= float(weight)
    kept = np.minimum(n, most)
    return kept, np.where(n > most, x * (kept / np.maximum(n, 1)), x)


def _common(fair: Trials, prior: Prior, foretold: Floats) -> Common:
    """Factor, spread and events within reach, each of which rests on the others: a few rounds from the plain sums settle them."""
    everything = float(foretold.sum())
    if everything <= 0:
        return Common(0.0, prior.phi, fair.x)
    x = fair.x
    for _ in range(_ROUNDS):
        factor = float(x.sum()) / everything
        expected = factor * foretold
        spread = prior.phi + _unrest(fair.x, expected, prior.phi)
        reach = REACH * np.sqrt(expected * (1 + expected * spread))
        within = np.clip(fair.x, expected - reach, expected + reach + AT_LEAST)
        if np.array_equal(within, x):
            break
        x = within
    return Common(factor, spread, x)


def _tamed(values: Floats, candidate: Bools) -> Floats:
    """The same with the oddest few brought to the next: fewer than half of the candidates, so that not all they say is taken for odd."""
    odd = min(int(np.ceil(TRIMMED * len(values))), (int(candidate.sum()) - 1) // 2)
    if odd < 1 or 2 * odd >= len(values):
        return values
    ordered = np.sort(values)
    return np.clip(values, ordered[odd], ordered[-1 - odd])


def _unrest(x: Floats, foretold: Floats, phi: Floats) -> float:
    """Relative variance of the devices' rates that their prior does not explain: how much they moved since."""
    known = foretold + foretold**2 * phi
    away = (x - foretold) ** 2
    odd = int(np.ceil(TRIMMED * len(x)))
    kept = np.argsort(away / np.maximum(known, 1e-12), kind="stable")[: len(x) - odd]
    square = float((foretold[kept] ** 2).sum())
    if square <= 0:
        return 0.0
    return max(0.0, float((away[kept] - known[kept]).sum()) / square)


def prior_of(found: Columns) -> Prior:
    """The prior of a rate and what it says of each unit. Half an event stands for none at all."""
    fair = found.fair
    mean, variance = _moments(fair.pre_n, fair.pre_x)
    if mean <= 0:
        mean, variance = _moments(fair.n, fair.x)
        phi = variance / mean**2 if mean > 0 else 0.0
        size = len(fair.n)
        return Prior(rate=np.full(size, max(mean, 1e-12)), phi=np.full(size, phi), mean=mean, cv=phi**0.5)
    if variance <= 1e-9 * mean**2:
        size = len(fair.n)
        return Prior(rate=np.full(size, mean), phi=np.zeros(size), mean=mean, cv=0.0)
    a, b = mean**2 / variance, mean / variance
    rate = (a + fair.pre_x) / (b + fair.pre_n)
    return Prior(rate=rate, phi=1 / (a + fair.pre_x), mean=mean, cv=variance**0.5 / mean)


def _moments(n: Floats, x: Floats) -> tuple[float, float]:
    """Mean and variance over devices of their true rates; (0, 0) without trials."""
    trials = float(n.sum())
    if trials <= 0:
        return 0.0, 0.0
    mean = max(float(x.sum()), 0.5) / trials
    used = n > 0
    spread = trials - float((n**2).sum()) / trials
    if int(used.sum()) < 2 or spread <= 0:
        return mean, 0.0
    between = float((n[used] * (x[used] / n[used] - mean) ** 2).sum())
    noise = (int(used.sum()) - 1) * mean * max(1 - mean, 0.0)
    return mean, max(0.0, (between - noise) / spread)


def levels(found: Columns, assignments: Assignments, ratio: float = 1.0) -> Floats:
    """Residuals of a level, before they are made exact; 0 for units without data."""
    seen = found.seen
    now = found.x / LEVEL_STEPS
    if ratio != 1:
        now = now - np.where(assignments.candidate, np.log(ratio), 0.0)
    before = found.pre_x / LEVEL_STEPS
    paired = seen & (found.pre_n > 0)
    out, past = np.zeros(len(now)), np.zeros(len(now))
    for number in range(int(assignments.stratum[-1]) + 1 if len(now) else 0):
        for group in (paired, seen & ~paired):
            members = group & (assignments.stratum == number)
            if members.any():
                out[members] = now[members] - np.median(now[members])
                if group is paired:
                    past[members] = before[members] - np.median(before[members])
    if int(paired.sum()) >= 3:
        x, y = _clipped(past[paired]), _clipped(out[paired])
        square = float((x * x).sum())
        slope = min(1.0, max(0.0, float((x * y).sum()) / square)) if square > 0 else 0.0
        out[paired] -= slope * past[paired]
    out[seen] = _clipped(out[seen])
    return out


def _clipped(values: Floats) -> Floats:
    if not len(values):
        return values
    middle = np.median(values)
    spread = SPREADS * _NORMAL_MAD * float(np.median(np.abs(values - middle)))
    return np.clip(values, middle - spread, middle + spread) if spread > 0 else values


def _exact(values: Floats) -> Floats:
    """Rounded to a power of two so coarse that sums of them are exact, whatever their order."""
    size = float(np.abs(values).sum())
    if size == 0:
        return values
    step = _BITS - int(np.frexp(size)[1])
    return np.asarray(np.ldexp(np.rint(np.ldexp(values, step)), -step), np.float64)
