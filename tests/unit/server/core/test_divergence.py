"""The statistics are those of the books and of scipy, and their p-values promise what they keep."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import distance
from skerry_contract import histogram as h
from skerry_server.core import divergence as d

counts = st.lists(st.integers(1, 5000), min_size=2, max_size=20)
pairs = st.integers(2, 20).flatmap(
    lambda k: st.tuples(
        st.lists(st.integers(0, 5000), min_size=k, max_size=k).filter(any),
        st.lists(st.integers(0, 5000), min_size=k, max_size=k).filter(any),
    )
)


def evidently_psi(now, reference):
    """Evidently's formula: shares, and 0.0001 for an empty bin."""
    a, b = np.array(now) / sum(now), np.array(reference) / sum(reference)
    a, b = np.where(a == 0, 0.0001, a), np.where(b == 0, 0.0001, b)
    return float(((b - a) * np.log(b / a)).sum())


@given(pairs)
def test_psi_is_evidentlys_formula_up_to_the_half_count_per_bin(pair):
    now, reference = pair
    kept = [(a, b) for a, b in zip(now, reference, strict=True) if a or b]
    filled = [[a + 0.5 for a, _ in kept], [b + 0.5 for _, b in kept]]
    assert d.psi(now, reference).value == pytest.approx(evidently_psi(*filled), rel=1e-9, abs=1e-12)


def test_psi_of_many_rows_is_evidentlys():
    rng = np.random.default_rng(1)
    now, reference = rng.multinomial(10**6, [0.1, 0.2, 0.3, 0.4]), rng.multinomial(10**6, [0.25] * 4)
    found = d.psi(now.tolist(), reference.tolist())
    assert found.value == pytest.approx(evidently_psi(now, reference), rel=1e-4)


@given(pairs)
def test_psi_is_symmetric_and_never_negative(pair):
    now, reference = pair
    assert d.psi(now, reference).value == pytest.approx(d.psi(reference, now).value)
    assert d.psi(now, reference).value >= 0


@given(pairs, st.randoms())
def test_psi_and_js_do_not_depend_on_the_order_of_bins(pair, chance):
    order = list(range(len(pair[0])))
    chance.shuffle(order)
    mixed = [[row[i] for i in order] for row in pair]
    assert d.psi(*mixed).value == pytest.approx(d.psi(*pair).value)
    assert d.jensen_shannon(*mixed) == pytest.approx(d.jensen_shannon(*pair), abs=1e-7)


@pytest.mark.parametrize("bins", [2, 6, 16])
@pytest.mark.parametrize(("n", "m"), [(200, 134), (1000, 134), (1000, 1000), (200, 10_000)])
def test_psi_without_drift_is_zero_on_average_and_its_p_value_errs_as_often_as_it_says(bins, n, m):
    rng = np.random.default_rng(bins * n + m)
    found = [
        d.psi(rng.multinomial(n, [1 / bins] * bins).tolist(), rng.multinomial(m, [1 / bins] * bins).tolist())
        for _ in range(2000)
    ]
    spread = math.sqrt(2 * (bins - 1)) * (1 / n + 1 / m)
    # The half count per bin pulls a little towards no drift, never away from it by more than the noise of this test.
    assert -0.3 * spread < np.mean([one.corrected for one in found]) < 4 * spread / math.sqrt(2000)
    for alpha in (0.05, 0.01):
        errors = sum(one.p < alpha for one in found)
        # Up to half as much again for 8 rows per bin; beyond that only chance.
        assert stats.binom.sf(errors - 1, 2000, 1.5 * alpha) > 1e-3, (alpha, errors)


@given(pairs)
def test_jensen_shannon_is_scipys(pair):
    assert d.jensen_shannon(*pair) == pytest.approx(distance.jensenshannon(*pair, base=2), abs=1e-6)


@given(
    st.lists(st.floats(-5, 5), min_size=20, max_size=200),
    st.lists(st.floats(-5, 5), min_size=20, max_size=200),
    st.lists(st.floats(-4, 4), min_size=1, max_size=12, unique=True).map(sorted),
)
def test_ks_from_bins_is_scipys_on_binned_rows_and_a_lower_bound_on_raw_rows(now, reference, edges):
    rows = [[0] * (len(edges) + 1) for _ in range(2)]
    for row, values in zip(rows, (now, reference), strict=True):
        for value in values:
            row[h.edge_bin(edges, value)] += 1
    found = d.kolmogorov_smirnov(*rows)
    binned = [[h.edge_bin(edges, value) for value in values] for values in (now, reference)]
    assert found.effect == pytest.approx(stats.ks_2samp(*binned, method="asymp").statistic, abs=1e-12)
    raw = stats.ks_2samp(now, reference, method="asymp")
    assert found.effect <= raw.statistic + 1e-12


def test_the_p_value_of_ks_is_scipys_and_cautious():
    rng = np.random.default_rng(2)
    now, reference = rng.normal(0.1, 1, 3000), rng.normal(0, 1, 2000)
    edges = np.quantile(reference, np.arange(1, 400) / 400)
    rows = [np.bincount(np.searchsorted(edges, x, "right"), minlength=400).tolist() for x in (now, reference)]
    found, raw = d.kolmogorov_smirnov(*rows), stats.ks_2samp(now, reference, method="asymp")
    assert raw.pvalue * 0.9 <= found.p <= raw.pvalue * 3


def test_mean_shift_is_welchs_on_raw_rows():
    rng = np.random.default_rng(3)
    now, reference = rng.normal(10.5, 4, 800), rng.normal(10, 3, 500)
    rows = [h.moments_of(h.quantize(float(v), 10.0, 3.0) for v in x) for x in (now, reference)]
    found = d.mean_shift(*rows)
    assert found.effect == pytest.approx((now.mean() - reference.mean()) / reference.std(ddof=1), rel=1e-3)
    raw = stats.ttest_ind(now, reference, equal_var=False)
    assert math.log10(found.p) == pytest.approx(math.log10(raw.pvalue), rel=0.02)


def test_a_reference_that_never_varied_gives_the_shift_in_its_scale():
    still = h.moments_of([0] * 100)
    assert d.mean_shift(h.moments_of([2 * 4096] * 100), still) == (2.0, 0.0)
    assert d.mean_shift(still, still) == (0.0, 1.0)
    assert d.mean_shift(h.Moments(n=1), still) is None


def test_rates_are_tested_as_scipy_does():
    found = d.rate_change(60, 1000, 30, 1000)
    raw = stats.chi2_contingency([[60, 940], [30, 970]], correction=False)
    assert (found.effect, found.p) == (pytest.approx(0.03), pytest.approx(raw.pvalue))
    assert d.rate_change(5, 5, 7, 7) == (0.0, 1.0)
    assert d.excess_rate(30, 1000, 0.01).p == pytest.approx(stats.binomtest(30, 1000, 0.01, "greater").pvalue)
    assert d.excess_rate(0, 1000, 0.01) == (0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.sampled_from([0.01, 0.05, 0.2]))
def test_benjamini_hochberg_is_scipys(p_values, rate):
    cut = d.benjamini_hochberg(p_values, rate)
    adjusted = stats.false_discovery_control(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        if abs(q - rate) > 1e-12:
            assert (p <= cut) == (q <= rate)


def test_a_row_that_counts_nothing_cannot_be_compared():
    with pytest.raises(ValueError, match="count something"):
        d.psi([0, 0], [1, 1])
