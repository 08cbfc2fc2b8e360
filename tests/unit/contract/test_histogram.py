"""Counts merge exactly: what DESIGN promises of every number that a device sends."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import histogram as h
from skerry_contract.errors import Malformed

from tests.unit.contract import values

many = st.lists(values.nanoseconds, max_size=60)


def partition(items: list, cuts: list[int]) -> list[list]:
    bounds = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


@given(many, st.lists(st.integers(0, 60), max_size=5), st.randoms(use_true_random=False))
def test_any_partition_and_order_equals_counting_at_once(items: list[int], cuts: list[int], rng: random.Random) -> None:
    shuffled = items[:]
    rng.shuffle(shuffled)
    parts = [h.exponential_of(part) for part in partition(shuffled, cuts)]
    while len(parts) > 1:  # merge in any order, merged ones again
        a = parts.pop(rng.randrange(len(parts)))
        b = parts.pop(rng.randrange(len(parts)))
        parts.append(h.merge_exponential(a, b))
    assert parts[0] == h.exponential_of(items)


@given(many, many, st.integers(-6, 5), st.integers(-6, 5))
def test_scales_may_differ_and_the_coarser_one_wins(a: list[int], b: list[int], x: int, y: int) -> None:
    merged = h.merge_exponential(h.rescale(h.exponential_of(a), x), h.rescale(h.exponential_of(b), y))
    assert merged == h.rescale(h.exponential_of(a + b), min(x, y))


@given(many, st.integers(-6, 5), st.integers(0, 6))
def test_rescaling_in_two_steps_is_rescaling_at_once(items: list[int], scale: int, further: int) -> None:
    histogram = h.exponential_of(items)
    two_steps = h.rescale(h.rescale(histogram, scale), scale - further)
    assert two_steps == h.rescale(histogram, scale - further)
    assert (two_steps.n, two_steps.total, two_steps.zero) == (len(items), sum(items), items.count(0))


def test_a_histogram_is_never_refined() -> None:
    with pytest.raises(ValueError, match="cannot refine"):
        h.rescale(h.Exponential(scale=2), 3)


@given(values.nanoseconds.filter(bool))
def test_a_bucket_holds_values_above_its_lower_and_up_to_its_upper_bound(value: int) -> None:
    index = h.exponential_index(value)
    # In exact arithmetic: 2**(i/32) < v <= 2**((i+1)/32), that is 2**i < v**32 <= 2**(i+1). The float nearest to v decides.
    power = Fraction(float(value)) ** 32
    assert Fraction(2) ** index < power <= Fraction(2) ** (index + 1)


@pytest.mark.parametrize("bits", range(63))
def test_a_power_of_two_belongs_to_the_bucket_below_its_bound(bits: int) -> None:
    assert h.exponential_index(1 << bits) == bits * 32 - 1
    assert h.exponential_index((1 << bits) * 1.0000001) == bits * 32


@given(st.lists(values.nanoseconds, min_size=1, max_size=60), st.floats(0, 1), st.integers(-3, 5))
def test_a_quantile_errs_at_most_by_the_bound_of_its_scale(items: list[int], q: float, scale: int) -> None:
    exact = sorted(items)[min(len(items) - 1, math.floor(q * len(items)))]
    found = h.quantile(h.rescale(h.exponential_of(items), scale), q)
    base = 2.0 ** (2.0**-scale)
    assert found is not None
    assert abs(found - exact) <= (base - 1) / (base + 1) * exact * (1 + 1e-9)


def test_quantile_of_nothing_is_nothing() -> None:
    assert h.quantile(h.Exponential(), 0.5) is None


@given(st.lists(values.quantized, max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_moments_merge_exactly(qs: list[int], cuts: list[int]) -> None:
    merged = h.Moments()
    for part in reversed(partition(qs, cuts)):
        merged = h.merge_moments(h.moments_of(part), merged)
    assert merged == h.Moments(n=len(qs), total=sum(qs), squares=sum(q * q for q in qs))


@given(
    st.lists(st.floats(-1e6, 1e6), max_size=40),
    st.lists(st.floats(-1e6, 1e6), unique=True, max_size=8).map(sorted),
    st.integers(0, 40),
)
def test_edge_counts_merge_exactly_and_lose_no_value(items: list[float], edges: list[float], cut: int) -> None:
    def count(part: list[float]) -> tuple[int, ...]:
        row = [0] * (len(edges) + 1)
        for value in part:
            row[h.edge_bin(edges, value)] += 1
        return tuple(row)

    assert h.merge_counts(count(items[:cut]), count(items[cut:])) == count(items)
    assert sum(count(items)) == len(items)
    for value in items:
        i = h.edge_bin(edges, value)
        assert (i == 0 or edges[i - 1] <= value) and (i == len(edges) or value < edges[i])


def test_rows_of_other_bins_are_not_added() -> None:
    with pytest.raises(ValueError, match="2 bins cannot be merged with 3"):
        h.merge_counts((1, 2), (1, 2, 3))


@given(st.floats(allow_nan=False), st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_quantized_values_stay_within_the_limit(value: float, centre: float, scale: float) -> None:
    assert -h.Q_LIMIT <= h.quantize(value, centre, scale) <= h.Q_LIMIT


def test_quantizing_rounds_half_to_even_as_numpy_does() -> None:
    step = 1 / (1 << h.Q_BITS)
    assert [h.quantize(x * step, 0.0, 1.0) for x in (0.5, 1.5, 2.5, -0.5, -1.5)] == [0, 2, 2, 0, -2]


@given(st.lists(values.quantized, min_size=2, max_size=50), st.floats(-100, 100), st.floats(0.1, 100))
def test_mean_and_deviation_are_those_of_the_quantized_values(qs: list[int], centre: float, scale: float) -> None:
    found = h.mean_and_sd(h.moments_of(qs), centre, scale)
    assert found is not None
    step = Fraction(scale) / (1 << h.Q_BITS)
    exact = [Fraction(centre) + q * step for q in qs]
    mean = sum(exact) / len(qs)
    variance = sum((x - mean) ** 2 for x in exact) / (len(qs) - 1)
    assert found[0] == pytest.approx(float(mean), rel=1e-9, abs=1e-9 * scale * 256)
    assert found[1] == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-9 * scale)


def check(histogram: h.Exponential) -> None:
    h.check_counts(histogram, where="latency.total")
    h.check_buckets(histogram, where="latency.total")


@pytest.mark.parametrize(
    "histogram",
    [
        h.Exponential(scale=6),
        h.Exponential(scale=-11),
        h.Exponential(zero=-1),
        h.Exponential(total=-1),
        h.Exponential(total=1 << 63),
        h.Exponential(offset=-2, counts=(1,)),
        h.Exponential(offset=h.MAX_INDEX + 1, counts=(1,)),
        h.Exponential(offset=h.MAX_INDEX, counts=(1, 1)),
        h.Exponential(scale=-10, offset=h.MAX_INDEX, counts=(1,)),  # its quantile would overflow a float
        h.Exponential(counts=(-1,)),
        h.Exponential(counts=(1 << 40,)),
    ],
)
def test_a_histogram_that_no_device_can_make_is_refused(histogram: h.Exponential) -> None:
    with pytest.raises(Malformed, match=r"histogram at latency\.total"):
        check(histogram)


@given(many, st.integers(-10, 5))
def test_every_histogram_of_nanoseconds_is_accepted_and_has_quantiles(items: list[int], scale: int) -> None:
    if items and sum(items) < h.MAX_SUM:
        histogram = h.rescale(h.exponential_of(items), scale)
        check(histogram)
        assert all(h.quantile(histogram, q) is not None for q in (0.0, 0.5, 1.0))
