"""The telemetry window: what one device counted of one key over a span, in integers that merge exactly.

A key is (model, bundle, variant, arm, rollout, stage); windows of different keys never merge. The worker builds windows,
the outbox may merge old ones of one key, the server adds them up. Fields a reader does not know survive in ``extra`` and
end with a merge (a newer field's merge rule is unknown), which ``merge`` reports by dropping them from the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from skerry_contract import histogram as h
from skerry_contract import ids
from skerry_contract.errors import Malformed

MAX_BINS = 4096
"""Counts of one feature or output."""
MAX_TALLIES = 512
MAX_SHADOWS = 8
SHADOW_DROPS: tuple[str, ...] = ("busy", "hot", "failed", "late")
"""Why a request of a shadow's share has no pair; devices of later releases may know others."""
LATER_FIELDS = ("tallies", "freshness", "attributions", "shadows", "distinct")
"""Fields that came after the first release: left out of the bytes while they are empty, so that what has none is as it was."""

GUARD_KINDS: tuple[str, ...] = (
    "null.rejected", "null.imputed", "null.fallback",
    "outside.rejected", "outside.imputed", "outside.fallback",
    "stale.counted", "stale.rejected", "stale.imputed", "stale.fallback",
    "access.denied", "access.rate", "access.throttled",
    "load.cold", "load.waiting", "provider.fallback",
)  # fmt: skip
"""What a guard did to a request, one bit each from the lowest, in a device's records; the names are keys of ``tallies``."""


class Key(NamedTuple):
    """What windows are keyed by. ``rollout`` is empty and ``stage`` 0 outside a rollout."""

    model: str
    bundle: str
    variant: str
    arm: str
    rollout: str
    stage: int


class Instant(msgspec.Struct, frozen=True, array_like=True):
    """A moment as the device saw it.

    Attributes:
        boot_id: of the kernel's boot, 32 hex digits; orders records together with boot_ns.
        boot_ns: CLOCK_BOOTTIME, nanoseconds.
        wall_ms: wall clock, milliseconds since 1970; decides nothing.
        synced: whether the wall clock was synchronised.
    """

    boot_id: str
    boot_ns: int
    wall_ms: int
    synced: bool


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Requests by outcome, and rows of the answered ones.

    Attributes:
        ok: answered with 200. Each counts as one inference whatever its batch.
        invalid: refused with 400: names, shapes, types, ranges, nulls.
        failed: the runtime or a transform failed, 500.
        shed: refused with 503.
        rows: rows of the answered requests.
        retries: requests marked as a repeat by the client, included above.
        cached: answered from a cache; included in ok. Skerry's own workers and SDK keep none: theirs is 0.
        fallback: answered by the fallback model; included in ok.
    """

    ok: int = 0
    invalid: int = 0
    failed: int = 0
    shed: int = 0
    rows: int = 0
    retries: int = 0
    cached: int = 0
    fallback: int = 0


class FeatureCounts(msgspec.Struct, frozen=True, array_like=True):
    """One feature: counts on the reference edges, nulls, values outside ``range``, integer moments."""

    counts: tuple[int, ...]
    null: int
    outside: int
    moments: h.Moments


class OutputCounts(msgspec.Struct, frozen=True, array_like=True):
    """One output. For a classifier ``counts`` is per predicted class and ``moments`` of the confidence.

    ``estimated`` is CBPE: per predicted class the sum of ``round(p * 2**20)`` of the calibrated probability.
    """

    counts: tuple[int, ...]
    moments: h.Moments
    estimated: tuple[int, ...] = ()


class SliceCounts(msgspec.Struct, frozen=True, array_like=True):
    """Rows, and rows predicted per class, of one slice."""

    rows: int
    counts: tuple[int, ...] = ()


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Nanoseconds per request: in the queue, in transforms, in the runtime, and in all."""

    total: h.Exponential = h.Exponential()
    queue: h.Exponential = h.Exponential()
    transform: h.Exponential = h.Exponential()
    infer: h.Exponential = h.Exponential()


class Labels(msgspec.Struct, frozen=True, kw_only=True):
    """Late labels: ``confusion`` is row-major [true][predicted]; the rest counts what could not be matched.

    ``lags``: per true class how long after its prediction a matched label came, whole seconds. It came after the first
    release, and is left out of the bytes while it is empty.
    """

    confusion: tuple[int, ...] = ()
    matched: int = 0
    late: int = 0
    unknown: int = 0
    duplicate: int = 0
    conflicting: int = 0
    lags: dict[int, h.Exponential] = {}


