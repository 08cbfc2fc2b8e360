"""Maintenance windows: which minutes of a week are open, and what is no window."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import group as g
from skerry_contract import opening
from skerry_contract.errors import Malformed

TIMES = st.integers(0, 1439).map(lambda minute: f"{minute // 60:02}:{minute % 60:02}")
WINDOWS = st.builds(
    opening.Window, start=TIMES, end=TIMES, days=st.lists(st.sampled_from(opening.DAYS), unique=True).map(tuple)
)


@given(WINDOWS)
def test_a_window_is_open_for_its_length_on_each_of_its_days(window: opening.Window) -> None:
    if opening.fault(window) is not None:
        assert window.start == window.end
        return
    start, end = (int(text[:2]) * 60 + int(text[3:]) for text in (window.start, window.end))
    minutes = sum(opening.is_open([window], day, minute) for day in range(7) for minute in range(1440))
    assert minutes == ((end - start) % 1440) * len(window.days or opening.DAYS)


def test_all_day_is_every_minute_and_no_window_is_none() -> None:
    every = [opening.Window(start="00:00", end="24:00")]
    assert all(opening.is_open(every, day, minute) for day in range(7) for minute in range(0, 1440, 7))
    assert not opening.is_open([], 0, 0)


@pytest.mark.parametrize(
    "window",
    [
        {"start": "24:00", "end": "01:00"},
        {"start": "2:00", "end": "03:00"},
        {"start": "02:00", "end": "25:00"},
        {"start": "02:60", "end": "03:00"},
        {"start": "02:00", "end": "02:00"},
        {"start": "02:00", "end": "03:00", "days": ("mon", "mon")},
    ],
)
def test_what_is_no_window_is_refused_in_the_group_document(window: dict[str, Any]) -> None:
    def document(*windows: opening.Window) -> g.GroupDocument:
        settings = g.Settings(windows=windows)
        return g.GroupDocument(schema=1, group="g", generation=1, requires=("windows",), settings=settings)

    good = opening.Window(start="02:00", end="03:00", days=("mon",))
    assert g.parse(g.encode(document(good))).settings.windows == (good,)
    with pytest.raises(Malformed, match=r"\$\.settings\.windows\[1\]"):
        g.encode(document(good, opening.Window(**window)))
    with pytest.raises(Malformed, match="at most 32"):
        g.encode(document(*[good] * 33))
