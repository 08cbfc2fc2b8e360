"""Hypothesis strategies for the values of the contract."""

from __future__ import annotations

import string
from typing import Any

import msgspec
from hypothesis import strategies as st
from skerry_contract import histogram as h
from skerry_contract import ids, wire
from skerry_contract import window as w

NAME_START = string.ascii_lowercase + string.digits
names = st.builds(
    str.__add__, st.sampled_from(NAME_START), st.text(NAME_START + "-", max_size=62)
)  # [a-z0-9][a-z0-9-]{0,62}
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
epochs = st.binary(min_size=16, max_size=16).map(bytes.hex)
nanoseconds = st.one_of(
    st.integers(0, 50),
    st.integers(0, 62).map(lambda bits: 1 << bits),  # on a bucket's bound
    st.integers(1, 62).map(lambda bits: (1 << bits) + 1),
    st.integers(0, 10**10),
    st.integers(0, (1 << 63) - 1),
)
quantized = st.integers(-h.Q_LIMIT, h.Q_LIMIT)
counts = st.integers(0, 1 << 20)
json_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)
json_values = st.recursive(
    json_scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
json_objects = st.dictionaries(st.text(max_size=8), json_values, max_size=6)

instants = st.builds(
    w.Instant,
    boot_id=st.sampled_from(["0" * 32, "1" * 32]),
    boot_ns=st.integers(0, 1 << 50),
    wall_ms=st.integers(0, 1 << 45),
    synced=st.booleans(),
)
moments = st.lists(quantized, max_size=20).map(h.moments_of)
exponentials = st.lists(nanoseconds, max_size=20).map(h.exponential_of)

CLASSES, BINS = 3, 5
_rows = st.tuples(*[counts] * BINS)
_classes = st.tuples(*[counts] * CLASSES)

KEY = w.Key(model="gas", bundle="a" * 64, variant="onnx-int8", arm="control", rollout="r-1", stage=2)


def _all_of(kind: type) -> st.SearchStrategy:
    return st.builds(kind, **dict.fromkeys(kind.__struct_fields__, counts))


_few = st.sampled_from([h.exponential_of(values) for values in ((), (0, 0), (1, 7, 1 << 40), (9,))])
_shadows = st.builds(
    lambda agreed, others, labelled, **rest: w.Shadow(pairs=agreed + others, agreed=agreed, labelled=labelled, **rest),
    agreed=counts,
    others=counts,
    labelled=st.tuples(counts, counts, counts, counts),
    dropped=st.dictionaries(st.sampled_from(["busy", "hot"]), counts),
    distance=_few,
    slower=_few,
    faster=_few,
)

_lags = st.dictionaries(
    st.integers(0, CLASSES - 1),
    st.sampled_from([h.exponential_of(values) for values in ((0,), (5, 86_400), (9, 9, 9))]),
)


def _with_lags(labels: w.Labels, lags: dict[int, h.Exponential]) -> w.Labels:
    """A lag is one of a label that was matched."""
    return msgspec.structs.replace(labels, lags=lags, matched=max(labels.matched, sum(lag.n for lag in lags.values())))


windows = st.builds(
    w.Window,
    key=st.just(KEY),
    start=instants,
    end=instants,
    counts=_all_of(w.Counts),
    latency=st.builds(w.Latency, total=exponentials, queue=exponentials, transform=exponentials, infer=exponentials),
    features=st.dictionaries(
        st.sampled_from(["f1", "f2", "f3"]),
        st.builds(w.FeatureCounts, counts=_rows, null=counts, outside=counts, moments=moments),
    ),
    outputs=st.dictionaries(
        st.sampled_from(["p", "q"]),
        st.builds(w.OutputCounts, counts=_classes, moments=moments, estimated=st.one_of(st.just(()), _classes)),
    ),
    slices=st.dictionaries(
        st.sampled_from(["night", "day"]),
        st.builds(w.SliceCounts, rows=counts, counts=st.one_of(st.just(()), _classes)),
    ),
    labels=st.builds(
        _with_lags,
        st.builds(
            w.Labels,
            confusion=st.one_of(st.just(()), st.tuples(*[counts] * CLASSES**2)),
            matched=counts,
            late=counts,
            unknown=counts,
            duplicate=counts,
            conflicting=counts,
        ),
        _lags,
    ),
    resources=st.dictionaries(st.sampled_from(["rss_mb_sum", "rss_mb_n", "rss_mb_max", "temp_max"]), counts),
    merged=st.integers(1, 1000),
    tallies=st.dictionaries(st.sampled_from([*w.GUARD_KINDS[:3], "cold_ms_max"]), counts),
    freshness=_few,
    attributions=st.dictionaries(st.sampled_from(["f1", "f2"]), moments),
    shadows=st.dictionaries(st.sampled_from(["b" * 64, "c" * 64]), _shadows),
    distinct=st.sampled_from([b"", h.distinct_of([1, 2, 3 << 60]), h.distinct_of([256, 1 << 40])]),
)


def sums_fit(window: w.Window) -> bool:
    """Whether no sum of nanoseconds left the range that the wire has for it."""
    return all(getattr(window.latency, part).total < h.MAX_SUM for part in window.latency.__struct_fields__)


bodies = st.binary(max_size=60)


@st.composite
def batches(draw: st.DrawFn) -> wire.Batch:
    """Batches that a device may send: seqs ascend, ``replaces`` lies below its seq."""
    seqs = sorted(draw(st.sets(st.integers(3, wire.MAX_SEQ), min_size=1, max_size=5)))
    records = []
    for seq in seqs:
        replaces = draw(st.sampled_from([(), ((1, 1),), ((1, seq - 1),), ((1, 1), (2, seq - 1))]))
        kind = draw(st.sampled_from(wire.KINDS))
        records.append(wire.Record(seq=seq, kind=kind, body=draw(bodies), replaces=replaces))
    return wire.Batch(epoch=ids.epoch(draw(epochs)), records=tuple(records))


EMPTY = w.Window(key=KEY, start=w.Instant("0" * 32, 1, 2, True), end=w.Instant("0" * 32, 1, 2, True))

IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"key": KEY._replace(model="Gas")}, "model"),
    ({"key": KEY._replace(bundle="A" * 64)}, "bundle digest"),
    ({"key": KEY._replace(variant="")}, "variant"),
    ({"key": KEY._replace(arm="winner")}, "key.arm"),
    ({"key": KEY._replace(rollout="../x")}, "rollout"),
    ({"key": KEY._replace(stage=-1)}, "key.stage"),
    ({"start": w.Instant("x", -1, 0, True)}, "start"),
    ({"end": w.Instant("x" * 65, 0, 0, True)}, "end"),
    ({"counts": w.Counts(ok=-1)}, "counts.ok"),
    ({"counts": w.Counts(rows=1 << 40)}, "counts.rows"),
    ({"latency": w.Latency(queue=h.Exponential(zero=-1))}, "latency.queue"),
    ({"features": {"f": w.FeatureCounts((-1,), 0, 0, h.Moments())}}, "features.f"),
    ({"features": {"f": w.FeatureCounts((1,), -1, 0, h.Moments())}}, "features.f"),
    ({"features": {"f": w.FeatureCounts((1,), 0, 1 << 40, h.Moments())}}, "features.f"),
    ({"features": {"f": w.FeatureCounts((0,) * 4097, 0, 0, h.Moments())}}, "features.f"),
    ({"features": {"f": w.FeatureCounts((1,), 0, 0, h.Moments(n=1, total=h.Q_LIMIT + 1, squares=0))}}, "features.f"),
    ({"features": {"f": w.FeatureCounts((1,), 0, 0, h.Moments(n=1, squares=-1))}}, "features.f"),
    ({"features": {"f": w.FeatureCounts((1,), 0, 0, h.Moments(n=1 << 30, squares=1 << 63))}}, "features.f"),
    ({"outputs": {"p": w.OutputCounts((1 << 40,), h.Moments())}}, "outputs.p"),
    ({"outputs": {"p": w.OutputCounts((1,), h.Moments(), (1 << 63,))}}, "outputs.p"),
    ({"slices": {"night": w.SliceCounts(-1)}}, "slices.night"),
    ({"slices": {"night": w.SliceCounts(1, (-1,))}}, "slices.night"),
    ({"labels": w.Labels(matched=-1)}, "labels"),
    ({"labels": w.Labels(confusion=(-1,))}, "labels"),
    ({"labels": w.Labels(matched=1, lags={0: h.exponential_of([1, 2])})}, "labels.lags"),
    ({"labels": w.Labels(matched=9, lags={-1: h.exponential_of([1])})}, "labels.lags"),
    ({"labels": w.Labels(matched=9, lags={w.MAX_BINS: h.exponential_of([1])})}, "labels.lags"),
    ({"labels": w.Labels(matched=9, lags={0: h.Exponential(zero=-1)})}, "labels.lags.0"),
    ({"labels": w.Labels(matched=9, lags={0: h.Exponential(scale=6)})}, "labels.lags.0"),
    ({"resources": {"rss_max": 1 << 63}}, "resources"),
    ({"merged": 0}, "merged"),
    ({"tallies": {"null.rejected": -1}}, "tallies"),
    ({"tallies": {f"t{i}": 1 for i in range(513)}}, "tallies"),
    ({"freshness": h.Exponential(zero=-1)}, "freshness"),
    ({"freshness": h.Exponential(scale=6)}, "freshness"),
    ({"attributions": {"f": h.Moments(n=1, total=h.Q_LIMIT + 1)}}, "attributions.f"),
    ({"attributions": {"f": h.Moments(n=-1)}}, "attributions.f"),
    ({"shadows": {"x": w.Shadow()}}, "bundle digest"),
    ({"shadows": {"b" * 64: w.Shadow(pairs=1, agreed=2)}}, "shadows"),
    ({"shadows": {"b" * 64: w.Shadow(labelled=(0, 0, -1, 0))}}, "shadows"),
    ({"shadows": {"b" * 64: w.Shadow(dropped={"busy": -1})}}, "shadows"),
    ({"shadows": {"b" * 64: w.Shadow(slower=h.Exponential(total=1 << 63))}}, "shadows.slower"),
    ({"shadows": {f"{i:064x}": w.Shadow() for i in range(9)}}, "shadows"),
    ({"distinct": b"\x01"}, "distinct"),
]
"""Changes to ``EMPTY`` that no device can make, and what the refusal names."""
