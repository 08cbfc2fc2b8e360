"""Which of several models' updates makes way for which: never two for each other."""

from __future__ import annotations

import itertools

import pytest
from skerry_agent.core import lifecycle, turns

KINDS = [(held, back) for held in (False, True) for back in (False, True)]


def test_no_two_updates_make_way_for_each_other_in_any_states() -> None:
    # What nothing holds never lies ready.
    states = {held: [s for s in lifecycle.STATES if held or s != "ready"] for held in (False, True)}
    for (one_held, one_back), (other_held, other_back) in itertools.product(KINDS, KINDS):
        one, other = turns.turn(held=one_held, back=one_back), turns.turn(held=other_held, back=other_back)
        there = any(turns.makes_way(state, back=one_back, comes=other) for state in states[one_held])
        again = any(turns.makes_way(state, back=other_back, comes=one) for state in states[other_held])
        assert not (there and again), (one_held, one_back, other_held, other_back)


@pytest.mark.parametrize(
    ("state", "back", "held", "comes_back", "makes_way"),
    [
        ("ready", False, False, False, True),
        ("ready", False, True, True, True),
        ("ready", False, True, False, False),
        ("ready", True, True, True, False),
        ("fetch", False, False, True, True),
        ("prove", False, False, True, True),
        ("fetch", False, True, True, False),
        ("fetch", False, False, False, False),
        ("fetch", True, False, True, False),
        ("trial", False, False, True, False),
        ("revert", False, False, True, False),
    ],
)
def test_a_way_back_goes_first_and_so_does_what_nothing_holds(
    state: lifecycle.State, back: bool, held: bool, comes_back: bool, makes_way: bool
) -> None:
    comes = turns.turn(held=held, back=comes_back)
    assert turns.makes_way(state, back=back, comes=comes) == makes_way


@pytest.mark.parametrize(
    ("state", "in_it_s", "back", "held", "comes_back", "makes_way"),
    [
        ("fetch", turns.LONG_S, False, False, False, True),
        ("fetch", turns.LONG_S - 1, False, False, False, False),
        ("fetch", turns.LONG_S, False, True, True, False),
        ("fetch", turns.LONG_S, True, False, False, False),
        ("fetch", turns.LONG_S, True, False, True, True),
        ("prove", turns.LONG_S, False, False, False, False),
        ("ready", turns.LONG_S, False, True, False, False),
        ("trial", turns.LONG_S, False, False, True, False),
    ],
)
def test_what_downloads_for_an_hour_makes_way_for_what_is_as_urgent(
    state: lifecycle.State, in_it_s: float, back: bool, held: bool, comes_back: bool, makes_way: bool
) -> None:
    comes = turns.turn(held=held, back=comes_back)
    assert turns.makes_way(state, back=back, comes=comes, in_it_s=in_it_s) == makes_way
