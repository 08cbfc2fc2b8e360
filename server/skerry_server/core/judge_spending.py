"""Spending alpha over looks by removing reference assignments.

At each look so many assignments may have been removed in all as the spending function allows of their number; those with the largest
statistics of the look go, among those still there. The candidate fails when the assignment that was really made is removed. Under
the hypothesis that it changes nothing, that one is any of them alike, so over all looks it is removed with a chance of at most
alpha, however devices differ and however their counts hang together in time.

Equal statistics cannot be told apart: they go together or not at all, and what is then left of the allowance stays for later looks.
So no coin is tossed over a device fleet, and what was observed never fails for a tie.
"""

from __future__ import annotations

import numpy as np

from skerry_server.core.judge_assignments import Bools, Floats

_SLACK = 1e-9


def spent(information: float, *, planned: bool) -> float:
    """The part of alpha that may be spent by now: ``min(1, u)`` with a planned end, ``u / (1 + u)`` without.

    >>> spent(0.25, planned=True), spent(7, planned=True), spent(1, planned=False)
    (0.25, 1.0, 0.5)
    """
    u = max(0.0, information)
    return min(1.0, u) if planned else u / (1 + u)


def allowance(alpha: float, information: float, total: int, *, planned: bool) -> int:
    """How many of ``total`` assignments may be gone by now."""
    return int(alpha * spent(information, planned=planned) * total + _SLACK)


def remove(statistics: Floats, removed: Bools, allowed: int) -> Bools:
    """Removes the largest statistics among those left, whole groups of equals, until ``allowed`` are gone in all.

    Returns:
        All that are removed now, those before included.
    """
    room = allowed - int(np.count_nonzero(removed))
    left = np.flatnonzero(~removed)
    if room <= 0 or not len(left):
        return removed
    if room >= len(left):
        return np.ones_like(removed)
    values = statistics[left]
    # Of the room + 1 largest the smallest stays: all above it go, and none that equals it.
    place = len(values) - room - 1
    gone = values > np.partition(values, place)[place]
    after = removed.copy()
    after[left[gone]] = True
    return after


def pack(removed: Bools) -> bytes:
    """A bit each, most significant first."""
    return np.packbits(removed).tobytes()


def unpack(packed: bytes, total: int) -> Bools:
    """Raises ``ValueError`` when there are not as many bits as that takes."""
    if not packed:
        return np.zeros(total, np.bool_)
    if len(packed) != (total + 7) // 8:
        raise ValueError(f"memory: {len(packed)} bytes of removed assignments do not fit {total}")
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=total).astype(np.bool_)
