"""The judge's parts: reference assignments, spending, residuals."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_server.core import judge_residuals as res
from skerry_server.core import judge_spending as spending
from skerry_server.core.judge_assignments import assignments, raw_stream
from skerry_server.core.judge_values import Design, Guardrail, Reading, Unit

RAIL = Guardrail(name="g", kind="rate", alpha=0.05, margin=1.5)


def design(*strata: tuple[int, int], rollout: str = "r-1") -> Design:
    """Per stratum: candidates, controls."""
    units = tuple(
        Unit(device=f"d-{i:04}", stratum=f"s{s}", candidate=i < candidates)
        for s, (candidates, controls) in enumerate(strata)
        for i in range(candidates + controls)
    )
    units = tuple(Unit(device=f"{u.stratum}-{u.device}", stratum=u.stratum, candidate=u.candidate) for u in units)
    return Design(rollout=rollout, stage=0, units=units, guardrails=(RAIL,))


GOLDEN_FIRST = [10, 19, 20, 100, 117, 139, 154, 159, 167, 189]
GOLDEN_SHA256 = "eb4db7f7944057331216aadb7b6c8cd1e701ac3f4c060c9c2e41e2c6244c6832"

# --- assignments ------------------------------------------------------------------------------------------------------


def pcg64(seed: bytes, count: int) -> list[int]:
    """PCG XSL RR 128/64 from its definition (O'Neill 2014), to hold numpy's to."""
    mask = (1 << 128) - 1
    state, increment = int.from_bytes(seed[:16], "big"), int.from_bytes(seed[16:], "big") | 1
    found = []
    for _ in range(count):
        state = (state * 47026247687942121848144207491837523525 + increment) & mask
        turn, word = state >> 122, (state >> 64 ^ state) & 0xFFFFFFFFFFFFFFFF
        found.append((word >> turn | word << (-turn & 63)) & 0xFFFFFFFFFFFFFFFF)
    return found


def test_the_raw_stream_is_that_of_the_definition() -> None:
    seed = hashlib.sha256(b"any").digest()
    assert raw_stream(seed).random_raw(100).tolist() == pcg64(seed, 100)


def test_drawn_assignments_are_the_same_for_ever() -> None:
    """Golden: a stored ruling must replay on every version of Python and numpy."""
    drawn = assignments(design((10, 190), rollout="r-golden"))
    assert drawn.total == 2000
    assert drawn.members[0].tolist() == list(range(10))
    assert drawn.members[1].tolist() == GOLDEN_FIRST
    assert hashlib.sha256(drawn.members.astype("<i4").tobytes()).hexdigest() == GOLDEN_SHA256


def test_a_small_set_holds_every_assignment_once() -> None:
    found = assignments(design((2, 3), (3, 1), (1, 0)))
    values = np.random.default_rng(1).integers(-100, 100, 10).astype(float)
    wanted = [
        values[list(a)].sum() + values[[5 + i for i in b]].sum() + values[9]
        for a in itertools.combinations(range(5), 2)
        for b in itertools.combinations(range(4), 3)
    ]
    assert found.total == len(wanted) == 40
    assert sorted(found.sums(values)) == sorted(wanted)
    assert found.sums(values)[found.observed] == values[[0, 1, 5, 6, 7, 9]].sum()


@pytest.mark.parametrize("strata", [((8, 40),), ((30, 12),), ((5, 9), (9, 5), (0, 7), (3, 0))], ids=str)
def test_drawn_sums_are_those_of_as_many_candidates_per_stratum(strata: tuple[tuple[int, int], ...]) -> None:
    plan = design(*strata)
    found = assignments(plan)
    size = len(plan.units)
    assert found.total == 2000
    assert found.observed == 0
    assert set(found.sums(np.ones(size))) == {sum(k for k, _ in strata)}
    for number, (k, _) in enumerate(strata):
        assert set(found.sums((found.stratum == number).astype(float))) == {k}
    own = np.array([u.candidate for u in plan.units], float)
    assert found.sums(own)[0] == own.sum()
    # Every unit is a candidate in its share of the drawn ones.
    share = np.array([np.mean(found.sums(np.eye(size)[i])[1:]) for i in range(size)])
    wanted = np.array([strata[s][0] / sum(strata[s]) for s in found.stratum])
    assert np.abs(share - wanted).max() < 4.5 * math.sqrt(0.25 / 1999)


def test_another_rollout_draws_others() -> None:
    one, two = (assignments(design((10, 190), rollout=name)) for name in ("r-1", "r-2"))
    assert (one.members[1:] != two.members[1:]).any()


# --- spending ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=30, max_size=30), min_size=1, max_size=6),
    st.lists(st.floats(0, 3), min_size=6, max_size=6),
    st.floats(0.01, 0.9),
    st.booleans(),
)
def test_no_more_are_removed_than_alpha_allows_and_equals_go_together(
    statistics: list[list[int]], information: list[float], alpha: float, planned: bool
) -> None:
    removed = np.zeros(30, np.bool_)
    for row, u in zip(statistics, sorted(information), strict=False):
        values = np.array(row, float)
        allowed = spending.allowance(alpha, u, 30, planned=planned)
        before = removed
        removed = spending.remove(values, before, allowed)
        assert allowed <= math.floor(alpha * 30 + 1e-9)
        assert removed.sum() <= max(allowed, before.sum())
        assert (removed >= before).all()
        gone, left = values[removed & ~before], values[~removed]
        if len(gone) and len(left):
            assert gone.min() > left.max()
        if len(left) and removed.sum() < allowed:
            # What is still there is a group of equals too large for what is left.
            assert (left == left.max()).sum() > allowed - removed.sum()
        assert (spending.unpack(spending.pack(removed), 30) == removed).all()


def test_a_memory_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        spending.unpack(b"\0", 30)


# --- residuals --------------------------------------------------------------------------------------------------------


def columns(plan: Design, reading: Reading) -> res.Columns:
    return res.Columns(reading, assignments(plan))


def test_the_prior_has_the_moments_of_the_devices() -> None:
    rng = np.random.default_rng(2)
    size = 4000
    plan = design((400, 3600))
    own = 0.02 * rng.gamma(1 / 0.6**2, 0.6**2, size)
    n = rng.integers(500, 4000, size)
    x = rng.binomial(n, own)
    found = columns(plan, Reading(n=(1,) * size, x=(0,) * size, pre_n=tuple(n.tolist()), pre_x=tuple(x.tolist()))).prior
    assert found.mean == pytest.approx(0.02, rel=0.05)
    assert found.cv == pytest.approx(0.6, rel=0.1)
    # The device's own rate lies between what it did and what all did.
    raw = x / n
    assert (np.abs(found.rate - found.mean) <= np.abs(raw - found.mean) * 1.2 + 0.002).all()
    assert np.abs(found.rate - own).mean() < np.abs(raw - own).mean()


def test_a_device_without_a_past_is_taken_as_any_other() -> None:
    plan = design((2, 3))
    reading = Reading(n=(100,) * 5, x=(5,) * 5, pre_n=(0, 900, 900, 900, 900), pre_x=(0, 90, 2, 8, 30))
    found = columns(plan, reading).prior
    assert found.rate[0] == pytest.approx(found.mean)
    assert found.phi[0] == found.phi.max()


def test_residuals_of_devices_that_do_what_was_foretold_are_zero() -> None:
    plan = design((2, 3))
    reading = Reading(n=(100,) * 5, x=(20, 20, 20, 20, 20), pre_n=(100,) * 5, pre_x=(10, 10, 10, 10, 10))
    found = res.rates(columns(plan, reading), assignments(plan).candidate)
    assert found.common_factor == pytest.approx(2.0)
    assert np.abs(found.values).max() < 1e-9


def test_at_the_true_ratio_the_residuals_of_candidates_are_zero() -> None:
    plan = design((2, 3))
    reading = Reading(n=(100,) * 5, x=(30, 30, 10, 10, 10), pre_n=(100,) * 5, pre_x=(10,) * 5)
    found = res.rates(columns(plan, reading), assignments(plan).candidate, ratio=3.0)
    assert np.abs(found.values).max() < 1e-6


@given(st.lists(st.integers(0, 1000), min_size=8, max_size=8), st.lists(st.integers(0, 1000), min_size=8, max_size=8))
def test_sums_of_residuals_do_not_depend_on_the_order_of_summation(x: list[int], pre: list[int]) -> None:
    plan = design((3, 5))
    reading = Reading(n=(1000,) * 8, x=tuple(x), pre_n=(1000,) * 8, pre_x=tuple(pre))
    values = res.rates(columns(plan, reading), assignments(plan).candidate).values
    assert {
        float(sum(values[list(order)])) for order in itertools.islice(itertools.permutations(range(8)), 0, 40320, 997)
    } == {math.fsum(values)}
