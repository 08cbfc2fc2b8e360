"""Windows of one key become as few as they may: what a merged window may hold has an end, which its sums reach some day.

A broken sensor is enough: of values far off, 2**23 rows make a sum of squares that no reader takes. A window that the contract
refuses would be lost with all its inferences, so what would not fit stays a window of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

from skerry_contract import window as w
from skerry_contract.errors import ContractError


def fits(window: w.Window) -> bool:
    """Whether a reader takes it."""
    try:
        w.check(window)
    except ContractError:
        return False
    return True


def merge_some(windows: Iterable[w.Window]) -> tuple[tuple[w.Window, int], ...]:
    """Merges neighbours as long as the result fits. Returns the windows and how many of the given ones each stands for.

    Raises:
        ValueError: keys or bins differ.
    """
    given = tuple(windows)
    if not given:
        return ()
    whole = reduce(w.merge, given)
    if fits(whole):
        return ((whole, len(given)),)
    found: list[tuple[w.Window, int]] = [(given[0], 1)]
    for window in given[1:]:
        last, n = found[-1]
        merged = w.merge(last, window)
        if fits(merged):
            found[-1] = merged, n + 1
        else:
            found.append((window, 1))
    return tuple(found)