class Shadow(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that saw the same inputs and answered nobody, paired by request with what was answered.

    Attributes:
        pairs: requests that both answered.
        dropped: requests of the share that have no pair, by reason, ``SHADOW_DROPS``.
        agreed: pairs with the same predicted class, or equal outputs within the golden tolerance where there are no classes.
        distance: greatest absolute difference of an output per pair, in millionths.
        slower, faster: nanoseconds by which the candidate took longer, or less long, than what answered.
        labelled: pairs by their label, which may come windows later: both right, only the answer, only the candidate, both wrong.
    """

    pairs: int = 0
    dropped: dict[str, int] = {}
    agreed: int = 0
    distance: h.Exponential = h.Exponential()
    slower: h.Exponential = h.Exponential()
    faster: h.Exponential = h.Exponential()
    labelled: tuple[int, int, int, int] = (0, 0, 0, 0)


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """See the module.

    Attributes:
        resources: integer readings by name: sums as ``*_sum``, peaks as ``*_max``, counts as ``*_n``.
        tallies: further counts of requests by name, among them ``GUARD_KINDS``; names ending in ``_max`` are peaks.
        freshness: age of the oldest feature of a request, milliseconds, of requests that said how old they are.
        attributions: by feature, quantized mean absolute attribution of explained rows.
        shadows: by the candidate's digest.
        distinct: registers of ``histogram.distinct_of``: about how many different requests there were; empty when nobody counts them.
    """

    key: Key
    start: Instant
    end: Instant
    counts: Counts = Counts()
    latency: Latency = Latency()
    features: dict[str, FeatureCounts] = {}
    outputs: dict[str, OutputCounts] = {}
    slices: dict[str, SliceCounts] = {}
    labels: Labels = Labels()
    resources: dict[str, int] = {}
    merged: int = 1
    tallies: dict[str, int] = {}
    freshness: h.Exponential = h.Exponential()
    attributions: dict[str, h.Moments] = {}
    shadows: dict[str, Shadow] = {}
    distinct: bytes = b""
    extra: dict[str, Any] = {}


def merge(a: Window, b: Window) -> Window:
    """The window of both spans. Commutative and associative in every count.

    ``start`` and ``end`` become the earliest and latest by (boot_ns within one boot, else wall_ms). Of two boots, wall clocks that
    were not set do not tell which came first: who knows it puts them right (``merging`` on the device).

    Raises:
        ValueError: when the keys or the bins differ.
    """
    if a.key != b.key:
        raise ValueError("windows of different keys never merge")
    return Window(
        key=a.key,
        start=min(a.start, b.start, key=_order(a, b)),
        end=max(a.end, b.end, key=_order(a, b)),
        counts=_add_fields(a.counts, b.counts),
        latency=Latency(
            total=h.merge_exponential(a.latency.total, b.latency.total),
            queue=h.merge_exponential(a.latency.queue, b.latency.queue),
            transform=h.merge_exponential(a.latency.transform, b.latency.transform),
            infer=h.merge_exponential(a.latency.infer, b.latency.infer),
        ),
        features=_merge_maps(a.features, b.features, _merge_feature),
        outputs=_merge_maps(a.outputs, b.outputs, _merge_output),
        slices=_merge_maps(a.slices, b.slices, _merge_slice),
        labels=_merge_labels(a.labels, b.labels),
        resources=_merge_readings(a.resources, b.resources),
        merged=a.merged + b.merged,
        tallies=_merge_readings(a.tallies, b.tallies),
        freshness=h.merge_exponential(a.freshness, b.freshness),
        attributions=_merge_maps(a.attributions, b.attributions, h.merge_moments),
        shadows=_merge_maps(a.shadows, b.shadows, merge_shadows),
        distinct=h.merge_distinct(a.distinct, b.distinct),
    )


def _order(a: Window, b: Window) -> Any:
    boots = {a.start.boot_id, a.end.boot_id, b.start.boot_id, b.end.boot_id}
    if len(boots) == 1:
        return lambda t: (t.boot_ns, t.wall_ms)
    return lambda t: (t.wall_ms, t.boot_id, t.boot_ns)


def _add_fields(a: Any, b: Any) -> Any:
    return type(a)(**{f: getattr(a, f) + getattr(b, f) for f in a.__struct_fields__})


def _merge_maps(a: dict[Any, Any], b: dict[Any, Any], join: Any) -> dict[Any, Any]:
    return {
        name: join(a[name], b[name]) if name in a and name in b else (a[name] if name in a else b[name])
        for name in sorted({*a, *b})
    }


def _merge_feature(a: FeatureCounts, b: FeatureCounts) -> FeatureCounts:
    return FeatureCounts(
        h.merge_counts(a.counts, b.counts),
        a.null + b.null,
        a.outside + b.outside,
        h.merge_moments(a.moments, b.moments),
    )


def _merge_output(a: OutputCounts, b: OutputCounts) -> OutputCounts:
    return OutputCounts(
        h.merge_counts(a.counts, b.counts), h.merge_moments(a.moments, b.moments), _longer(a.estimated, b.estimated)
    )


def _merge_slice(a: SliceCounts, b: SliceCounts) -> SliceCounts:
    return SliceCounts(a.rows + b.rows, _longer(a.counts, b.counts))


def _longer(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    # Empty means "not counted yet", the zero of every length.
    if not a or not b:
        return a or b
    return h.merge_counts(a, b)


def _merge_labels(a: Labels, b: Labels) -> Labels:
    return Labels(
        confusion=_longer(a.confusion, b.confusion),
        matched=a.matched + b.matched,
        late=a.late + b.late,
        unknown=a.unknown + b.unknown,
        duplicate=a.duplicate + b.duplicate,
        conflicting=a.conflicting + b.conflicting,
        lags=_merge_maps(a.lags, b.lags, h.merge_exponential),
    )


def merge_shadows(a: Shadow, b: Shadow) -> Shadow:
    """The pairs of both. Commutative and associative in every count."""
    return Shadow(
        pairs=a.pairs + b.pairs,
        dropped=_merge_readings(a.dropped, b.dropped),
        agreed=a.agreed + b.agreed,
        distance=h.merge_exponential(a.distance, b.distance),
        slower=h.merge_exponential(a.slower, b.slower),
        faster=h.merge_exponential(a.faster, b.faster),
        labelled=tuple(x + y for x, y in zip(a.labelled, b.labelled, strict=True)),  # type: ignore[arg-type]  # four and four
    )


def _merge_readings(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: _merge_resource(name, a.get(name), b.get(name)) for name in sorted({*a, *b})}


def _merge_resource(name: str, a: int | None, b: int | None) -> int:
    if a is None or b is None:
        return a if a is not None else (b or 0)
    return max(a, b) if name.endswith("_max") else a + b


def check(window: Window) -> Window:
    """Refuses a window that no device of ours can have made.

    Raises:
        Malformed: ids out of grammar, negative or absurd counts.
    """
    _check_ranges(window)
    return check_relations(window)


def check_relations(window: Window) -> Window:
    """``check`` for a reader whose types hold every number to its range by themselves.

    Raises:
        Malformed: ids out of grammar, an instant, a histogram or moments that cannot be.
    """
    key = window.key
    ids.model_name(key.model)
    ids.bundle_digest(key.bundle)
    ids.variant_id(key.variant)
    if key.arm not in ("none", "control", "candidate"):
        raise Malformed("window", f"unknown arm {key.arm[:20]!r}", where="key.arm")
    if key.rollout:
        ids.rollout_id(key.rollout)
    if not 0 <= key.stage < 1 << 31:
        raise Malformed("window", "wanted 0 to 2**31", where="key.stage")
    for end in ("start", "end"):
        _check_instant(getattr(window, end), end)
    for part in window.latency.__struct_fields__:
        h.check_buckets(getattr(window.latency, part), where=f"latency.{part}")
    _check_moments("features", {name: part.moments for name, part in window.features.items()})
    _check_moments("outputs", {name: part.moments for name, part in window.outputs.items()})
    _check_later(window)
    return window


def _check_later(window: Window) -> None:
    h.check_buckets(window.freshness, where="freshness")
    _check_lags(window.labels)
    _check_moments("attributions", window.attributions)
    if len(window.tallies) > MAX_TALLIES:
        raise Malformed("window", f"wanted at most {MAX_TALLIES} names", where="tallies")
    if len(window.shadows) > MAX_SHADOWS:
        raise Malformed("window", f"wanted at most {MAX_SHADOWS} candidates", where="shadows")
    for digest, shadow in window.shadows.items():
        ids.bundle_digest(digest)
        for part in ("distance", "slower", "faster"):
            h.check_buckets(getattr(shadow, part), where=f"shadows.{part}")
        if shadow.agreed > shadow.pairs:
            raise Malformed("window", "wanted no more than there are pairs", where="shadows")
    if len(window.distinct) not in (0, h.DISTINCT_REGISTERS):
        raise Malformed("window", f"wanted {h.DISTINCT_REGISTERS} bytes or none", where="distinct")


def _check_lags(labels: Labels) -> None:
    n = 0
    for of_class, lag in labels.lags.items():
        if not 0 <= of_class < MAX_BINS:
            raise Malformed("window", f"wanted classes from 0 to {MAX_BINS}", where="labels.lags")
        h.check_buckets(lag, where=f"labels.lags.{of_class}")
        n += lag.n
    if n > labels.matched:
        raise Malformed("window", "wanted no more lags than matched labels", where="labels.lags")


def _check_moments(kind: str, parts: Mapping[str, h.Moments]) -> None:
    # |sum of q| <= n * limit and sum of q*q <= n * limit**2: anything else is no sum of quantized values.
    for name, moments in parts.items():
        most = moments.n * h.Q_LIMIT
        if not -most <= moments.total <= most or moments.squares > most * h.Q_LIMIT:
            raise Malformed("window", "these moments cannot be", where=f"{kind}.{name[:40]}")


def _check_ranges(window: Window) -> None:
    for name in window.counts.__struct_fields__:
        if not 0 <= getattr(window.counts, name) < h.MAX_COUNT:
            raise Malformed("window", "wanted a count from 0 to 2**40", where=f"counts.{name}")
    for part in window.latency.__struct_fields__:
        h.check_counts(getattr(window.latency, part), where=f"latency.{part}")
    for name, feature in window.features.items():
        _check_row(feature.counts, feature.moments, f"features.{name[:40]}")
        if not h.counts_fit((feature.null, feature.outside)):
            raise Malformed("window", "wanted counts >= 0", where=f"features.{name[:40]}")
    for name, output in window.outputs.items():
        _check_row(output.counts, output.moments, f"outputs.{name[:40]}")
        if len(output.estimated) > MAX_BINS or not all(0 <= part < h.MAX_SUM for part in output.estimated):
            raise Malformed("window", f"wanted at most {MAX_BINS} sums >= 0", where=f"outputs.{name[:40]}")
    for name, part_counts in window.slices.items():
        if not h.counts_fit((part_counts.rows, *part_counts.counts)):
            raise Malformed("window", "wanted counts >= 0", where=f"slices.{name[:40]}")
    labels = window.labels
    numbers = (labels.matched, labels.late, labels.unknown, labels.duplicate, labels.conflicting, *labels.confusion)
    if not h.counts_fit(numbers):
        raise Malformed("window", "wanted counts >= 0", where="labels")
    for of_class, lag in labels.lags.items():
        h.check_counts(lag, where=f"labels.lags.{of_class}")
    if not all(0 <= reading < h.MAX_SUM for reading in window.resources.values()):
        raise Malformed("window", "wanted readings from 0 to 2**63", where="resources")
    if not 1 <= window.merged < h.MAX_COUNT:
        raise Malformed("window", "wanted >= 1", where="merged")
    if not h.counts_fit(tuple(window.tallies.values())):
        raise Malformed("window", "wanted counts >= 0", where="tallies")
    h.check_counts(window.freshness, where="freshness")
    for name, moments in window.attributions.items():
        _check_row((), moments, f"attributions.{name[:40]}")
    for shadow in window.shadows.values():
        if not h.counts_fit((shadow.pairs, shadow.agreed, *shadow.labelled, *shadow.dropped.values())):
            raise Malformed("window", "wanted counts >= 0", where="shadows")
        for part in ("distance", "slower", "faster"):
            h.check_counts(getattr(shadow, part), where=f"shadows.{part}")


def _check_instant(instant: Instant, where: str) -> None:
    if not (0 <= instant.boot_ns < h.MAX_SUM and 0 <= instant.wall_ms < 1 << 53 and len(instant.boot_id) <= 64):
        raise Malformed("window", "wanted a boot id and times >= 0", where=where)


def _check_row(counts: tuple[int, ...], moments: h.Moments, where: str) -> None:
    if len(counts) > MAX_BINS or not h.counts_fit(counts):
        raise Malformed("window", f"wanted at most {MAX_BINS} counts >= 0", where=where)
    if not 0 <= moments.n < h.MAX_COUNT or not 0 <= moments.squares < h.MAX_SUM:
        raise Malformed("window", "these moments cannot be", where=where)
