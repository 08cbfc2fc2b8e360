"""What is accepted and what is shed, turn by turn."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st
from skerry_agent.worker.backlog import Backlog


class Turns:
    """A loop whose turns the test ends."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> object:
        self.soon.append(callback)
        return None

    def end(self) -> None:
        due, self.soon = self.soon, []
        for callback in due:
            callback()


def test_a_turn_answers_so_many_and_the_next_one_again() -> None:
    turns = Turns()
    backlog = Backlog(turns, most=3, longest_us=1e6)
    for _ in range(2):
        assert [backlog.at_once(100.0) for _ in range(5)] == [0.0, 0.0, 0.0, 300.0, 300.0]
        assert backlog.full(at_once=True) == 300.0
        assert len(turns.soon) == 1
        turns.end()
        assert backlog.full(at_once=True) == 0.0
    assert backlog.queued == 0


def test_a_turn_ends_sooner_when_those_in_it_take_long() -> None:
    backlog = Backlog(Turns(), most=100, longest_us=250.0)
    assert [backlog.at_once(200.0) for _ in range(4)] == [0.0, 0.0, 400.0, 400.0]


def test_the_queue_takes_so_many_and_who_is_shed_is_told_how_long_it_is() -> None:
    backlog = Backlog(Turns(), most=3, longest_us=1e9)
    assert [backlog.enter(5000.0) for _ in range(4)] == [0.0, 0.0, 0.0, 15000.0]
    # What the one under way has behind it need not be waited for.
    assert backlog.enter(5000.0, gone_us=3000.0) == 12000.0
    backlog.leave(5000.0)
    assert backlog.enter(1000.0) == 0.0
    assert backlog.full(at_once=False) == 11000.0
    assert backlog.full(at_once=True) == 0.0


def test_nobody_is_accepted_to_wait_longer_than_is_allowed_but_the_first_always_is() -> None:
    backlog = Backlog(Turns(), most=100, longest_us=10_000.0)
    assert backlog.enter(1e7) == 0.0
    assert backlog.enter(1.0) == 1e7
    backlog.leave(1e7)
    assert [backlog.enter(6000.0) for _ in range(3)] == [0.0, 0.0, 12000.0]


@given(st.lists(st.tuples(st.booleans(), st.floats(1, 1e5)), max_size=200), st.integers(1, 9), st.floats(1, 1e6))
def test_whatever_comes_the_queue_stays_within_its_bounds_and_empties_to_nothing(
    steps: list[tuple[bool, float]], most: int, longest_us: float
) -> None:
    backlog = Backlog(Turns(), most=most, longest_us=longest_us)
    inside: list[float] = []
    for comes, takes_us in steps:
        if comes:
            waits = sum(inside)
            wait = backlog.enter(takes_us)
            if wait == 0.0:
                assert not inside or waits <= longest_us * (1 + 1e-9)
                inside.append(takes_us)
            else:
                assert abs(wait - max(1.0, waits)) <= 1e-6 * max(1.0, waits)
                assert len(inside) >= most or waits > longest_us * (1 - 1e-9)
        elif inside:
            backlog.leave(inside.pop(0))
        assert backlog.queued == len(inside) <= most
    for takes_us in inside:
        backlog.leave(takes_us)
    assert backlog.enter(1.0) == 0.0
