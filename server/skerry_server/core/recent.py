"""Results of a pure function for what it was last asked, kept as long as they are small enough together."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Keeps what was asked for last, up to ``most_bytes`` in all; the newest always.

    Bounded by weight and not by number: how many are in use at once is for others to say, how much memory they may take is not.
    For several threads without a lock: what is kept is replaced whole, so of two that ask at once one may have to work out again.
    """

    def __init__(self, make: Callable[[K], V], weigh: Callable[[K, V], int], *, most_bytes: int) -> None:
        """``weigh``: about how many bytes a key and its result take."""
        self._make = make
        self._weigh = weigh
        self._most = most_bytes
        self._kept: dict[K, tuple[V, int]] = {}

    def __call__(self, key: K) -> V:
        """What the function gives for the key."""
        found = self._kept.get(key)
        if found is None:
            value = self._make(key)
            found = (value, self._weigh(key, value))
        kept = dict(self._kept)
        kept.pop(key, None)
        # The last place is that of the newest.
        kept[key] = found
        while len(kept) > 1 and _sum(kept) > self._most:
            del kept[next(iter(kept))]
        self._kept = kept
        return found[0]

    @property
    def weight(self) -> int:
        """Bytes of all that is kept."""
        return _sum(self._kept)


def _sum(kept: dict[K, tuple[V, int]]) -> int:
    return sum(weight for _, weight in kept.values())
