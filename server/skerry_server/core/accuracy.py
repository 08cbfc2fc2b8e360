"""How often a model is right: measured from late labels, and estimated where there are none.

**Measured** (``measured``): share of right answers among the labelled rows, with two intervals. *Wilson* (1927) takes labels as
independent. *By device*: answers of one device resemble each other, so the variance is taken between devices (ratio estimator,
Cochran, "Sampling techniques", 1977, eq. 6.13), by leaving out one after the other (jackknife): a device that sent most of the labels
draws the share to itself, so that only without it is seen how far it stands from the others. The design effect (Kish 1965) shrinks the
number of labels to an effective one, which goes into Wilson's formula with Student's quantile (Korn and Graubard 1998 do this for Clopper
and Pearson's). Its degrees of freedom are those of the *effective number of devices*, Kish's n**2 / sum of n_i**2: eight devices of which
one sent nearly all labels count as one, and then nothing is known. The interval stays within 0 and 1, and is never narrower than
Wilson's. It is shown as soon as enough devices have sent labels.

**Held back.** Labels of a device of which there are more than rows that it answered count in part, right and wrong ones alike; the caller
says which part (``evidence.held_labels``). The matrix of classes is of all devices together, so nothing can be taken off it: with more than
``HELD_IN_CLASSES`` of the labels held back there are no shares per class, and with less they are at most so far off.

**Estimated** (``estimated``): CBPE, the mean calibrated probability of being right (Bialek et al. 2024, eq. 1). It sees no labels:
a world that has changed its meaning (concept drift) and a calibration that no longer holds are invisible to it. So it is
called an estimate wherever it stands, and never replaces a label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
from skerry_contract import histogram as h

from skerry_server.core import special

CONFIDENCE = 0.95
HELD_IN_CLASSES = 0.01
_LEAST_FREEDOM = 0.05
_MOST_QUANTILE = 1e6


class Minimums(msgspec.Struct, frozen=True, kw_only=True):
    """Below these no share is shown: ``labels`` in all, ``class_labels`` of one class, ``devices`` for their interval."""

    labels: int = 30
    class_labels: int = 10
    devices: int = 8


class Interval(NamedTuple):
    """Of ``CONFIDENCE``."""

    low: float
    high: float


class DeviceLabels(NamedTuple):
    """Labels of one device: ``labelled`` rows, of which ``wrong``."""

    labelled: int
    wrong: int


NOTHING = DeviceLabels(0, 0)


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A measured share.

    Attributes:
        value: None below the minimum.
        right, n: what it is a share of.
        wilson: independent labels; by_device: see the module; None with too few of them.
        shown: which of both holds, empty without a value.
        devices: that sent labels; effective_devices: so many of equal counts would say as much.
        design_effect: variance between devices over that of independent labels, at least 1.
    """

    value: float | None
    right: int
    n: int
    wilson: Interval | None = None
    by_device: Interval | None = None
    shown: Literal["by_device", "wilson", ""] = ""
    devices: int | None = None
    effective_devices: float | None = None
    design_effect: float | None = None

    @property
    def interval(self) -> Interval | None:
        """The interval that is shown."""
        return self.by_device if self.shown == "by_device" else self.wilson


class Lag(msgspec.Struct, frozen=True, kw_only=True):
    """How long after their predictions ``n`` labels came, seconds; quantiles are None without any, and 1.1 % off at most where devices' own bins are."""

    n: int
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None


class PerClass(msgspec.Struct, frozen=True, kw_only=True):
    """One class: of the rows that are it, how many were found; of those called it, how many are it; how late it was told."""

    label: str
    recall: Share
    precision: Share
    lag: Lag


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """What labels say.

    Attributes:
        classes: empty with too many labels held back.
        coverage: labelled rows over answered rows; None without answers.
        held_back: labels that do not count, see the module.
        missing: what lacks, in words; empty when accuracy has a value.
        notes: what else to know of these numbers, in words.
    """

    accuracy: Share
    classes: tuple[PerClass, ...]
    labelled: int
    answered: int
    coverage: float | None
    held_back: int = 0
    missing: str = ""
    notes: tuple[str, ...] = ()


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What the model's own calibrated confidence says: an estimate. ``estimate`` is None below the minimum of rows."""

    estimate: float | None
    rows: int
    method: str = "CBPE: an estimate from calibrated confidence, without labels; blind to concept drift"


def wilson(right: float, n: float, quantile: float | None = None) -> Interval:
    """Wilson's score interval of ``right`` out of ``n``.

    >>> [round(v, 4) for v in wilson(90, 100)]
    [0.8256, 0.9448]

    Args:
        quantile: of the standardised error; that of the normal distribution when None.
    """
    z = float(special.ndtri((1 + CONFIDENCE) / 2)) if quantile is None else quantile
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def effective_devices(devices: Sequence[DeviceLabels]) -> float:
    """How many devices of equal counts say as much: from 1 to their number (Kish 1965).

    >>> effective_devices([DeviceLabels(100, 3)] * 8)
    8.0
    >>> round(effective_devices([DeviceLabels(10_000, 300), *[DeviceLabels(5, 1)] * 7]), 2)
    1.01
    """
    n = sum(one.labelled for one in devices)
    return n**2 / sum(one.labelled**2 for one in devices)


