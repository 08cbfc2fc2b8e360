"""Folding many slots at once gives the integers of the contract's one-by-one definitions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_agent.worker import ring as r
from skerry_agent.worker.fold import CHUNK, Fold, LatencyFold
from skerry_agent.worker.plan import FeatureColumn, OutputColumn, Plan, SliceColumn
from skerry_agent.worker.recorder import Recorder
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire

KEY = w.Key("gas", "a" * 64, "onnx-fp32", "candidate", "r1", 2)
EDGES = (-1.0, 0.0, 0.1, 0.7, 2.5)
MANY_EDGES = tuple(i / 8 - 3 for i in range(60))
CENTRE, SCALE = 0.3, 1.7

durations = st.one_of(
    st.integers(0, 10_000_000_000),
    st.integers(0, 62).map(lambda e: 1 << e),
    st.integers(1, 62).map(lambda e: (1 << e) - 1),
    st.integers(0, 2**63 - 1),
)
values = st.one_of(
    st.sampled_from([*EDGES, math.nan, math.inf, -math.inf, 0.0, -0.0, CENTRE]),
    st.floats(-5, 5),
    st.floats(allow_nan=True, allow_infinity=True),
)


@given(st.lists(durations, max_size=60))
@settings(max_examples=300, deadline=None)
def test_latencies_fold_to_the_definition(nanoseconds: list[int]) -> None:
    fold = LatencyFold()
    # The sum of a window's latencies stays below int64 in practice (292 years); here each value is folded alone when huge.
    for value in nanoseconds:
        fold.add(np.array([value], np.int64))
    assert fold.result() == h.exponential_of(nanoseconds)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_latencies_folded_together_equal_those_folded_apart(nanoseconds: list[int]) -> None:
    together, apart = LatencyFold(), LatencyFold()
    together.add(np.array(nanoseconds, np.int64))
    for part in itertools.batched(nanoseconds, 7) if hasattr(itertools, "batched") else [nanoseconds]:
        other = LatencyFold()
        other.add(np.array(part, np.int64))
        apart.merge(other)
    assert together.result() == apart.result() == h.exponential_of(nanoseconds)


def test_every_bucket_bound_falls_on_the_side_the_definition_says() -> None:
    # Upper bounds are inclusive: the integers around each power of 2**(1/32) are the ones that could go wrong.
    around = sorted({max(0, int(2.0 ** (i / 32)) + d) for i in range(62 * 32) for d in (-1, 0, 1)})
    fold = LatencyFold()
    for value in around:
        fold.add(np.array([value], np.int64))
    assert fold.result() == h.exponential_of(around)


def plan(*, wide: bool, classes: int, b_edges: tuple[float, ...]) -> Plan:
    knots = {"knots_x": (0.2, 0.5, 1.0), "knots_y": (0.3, 0.45, 0.97)}
    return Plan(
        features=(
            FeatureColumn(name="a", input="x", column=0, edges=EDGES, centre=CENTRE, scale=SCALE, low=-2.0, high=2.0),
            FeatureColumn(name="b", input="x", column=1, edges=b_edges),
        ),
        outputs=(OutputColumn(name="p", classes=classes, **knots),),
        slices=(SliceColumn(name="low", feature=0, low=-1.0, high=0.1),),
        wide=wide,
    )


def expected(rows: np.ndarray, probabilities: np.ndarray, b_edges: tuple[float, ...]) -> w.Window:
    """The window's row counts, value by value, by the contract's definitions."""
    features = {}
    for i, (name, edges, centre, scale) in enumerate((("a", EDGES, CENTRE, SCALE), ("b", b_edges, 0.0, 1.0))):
        column = [float(v) for v in rows[:, i]]
        known = [v for v in column if not math.isnan(v)]
        counts = [0] * (len(edges) + 1)
        for v in known:
            counts[h.edge_bin(edges, v)] += 1
        outside = sum(name == "a" and not -2.0 <= v <= 2.0 for v in known)
        moments = h.moments_of(h.quantize(v, centre, scale) for v in known)
        features[name] = w.FeatureCounts(tuple(counts), len(column) - len(known), outside, moments)
    counts, estimated = [0] * probabilities.shape[1], [0] * probabilities.shape[1]
    inside = [0] * (1 + probabilities.shape[1])
    qs = []
    for row, p in zip(rows, probabilities, strict=True):
        predicted = max(range(len(p)), key=lambda k: (p[k], -k))
        confidence = float(p[predicted])
        counts[predicted] += 1
        qs.append(h.quantize(confidence, 0.0, 1.0))
        estimated[predicted] += round(float(np.interp(confidence, (0.2, 0.5, 1.0), (0.3, 0.45, 0.97))) * 2**h.P_BITS)
        if -1.0 <= float(row[0]) < 0.1:
            inside[0] += 1
            inside[1 + predicted] += 1
    output = w.OutputCounts(tuple(counts), h.moments_of(qs), tuple(estimated))
    slices = {"low": w.SliceCounts(inside[0], tuple(inside[1:]))} if inside[0] else {}
    moment = w.Instant("", 0, 0, False)
    return w.Window(key=KEY, start=moment, end=moment, features=features, outputs={"p": output}, slices=slices)


@given(
    st.lists(st.tuples(values, values), min_size=1, max_size=40),
    st.booleans(),
    st.sampled_from([2, 5, 40]),
    st.sampled_from([(), (0.5,), MANY_EDGES]),
    st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_rows_fold_to_the_definition(
    rows: list[tuple[float, float]], wide: bool, classes: int, b_edges: tuple[float, ...], seed: int
) -> None:
    with np.errstate(over="ignore"):
        stored = np.array(rows, np.float64 if wide else np.float32)
    p = np.random.default_rng(seed).dirichlet(np.ones(classes), len(rows)).astype(stored.dtype)
    p[::3, :2] = p[::3, :2].max(1, keepdims=True)  # ties: the first largest wins
    the_plan = plan(wide=wide, classes=classes, b_edges=b_edges)
    columns = p if classes <= 32 else np.stack([p.argmax(1), p.max(1)], 1)
    meta = np.zeros(len(rows), r.META)
    meta["outcome"] = r.OK
    meta["flags"] = r.VALUES
    meta["rows"] = 1
    whole, parts = Fold(the_plan), Fold(the_plan)
    whole.add(meta, np.hstack([stored, columns]))
    for i in range(0, len(rows), 3):
        parts.add(meta[i : i + 3], np.hstack([stored, columns])[i : i + 3])
    moment = w.Instant("", 0, 0, False)
    wanted = expected(stored, p, b_edges)
    for fold in (whole, parts):
        window = fold.window(KEY, moment, moment, {})
        assert window.features == wanted.features
        assert window.outputs == wanted.outputs
        assert window.slices == wanted.slices


@pytest.mark.parametrize("capacity", [64, 5000])
def test_what_is_recorded_comes_back_as_windows_whatever_the_batches_and_wraps(tmp_path: Path, capacity: int) -> None:
    rng = np.random.default_rng(5)
    the_plan = Plan(
        features=tuple(
            FeatureColumn(name=f"f{i}", input="x", column=c, edges=EDGES, centre=CENTRE, scale=SCALE)
            for i, c in enumerate((2, 0))
        ),
        outputs=(OutputColumn(name="p", classes=3),),
    )
    sent: list[w.Window] = []
    soon: list = []
    recorder = Recorder(
        KEY,
        the_plan,
        ring=str(tmp_path / "1.ring"),
        boot_id="0" * 32,
        send=lambda cut: sent.append(wire.decode_window(cut.body)),
        later=soon.append,
        capacity=capacity,
    )
    xs, ps, totals, ok = [], [], [], 0
    for i in range(3 * CHUNK // 8):
        n = int(rng.choice([1, 1, 1, 1, 2, 7, capacity // 4]))
        x, p = rng.normal(size=(n, 4)).astype("f4"), rng.dirichlet(np.ones(3), n).astype("f4")
        total = int(rng.integers(1, 10**7))
        recorder.ok({"x": x}, {"p": p}, n, total, 0, 5, 9, 1000 + i)
        if i % 10 == 0:
            recorder.other((r.INVALID, r.FAILED, r.SHED)[i // 10 % 3], 7, 1000 + i, r.RETRY)
        xs.append(x)
        ps.append(p)
        totals.append(total)
        ok += 1
        while soon:
            soon.pop()()
        if i % 500 == 499:
            recorder.cut()
    recorder.cut()
    assert len(sent) > 2
    merged = sent[0]
    for window in sent[1:]:
        merged = w.merge(merged, window)
    x, p = np.concatenate(xs), np.concatenate(ps)
    others = (len(totals) + 9) // 10
    assert merged.counts.ok == ok
    assert merged.counts.rows == len(x)
    assert merged.counts.invalid + merged.counts.failed + merged.counts.shed == merged.counts.retries == others
    assert merged.latency.total == h.exponential_of(totals)
    for name, column in (("f0", 2), ("f1", 0)):
        found = merged.features[name]
        known = [float(v) for v in x[:, column]]
        assert found.moments == h.moments_of(h.quantize(v, CENTRE, SCALE) for v in known)
        assert found.counts == tuple(sum(h.edge_bin(EDGES, v) == b for v in known) for b in range(len(EDGES) + 1))
    assert merged.outputs["p"].counts == tuple(np.bincount(p.argmax(1), minlength=3).tolist())
    health = recorder.health(1.0)
    assert (health.ok, health.invalid + health.failed + health.shed) == (ok, others)
    wanted = h.quantile(h.exponential_of(totals), 0.95)
    assert wanted is not None
    assert health.p95_ms == pytest.approx(wanted / 1e6)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=20), st.sampled_from([(), (0.5,), MANY_EDGES]))
@settings(max_examples=60, deadline=None)
def test_of_a_personal_feature_nothing_is_folded_but_in_which_bins_values_fell(
    rows: list[tuple[float, float]], edges: tuple[float, ...]
) -> None:
    the_plan = Plan(
        features=(FeatureColumn(name="a", input="x", column=0, edges=edges, centre=CENTRE, scale=SCALE, pii=True),)
    )
    meta = np.zeros(len(rows), r.META)
    meta["outcome"], meta["flags"], meta["rows"] = r.OK, r.VALUES, 1

    def folded(numbers: list[float]) -> w.FeatureCounts:
        fold = Fold(the_plan)
        fold.add(meta, np.array(numbers, np.float32).reshape(-1, 1))
        moment = w.Instant("", 0, 0, False)
        return fold.window(KEY, moment, moment, {}).features["a"]

    with np.errstate(over="ignore"):
        stored = np.array(rows, np.float32)[:, 0].tolist()
    found = folded(stored)
    assert found.moments == h.binned_moments(found.counts, edges, CENTRE, SCALE)
    # Another value in each bin: the windows are the same.
    low, high = (edges[0] - 7.0, edges[-1] + 7.0) if edges else (3.0, 3.0)
    inner = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    moved = [v if math.isnan(v) else [low, *inner, high][h.edge_bin(edges, v)] for v in stored]
    assert folded(moved) == found
    assert found.moments.n == sum(found.counts)
