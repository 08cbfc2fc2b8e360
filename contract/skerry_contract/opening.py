"""Maintenance windows: in which hours of a week another bundle may begin to answer, by the device's local time. Pure.

A window has days, a start and an end; one whose end does not lie after its start goes on into the next day. Nothing here reads a clock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import msgspec

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MOST_WINDOWS = 32
_DAY_MIN = 24 * 60
_TIME = re.compile(r"(?:[01][0-9]|2[0-3]):[0-5][0-9]|24:00")


class Window(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``days`` on which it starts, empty for all; ``start`` and ``end`` as ``HH:MM``, ``24:00`` for the end of the day."""

    start: str
    end: str
    days: tuple[Day, ...] = ()


def fault(window: Window) -> str | None:
    """What is wrong with a window; None where nothing is."""
    for name, text in (("start", window.start), ("end", window.end)):
        if _TIME.fullmatch(text) is None or (name == "start" and text == "24:00"):
            return f"{name}: wanted a time as 22:30, got {text!r}"
    if window.start == window.end:
        return f"wanted an end other than its start {window.start}; all day is 00:00 to 24:00"
    if len(set(window.days)) != len(window.days):
        return f"days: wanted each once, got {', '.join(window.days)}"
    return None


def is_open(windows: Iterable[Window], weekday: int, minute: int) -> bool:
    """Whether one of them is open.

    Args:
        weekday: 0 for Monday; minute: of the day, 0 to 1439.

    >>> night = Window(start="22:00", end="04:00", days=("fri",))
    >>> [is_open([night], *at) for at in ((4, 22 * 60), (5, 3 * 60 + 59), (5, 4 * 60), (4, 3 * 60))]
    [True, True, False, False]
    """
    return any(_covers(window, weekday, minute) for window in windows)


def _covers(window: Window, weekday: int, minute: int) -> bool:
    start, end = _minute(window.start), _minute(window.end)
    if end <= start:
        end += _DAY_MIN
    for day in window.days or DAYS:
        since = ((weekday - DAYS.index(day)) % 7) * _DAY_MIN + minute
        if start <= since < end:
            return True
    return False


def _minute(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return int(hours) * 60 + int(minutes)


def words(windows: Iterable[Window]) -> str:
    """As a person reads them.

    >>> words([Window(start="22:00", end="04:00", days=("fri", "sat")), Window(start="12:00", end="13:00")])
    'fri sat 22:00-04:00, daily 12:00-13:00'
    """
    return ", ".join(f"{' '.join(one.days) or 'daily'} {one.start}-{one.end}" for one in windows)