def design_effect(devices: Sequence[DeviceLabels]) -> float:
    """Variance of the share of wrong answers between devices over what independent labels would have; at least 1.

    Args:
        devices: two or more, each with labels.
    """
    n = sum(one.labelled for one in devices)
    share = sum(one.wrong for one in devices) / n
    independent = share * (1 - share) / n
    if not independent:
        return 1.0
    # What the share would be without a device, less what it is.
    moved = [(share * one.labelled - one.wrong) / (n - one.labelled) for one in devices]
    between = (len(devices) - 1) / len(devices) * sum(one**2 for one in moved)
    return max(1.0, between / independent)


def measured(
    confusion: Sequence[int],
    labels: Sequence[str],
    devices: Sequence[DeviceLabels],
    answered: int,
    minimums: Minimums | None = None,
    *,
    held_back: DeviceLabels = NOTHING,
    lags: Mapping[int, h.Exponential] | None = None,
) -> Accuracy:
    """Accuracy, recall and precision from labelled rows.

    Args:
        confusion: row-major [true][predicted]; empty without labels.
        labels: the classes.
        devices: one entry per device that sent labels, without those held back.
        answered: rows answered in the same time.
        held_back: labels in the matrix that do not count, of all devices.
        lags: by true class, seconds.

    Raises:
        ValueError: the matrix does not fit the classes.
    """
    minimums = minimums or Minimums()
    k = len(labels)
    confusion = confusion or (0,) * (k * k)
    if len(confusion) != k * k:
        raise ValueError(f"a matrix of {len(confusion)} counts cannot be of {k} classes")
    n = sum(confusion) - held_back.labelled
    right = sum(confusion[:: k + 1]) - (held_back.labelled - held_back.wrong)
    told = [one for one in devices if one.labelled]
    by_class = held_back.labelled <= HELD_IN_CLASSES * n
    coverage = n / answered if answered else None
    return Accuracy(
        accuracy=_share(right, n, minimums.labels, told, minimums.devices),
        classes=tuple(
            PerClass(
                label=label,
                recall=_share(confusion[i * k + i], sum(confusion[i * k : (i + 1) * k]), minimums.class_labels),
                precision=_share(confusion[i * k + i], sum(confusion[i::k]), minimums.class_labels),
                lag=_lag((lags or {}).get(i, h.Exponential())),
            )
            for i, label in enumerate(labels)
            if by_class
        ),
        labelled=n,
        answered=answered,
        coverage=coverage,
        held_back=held_back.labelled,
        missing="" if n >= minimums.labels else f"wanted {minimums.labels} labels, have {n}",
        notes=tuple(_notes(coverage, held_back.labelled, by_class)),
    )


def _lag(found: h.Exponential) -> Lag:
    p50, p90, p99 = (h.quantile(found, q) for q in (0.5, 0.9, 0.99))
    return Lag(n=found.n, p50_s=p50, p90_s=p90, p99_s=p99)


def _notes(coverage: float | None, held_back: int, by_class: bool) -> Iterator[str]:
    if held_back:
        rest = "" if by_class else "; nothing is said per class, where they cannot be left out"
        yield f"{held_back} labels do not count: they are more than what their devices answered{rest}"
    if coverage is not None and coverage > 1:
        yield "more labels than answers in this time: some are of answers from before it"


def _share(right: int, n: int, least: int, devices: Sequence[DeviceLabels] = (), least_devices: int = 0) -> Share:
    if n < least or not n:
        return Share(value=None, right=right, n=n, devices=len(devices) or None)
    found = Share(value=right / n, right=right, n=n, wilson=wilson(right, n), shown="wilson")
    if not devices:
        return found
    effective = effective_devices(devices)
    found = msgspec.structs.replace(found, devices=len(devices), effective_devices=effective)
    if len(devices) < max(2, least_devices):
        return found
    effect = design_effect(devices)
    # Of next to no degrees of freedom the quantile is beyond any number: the interval is then from 0 to 1.
    quantile = min(float(special.stdtrit(max(effective - 1, _LEAST_FREEDOM), (1 + CONFIDENCE) / 2)), _MOST_QUANTILE)
    by_device = wilson(right / effect, n / effect, quantile)
    return msgspec.structs.replace(found, by_device=by_device, shown="by_device", design_effect=effect)


def estimated(sums: Sequence[int], rows: int, least: int = 200) -> Estimate:
    """CBPE.

    Args:
        sums: per predicted class the sum of ``round(p * 2**20)``; rows: those it was summed over.
        least: fewer rows give no estimate.
    """
    if rows < max(1, least) or not sums:
        return Estimate(estimate=None, rows=rows if sums else 0)
    return Estimate(estimate=sum(sums) / (1 << h.P_BITS) / rows, rows=rows)
