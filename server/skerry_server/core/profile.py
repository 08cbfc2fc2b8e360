"""Profiles: what many windows of one bundle counted of its features and outputs, added up exactly.

Owns which part of a window enters a profile and the addition. A profile is laid out by the bundle's manifest, so a window
that does not fit it (a device that was tampered with, or that counts for another manifest) changes nothing: what does not
fit is left out and counted. Leaves storage to ``profiles`` and the meaning of the numbers to ``drift`` and ``accuracy``.

Adding is column by column over many windows at once; the result equals ``window.merge`` in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from skerry_contract import histogram as h
from skerry_contract import manifest as m
from skerry_contract import window as w

MOST_LABELS = 1 << 32
"""Labels of one window, in sum: a thousand a second for seven weeks, more than any outbox merges. More is no count of labels."""
MOST_LAG_S = 1 << 24
"""What a device's label book can say: 194 days."""
LEAST_SCALE = 3
"""Of a latency histogram: 8 buckets per doubling, 4.3 % off at most. Devices make 5. Sums take the scale of the coarsest that is in them, so that
one window of scale -10, a bucket per 1,024 doublings, would hide how slow a whole arm is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What the windows of a bundle must look like.

    Attributes:
        model: the bundle's; variants: its variant ids.
        features: name -> number of bins; outputs: name -> number of classes.
        classes: of the first classifier output, whose confusion matrix labels are counted in; 0 without one.
    """

    model: str
    variants: frozenset[str]
    features: Mapping[str, int]
    outputs: Mapping[str, int]
    classes: int


def shape_of(manifest: m.Manifest) -> Shape:
    """The shape that a manifest prescribes."""
    outputs = {tensor.name: len(tensor.labels) for tensor in manifest.outputs if tensor.labels}
    return Shape(
        model=manifest.model,
        variants=frozenset(variant.id for variant in manifest.variants),
        features={feature.name: len(feature.edges) + 1 for feature in manifest.features},
        outputs=outputs,
        classes=next(iter(outputs.values()), 0),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """Rows whose answers were explained, and what each feature had to do with them.

    Attributes:
        chosen: rows to be explained; rows: those that were; dropped: those that never will be.
        attributions: by feature, quantized absolute attributions of ``rows``.
    """

    chosen: int = 0
    rows: int = 0
    dropped: int = 0
    attributions: Mapping[str, h.Moments] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.chosen or self.rows or self.dropped)


def explained_of(window: w.Window, features: Mapping[str, int]) -> Explained | None:
    """What a window adds; None when no device can have counted it of a bundle with these features."""
    count = window.tallies.get
    rows = count("explain.rows", 0)
    attributions = window.attributions
    # Each explained row says something of every feature that is explained, and how much is never below 0.
    fits = bool(attributions) == bool(rows) and all(
        name in features and part.n == rows and part.total >= 0 and _possible(part)
        for name, part in attributions.items()
    )
    if not fits:
        return None
    return Explained(
        chosen=count("explain.chosen", 0), rows=rows, dropped=count("explain.dropped", 0), attributions=attributions
    )


