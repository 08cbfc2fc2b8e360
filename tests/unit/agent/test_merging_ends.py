"""Merging ends where a window would be refused: what a full outbox merges is always what the server takes."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest
from skerry_agent.core import merging
from skerry_agent.readings import Readings
from skerry_agent.store import Entry, Store, open_store
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire

KEY = w.Key("gas", "a" * 64, "v", "none", "", 0)
AT = w.Instant("b" * 32, 1, 2, True)


def far_off(rows: int) -> w.Window:
    """Rows of a broken sensor: each value is as far from the centre as is counted."""
    moments = h.Moments(n=rows, total=rows * h.Q_LIMIT, squares=rows * h.Q_LIMIT**2)
    features = {f"f{i}": w.FeatureCounts((0, 0, rows), 0, rows, moments) for i in range(10)}
    return w.Window(key=KEY, start=AT, end=AT, counts=w.Counts(ok=rows, rows=rows), features=features)


def of_candidate(i: int) -> w.Window:
    shadows = {f"{i * 3 + part:064x}": w.Shadow(pairs=3) for part in range(3)}
    readings = {f"reading_{reading}_n": 1 for reading in range(100)}
    return w.Window(key=KEY, start=AT, end=AT, counts=w.Counts(ok=3), shadows=shadows, resources=readings)


def with_reading(reading: int) -> w.Window:
    return w.Window(key=KEY, start=AT, end=AT, counts=w.Counts(ok=1), resources={"device_power_uw_sum": reading})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found, _ = open_store(
        tmp_path / "state.db", binding="m", device="d-1", new_epoch=lambda: os.urandom(16).hex(), wall_s=1.0
    )
    yield found
    found.close()


def fill(store: Store, windows: list[w.Window]) -> int:
    for window in windows:
        entry = Entry(kind="window", body=wire.encode(window), key="k", inferences=window.counts.ok)
        store.append([entry])
    return sum(window.counts.ok for window in windows)


def compact_until_it_rests(store: Store) -> None:
    for _ in range(100):
        if store.compact(AT) <= 0:
            return
    raise AssertionError("compaction does not end")


def waiting(store: Store) -> list[w.Window]:
    batch = store.next_batch(set(), max_bytes=1 << 24, max_records=1000)
    assert batch is not None
    assert {record.kind for record in batch.records} == {"window"}
    return [wire.decode_window(record.body) for record in batch.records]


@pytest.mark.parametrize(
    "windows",
    [
        [far_off(1_500_000) for _ in range(60)],
        [far_off(4_000_000) for _ in range(60)],
        [far_off(1 + i * 200_000) for i in range(30)],
        [of_candidate(i) for i in range(60)],
        [with_reading(1 << 61) for _ in range(60)],
    ],
    ids=["sums the server refuses", "sums that nothing encodes", "uneven", "too many candidates", "readings"],
)
def test_a_full_outbox_merges_to_windows_that_the_server_takes_and_no_inference_is_lost(
    store: Store, windows: list[w.Window]
) -> None:
    made = fill(store, windows)
    # Below what they take merged as far as they may: all that can merge does, then the oldest give way.
    least = sum(len(wire.encode(merged)) for merged, _ in merging.merge_some(windows))
    store.bound_bytes = store.pending()[1] - 1
    while store.bound_bytes > 1.4 * least and store.pending()[1] > store.bound_bytes:
        store.compact(AT)
        store.bound_bytes = min(store.bound_bytes, store.pending()[1]) * 9 // 10
    kept = waiting(store)
    assert len(kept) < len(windows)
    assert sum(window.counts.ok for window in kept) == store.pending_inferences() == made
    assert store.lost() == {}


def test_windows_that_are_full_give_way_at_last_with_a_tombstone(store: Store) -> None:
    made = fill(store, [far_off(8_000_000) for _ in range(20)])
    store.bound_bytes = store.pending()[1] // 2
    compact_until_it_rests(store)
    for _ in range(100):
        if store.pending()[1] <= store.bound_bytes:
            break
        store.compact(AT)
    assert store.pending()[1] <= store.bound_bytes
    batch = store.next_batch(set(), max_bytes=1 << 24, max_records=1000)
    assert batch is not None
    kept = sum(wire.decode_window(r.body).counts.ok for r in batch.records if r.kind == "window")
    assert 0 < kept < made
    assert store.lost()["inferences_dropped"] == made - kept


def test_a_window_that_cannot_be_read_stays_apart_and_the_others_merge(store: Store) -> None:
    made = fill(store, [far_off(10) for _ in range(8)])
    store.append([Entry(kind="window", body=b"\x81\xa3key\xc1", key="k", inferences=1)])
    made += fill(store, [far_off(10) for _ in range(15)])
    store.bound_bytes = store.pending()[1] - 1
    for _ in range(10):
        store.compact(AT)
        store.bound_bytes = min(store.bound_bytes, store.pending()[1]) - 1
        if store.pending()[0] <= 10:
            break
    assert store.pending_inferences() == made + 1
    assert store.pending()[0] <= 10


@pytest.mark.parametrize("seed", range(5))
def test_what_is_merged_as_far_as_it_fits_adds_up_to_the_same(seed: int) -> None:
    rng = random.Random(seed)
    windows = [far_off(rng.choice([1, 1000, 3_000_000, 8_388_000])) for _ in range(12)]
    found = merging.merge_some(windows)
    assert all(merging.fits(window) for window, _ in found)
    assert sum(n for _, n in found) == 12
    at = list(itertools.accumulate((n for _, n in found), initial=0))
    for (window, _), start, end in zip(found, at, at[1:], strict=False):
        assert window == reduce(w.merge, windows[start:end])
    # None could have taken its neighbour's first one too.
    for (window, _), start in zip(found, at[1:], strict=False):
        assert start == 12 or not merging.fits(w.merge(window, windows[start]))


def test_nothing_merges_to_nothing() -> None:
    assert merging.merge_some([]) == ()


def test_a_broken_sensor_cannot_make_the_readings_more_than_a_window_may_hold(tmp_path: Path) -> None:
    power = tmp_path / "class/hwmon/hwmon0/power1_input"
    power.parent.mkdir(parents=True)
    power.write_text(f"{(1 << 43) - 1}\n")
    reader = Readings(tmp_path, interval_s=1.0, clock_s=time.monotonic, sys=tmp_path)
    reader.read()
    window = w.Window(key=KEY, start=AT, end=AT, resources=dict(reader.held()))
    # A year of a reading each minute, all merged.
    whole = window
    for _ in range(19):
        whole = w.merge(whole, whole)
    assert whole.resources["device_power_uw_n"] == 1 << 19
    assert merging.fits(whole)
    for _ in range(40):
        reader._sums = {name: value * 2 for name, value in reader._sums.items()}
        reader.read()
    assert merging.fits(w.Window(key=KEY, start=AT, end=AT, resources=dict(reader.held())))
