"""Where bytes of a target stand in its base, when nothing is known about either: copies with few differences, as bsdiff finds.

All places of base and target are sorted by what follows them, so that the neighbours of a target's place are the places of the
base with which it agrees longest. A match that was found grows in both directions over differences as long as it pays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_Ints = NDArray[np.int64]

_KEY = 8
_LEAST = 12
"""Agreeing bytes below which a match costs more than it saves."""
_SORTED_BY_MOST = 1 << 12
"""Bytes by which places are told apart."""
_AHEAD = 1 << 14
DIFFERS = 4


@dataclass(frozen=True, slots=True)
class Match:
    """``size`` bytes of the target at ``at`` stand in the base at ``base``; some may differ."""

    at: int
    base: int
    size: int


class Matches:
    """For the places of a target that are asked about, where their bytes stand in a base.

    Args:
        base: the whole base.
        target: the whole target.
        asked: parts of the target, begin and end, in order.
        searched: parts of the base; None for all of it.
    """

    def __init__(
        self, base: Bytes, target: Bytes, asked: list[tuple[int, int]], searched: list[tuple[int, int]] | None = None
    ) -> None:
        self.base, self.target = base, target
        old = _places(searched if searched is not None else [(0, len(base))])
        new = _places(asked)
        best = _longest(base[old], target[new])
        self._best = np.full(len(target), -1, np.int64)
        found = best >= 0
        self._best[new[found]] = old[best[found]]

    def within(self, start: int, end: int, differs: int = DIFFERS) -> Iterator[Match]:
        """Matches in ``target[start:end]``, in order, apart from each other; one difference costs as many agreeing bytes."""
        base, part = self.base, self.target[start:end]
        found, beside = self._between(start, end)
        covered, shift, step = 0, None, 0
        while step < len(found):
            place = int(found[step])
            if place < covered:
                step = int(np.searchsorted(found, covered))
                continue
            where = int(beside[step])
            size = _agree(base, part, where, place)
            # Where the last match would go on as well, nothing need be said of it.
            if shift is not None and 0 <= place + shift < len(base):
                same = _agree(base, part, place + shift, place)
                if same >= max(size - 4, _KEY):
                    where, size = place + shift, same
            if size < _LEAST:
                step += 1
                continue
            back = _backward(base, part, where, place, covered, differs)
            size = back + _forward(base, part, where, place, differs)
            yield Match(start + place - back, where - back, size)
            covered, shift = place - back + size, where - place

    def _between(self, start: int, end: int) -> tuple[_Ints, _Ints]:
        """Places of ``target[start:end]``, from its begin, that the base has, in order; and where."""
        best = self._best[start:end]
        found = np.flatnonzero(best >= 0)
        return found, best[found]


def _places(parts: list[tuple[int, int]]) -> _Ints:
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(start, end) for start, end in parts)])


def _longest(base: Bytes, target: Bytes) -> _Ints:
    """For each place of the target one of the base that agrees longest, -1 where fewer than eight bytes do.

    By ranks of prefixes that double in length: Manber and Myers, "Suffix arrays", 1993.
    """
    n = len(base) + 1 + len(target)
    if len(base) < _KEY or len(target) < _KEY:
        return np.full(len(target), -1, np.int64)
    whole = np.concatenate(
        [base.astype(np.uint64) + np.uint64(1), [np.uint64(0)], target.astype(np.uint64) + np.uint64(1)]
    )
    padded = np.concatenate([whole, np.zeros(_KEY, np.uint64)])
    keys = np.zeros(n, np.uint64)
    for i in range(7):
        keys = keys * np.uint64(257) + padded[i : i + n]
    order = _sorted(keys)
    # In sorted order: the nearest place of the base before and after each.
    of_base = order < len(base)
    at = np.arange(n)
    before = np.maximum.accumulate(np.where(of_base, at, -1))
    after = np.minimum.accumulate(np.where(of_base, at, n)[::-1])[::-1]
    best = np.full(len(target), -1, np.int64)
    most = np.full(len(target), _KEY - 1, np.int64)
    sorted_target = np.flatnonzero(order > len(base))
    place = order[sorted_target] - len(base) - 1
    for nearest in (before, after):
        beside = nearest[sorted_target]
        there = (beside >= 0) & (beside < n)
        where, mine = order[beside[there]], place[there]
        size = _agreeing(base, target, where, mine)
        longer = size > most[mine]
        best[mine[longer]], most[mine[longer]] = where[longer], size[longer]
    return best


def _sorted(keys: NDArray[np.uint64]) -> _Ints:
    """Places in the order of what follows them, of which the keys are the first seven bytes; equal places stand anyhow."""
    n, length = len(keys), 7
    order = np.argsort(keys, kind="stable")
    slots, firsts = np.arange(n), _firsts(keys[order], np.arange(n))
    # A place's rank is the first slot of those that look like it so far.
    rank = np.empty(n, np.int64)
    rank[order] = firsts
    while length < _SORTED_BY_MOST:
        alike = np.bincount(rank, minlength=n)[rank[order[slots]]] > 1
        slots = slots[alike]
        if not len(slots):
            break
        places = order[slots]
        further = np.where(places + length < n, rank[np.minimum(places + length, n - 1)] + 1, 0)
        both = rank[places] * np.int64(n + 1) + further
        again = np.argsort(both, kind="stable")
        order[slots] = places[again]
        rank[places[again]] = _firsts(both[again], slots)
        length *= 2
    return order


def _firsts(keys: NDArray[np.int64] | NDArray[np.uint64], slots: _Ints) -> _Ints:
    """For sorted keys, the slot of the first that equals each."""
    differs = np.concatenate([[True], keys[1:] != keys[:-1]])
    return np.maximum.accumulate(np.where(differs, slots, 0))


def _agreeing(base: Bytes, target: Bytes, where: _Ints, place: _Ints) -> _Ints:
    """How many bytes agree of each pair of places, up to 64: enough to choose by."""
    size = np.zeros(len(where), np.int64)
    going = np.arange(len(where))
    for step in range(64):
        a, b = where[going] + step, place[going] + step
        inside = (a < len(base)) & (b < len(target))
        going, a, b = going[inside], a[inside], b[inside]
        going = going[base[a] == target[b]]
        if not len(going):
            break
        size[going] += 1
    return size


def _agree(base: Bytes, part: Bytes, where: int, place: int) -> int:
    """How many bytes agree without a difference."""
    size, step = 0, 64
    while True:
        n = min(step, len(base) - where - size, len(part) - place - size)
        if n <= 0:
            return size
        a, b = where + size, place + size
        differ = np.flatnonzero(base[a : a + n] != part[b : b + n])
        if len(differ):
            return size + int(differ[0])
        size, step = size + n, min(step * 4, 1 << 20)


def _forward(base: Bytes, part: Bytes, where: int, place: int, differs: int) -> int:
    """How far a match goes with differences in it: to where agreeing bytes outweigh the others most."""
    size = 0
    while True:
        n = min(_AHEAD, len(base) - where - size, len(part) - place - size)
        old, new = base[where + size : where + size + max(n, 0)], part[place + size : place + size + max(n, 0)]
        grown = _grown(old, new, differs)
        size += grown
        if grown < n or n <= 0:
            return size


def _backward(base: Bytes, part: Bytes, where: int, place: int, least: int, differs: int) -> int:
    n = max(min(where, place - least, _AHEAD), 0)
    return _grown(base[where - n : where][::-1], part[place - n : place][::-1], differs)


def _grown(old: Bytes, new: Bytes, differs: int) -> int:
    """To where a match pays most, before it has paid nothing for long."""
    score = np.cumsum(np.where(old == new, 1, -differs))
    given_up = np.flatnonzero(np.maximum.accumulate(np.maximum(score, 0)) - score > 32)
    if len(given_up):
        score = score[: int(given_up[0])]
    best = int(np.argmax(score)) if len(score) else 0
    return best + 1 if len(score) and score[best] > 0 else 0
