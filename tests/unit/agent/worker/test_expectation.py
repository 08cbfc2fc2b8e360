"""What requests should take follows what they take, and not what one of them took."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_agent.worker.backlog import Backlog
from skerry_agent.worker.expectation import USUAL, Expectation

MS = 1_000_000


class NoTurns:
    def call_soon(self, _: object) -> object:
        return None


def taught(expectation: Expectation, took_ns: int, times: int) -> Expectation:
    for _ in range(times):
        if not expectation.low_ns <= took_ns <= expectation.high_ns:
            expectation.learn(1, took_ns)
    return expectation


def accepted(expectation: Expectation, longest_ms: float) -> int:
    """How many a queue takes that nobody leaves."""
    backlog = Backlog(NoTurns(), most=1000, longest_us=longest_ms * 1e3)
    n = 0
    while not backlog.enter(expectation.us(1)):
        n += 1
    return n


@pytest.mark.parametrize("factor", [0.05, 0.3, 3.0, 20.0])
def test_a_device_that_became_faster_or_slower_is_noticed_within_some_requests(factor: float) -> None:
    found = taught(Expectation(5000.0), int(5 * MS * factor), 60).us(1)
    assert 5000 * factor / USUAL <= found <= 5000 * factor * USUAL


def test_a_queue_takes_as_many_as_can_be_answered_in_time_at_the_speed_of_now() -> None:
    expectation = Expectation(5000.0)
    assert accepted(expectation, 100.0) == 21
    # The board throttles: what took 5 ms takes 25. Twenty of them would wait half a second, and 100 ms was promised.
    taught(expectation, 25 * MS, 20)
    assert 4 <= accepted(expectation, 100.0) <= 7
    taught(expectation, 5 * MS, 40)
    assert 15 <= accepted(expectation, 100.0) <= 31


def test_one_that_the_system_held_up_changes_little_and_not_for_long() -> None:
    expectation = Expectation(5000.0)
    expectation.learn(1, 10_000 * MS)
    assert expectation.us(1) == pytest.approx(6000.0)
    taught(expectation, 3 * MS, 5)
    assert expectation.us(1) < 5000.0


def test_what_varies_as_usual_changes_nothing() -> None:
    expectation = Expectation(5000.0)
    for took_ns in (int(5 * MS / USUAL) + 1, 5 * MS, int(5 * MS * USUAL) - 1):
        expectation.learn(1, took_ns)
    assert expectation.us(1) == 5000.0


def test_further_rows_have_a_cost_of_their_own() -> None:
    expectation = Expectation(5000.0)
    assert expectation.us(11) == 55_000.0
    for _ in range(40):
        expectation.learn(11, 6 * MS)
    assert expectation.us(1) == 5000.0
    assert expectation.us(11) == pytest.approx(6000.0, rel=0.01)


@given(st.floats(0, 1e9), st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2**53)), max_size=200))
def test_it_stays_a_time(one_us: float, requests: list[tuple[int, int]]) -> None:
    expectation = Expectation(one_us)
    for rows, took_ns in requests:
        expectation.learn(rows, took_ns)
        assert expectation.us(1) >= 1.0
        assert expectation.us(rows) >= expectation.us(1)
        assert expectation.low_ns < expectation.high_ns
