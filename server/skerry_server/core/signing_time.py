"""The time that a timestamp says it was signed at. Pure.

Devices take it as a lower bound of now, for good; so it never goes back, and a clock that ran ahead must not run away with it. Nor may
it stand still where the clock is behind: what is signed then would have ended for every device whose clock is right. So it keeps
to a line, what the last timestamp said and the time that this process measured since, by a clock that nobody sets. It is never
behind that line, and goes before it, on the wall clock's word, by a week at most, and by as much more as time goes by. A process that
begins where the clock was further ahead than that has no other week: else each start of a server whose clock is wrong would add one.

Only where this process saw the clock leave for ahead and come back to where it had been does the time stand still until the clock
has caught up: then what was signed in between was wrong, and the clock is not.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_AHEAD_S = 7 * 86_400
"""How far the clock may be beyond the line and still be believed: as long as fleet and snapshot live."""
ASTRAY_S = 3_600
"""A clock that is off by less is not worth a word."""
_PLAUSIBLE_S = 1_704_067_200
"""2024. What was signed before that was signed by a clock that nobody had set, and bounds nothing."""


def plausible(signed_s: int) -> bool:
    """Whether a clock that somebody had set said so."""
    return signed_s >= _PLAUSIBLE_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """What a process holds of the time between two timestamps.

    Attributes:
        last_s: what the last timestamp says.
        at_s: when the process found or signed it, by a clock that nobody sets.
        spare_s: how far beyond the line the wall clock is still believed; it grows as time goes by, to ``MOST_AHEAD_S``.
        home_s: the wall clock's lead over that clock when the process began; None when the wall clock was behind even then.
    """

    last_s: int
    at_s: float
    spare_s: float
    home_s: float | None

    @classmethod
    def begun(cls, now_s: int, last_s: int, at_s: float, clock_s: int = 0) -> Count:
        """Of a process that finds a timestamp which says ``last_s`` and was signed when the wall clock said ``clock_s``.

        >>> [Count.begun(900, last_s=300, at_s=0.0, clock_s=clock_s).spare_s for clock_s in (300, 880, 1000)]
        [604800.0, 20.0, 0.0]
        """
        home_s = now_s - at_s if now_s >= last_s else None
        spare_s = float(MOST_AHEAD_S)
        if clock_s > last_s:
            # It was believed as far as it is: what it may be believed beyond that is what went by since.
            spare_s = min(spare_s, max(0.0, float(now_s - clock_s)))
        return cls(last_s=last_s, at_s=at_s, spare_s=spare_s, home_s=home_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What the next timestamp says, seconds since 1970; whether the wall clock is behind; what to hold once it is signed."""

    signed_s: int
    behind: bool
    count: Count


def judge(now_s: int, at_s: float, count: Count) -> Judged:
    """See the module. ``now_s``: the wall clock; ``at_s``: the clock that nobody sets.

    >>> day, start = 86_400, 1_800_000_000
    >>> begun = Count.begun(start, start, 0.0)
    >>> [(judge(start + days * day, 0.0, begun).signed_s - start) // day for days in (-3, 2, 400)]
    [0, 2, 7]
    >>> [(found.signed_s - start, found.behind) for found in [judge(start - 3 * day, 2.0 * day, begun)]]
    [(172800, True)]
    >>> ahead = judge(start + 5 * day, 60.0, begun).count
    >>> [(found.signed_s - start) // day for found in [judge(start + 2 * day, 2.0 * day, ahead)]]
    [5]
    """
    gone_s = max(0.0, at_s - count.at_s)
    line_s = count.last_s + int(gone_s)
    spare_s = min(float(MOST_AHEAD_S), count.spare_s + gone_s)
    returned = count.home_s is not None and abs(now_s - at_s - count.home_s) <= ASTRAY_S
    signed_s = max(count.last_s if returned else line_s, min(now_s, line_s + int(spare_s)))
    return Judged(
        signed_s=signed_s,
        behind=now_s < line_s - ASTRAY_S and not returned,
        count=Count(
            last_s=signed_s,
            at_s=at_s - (gone_s - int(gone_s)),
            spare_s=spare_s - max(0, signed_s - line_s),
            home_s=count.home_s,
        ),
    )


def known_s(expires: dict[str, int], lives_s: dict[str, int]) -> int:
    """When the newest of the offline roles was signed, as its holders' clocks had it; 0 without one.

    The first timestamp of an online key has no other before it that counts; root and targets that name the key were signed just then.

    Args:
        expires: role -> seconds since 1970. lives_s: role -> how long it is signed for.

    >>> known_s({"root": 1000, "catalog": 700}, {"root": 365, "catalog": 180})
    635
    """
    return max((ends - lives_s[role] for role, ends in expires.items() if role in lives_s), default=0)
