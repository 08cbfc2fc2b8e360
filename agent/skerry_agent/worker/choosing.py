"""Which answered rows are explained, and which are kept as samples: a function of the row, decided while a window is folded.

A request pays nothing: what it asked and answered stands in the recorder's ring. The choice by share is a hash of the row's
place (``hash_of``), so whoever knows a prediction's id can tell whether it was chosen, and a larger share contains a smaller one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from skerry_agent.worker.plan import Plan

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


class Row(NamedTuple):
    """A chosen row. ``values``: as the plan lays them out; ``predicted``: class, -1 for none."""

    position: int
    at_ns: int
    values: npt.NDArray[np.float64]
    predicted: int
    why: str = "share"


class Rows(NamedTuple):
    """Answered rows of a fold: one entry each."""

    positions: npt.NDArray[np.uint64]
    at_ns: npt.NDArray[np.int64]
    values: npt.NDArray[np.floating]
    predicted: npt.NDArray[np.int64] | None
    hashes: npt.NDArray[np.uint64]

    def take(self, mask: npt.NDArray[np.bool_], why: str = "share") -> list[Row]:
        """The rows of a mask, copied: the ring goes on."""
        predicted = self.predicted
        return [
            Row(
                int(self.positions[i]),
                int(self.at_ns[i]),
                self.values[i].astype(np.float64),
                -1 if predicted is None else int(predicted[i]),
                why,
            )
            for i in np.flatnonzero(mask)
        ]


Tally = Callable[[str, int], None]


class Choice:
    """What a fold shows its rows to.

    Args:
        plan: says what is explained.
        seed: of the ring.
        explain: takes chosen rows, returns how many it took; the rest is counted as dropped. None: nobody explains.
        sample: looks at all rows. None: none are kept.
    """

    def __init__(
        self,
        plan: Plan,
        seed: int,
        *,
        explain: Callable[[list[Row]], int] | None = None,
        sample: Callable[[Rows, Tally], None] | None = None,
    ) -> None:
        self._plan = plan
        self._seed = seed
        self._explain = explain
        self._sample = sample
        self._audit = np.array(plan.explain.audit if plan.explain is not None else (), np.int64)

    @property
    def idle(self) -> bool:
        """Whether nothing is ever chosen."""
        return self._plan.explain is None and self._sample is None

    def look(
        self,
        positions: npt.NDArray[np.int64],
        at_ns: npt.NDArray[np.int64],
        values: npt.NDArray[np.floating],
        predicted: npt.NDArray[np.int64] | None,
        tally: Tally,
    ) -> None:
        """Chooses among rows. ``tally``: adds to a count of the window under way."""
        places = positions.astype(np.uint64)
        rows = Rows(places, at_ns, values, predicted, hashes_of(self._seed, places))
        if self._plan.explain is not None:
            mask = chosen(rows.hashes, self._plan.explain.share)
            if len(self._audit) and predicted is not None:
                mask |= np.isin(predicted, self._audit)
            n = int(np.count_nonzero(mask))
            if n:
                taken = self._explain(rows.take(mask)) if self._explain is not None else 0
                tally("explain.chosen", n)
                if n > taken:
                    tally("explain.dropped", n - taken)
        if self._sample is not None:
            self._sample(rows, tally)


def seed_of(prefix: str) -> int:
    """The seed of a ring: of what its prediction ids begin with.

    >>> hex(seed_of("gas-00c0ffee00-"))
    '0x70bea3d5de90d7e8'
    """
    return int.from_bytes(hashlib.blake2b(prefix.encode(), digest_size=8).digest(), "little")


def hash_of(seed: int, position: int) -> int:
    """64 bits of a row's place: number ``position`` of the splitmix64 sequence (Steele, Lea and Flood 2014) of the seed.

    >>> hex(hash_of(0, 0))
    '0xe220a8397b1dcdaf'
    """
    z = (seed + (position + 1) * _GOLDEN) & _MASK
    z = (z ^ (z >> 30)) * _FIRST & _MASK
    z = (z ^ (z >> 27)) * _SECOND & _MASK
    return z ^ (z >> 31)


def hashes_of(seed: int, positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """``hash_of`` of many."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (positions + np.uint64(1)) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))


def chosen(hashes: npt.NDArray[np.uint64], share: float) -> npt.NDArray[np.bool_]:
    """Which hashes lie below the share of all."""
    if share >= 1:
        return np.ones(len(hashes), np.bool_)
    return hashes < np.uint64(int(share * 2.0**64))
