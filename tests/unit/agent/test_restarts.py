"""Which starts of the agent count against what it confirmed last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from skerry_agent.clock import BootSeconds, Clock
from skerry_agent.core.lifecycle import CRASHES
from skerry_agent.restarts import LASTED_S, Restarts
from skerry_agent.store import Store, open_store
from skerry_contract import ids


class Turned(Clock):
    """A clock that a test moves on."""

    now = 1000.0

    def boot_s(self) -> BootSeconds:
        return BootSeconds(self.now)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found, _ = open_store(
        tmp_path / "state.db", binding="m", device=ids.device_id("d-1"), new_epoch=lambda: "e" * 32, wall_s=0.0,
        bound_bytes=1_000_000,
    )  # fmt: skip
    yield found
    found.close()


def start(store: Store, *, lasts_s: float = 0.0, at_rest: bool = True) -> tuple[bool, Restarts]:
    clock = Turned()
    found = Restarts(store, clock, scale=1.0)
    blamed = found.began(at_rest=at_rest)
    clock.now += lasts_s
    found.tick()
    return blamed, found


def test_every_fifth_start_in_a_row_that_did_not_last_blames(store: Store) -> None:
    blamed = [start(store)[0] for _ in range(2 * CRASHES + 1)]
    assert [number for number, one in enumerate(blamed) if one] == [CRASHES, 2 * CRASHES]


def test_a_start_that_lasts_or_ends_in_order_or_finds_an_update_under_way_counts_for_nothing(store: Store) -> None:
    for _ in range(CRASHES - 1):
        start(store)
    start(store, lasts_s=LASTED_S)
    assert start(store)[1].in_a_row == 0
    for _ in range(CRASHES - 1):
        start(store)
    start(store)[1].ended()
    assert start(store)[1].in_a_row == 0
    for _ in range(CRASHES - 1):
        start(store)
    assert not start(store, at_rest=False)[0]
    assert start(store)[1].in_a_row == 0
