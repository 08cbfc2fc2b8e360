"""Windows of a clock that was not set, or jumped, get the time they are of, and say how it is known."""

import pytest
from skerry_contract import window as w
from skerry_contract import wire
from skerry_server.anchors import MOST_BOOTS
from skerry_server.db import tables as t

from tests.unit.server.ingest.conftest import BOOT, record, state, up, window

NOW_MS = 1_790_000_000_000
HOUR_MS, YEAR_MS = 3_600_000, 365 * 86_400_000
NEVER_SET = 1000
"""Milliseconds since 1970: where a clock without a battery begins."""


@pytest.fixture
def held(server):
    server.now_ms = NOW_MS
    return server


def instant(boot_ms, wall_ms=NEVER_SET, *, synced=False, boot=BOOT):
    return w.Instant(boot, boot_ms * 1_000_000, wall_ms, synced)


def spanning(start, end):
    found = window()
    return w.Window(key=found.key, start=start, end=end, counts=found.counts)


def placed(held, device="dev-a"):
    return [(row["start_ms"], row["end_ms"], row["timed"]) for row in held.rows(t.windows, device=device)]


def test_a_clock_that_is_set_is_believed(held):
    at = NOW_MS - 5 * HOUR_MS
    held.take(
        up("dev-a", record(1, spanning(instant(0, at, synced=True), instant(300_000, at + 300_000, synced=True))))
    )
    assert placed(held) == [(at, at + 300_000, "device")]


def test_what_was_counted_before_the_clock_was_set_is_placed_by_what_came_after_in_the_same_boot(held):
    set_at = instant(10 * HOUR_MS, NOW_MS - HOUR_MS, synced=True)
    held.take(
        up("dev-a", record(1, spanning(instant(HOUR_MS), instant(2 * HOUR_MS))), record(2, spanning(set_at, set_at)))
    )
    assert placed(held)[0] == (NOW_MS - 10 * HOUR_MS, NOW_MS - 9 * HOUR_MS, "boot")
    # Also in a later message, from the database; another device of the same number of boot is another device.
    held.take(
        up("dev-a", record(3, spanning(instant(3 * HOUR_MS), instant(4 * HOUR_MS)))),
        up("dev-b", record(1, spanning(instant(3 * HOUR_MS), instant(4 * HOUR_MS)))),
    )
    assert placed(held)[-1] == (NOW_MS - 8 * HOUR_MS, NOW_MS - 7 * HOUR_MS, "boot")
    assert placed(held, "dev-b")[0][2] == "received"


def test_events_and_tombstones_of_a_clock_that_was_not_set_get_their_time_too(held):
    set_at = instant(10 * HOUR_MS, NOW_MS - HOUR_MS, synced=True)
    crashed = wire.Event(at=instant(HOUR_MS), name="worker", code="runtime_crashed", data={})
    dropped = wire.Tombstone(at=instant(2 * HOUR_MS), why="outbox_full", records=1)
    ahead = wire.Event(at=instant(3 * HOUR_MS, NOW_MS + 10 * YEAR_MS), name="update", code="", data={})
    held.take(
        up(
            "dev-a",
            record(1, crashed, kind="event"),
            record(2, ahead, kind="event"),
            record(3, spanning(set_at, set_at)),
            record(5, dropped, kind="tombstone", replaces=[(4, 4)]),
        )
    )
    times = {row["name"]: row["at_ms"] for row in held.rows(t.events)}
    assert times == {
        "worker": NOW_MS - 10 * HOUR_MS, "tombstone": NOW_MS - 9 * HOUR_MS, "update": NOW_MS - 8 * HOUR_MS,
    }  # fmt: skip
    # Of a boot of which nothing is known but that it is over.
    other = wire.Event(at=instant(HOUR_MS, boot="e" * 32), name="slot", code="", data={})
    held.take(up("dev-a", record(6, other, kind="event")))
    assert held.rows(t.events, name="slot")[0]["at_ms"] == held.now_ms


