"""Accuracy from labels with an interval that holds when devices differ, and an estimate that calls itself one."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from skerry_contract import histogram as h
from skerry_server.core import accuracy as a


def devices(*pairs):
    return [a.DeviceLabels(n, wrong) for n, wrong in pairs]


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(pair):
    right, n = pair
    low, high = a.wilson(right, n)
    theirs = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
    assert (low, high) == (pytest.approx(theirs.low, abs=1e-9), pytest.approx(theirs.high, abs=1e-9))


def test_how_long_labels_took_is_told_per_class():
    took = {0: h.exponential_of([10] * 50 + [3600] * 45 + [86_400] * 5), 1: h.exponential_of([0] * 3)}
    x, y, z = a.measured([50, 50, 0, 0, 3, 0, 0, 0, 9], ["x", "y", "z"], devices((112, 50)), 300, lags=took).classes
    assert x.lag.n == 100
    for said, exact in ((x.lag.p50_s, 3600), (x.lag.p90_s, 3600), (x.lag.p99_s, 86_400)):
        assert said == pytest.approx(exact, rel=0.011)
    assert (y.lag.n, y.lag.p50_s, y.lag.p99_s) == (3, 0.0, 0.0)
    assert (z.lag.n, z.lag.p50_s, z.lag.p90_s, z.lag.p99_s) == (0, None, None, None)


def test_recall_and_precision_per_class():
    # Rows of the matrix are the true classes.
    found = a.measured([40, 10, 0, 5, 45, 0, 0, 0, 3], ["x", "y", "z"], devices((103, 15)), 206)
    assert (found.accuracy.value, found.labelled, found.coverage) == (pytest.approx(88 / 103), 103, 0.5)
    x, y, z = found.classes
    assert (x.label, x.recall.value, x.precision.value) == ("x", 0.8, pytest.approx(40 / 45))
    assert y.precision.value == pytest.approx(45 / 55)
    assert (x.lag.n, x.lag.p50_s) == (0, None)
    # Three labels say nothing about a class.
    assert (z.recall.value, z.recall.n, z.recall.interval) == (None, 3, None)


def test_below_the_minimum_there_is_no_value_and_it_says_what_lacks():
    found = a.measured([20, 5, 1, 3], ["x", "y"], devices((29, 6)), 1000)
    assert (found.accuracy.value, found.accuracy.interval, found.accuracy.shown) == (None, None, "")
    assert found.missing == "wanted 30 labels, have 29"
    none = a.measured([], ["x", "y"], [], 0)
    assert (none.accuracy.value, none.coverage, none.labelled) == (None, None, 0)


def test_labels_that_are_held_back_are_in_no_share_and_are_told():
    few = a.measured([60, 10, 10, 21], ["x", "y"], devices((100, 20)), 90, held_back=a.DeviceLabels(1, 0))
    assert (few.accuracy.value, few.labelled, few.held_back, len(few.classes)) == (0.8, 100, 1, 2)
    assert few.coverage == pytest.approx(100 / 90)
    assert [note.split(":")[0] for note in few.notes] == [
        "1 labels do not count",
        "more labels than answers in this time",
    ]
    many = a.measured([60, 12, 10, 20], ["x", "y"], devices((100, 20)), 200, held_back=a.DeviceLabels(2, 2))
    assert (many.accuracy.value, many.classes) == (0.8, ())
    assert "nothing is said per class" in many.notes[0]
    assert a.measured([50, 0, 0, 50], ["x", "y"], devices((100, 0)), 100).notes == ()


def test_a_matrix_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="2 classes"):
        a.measured([1, 2, 3], ["x", "y"], [], 3)


def test_which_interval_is_shown_depends_on_how_many_devices_sent_labels():
    few = a.measured([180, 20, 0, 0], ["x", "y"], devices(*[(50, 5)] * 4), 200)
    assert (few.accuracy.shown, few.accuracy.devices, few.accuracy.by_device) == ("wilson", 4, None)
    many = a.measured([360, 40, 0, 0], ["x", "y"], devices(*[(50, 5)] * 8), 400)
    assert many.accuracy.shown == "by_device"
    assert many.accuracy.interval == many.accuracy.by_device


def test_devices_that_differ_widen_the_interval():
    even = a.measured([1800, 200, 0, 0], ["x", "y"], devices(*[(100, 10)] * 20), 2000).accuracy
    uneven = a.measured([1800, 200, 0, 0], ["x", "y"], devices(*[(100, 0)] * 10, *[(100, 20)] * 10), 2000).accuracy
    assert even.design_effect == 1.0
    # By hand: 20 devices, 10 or 0 or 20 wrong of 100 each: D/(D-1) * 20 * 10**2 / 2000**2 over .1 * .9 / 2000.
    assert uneven.design_effect == pytest.approx(20 / 19 * 2000 / 2000**2 / (0.09 / 2000))
    assert uneven.value == even.value
    assert uneven.interval.high - uneven.interval.low > 2 * (even.wilson.high - even.wilson.low)


@given(
    st.lists(st.integers(0, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=30)
)
def test_the_interval_by_device_holds_the_value_and_is_never_narrower(pairs):
    n, wrong = sum(n for n, _ in pairs), sum(wrong for _, wrong in pairs)
    found = a.measured([n - wrong, wrong, 0, 0], ["x", "y"], devices(*pairs), n).accuracy
    if found.by_device is None:
        return
    low, high = found.by_device
    assert 0 <= low <= found.value <= high <= 1
    assert low <= found.wilson.low + 1e-9
    assert high >= found.wilson.high - 1e-9


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_interval_by_device_covers_the_truth_as_often_as_it_says(spread):
    rng = np.random.default_rng(int(10 * spread))
    truth, runs, clusters = 0.1, 600, 20
    covered = {"by_device": 0, "wilson": 0}
    for _ in range(runs):
        rates = rng.gamma(1 / spread**2, truth * spread**2, clusters) if spread else np.full(clusters, truth)
        wrong = rng.binomial(100, np.minimum(rates, 1.0))
        n = 100 * clusters
        matrix = [n - int(wrong.sum()), int(wrong.sum()), 0, 0]
        found = a.measured(matrix, ["x", "y"], devices(*[(100, int(x)) for x in wrong]), n).accuracy
        mean = 1 - np.minimum(rates, 1.0).mean() if not spread else 1 - truth
        for name in covered:
            low, high = getattr(found, name)
            covered[name] += low <= mean <= high
    assert covered["by_device"] / runs > 0.91
    if spread:
        # What everybody shows, on devices that differ: it holds less than half as often as it says.
        assert covered["wilson"] / runs < 0.6


UNEQUAL = {
    "one device sent nearly all": [10_000] + [5] * 7,
    "one sent most": [2_000] + [200] * 7,
    "two sent most": [1_000] * 2 + [20] * 14,
    "counts of every size": [1, 3, 7, 20, 40, 80, 100, 150, 300, 500, 900, 2_000],
}


@pytest.mark.parametrize("labelled", UNEQUAL.values(), ids=UNEQUAL.keys())
def test_the_interval_by_device_covers_the_truth_when_some_devices_send_more_labels_than_others(labelled):
    rng = np.random.default_rng(len(labelled))
    runs, covered = 500, 0
    for _ in range(runs):
        wrong = rng.binomial(labelled, rng.beta(2, 18, len(labelled)))
        n, total = sum(labelled), int(wrong.sum())
        pairs = zip(labelled, wrong.tolist(), strict=True)
        found = a.measured([n - total, total, 0, 0], ["x", "y"], devices(*pairs), n).accuracy
        covered += found.by_device.low <= 0.9 <= found.by_device.high
    # 95 % less two standard errors of 500 runs and a little for the approximation.
    assert covered / runs > 0.92


def test_devices_of_unequal_counts_are_as_many_as_they_say_something():
    equal = a.measured([720, 80, 0, 0], ["x", "y"], devices(*[(100, 10)] * 8), 800).accuracy
    assert equal.effective_devices == pytest.approx(8)
    alone = a.measured(
        [9_030, 1_005, 0, 0], ["x", "y"], devices((10_000, 1_000), *[(5, 1)] * 5, (5, 0), (5, 0)), 10_035
    )
    assert alone.accuracy.devices == 8
    assert alone.accuracy.effective_devices == pytest.approx(1.007, abs=0.001)
    # One device is no sample of devices: nothing is known, and that is what it says.
    assert alone.accuracy.interval == pytest.approx((0, 1), abs=1e-6)


def test_the_estimate_is_the_mean_calibrated_confidence_and_says_that_it_is_one():
    found = a.estimated([round(0.9 * 2**20) * 300, round(0.5 * 2**20) * 100], 400)
    assert found.estimate == pytest.approx(0.8, abs=1e-6)
    assert "estimate" in found.method
    assert set(msgspec.to_builtins(found)) == {"estimate", "rows", "method"}


def test_without_enough_rows_or_calibration_there_is_no_estimate():
    assert a.estimated([100 << 20], 199).estimate is None
    assert a.estimated([], 5000).estimate is None
    assert math.isclose(a.estimated([200 << 20], 200).estimate, 1.0)
