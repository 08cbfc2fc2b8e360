"""Where bytes of a large target stand in its base: blocks of the base are looked up by what rolls over the target, as rsync does.

``matching`` sorts all places, which takes some 160 bytes of memory for each. Here a place of the base costs two or three, and what agrees for less
than a block and the step between two blocks is not found. How a match grows is the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from skerry_runtime.delta.matching import Bytes, Matches

_Hashes = NDArray[np.uint64]
_Ints = NDArray[np.int64]

_LEAST_STEP = 8
_STEPS_MOST = 1 << 22
"""So many blocks of a base are remembered; of a larger one they lie further apart."""
_FACTOR = 0x9E3779B97F4A7C15
_ASKED = 1 << 18
"""Places of the target that are looked up at a time."""
_THINNED = 8
"""Of places side by side that are all found (zeros, say) every so manieth is kept: matches grow to both sides."""
_FILTER_MOST_BITS = 26


class Blocks(Matches):
    """As ``Matches``."""

    def __init__(
        self, base: Bytes, target: Bytes, asked: list[tuple[int, int]], searched: list[tuple[int, int]] | None = None
    ) -> None:
        self.base, self.target = base, target
        parts = searched if searched is not None else [(0, len(base))]
        total = sum(end - start for start, end in parts)
        step = _LEAST_STEP
        while total > step * _STEPS_MOST:
            step *= 2
        self._size = 2 * step
        found = list(self._rolled(base, parts, step))
        hashes = np.concatenate([np.zeros(0, np.uint64), *(one for one, _ in found)])
        places = np.concatenate([np.zeros(0, np.int64), *(one for _, one in found)])
        # What stands in the base more than once is looked for at its first place.
        self._hashes, first = np.unique(hashes, return_index=True)
        self._where = places[first]
        bits = min(_FILTER_MOST_BITS, 4 + max(1, len(self._hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)
        self._filter[self._hashes >> self._shift] = True
        pairs = [self._looked_up(hashes, places) for hashes, places in self._rolled(target, asked, 1)]
        self._at = np.concatenate([np.zeros(0, np.int64), *(at for at, _ in pairs)])
        self._beside = np.concatenate([np.zeros(0, np.int64), *(where for _, where in pairs)])

    def _rolled(self, data: Bytes, parts: list[tuple[int, int]], step: int) -> Iterator[tuple[_Hashes, _Ints]]:
        """Every ``step``-th place and the hash of the block there, by pieces."""
        for start, end in parts:
            for at in range(start, end - self._size + 1, _ASKED):
                stop = min(at + _ASKED, end - self._size + 1)
                hashes = _hashes(data[at : stop + self._size - 1], self._size)
                yield hashes[::step].copy(), np.arange(at, stop, step)

    def _looked_up(self, hashes: _Hashes, places: _Ints) -> tuple[_Ints, _Ints]:
        if not len(self._hashes):
            return places[:0], places[:0]
        likely = np.flatnonzero(self._filter[hashes >> self._shift])
        there = np.minimum(np.searchsorted(self._hashes, hashes[likely]), len(self._hashes) - 1)
        same = self._hashes[there] == hashes[likely]
        likely, there = likely[same], there[same]
        begins = np.concatenate([[True], np.diff(likely) > 1])[: len(likely)]
        runs = likely - likely[np.maximum.accumulate(np.where(begins, np.arange(len(likely)), 0))]
        kept = runs % _THINNED == 0
        return places[likely[kept]], self._where[there[kept]]

    def _between(self, start: int, end: int) -> tuple[_Ints, _Ints]:
        first, last = np.searchsorted(self._at, [start, end])
        return self._at[first:last] - start, self._beside[first:last]


def _hashes(data: Bytes, size: int) -> _Hashes:
    """Of each block of ``size`` bytes, a power of two: a polynomial over its bytes, made of those of its halves."""
    found, width, factor = data.astype(np.uint64) + np.uint64(1), 1, _FACTOR
    while width < size:
        found = found[:-width] * np.uint64(factor) + found[width:]
        width, factor = 2 * width, factor * factor % (1 << 64)
    return found * np.uint64(_FACTOR)
