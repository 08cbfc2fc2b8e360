"""Windows of one key become as few as they may: what a merged window may hold has an end, which its sums reach some day.

A broken sensor is enough: of values far off, 2**23 rows make a sum of squares that no reader takes. A window that the contract
refuses would be lost with all its inferences, so what would not fit stays a window of its own.

Without a clock that was set, or after it jumped, instants do not tell which of two boots came first; the device knows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import msgspec
from skerry_contract import window as w
from skerry_contract.errors import ContractError


def fits(window: w.Window) -> bool:
    """Whether a reader takes it."""
    try:
        w.check(window)
    except ContractError:
        return False
    return True


def merge_two(a: w.Window, b: w.Window, boots: Sequence[str] = ()) -> w.Window:
    """The window of both.

    Args:
        boots: ids of boots in their order. Where they name all that is asked for, they place start and end, else the wall clock does.

    Raises:
        ValueError: keys or bins differ.
    """
    merged = w.merge(a, b)
    place = {boot: i for i, boot in enumerate(boots)}
    if not {at.boot_id for one in (a, b) for at in (one.start, one.end)} <= place.keys():
        return merged

    def order(at: w.Instant) -> tuple[int, int]:
        return place[at.boot_id], at.boot_ns

    return msgspec.structs.replace(merged, start=min(a.start, b.start, key=order), end=max(a.end, b.end, key=order))


def merge_some(windows: Iterable[w.Window], boots: Sequence[str] = ()) -> tuple[tuple[w.Window, int], ...]:
    """Merges neighbours as long as the result fits. Returns the windows and how many of the given ones each stands for.

    ``boots``: as ``merge_two``.

    Raises:
        ValueError: keys or bins differ.
    """
    given = tuple(windows)

    def merge(a: w.Window, b: w.Window) -> w.Window:
        return merge_two(a, b, boots)

    if not given:
        return ()
    whole = reduce(merge, given)
    if fits(whole):
        return ((whole, len(given)),)
    found: list[tuple[w.Window, int]] = [(given[0], 1)]
    for window in given[1:]:
        last, n = found[-1]
        merged = merge(last, window)
        if fits(merged):
            found[-1] = merged, n + 1
        else:
            found.append((window, 1))
    return tuple(found)
