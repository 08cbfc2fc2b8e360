"""Where bytes of a target stand in its base, when nothing is known about either: copies with few differences, as bsdiff finds.

Every eight bytes of the base are hashed and sorted; each place of the target that no match covers yet is looked up, and what is
found grows in both directions as long as more bytes agree than not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_KEY = 8
_LEAST = 16
"""Agreeing bytes below which a match costs more than it saves."""
_TRIED = 8
"""Candidates of one place that are compared."""
_AHEAD = 1 << 14


@dataclass(frozen=True, slots=True)
class Match:
    """``size`` bytes of the target at ``at`` stand in the base at ``base``; some may differ."""

    at: int
    base: int
    size: int


class Index:
    """Where each eight bytes stand in a base."""

    def __init__(self, base: Bytes) -> None:
        self.base = base
        keys = _keys(base)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def matches(self, target: Bytes, start: int, end: int) -> Iterator[Match]:
        """Matches within ``target[start:end]``, in order, apart from each other."""
        base, part = self.base, target[start:end]
        if len(part) < _KEY or not len(self._sorted):
            return
        keys = _keys(part)
        first = np.searchsorted(self._sorted, keys, "left")
        found = np.flatnonzero(self._sorted[np.minimum(first, len(self._sorted) - 1)] == keys)
        at, shift = 0, None  # what is covered, and how far the last match stood from its place
        step = 0
        while step < len(found):
            place = int(found[step])
            if place < at:
                step = int(np.searchsorted(found, at))
                continue
            where, size = self._best(part, place, int(first[place]), int(keys[place]), shift)
            if size < _LEAST:
                step += 1
                continue
            back = _backward(base, part, where, place, at)
            size = back + _forward(base, part, where, place)
            yield Match(start + place - back, where - back, size)
            at, shift = place - back + size, where - place

    def _best(self, part: Bytes, place: int, first: int, key: int, shift: int | None) -> tuple[int, int]:
        best = (0, 0)
        candidates = [int(self._order[i]) for i in range(first, min(first + _TRIED, len(self._order)))
                      if int(self._sorted[i]) == key]  # fmt: skip
        if shift is not None and 0 <= place + shift <= len(self.base) - _KEY:
            candidates.insert(0, place + shift)
        for where in candidates:
            size = _agree(self.base, part, where, place)
            if size > best[1]:
                best = (where, size)
        return best


def _keys(data: Bytes) -> NDArray[np.uint64]:
    if len(data) < _KEY:
        return np.zeros(0, np.uint64)
    n = len(data) - _KEY + 1
    keys = np.zeros(n, np.uint64)
    for i in range(_KEY):
        keys = (keys << np.uint64(8)) | data[i : i + n].astype(np.uint64)
    return keys


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


def _forward(base: Bytes, part: Bytes, where: int, place: int) -> int:
    """How far a match goes with differences in it: to where agreeing bytes outweigh the others most."""
    size = 0
    while True:
        n = min(_AHEAD, len(base) - where - size, len(part) - place - size)
        if n <= 0:
            return size
        a, b = where + size, place + size
        same = base[a : a + n] == part[b : b + n]
        score = np.cumsum(np.where(same, 1, -1))
        best = int(np.argmax(score))
        grown = best + 1 if score[best] > 0 else 0
        size += grown
        if grown < n:
            return size


def _backward(base: Bytes, part: Bytes, where: int, place: int, least: int) -> int:
    n = min(where, place - least, _AHEAD)
    if n <= 0:
        return 0
    same = base[where - n : where][::-1] == part[place - n : place][::-1]
    score = np.cumsum(np.where(same, 1, -1))
    best = int(np.argmax(score))
    return best + 1 if score[best] > 0 else 0
