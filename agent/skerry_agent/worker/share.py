"""Bundles in shadow: which requests one sees, and how long it rests so that it stays within its budget.

Pure: which of the requests are chosen follows from their position in the recorder's ring, so the same ones are chosen again.
"""

from __future__ import annotations

_SPREAD = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio: consecutive positions spread evenly (Knuth, The Art of Computer Programming 3, 6.4)."""
_WORD = (1 << 64) - 1
LONGEST_PAUSE_S = 60.0


def threshold(share: float) -> int:
    """The share as ``chosen`` wants it."""
    return round(min(1.0, max(0.0, share)) * (1 << 64))


def chosen(position: int, below: int) -> bool:
    """Whether the request at that position of the ring is shown; ``below``: a ``threshold``.

    >>> [sum(chosen(i, threshold(share)) for i in range(10_000)) for share in (0.0, 0.25, 1.0)]
    [0, 2502, 10000]
    """
    return (position * _SPREAD) & _WORD < below


def place(token: str, position: int) -> int:
    """64 bits that name a prediction: the token of its label book and its position."""
    return (int(token or "0", 16) * 0x100000001B3 ^ position * _SPREAD) & _WORD


def pause_s(used_s: float, cpu: float) -> float:
    """How long to rest after ``used_s`` seconds of CPU, so that the share of a core stays at ``cpu``.

    >>> pause_s(0.01, 0.25), pause_s(0.01, 1.0)
    (0.03, 0.0)
    """
    return min(LONGEST_PAUSE_S, used_s * (1.0 / max(cpu, 1e-6) - 1.0))
