"""Drift is found when it is there, not when it is not, whatever way the windows came; and it neither flaps nor guesses."""

import functools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from skerry_contract import histogram as h
from skerry_contract import manifest as m
from skerry_contract import window as w
from skerry_server.core import drift
from skerry_server.core.profile import Profile, total

EDGES = tuple(float(e) for e in np.linspace(-1.5, 1.5, 15))
FEATURES = 8
LIMITS = drift.Limits()


def column(values, edges=EDGES):
    values = np.asarray(values, float)
    kept = values[~np.isnan(values)]
    counts = np.bincount(np.searchsorted(edges, kept, "right"), minlength=len(edges) + 1)
    q = np.rint(np.clip(kept * 4096, -(2.0**20), 2.0**20)).astype(int).tolist()
    return tuple(counts.tolist()), int(np.isnan(values).sum()), h.moments_of(q)


def reference_column(values):
    counts, null, moments = column(values)
    return m.ReferenceColumn(counts=counts, null=null, moments=(moments.n, moments.total, moments.squares))


def manifest(reference, classes, *, value_range=None):
    """A manifest whose reference is these rows (columns ``x0``, ``x1``...) and these predicted classes."""
    tensor = m.Tensor(name="x", datatype="FP32", shape=(-1, reference.shape[1]))
    answer = m.Tensor(name="y", datatype="FP32", shape=(-1, 3), labels=("a", "b", "c"))
    confident = h.moments_of([3000 + 500 * (i % 2) for i in range(len(classes))])
    output = m.ReferenceColumn(
        counts=tuple(np.bincount(classes, minlength=3).tolist()),
        moments=(confident.n, confident.total, confident.squares),
    )
    return m.Manifest(
        schema=1,
        model="gas",
        version="1.0.0",
        created="2026-01-01T00:00:00Z",
        owner=m.Owner(name="t", contact="t"),
        licence="x",
        variants=(),
        inputs=(tensor,),
        outputs=(answer,),
        features=tuple(
            m.Feature(name=f"x{i}", input="x", column=i, edges=EDGES, range=value_range)
            for i in range(reference.shape[1])
        ),
        reference=m.Reference(
            n=len(reference),
            features={f"x{i}": reference_column(reference[:, i]) for i in range(reference.shape[1])},
            outputs={"y": output},
        ),
    )


def profile(rows, classes, outside=0):
    confident = h.moments_of([3000 + 500 * (i % 2) for i in range(len(classes))])
    return Profile(
        rows=len(rows),
        features={
            f"x{i}": w.FeatureCounts(counts, null, outside, moments)
            for i, (counts, null, moments) in enumerate(column(rows[:, i]) for i in range(rows.shape[1]))
        },
        outputs={"y": w.OutputCounts(tuple(np.bincount(classes, minlength=3).tolist()), confident)},
    )


@functools.cache
def known(m_rows=1000):
    rng = np.random.default_rng(7)
    return manifest(rng.normal(size=(m_rows, FEATURES)), np.arange(m_rows) % 3)


def drawn(rng, n=800, shift=0.0, feature=0, classes=(1, 1, 1)):
    rows = rng.normal(size=(n, FEATURES))
    rows[:, feature] += shift
    share = np.array(classes) / sum(classes)
    return profile(rows, rng.choice(3, size=n, p=share))


def span(i, part):
    return drift.Span(from_ms=i * 1000, to_ms=(i + 1) * 1000, profile=part)


def spans(parts):
    return [span(i, part) for i, part in enumerate(parts)]


def drifted(evaluation):
    return {one.subject for one in evaluation.subjects if one.drifted}


# --- no drift, certain drift -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m_rows", [134, 1000])
def test_rows_like_the_reference_are_not_drift(m_rows):
    rng = np.random.default_rng(m_rows)
    found = 0
    for _ in range(400):
        # The reference is drawn anew as well: an unlucky one is part of the promise.
        reference = manifest(rng.normal(size=(m_rows, FEATURES)), np.arange(m_rows) % 3)
        found += any(one.state == "drifted" for one in drift.measure(reference, drawn(rng), LIMITS))
    # Promised: a false discovery in at most 1% of spans, before persistence is asked for at all.
    assert stats.binom.sf(found - 1, 400, LIMITS.false_rate) > 1e-3, found


