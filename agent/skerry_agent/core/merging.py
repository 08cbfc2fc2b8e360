"""Windows of one key become as few as they may: what a merged window may hold has an end, which its sums reach some day.

A broken sensor is enough: of values far off, 2**23 rows make a sum of squares that no reader takes. A window that the contract
refuses would be lost with all its inferences, so what would not fit stays a window of its own.

Given are windows in the order in which they were cut, so of two boots it is known which came first, whatever the wall clock said:
without one that was set, or after it jumped, the instants alone do not tell.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def merge_next(a: w.Window, b: w.Window) -> w.Window:
    """The window of both, of which ``b`` was cut after ``a``: it begins in the boot of ``a`` and ends in that of ``b``. Associative.

    Raises:
        ValueError: keys or bins differ.
    """
    start, end = a.start, b.end
    if b.start.boot_id == start.boot_id:
        start = min(start, b.start, key=_of_a_boot)
    if a.end.boot_id == end.boot_id:
        end = max(end, a.end, key=_of_a_boot)
    return msgspec.structs.replace(w.merge(a, b), start=start, end=end)


def _of_a_boot(at: w.Instant) -> tuple[int, int]:
    return at.boot_ns, at.wall_ms


def merge_some(windows: Iterable[w.Window]) -> tuple[tuple[w.Window, int], ...]:
    """Merges neighbours as long as the result fits. Returns the windows and how many of the given ones each stands for.

    Raises:
        ValueError: keys or bins differ.
    """
    given = tuple(windows)
    if not given:
        return ()
    whole = reduce(merge_next, given)
    if fits(whole):
        return ((whole, len(given)),)
    found: list[tuple[w.Window, int]] = [(given[0], 1)]
    for window in given[1:]:
        last, n = found[-1]
        merged = merge_next(last, window)
        if fits(merged):
            found[-1] = merged, n + 1
        else:
            found.append((window, 1))
    return tuple(found)
