"""What holds an update back: who, for how long, and what is never held."""

from __future__ import annotations

import math
from typing import Any

import pytest
from skerry_agent.core import holds
from skerry_contract import opening

BOOT = "b" * 32


def lock(owner: str = "welder", *, for_s: float = 600.0, until_s: float = 700.0, boot_id: str = BOOT) -> holds.Lock:
    return holds.Lock(owner=owner, reason="a seam", for_s=for_s, boot_id=boot_id, until_s=until_s)


def test_a_lock_ends_by_the_time_since_boot() -> None:
    assert holds.live([lock()], BOOT, 699.0) == (lock(),)
    assert holds.live([lock()], BOOT, 700.0) == ()


def test_a_reboot_begins_a_lock_anew_and_it_still_ends() -> None:
    assert lock().left_s("c" * 32, 0.0) == 600.0
    assert holds.live([lock()], "c" * 32, 599.0)
    assert not holds.live([lock()], "c" * 32, 600.0)


def test_every_holder_of_a_lock_is_named() -> None:
    found = holds.held(
        holds.Holders(answers=True, locks=holds.live([lock("a"), lock("b", until_s=900.0)], BOOT, 100.0))
    )
    assert found == "the lock of b to end (a seam); the lock of a to end (a seam)"


@pytest.mark.parametrize(
    ("holders", "is_held"),
    [
        (holds.Holders(answers=True), False),
        (holds.Holders(answers=True, locks=(lock(),)), True),
        (holds.Holders(answers=False, locks=(lock(),), by_command=True), False),
        (holds.Holders(answers=True, by_command=True), True),
        (holds.Holders(answers=True, by_command=True, ordered=True), False),
        (holds.Holders(answers=True, locks=(lock(),), ordered=True), True),
        (holds.Holders(answers=True, locks=(lock(),), ordered=True, despite_locks=True), False),
    ],
)
def test_an_order_beats_the_hour_and_a_lock_only_where_it_says_so(holders: holds.Holders, is_held: bool) -> None:
    assert bool(holds.held(holders)) == is_held


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"owner": ""}, "owner"),
        ({"owner": "a\nb"}, "owner"),
        ({"owner": "x" * 201}, "owner"),
        ({"reason": "  "}, "reason"),
        ({"reason": 3}, "reason"),
        ({"for_s": 0}, "for_s"),
        ({"for_s": True}, "for_s"),
        ({"for_s": math.inf}, "for_s"),
        ({"for_s": math.nan}, "for_s"),
        ({"for_s": 3601}, "updates.lock_s"),
    ],
)
def test_a_lock_that_cannot_be_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    good: dict[str, Any] = {"owner": "welder", "reason": "a seam", "for_s": 3600}
    assert holds.lock_fault(**good, most_s=3600.0) is None
    assert named in str(holds.lock_fault(**{**good, **given}, most_s=3600.0))


NIGHT = (opening.Window(start="22:00", end="04:00", days=("fri",)),)


@pytest.mark.parametrize(
    ("local", "more", "waits_for"),
    [
        ((4, 23 * 60), {}, ""),
        ((5, 3 * 60), {}, ""),
        ((4, 12 * 60), {}, "its group's hours by local time: fri 22:00-04:00"),
        (None, {}, "this device does not know the time"),
        (None, {"lower": True}, ""),
        ((4, 12 * 60), {"ordered": True}, ""),
        ((4, 12 * 60), {"answers": False}, ""),
        ((4, 23 * 60), {"locks": (lock(),)}, "the lock of welder"),
    ],
)
def test_a_window_holds_by_a_clock_that_is_set_and_no_way_back(
    local: tuple[int, int] | None, more: dict[str, Any], waits_for: str
) -> None:
    found = holds.held(holds.Holders(**{"answers": True, "windows": NIGHT, "local": local, **more}))
    assert (waits_for in found) if waits_for else found == ""


@pytest.mark.parametrize(
    ("now_s", "local", "more", "is_held"),
    [
        (99.0, (0, 0), {}, True),
        (100.0, (0, 0), {}, False),
        (100.0, None, {}, False),
        (99.0, None, {}, True),
        (99.0, (0, 0), {"lower": True}, False),
        (99.0, (0, 0), {"ordered": True}, False),
        (99.0, (0, 0), {"answers": False}, False),
    ],
)
def test_nothing_begins_before_its_time_but_ways_back_first_bundles_and_what_a_person_orders(
    now_s: float, local: tuple[int, int] | None, more: dict[str, Any], is_held: bool
) -> None:
    found = holds.held(holds.Holders(**{"answers": True, "opens_at": 100, "now_s": now_s, "local": local, **more}))
    assert bool(found) == is_held
    if found:
        assert "1970-01-01 00:01 UTC" in found
        assert ("signed time" in found) == (local is None)