def test_without_drift_nothing_opens_over_many_evaluations():
    rng = np.random.default_rng(11)
    parts = [drawn(rng) for _ in range(300)]
    opened = set()
    for end in range(5, len(parts)):
        opened |= drifted(drift.evaluate(known(), spans(parts[end - 5 : end]), (), LIMITS))
    assert opened == set()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([-3.0, -1.0, 0.7, 1.0, 5.0, 1e6]), st.integers(0, FEATURES - 1))
def test_certain_drift_is_found_in_its_feature_and_nowhere_else(seed, shift, feature):
    rng = np.random.default_rng(seed)
    parts = [drawn(rng) for _ in range(2)] + [drawn(rng, shift=shift, feature=feature) for _ in range(3)]
    found = drift.evaluate(known(), spans(parts), (), LIMITS)
    assert found.verdict == "DRIFT"
    assert drifted(found) == {f"feature:x{feature}"}
    (subject,) = (one for one in found.subjects if one.drifted)
    assert (subject.change, subject.since_ms, subject.spans_drifted) == ("open", 2000, 3)
    assert subject.now.shift_sd is not None
    assert (subject.now.shift_sd > 0) == (shift > 0)
    assert subject.reasons


def test_a_harmless_shift_is_no_drift_however_many_rows_show_it():
    rng = np.random.default_rng(4)
    parts = [drawn(rng, n=60_000, shift=0.08) for _ in range(3)]
    found = drift.evaluate(
        manifest(rng.normal(size=(60_000, FEATURES)), np.arange(60_000) % 3), spans(parts), (), LIMITS
    )
    moved = next(one for one in found.subjects if one.subject == "feature:x0")
    # Beyond doubt, and too small to matter.
    assert moved.now.p < 1e-6
    assert (found.verdict, moved.now.state) == ("STEADY", "calm")


def test_a_large_effect_that_chance_explains_is_no_drift():
    rng = np.random.default_rng(5)
    limits = msgspec.structs.replace(LIMITS, min_rows=20, min_reference=20, psi=0.01)
    reference = manifest(rng.normal(size=(30, FEATURES)), np.arange(30) % 3)
    found = [one for _ in range(50) for one in drift.measure(reference, drawn(rng, n=30), limits)]
    assert sum(one.psi > 0.1 for one in found) > 200
    assert sum(one.state == "drifted" for one in found) <= 2


def test_answers_that_move_are_drift_of_the_output():
    rng = np.random.default_rng(6)
    parts = [drawn(rng, classes=(6, 1, 1)) for _ in range(3)]
    found = drift.evaluate(known(), spans(parts), (), LIMITS)
    assert drifted(found) == {"output:y"}


def test_nulls_and_values_outside_the_range_are_drift():
    rng = np.random.default_rng(8)
    reference = manifest(rng.normal(size=(1000, 2)), np.arange(1000) % 3, value_range=(-9.0, 9.0))
    rows = rng.normal(size=(800, 2))
    rows[:80, 0] = np.nan
    found = {one.subject: one for one in drift.measure(reference, profile(rows, np.arange(800) % 3), LIMITS)}
    assert [sign.name for sign in found["feature:x0"].signs] == ["nulls"]
    assert found["feature:x0"].null_rate == pytest.approx(0.1)
    assert found["feature:x1"].state == "calm"
    outside = drift.measure(reference, profile(rng.normal(size=(800, 2)), np.arange(800) % 3, outside=80), LIMITS)
    assert [[sign.name for sign in one.signs] for one in outside] == [["outside"], ["outside"], []]


def test_a_feature_that_is_always_null_now_is_drift_and_not_a_fault():
    rng = np.random.default_rng(8)
    rows = rng.normal(size=(800, FEATURES))
    rows[:, 3] = np.nan
    found = {one.subject: one for one in drift.measure(known(), profile(rows, np.arange(800) % 3), LIMITS)}
    assert found["feature:x3"].state == "drifted"
    assert found["feature:x3"].psi is None


