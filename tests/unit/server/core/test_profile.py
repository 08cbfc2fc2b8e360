"""Profiles are sums: any partition and order gives what merging the windows gives, and what does not fit stays out."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_server.core import profile as p

from tests.unit.contract.values import BINS, CLASSES, quantized

SHAPE = p.Shape(
    model="gas",
    variants=frozenset({"cpu"}),
    features={"f1": BINS, "f2": BINS},
    outputs={"y": CLASSES},
    classes=CLASSES,
)
small = st.integers(0, 50)


@st.composite
def counted(draw, bins):
    """Counts and moments of the same values."""
    values = draw(st.lists(st.tuples(st.integers(0, bins - 1), quantized), max_size=12))
    row = [0] * bins
    for where, _ in values:
        row[where] += 1
    return tuple(row), h.moments_of(q for _, q in values)


features = counted(BINS).flatmap(
    lambda c: st.builds(w.FeatureCounts, st.just(c[0]), small, st.integers(0, sum(c[0])), st.just(c[1]))
)
outputs = counted(CLASSES).flatmap(
    lambda c: st.builds(
        w.OutputCounts, st.just(c[0]), st.just(c[1]), st.sampled_from([(), tuple(n << h.P_BITS for n in c[0])])
    )
)
AT = w.Instant("0" * 32, 1, 1, True)
windows = st.builds(
    w.Window,
    key=st.just(w.Key("gas", "a" * 64, "cpu", "none", "", 0)),
    start=st.just(AT),
    end=st.just(AT),
    counts=st.builds(w.Counts, rows=small),
    features=st.dictionaries(st.sampled_from(["f1", "f2"]), features),
    outputs=st.dictionaries(st.just("y"), outputs),
    labels=st.builds(
        w.Labels, confusion=st.one_of(st.just(()), st.tuples(*[small] * CLASSES**2)), matched=small, late=small
    ),
)


def profile(window):
    found, unfit = p.profile_of(window, SHAPE)
    assert unfit == 0
    return found


@given(st.lists(windows, min_size=1, max_size=6), st.randoms())
def test_any_partition_and_order_equals_merging_the_windows(parts, chance):
    merged = parts[0]
    for part in parts[1:]:
        merged = w.merge(merged, part)
    shuffled = parts[:]
    chance.shuffle(shuffled)
    groups = [[]]
    for part in shuffled:
        groups[-1].append(profile(part))
        if chance.random() < 0.4:
            groups.append([])
    assert p.total(p.total(group) for group in groups) == profile(merged)


@given(windows)
def test_nothing_is_the_zero(window):
    one = profile(window)
    assert p.total([one, p.Profile()]) == one
    assert p.total([]) == p.Profile()


def window(**changes):
    good = {
        "f1": w.FeatureCounts((1, 1, 0, 0, 0), 0, 0, h.moments_of([1, 2])),
        "f2": w.FeatureCounts((0,) * 5, 2, 0, h.Moments()),
    }
    answer = {"y": w.OutputCounts((2, 0, 0), h.moments_of([5, 6]), (1 << 20, 0, 0))}
    base = w.Window(key=w.Key("gas", "a" * 64, "cpu", "none", "", 0), start=AT, end=AT, features=good, outputs=answer)
    return msgspec.structs.replace(base, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"features": {"unknown": w.FeatureCounts((0,) * 5, 0, 0, h.Moments())}},
        {"features": {"f1": w.FeatureCounts((1,) * 4, 0, 0, h.moments_of([1, 1, 1, 1]))}},
        {"features": {"f1": w.FeatureCounts((9,) * 5, 0, 0, h.moments_of([1]))}},
        {"features": {"f1": w.FeatureCounts((1, 0, 0, 0, 0), 0, 0, h.Moments(n=1, total=5, squares=1))}},
        {"outputs": {"z": w.OutputCounts((0, 0, 0), h.Moments())}},
        {"outputs": {"y": w.OutputCounts((1, 0), h.moments_of([1]))}},
        {"outputs": {"y": w.OutputCounts((1, 0, 0), h.moments_of([1]), (1 << 21, 0, 0))}},
        {"outputs": {"y": w.OutputCounts((1, 0, 0), h.moments_of([1]), (1,))}},
        {"labels": w.Labels(confusion=(1, 2, 3, 4))},
    ],
)
def test_what_no_device_of_this_bundle_can_have_counted_is_left_out(changes):
    assert p.profile_of(window(), SHAPE)[1] == 0
    found, unfit = p.profile_of(window(**changes), SHAPE)
    assert unfit == 1
    assert [found.features, found.outputs, found.labels.confusion] == [
        {} if "features" in changes else window().features,
        {} if "outputs" in changes else window().outputs,
        (),
    ]


def test_more_values_outside_than_values_do_not_enter():
    # Its rate would be no share: one such device took the sign from all others.
    row = (3,) + (0,) * (BINS - 1)
    moments = h.moments_of([1, 2, 3])
    parts = {"f1": w.FeatureCounts(row, 0, 3, moments), "f2": w.FeatureCounts(row, 9, 4, moments)}
    found, unfit = p.fitted(p.Profile(rows=3, features=parts), SHAPE)
    assert (set(found.features), unfit) == ({"f1"}, 1)
