"""An outbox above its bound is brought below it a little at a time: whoever has other work does it in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from skerry_agent.store import Entry, Store, open_store
from skerry_contract import window as w
from skerry_contract import wire

AT = w.Instant("b" * 32, 1, 2, True)
N = 2400


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found, _ = open_store(
        tmp_path / "state.db", binding="m", device="d-1", new_epoch=lambda: os.urandom(16).hex(), wall_s=1.0
    )
    entries = []
    for i in range(N):
        key = w.Key("gas", "a" * 64, "v", "none", "", i % 3)
        one = w.Window(key=key, start=AT, end=AT, counts=w.Counts(ok=1), resources={f"r{k}_n": 1 for k in range(60)})
        entries.append(Entry(kind="window", body=wire.encode(one), key=str(i % 3), inferences=1))
    found.append(entries)
    yield found
    found.close()


def inferences(store: Store) -> int:
    return store.pending_inferences() + store.lost().get("inferences_dropped", 0)


def test_one_step_is_one_merge_and_the_backlog_is_not_planned_anew_for_each(store: Store) -> None:
    store.bound_bytes = store.pending()[1] // 4
    looks = 0

    def traced(statement: str) -> None:
        nonlocal looks
        looks += "INDEXED BY outbox_waiting" in statement

    store._db.set_trace_callback(traced)
    steps = 0
    while not store.within_bounds():
        before = store.pending()[0]
        store.compact(AT, more=lambda: False)
        assert 0 <= before - store.pending()[0] <= 7, "eight become one"
        steps += 1
        assert steps < N
    assert steps > 200
    assert looks < steps // 4
    assert store.load()[0] <= store.load()[1]
    assert inferences(store) == N


def test_what_was_sent_or_acknowledged_between_two_steps_is_left_alone(store: Store) -> None:
    store.bound_bytes = store.pending()[1] // 4
    store.compact(AT, more=lambda: False)
    assert store.planned
    batch = store.next_batch(set(), max_bytes=1 << 20, max_records=300)
    assert batch is not None
    sent = tuple(record.seq for record in batch.records)
    store.mark_sent(store.epoch, sent)
    store.acknowledge(wire.Ack(epoch=store.epoch, upto=0, extra_ranges=tuple((seq, seq) for seq in sent[::2])))
    freed = sum(wire.decode_window(record.body).counts.ok for record in batch.records[::2])
    while not store.within_bounds():
        store.compact(AT, more=lambda: False)
    for record in batch.records[1::2]:
        assert store.record(store.epoch, record.seq) == record
    assert inferences(store) == N - freed


def test_room_that_acknowledgements_made_ends_a_plan(store: Store) -> None:
    store.bound_bytes = store.pending()[1] * 9 // 10
    store.compact(AT, more=lambda: False)
    assert store.planned
    left = store.pending()[0]
    store.bound_bytes *= 2
    store.compact(AT)
    assert not store.planned
    assert store.pending()[0] == left