# --- order and partition ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.randoms(), st.integers(1, 12))
def test_order_and_partition_of_windows_do_not_matter(seed, chance, pieces):
    rng = np.random.default_rng(seed)
    rows, classes = rng.normal(0.4, 1, size=(600, FEATURES)), rng.integers(0, 3, 600)
    cuts = sorted(chance.sample(range(1, 600), pieces))
    parts = [profile(rows[a:b], classes[a:b]) for a, b in zip([0, *cuts], [*cuts, 600], strict=True)]
    # Confidence is made up from the position; only here it must not depend on the cut.
    whole = profile(rows, classes)
    parts = [_without_confidence(part) for part in parts]
    chance.shuffle(parts)
    assert drift.measure(known(), total(parts), LIMITS) == drift.measure(known(), _without_confidence(whole), LIMITS)


def _without_confidence(part):
    outputs = {name: w.OutputCounts(o.counts, h.Moments()) for name, o in part.outputs.items()}
    return Profile(rows=part.rows, features=part.features, outputs=outputs)


# --- spans ------------------------------------------------------------------------------------------------------------------


@functools.cache
def counted(n, features=FEATURES):
    """``n`` rows of which ``features`` features are counted, and the answers when all are."""
    whole = profile(np.zeros((n, FEATURES)), np.zeros(n, int))
    kept = {name: part for i, (name, part) in enumerate(whole.features.items()) if i < features}
    return Profile(rows=n, features=kept, outputs=whole.outputs if features == FEATURES else {})


def buckets(*rows):
    """Buckets newest first."""
    return [span(len(rows) - i, counted(n)) for i, n in enumerate(rows)]


def test_spans_grow_until_they_hold_enough_rows():
    found = drift.gather(known(), buckets(150, 60, 500, 10, 10, 190, 7), LIMITS)
    assert [(s.from_ms, s.to_ms, s.profile.rows) for s in found] == [
        (2000, 5000, 210),
        (5000, 6000, 500),
        (6000, 8000, 210),
    ]


