"""Which of several models' updates goes first, and what makes way for which. Pure.

One update is under way at a time. A way back (a lower version than what answers, which the group's document orders) goes before a way up,
and what nothing holds before what would lie ready and wait. What is under way makes way only for what is more urgent than it can be, so
that no two make way for each other in turn, whatever the order in which they are looked at.
"""

from __future__ import annotations

from skerry_agent.core.lifecycle import State

_MAKES_WAY: frozenset[State] = frozenset({"fetch", "verify", "stage", "prove"})
"""A trial is not ended by the document: what it showed so far would be lost, each time anew where the other fails again and again."""


LONG_S = 3600.0
"""What downloads for so long makes way for what is as urgent: a mirror that trickles must not keep another model's fix waiting for a day."""


def turn(*, held: bool, back: bool) -> int:
    """How urgent an update is; the highest goes first."""
    return 2 * (not held) + back


def makes_way(state: State, *, back: bool, comes: int, in_it_s: float = 0.0) -> bool:
    """Whether an update in a state makes way for another model's.

    Args:
        back: whether it is a way back itself.
        comes: the turn of the other one.
        in_it_s: how long it is in its state. Two that both download for hours take turns by ``LONG_S``, and what came stays.
    """
    if state == "fetch" and in_it_s >= LONG_S:
        return comes >= turn(held=False, back=back)
    if state == "ready":
        return comes > turn(held=True, back=back)
    # Whether it will be held is not known yet.
    return state in _MAKES_WAY and comes > turn(held=False, back=back)
