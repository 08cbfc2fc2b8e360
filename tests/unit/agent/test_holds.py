"""What holds an update back: who, for how long, and what is never held."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from skerry_agent.clock import BootSeconds, Clock
from skerry_agent.config import Config
from skerry_agent.core import holds
from skerry_agent.core.lifecycle import Update
from skerry_agent.holding import Holding
from skerry_agent.slots import Slots
from skerry_agent.store import Store, open_store
from skerry_contract import ids, opening

BOOT = "b" * 32


def lock(owner: str = "welder", *, for_s: float = 600.0, until_s: float = 700.0, boot_id: str = BOOT) -> holds.Lock:
    return holds.Lock(owner=owner, reason="a seam", for_s=for_s, boot_id=boot_id, until_s=until_s)


def test_a_lock_ends_by_the_time_since_boot() -> None:
    assert holds.live([lock()], BOOT, 699.0) == (lock(),)
    assert holds.live([lock()], BOOT, 700.0) == ()


def test_a_reboot_leaves_a_lock_what_it_had_left_when_it_was_noted() -> None:
    # Taken at 100 s, as an agent before this one stored it.
    assert lock().left_s("c" * 32, 0.0) == 600.0
    noted = lock().noted(BOOT, 400.0)
    assert noted.left_s(BOOT, 400.0) == 300.0
    assert noted.left_s("c" * 32, 20.0) == 280.0
    again = noted.noted("c" * 32, 20.0)
    assert again.left_s("c" * 32, 20.0) == 280.0
    assert not holds.live([again], "d" * 32, 280.0)


class Turned(Clock):
    """A clock that a test moves on."""

    now = 50.0

    def boot_s(self) -> BootSeconds:
        return BootSeconds(self.now)


def device(store: Store, tmp_path: Path, boot: str) -> tuple[Holding, Turned]:
    """The locks of an agent that starts in a boot."""
    clock = Turned()
    clock.boot_id = boot * 32
    config = Config(state_dir=tmp_path)
    holding = Holding(config, store, Slots(tmp_path / "slots"), clock, windows=lambda: (), opens_at=lambda *_: 0)
    return holding, clock


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found, _ = open_store(
        tmp_path / "state.db", binding="m", device=ids.device_id("d-1"), new_epoch=lambda: "e" * 32, wall_s=0.0,
        bound_bytes=1_000_000,
    )  # fmt: skip
    yield found
    found.close()


def test_a_lock_that_ended_does_not_come_back_to_life_at_a_boot(store: Store, tmp_path: Path) -> None:
    holding, clock = device(store, tmp_path, "a")
    assert holding.take("welder", "a seam", 36_000.0).status == 200
    clock.now += 36_001.0
    holding.tick()
    assert holding.status() == []
    for boot in "bc":
        holding, _ = device(store, tmp_path, boot)
        assert holding.status() == [], boot


def test_a_device_that_is_switched_off_each_evening_serves_a_lock_out(store: Store, tmp_path: Path) -> None:
    holding, _ = device(store, tmp_path, "0")
    assert holding.take("welder", "a seam", 36_000.0).status == 200
    hours, boots = 0.0, iter("123456789")
    while holding.status():
        holding, clock = device(store, tmp_path, next(boots))
        for _ in range(9 * 12):
            holding.tick()
            if not holding.status():
                break
            clock.now += 300.0
            hours += 1 / 12
    assert 9.8 < hours <= 10.1


def test_an_order_to_activate_ends_with_the_bundle_that_it_was_for(store: Store, tmp_path: Path) -> None:
    holding, _ = device(store, tmp_path, "a")
    held = Update(state="ready", model="gas", digest="1" * 64, version="2.0.0")
    holding.order(held, despite_locks=True)
    for state, code, lasts in (
        ("ready", "", True),
        ("prove", "", True),
        ("idle", "yielded", True),
        ("fetch", "", True),
        ("trial", "", False),
    ):
        holding.settled(msgspec.structs.replace(held, state=state, code=code))
        assert (store.get("activate") is not None) == lasts, state
    holding.order(held, despite_locks=True)
    holding.settled(msgspec.structs.replace(held, state="idle", digest="2" * 64))
    assert store.get("activate") is not None, "of another bundle"
    holding.settled(msgspec.structs.replace(held, state="idle", code="withdrawn"))
    assert store.get("activate") is None


def test_every_holder_of_a_lock_is_named() -> None:
    found = holds.held(
        holds.Holders(answers=True, locks=holds.live([lock("a"), lock("b", until_s=900.0)], BOOT, 100.0))
    )
    assert found == "the lock of a to end (a seam); the lock of b to end (a seam)"


def test_applications_that_renew_their_locks_in_turn_change_no_word_of_what_holds() -> None:
    words = {
        holds.held(
            holds.Holders(answers=True, locks=holds.live([lock("a", until_s=a), lock("b", until_s=b)], BOOT, 1.0))
        )
        for a, b in ((100.0, 200.0), (300.0, 200.0), (300.0, 400.0))
    }
    assert len(words) == 1
    many = holds.live([lock(f"app-{number:02}") for number in range(holds.MOST_LOCKS)], BOOT, 1.0)
    assert holds.held(holds.Holders(answers=True, locks=many)).endswith("(a seam); 61 more locks")


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