def test_spans_are_cut_by_counted_values_whatever_rows_a_device_says_it_answered():
    honest = buckets(150, 60, 500, 10, 10, 190, 7)
    claimed = [span(i, total([one.profile, Profile(rows=10**6)])) for i, one in enumerate(honest)]
    found = drift.gather(known(), claimed, LIMITS)
    assert [s.profile.features["x0"].moments.n for s in found] == [210, 500, 210]
    # Nor do a few features that one device counted without end, or that no device counts at all.
    inflated = [span(i, total([one.profile, counted(1000, features=FEATURES // 2)])) for i, one in enumerate(honest)]
    found = drift.gather(known(), inflated, LIMITS)
    assert [s.profile.outputs["y"].moments.n for s in found] == [210, 500, 210]
    sparse = drift.gather(known(), [span(1, counted(200, features=FEATURES // 2 + 1))], LIMITS)
    assert [s.profile.rows for s in sparse] == [200]
    bare = msgspec.structs.replace(known(), reference=m.Reference(n=0))
    assert len(drift.gather(bare, [span(1, Profile(rows=200))], LIMITS)) == 1


def test_no_more_buckets_are_read_than_needed():
    read = iter(buckets(*[1000] * 20))
    assert len(drift.gather(known(), read, LIMITS)) == LIMITS.of
    assert len(list(read)) == 15


def test_too_few_rows_are_no_data():
    rng = np.random.default_rng(9)
    nothing = drift.evaluate(known(), drift.gather(known(), [], LIMITS), (), LIMITS)
    assert (nothing.verdict, nothing.subjects) == ("NO_DATA", ())
    few = drift.evaluate(known(), spans([drawn(rng, shift=9.0)] * 2), (), LIMITS)
    assert few.verdict == "NO_DATA"
    assert "wanted 3 spans" in few.reason
    small = manifest(rng.normal(size=(20, FEATURES)), np.arange(20) % 3)
    unknown = drift.evaluate(small, spans([drawn(rng, shift=9.0)] * 5), (), LIMITS)
    assert (unknown.verdict, {one.now.state for one in unknown.subjects}) == ("NO_DATA", {"unknown"})
    bare = drift.evaluate(msgspec.structs.replace(small, reference=m.Reference(n=0)), spans([drawn(rng)] * 5), ())
    assert "no reference" in bare.reason


# --- persistence ------------------------------------------------------------------------------------------------------------

DRIFTED, BETWEEN, CALM, UNKNOWN = "dbc?"


def walk(states):
    """Opens and closes of x0 as the spans come in one by one: D drifted, b between, c calm, ? too few rows."""
    rng = np.random.default_rng(12)
    made = {
        "d": lambda: drawn(rng, shift=1.0),
        "b": lambda: drawn(rng, n=4000, shift=0.28),
        "c": lambda: drawn(rng),
        "?": lambda: drawn(rng, n=100),
    }
    history, opened, said = [], set(), ""
    for i, letter in enumerate(states):
        history.append(span(i, made[letter]()))
        found = drift.evaluate(known(), history[-LIMITS.of :], opened, LIMITS)
        (subject,) = (one for one in found.subjects if one.subject == "feature:x0")
        opened = drifted(found)
        said += {"open": "O", "close": "X", "": "."}[subject.change]
    return said


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ("ccdcc", "....."),
        ("ddcdccc", "...O..X"),
        ("dcdcd", "....O"),
        ("dddbbbbbb", "..O......"),
        ("dddccbcc", "..O....."),
        ("dddccc", "..O..X"),
        ("dddcccddd", "..O..X..O"),
        ("d?d?d", "....O"),
        ("ddd?????", "..O....."),
        ("dddc?cc", "..O...X"),
    ],
)
def test_drift_opens_when_it_persists_and_closes_when_calm_persists(states, said):
    assert walk(states) == said


def test_old_drift_does_not_open_once_it_is_over():
    rng = np.random.default_rng(13)
    parts = [drawn(rng, shift=1.0)] * 3 + [drawn(rng)] * 2
    assert drifted(drift.evaluate(known(), spans(parts), (), LIMITS)) == set()


def test_an_open_subject_stays_open_while_nothing_can_be_judged():
    rng = np.random.default_rng(14)
    found = drift.evaluate(known(), spans([drawn(rng, n=100)] * 5), {"feature:x0"}, LIMITS)
    assert (found.verdict, drifted(found)) == ("DRIFT", {"feature:x0"})


def test_every_number_can_be_written_as_json():
    rng = np.random.default_rng(15)
    rows = rng.normal(size=(800, FEATURES))
    rows[:, 1], rows[:, 2] = np.inf, np.nan
    found = drift.evaluate(known(), spans([profile(rows, np.zeros(800, int))] * 5), (), LIMITS)
    written = msgspec.json.encode(found)
    assert b"null" in written
    assert msgspec.json.decode(written, type=drift.Evaluation) == found


def test_a_personal_feature_of_which_only_bins_are_known_drifts_by_bins_and_not_by_their_width():
    rng = np.random.default_rng(4)
    reference = rng.normal(1.2, 2.0, (20_000, 1))
    known = manifest(reference, np.zeros(20_000, int))
    personal = msgspec.structs.replace(
        known, features=tuple(msgspec.structs.replace(f, pii=True) for f in known.features)
    )

    def states(values):
        counts, null, _ = column(values[:, 0])
        moments = h.binned_moments(counts, EDGES, 0.0, 1.0)
        profile = Profile(features={"x0": w.FeatureCounts(counts, null, 0, moments)}, outputs={})
        return {one.subject: one.state for one in drift.measure(personal, profile, LIMITS)}

    assert states(rng.normal(1.2, 2.0, (20_000, 1)))["feature:x0"] == "calm"
    assert states(rng.normal(2.4, 2.0, (20_000, 1)))["feature:x0"] == "drifted"