def total_explained(parts: Iterable[Explained]) -> Explained:
    """All of them in one: commutative, associative, exact."""
    found = list(parts)
    return Explained(
        chosen=sum(part.chosen for part in found),
        rows=sum(part.rows for part in found),
        dropped=sum(part.dropped for part in found),
        attributions=_by_name([part.attributions for part in found], _moments),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Sums over windows.

    Attributes:
        rows: rows of answered requests.
        features, outputs: by name, as windows carry them; the integers are of any size.
        labels: late labels.
    """

    rows: int = 0
    features: Mapping[str, w.FeatureCounts] = field(default_factory=dict)
    outputs: Mapping[str, w.OutputCounts] = field(default_factory=dict)
    labels: w.Labels = field(default_factory=w.Labels)


def profile_of(window: w.Window, shape: Shape) -> tuple[Profile, int]:
    """What a window adds, and how many of its parts do not fit the shape and were left out."""
    whole = Profile(rows=window.counts.rows, features=window.features, outputs=window.outputs, labels=window.labels)
    return fitted(whole, shape)


def fitted(profile: Profile, shape: Shape) -> tuple[Profile, int]:
    """The profile without the parts that do not fit the shape, and how many those were."""
    features = _fitting_features(profile.features, shape.features)
    outputs = {name: part for name, part in profile.outputs.items() if _output_fits(part, shape.outputs.get(name))}
    labels = profile.labels
    unfit = len(profile.features) - len(features) + len(profile.outputs) - len(outputs)
    if not labels_fit(labels, shape):
        labels, unfit = w.Labels(), unfit + 1
    return Profile(rows=profile.rows, features=features, outputs=outputs, labels=labels), unfit


def labels_fit(labels: w.Labels, shape: Shape | None) -> bool:
    """Whether a device can have counted these labels. ``shape`` None: nobody knows the bundle, any square matrix will do."""
    size = len(labels.confusion)
    classes = math.isqrt(size) if shape is None else shape.classes
    if size and (size != classes**2 or sum(labels.confusion) > MOST_LABELS):
        return False
    # A lag is one of a label that is in the matrix; no label is older than a device can be.
    return all(
        of_class < classes
        and lag.n <= sum(labels.confusion[of_class * classes : (of_class + 1) * classes])
        and lag.total <= lag.n * MOST_LAG_S
        and latency_fits(lag)
        for of_class, lag in labels.lags.items()
    )


def latency_fits(histogram: h.Exponential) -> bool:
    """Whether it is fine enough to be added to those of other windows; an empty one has a scale too."""
    return histogram.scale >= LEAST_SCALE


def shadow_fits(shadow: w.Shadow) -> bool:
    """Whether its histograms are fine enough to be added to those of other devices."""
    return min(shadow.distance.scale, shadow.slower.scale, shadow.faster.scale) >= LEAST_SCALE


def _fitting_features(found: Mapping[str, w.FeatureCounts], bins: Mapping[str, int]) -> Mapping[str, w.FeatureCounts]:
    # One loop without a call per part: ingest does this for every window. More values outside than values would hide those of other
    # devices. The last condition is Cauchy's and Schwarz's: what breaks it is no sum of values and their squares.
    unfit = []
    for name, part in found.items():
        moments, counts = part.moments, part.counts
        n, summed = moments.n, moments.total
        if (
            bins.get(name) != len(counts)
            or sum(counts) != n
            or part.outside > n
            or summed * summed > n * moments.squares
        ):
            unfit.append(name)
    return {name: part for name, part in found.items() if name not in unfit} if unfit else found


def _output_fits(part: w.OutputCounts, classes: int | None) -> bool:
    if classes != len(part.counts) or sum(part.counts) != part.moments.n or not _possible(part.moments):
        return False
    if not part.estimated:
        return True
    most = 1 << h.P_BITS
    return len(part.estimated) == classes and all(
        p <= n * most for p, n in zip(part.estimated, part.counts, strict=True)
    )


def _possible(moments: h.Moments) -> bool:
    # Cauchy and Schwarz, as above: what breaks it is no sum of values and their squares.
    return moments.total**2 <= moments.n * moments.squares


def total(profiles: Iterable[Profile]) -> Profile:
    """All of them in one: commutative, associative, exact. All must be of one shape."""
    parts = list(profiles)
    if len(parts) == 1:
        return parts[0]
    return Profile(
        rows=sum(part.rows for part in parts),
        features=_by_name([part.features for part in parts], _add_features),
        outputs=_by_name([part.outputs for part in parts], _add_outputs),
        labels=_add_labels([part.labels for part in parts]),
    )


def _by_name(maps: Sequence[Mapping[str, Any]], add: Callable[[list[Any]], Any]) -> dict[str, Any]:
    names = dict.fromkeys(name for part in maps for name in part)
    return {name: add([part[name] for part in maps if name in part]) for name in names}


def _columns(rows: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))


def _moments(parts: Sequence[h.Moments]) -> h.Moments:
    return h.Moments(
        n=sum([part.n for part in parts]),
        total=sum([part.total for part in parts]),
        squares=sum([part.squares for part in parts]),
    )


def _add_features(parts: list[w.FeatureCounts]) -> w.FeatureCounts:
    return w.FeatureCounts(
        _columns([part.counts for part in parts]),
        sum([part.null for part in parts]),
        sum([part.outside for part in parts]),
        _moments([part.moments for part in parts]),
    )


def _add_outputs(parts: list[w.OutputCounts]) -> w.OutputCounts:
    return w.OutputCounts(
        _columns([part.counts for part in parts]),
        _moments([part.moments for part in parts]),
        _columns([part.estimated for part in parts if part.estimated]),
    )


def _add_labels(parts: list[w.Labels]) -> w.Labels:
    plain = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("matched", "late", "unknown", "duplicate", "conflicting")
    }
    return w.Labels(
        confusion=_columns([part.confusion for part in parts if part.confusion]),
        lags=add_lags([part.lags for part in parts if part.lags]),
        **plain,
    )


def add_lags(parts: Sequence[Mapping[int, h.Exponential]]) -> dict[int, h.Exponential]:
    """How long labels took, per true class, of all parts."""
    return {
        of_class: reduce(h.merge_exponential, [part[of_class] for part in parts if of_class in part])
        for of_class in sorted({of_class for part in parts for of_class in part})
    }