def test_a_clock_that_is_never_set_is_placed_by_when_the_device_was_heard(held):
    held.take(state("dev-a", 1, at=instant(100 * HOUR_MS)))
    heard_ms = held.now_ms
    held.take(up("dev-a", record(1, spanning(instant(10 * HOUR_MS), instant(11 * HOUR_MS)))))
    assert placed(held) == [(heard_ms - 90 * HOUR_MS, heard_ms - 89 * HOUR_MS, "heard")]
    # Said again with a delay: what lay least between is nearest to the truth.
    held.now_ms += 60_000
    held.take(state("dev-a", 1, at=instant(100 * HOUR_MS + 1000)))
    held.take(up("dev-a", record(2, spanning(instant(10 * HOUR_MS), instant(11 * HOUR_MS)))))
    assert placed(held)[-1][:2] == (heard_ms - 90 * HOUR_MS, heard_ms - 89 * HOUR_MS)


def test_a_state_that_the_broker_kept_says_nothing_of_now(held):
    held.take(state("dev-a", 1, at=instant(100 * HOUR_MS), retained=True))
    held.take(up("dev-a", record(1, spanning(instant(10 * HOUR_MS), instant(11 * HOUR_MS)))))
    assert placed(held) == [(held.now_ms, held.now_ms, "received")]


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_jumped_by_years_is_not_believed_though_it_is_called_set(held, years):
    held.take(state("dev-a", 1, at=instant(20 * HOUR_MS)))
    heard_ms = held.now_ms
    wrong = NOW_MS + years * YEAR_MS
    held.take(
        up(
            "dev-a",
            record(1, spanning(instant(10 * HOUR_MS, wrong, synced=True), instant(11 * HOUR_MS, wrong + HOUR_MS, synced=True))),
            record(2, spanning(instant(12 * HOUR_MS, wrong), instant(13 * HOUR_MS, wrong))),
        )
    )  # fmt: skip
    assert placed(held) == [
        (heard_ms - 10 * HOUR_MS, heard_ms - 9 * HOUR_MS, "heard"), (heard_ms - 8 * HOUR_MS, heard_ms - 7 * HOUR_MS, "heard"),
    ]  # fmt: skip


def test_of_an_earlier_boot_nothing_is_known_but_that_it_is_over(held):
    held.take(state("dev-a", 1, at=instant(HOUR_MS)))
    held.take(
        up("dev-a", record(1, spanning(instant(50 * HOUR_MS, boot="c" * 32), instant(51 * HOUR_MS, boot="c" * 32))))
    )
    assert placed(held) == [(held.now_ms, held.now_ms, "received")]


def test_nothing_ends_after_it_was_received(held):
    held.take(state("dev-a", 1, at=instant(HOUR_MS)))
    held.take(up("dev-a", record(1, spanning(instant(2 * HOUR_MS), instant(3 * HOUR_MS)))))
    assert placed(held)[0][1] <= held.now_ms
    odd = w.Instant("no boot", 1 << 62, NEVER_SET, False)
    held.take(up("dev-a", record(2, spanning(odd, odd))), state("dev-a", 1, at=odd))
    assert placed(held)[-1][2] == "received"


def test_a_device_that_boots_for_ever_keeps_few_boots_here(held):
    for n in range(MOST_BOOTS + 20):
        held.take(state("dev-a", n + 1, at=instant(HOUR_MS, boot=f"{n:032x}")))
    boots = {row["boot_id"] for row in held.rows(t.boots, device="dev-a")}
    assert boots == {f"{n:032x}" for n in range(20, MOST_BOOTS + 20)}


def test_a_state_without_a_time_has_the_bytes_it_had():
    assert b"\xa2at" not in wire.encode(wire.State(status="online", birth=1))
    at = instant(HOUR_MS)
    assert wire.decode(wire.State, wire.encode(wire.State(status="online", birth=1, at=at))).at == at
