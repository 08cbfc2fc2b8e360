"""The time that a timestamp says it was signed at. Pure.

Devices take it as a lower bound of now, for good; so it never goes back, and a clock that ran ahead must not run away with it. A lower
bound may lag, and does no harm: it follows the clock only so far beyond what the last timestamp said, and further as time that
this process measured goes by.
"""

from __future__ import annotations

MOST_AHEAD_S = 7 * 86_400
"""How far the clock may be beyond the last timestamp and still be believed: as long as fleet and snapshot live."""
_PLAUSIBLE_S = 1_704_067_200
"""2024. What was signed before that was signed by a clock that nobody had set, and bounds nothing."""


def plausible(signed_s: int) -> bool:
    """Whether a clock that somebody had set said so."""
    return signed_s >= _PLAUSIBLE_S


def signing_time_s(now_s: int, last_s: int, begun_s: int, elapsed_s: float) -> int:
    """What the next timestamp says, seconds since 1970.

    Args:
        now_s: the server's wall clock.
        last_s: what the last timestamp says, 0 without one whose key root still names.
        begun_s: what the last one said when this process began to count.
        elapsed_s: since then, by a clock that nobody sets. Counted twice, so that a server that was off for long catches up.

    >>> start = 1_800_000_000
    >>> [signing_time_s(start + days * 86_400, start, start, 0.0) - start for days in (-3, 2, 400)]
    [0, 172800, 604800]
    >>> signing_time_s(start, 0, 0, 0.0) == start
    True
    """
    if not plausible(min(last_s, begun_s)):
        return max(now_s, last_s)
    return max(last_s, min(now_s, begun_s + MOST_AHEAD_S + int(2 * elapsed_s)))
