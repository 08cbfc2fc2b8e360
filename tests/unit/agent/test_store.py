"""The store: nothing committed is lost, no seq is used twice, a damaged file never stops a start."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_agent.errors import Degraded
from skerry_agent.migrations import MIGRATIONS
from skerry_agent.store import Entry, Opened, RingAt, Store, open_store
from skerry_contract import window as w
from skerry_contract import wire

AT = w.Instant("b" * 32, 1, 2, True)
KEY = w.Key("gas", "a" * 64, "v", "none", "", 0)
numbers = itertools.count(1)


opened_here: list[Store] = []


def reopen(path: Path, binding: str = "machine-a", device: str = "d-1", bound: int = 64 << 20) -> tuple[Store, Opened]:
    found = open_store(
        path,
        binding=binding,
        device=device,
        new_epoch=lambda: f"{next(numbers):032x}",
        wall_s=1000.0,
        bound_bytes=bound,
    )
    opened_here.append(found[0])
    return found


@pytest.fixture(autouse=True)
def _stores_are_closed() -> Iterator[None]:
    yield
    while opened_here:
        opened_here.pop().close()


def open_below(folder: Path) -> list[str]:
    """Descriptors of this process on files below a folder."""
    found = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return [target for target in found if target.startswith(f"{folder}/")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return reopen(tmp_path / "state.db")[0]


def window(ok: int, key: w.Key = KEY, pad: int = 0) -> Entry:
    found = w.Window(key=key, start=AT, end=AT, counts=w.Counts(ok=ok), resources={f"r{i}_n": 1 for i in range(pad)})
    return Entry(kind="window", body=wire.encode(found), key="/".join(map(str, key)), inferences=ok)


def event(name: str = "x") -> Entry:
    return Entry(kind="event", body=wire.encode(wire.Event(at=AT, name=name)))


def waiting(store: Store) -> list[wire.Record]:
    found: list[wire.Record] = []
    flying: set[tuple[str, int]] = set()
    while (batch := store.next_batch(flying, max_bytes=1 << 20, max_records=1000)) is not None:
        found += batch.records
        flying |= {(batch.epoch, record.seq) for record in batch.records}
    return found


def ok_of(records: list[wire.Record]) -> int:
    return sum(wire.decode_window(r.body).counts.ok for r in records if r.kind == "window")


def test_seqs_run_from_one_and_go_on_after_a_restart(store: Store) -> None:
    assert store.append([window(1), window(2)]) == (1, 2)
    store.mark_sent(store.epoch, (1, 2))
    store.acknowledge(wire.Ack(epoch=store.epoch, upto=2))
    assert store.pending() == (0, 0)
    epoch = store.epoch
    store.close()
    again, opened = reopen(store.path)
    assert (again.epoch, opened.new_epoch) == (epoch, "")
    assert again.append([window(3)]) == (3,)


def test_a_window_and_its_ring_position_are_one(store: Store) -> None:
    store.append([window(1)], [RingAt(ring="r1", upto=10)])
    store.append([window(1)], [RingAt(ring="r1", upto=20)])
    store.append([], [RingAt(ring="r1", upto=5)])
    assert store.ring_upto("r1") == 20
    assert store.ring_upto("r2") is None
    store.forget_ring("r1")
    assert store.ring_upto("r1") is None


def test_a_transaction_that_fails_leaves_no_trace_and_no_gap(store: Store) -> None:
    with pytest.raises(RuntimeError, match="power"), store.transaction():
        store.append([window(1)])
        store.put("update", {"state": "trial"})
        raise RuntimeError("power")
    assert store.get("update") is None
    assert store.append([window(2)]) == (1,)


def test_an_acknowledgement_frees_what_the_server_holds_and_no_more(store: Store) -> None:
    store.append([window(i) for i in range(1, 11)])
    store.mark_sent(store.epoch, range(1, 11))
    store.acknowledge(wire.Ack(epoch=store.epoch, upto=3, extra_ranges=((5, 6), (9, 9))))
    assert [record.seq for record in waiting(store)] == [4, 7, 8, 10]
    assert store.acknowledge(wire.Ack(epoch="f" * 32, upto=99)).freed == 0
    assert [record.seq for record in waiting(store)] == [4, 7, 8, 10]


def test_a_copied_folder_begins_a_new_epoch_and_sends_the_old_records_unchanged(store: Store) -> None:
    store.append([window(1), event()])
    before = waiting(store)
    old = store.epoch
    store.close()
    copy, opened = reopen(store.path, binding="machine-b")
    assert opened.new_epoch == "moved"
    assert copy.epoch != old
    copy.append([window(5)])
    batch = copy.next_batch((), max_bytes=1 << 20, max_records=10)
    assert batch is not None
    assert (batch.epoch, list(batch.records)) == (old, sorted(before, key=lambda r: r.seq))
    copy.acknowledge(wire.Ack(epoch=old, upto=2))
    assert [(r.seq, r.kind) for r in waiting(copy)] == [(1, "window")]


def test_records_of_another_device_are_dropped_and_counted(store: Store) -> None:
    store.append([window(1), window(2)])
    store.close()
    other, _ = reopen(store.path, device="d-2")
    assert waiting(other) == []
    assert other.lost() == {"foreign_records": 2}


def test_a_server_that_is_ahead_makes_a_new_epoch_and_is_still_asked_about_what_was_never_sent(store: Store) -> None:
    store.append([window(1), window(2), window(4), window(8)])
    old = store.epoch
    store.mark_sent(old, (1, 2))
    done = store.acknowledge(wire.Ack(epoch=old, upto=50))
    assert (done.new_epoch, done.freed) == ("ahead", 2)
    assert [(r.seq, ok_of([r])) for r in waiting(store)] == [(3, 4), (4, 8)]
    # The other life had sent 3 already; 4 is another record there.
    store.mark_sent(old, (3, 4))
    store.acknowledge(wire.Ack(epoch=old, upto=50, conflict=(4,)))
    assert [(r.seq, ok_of([r])) for r in waiting(store)] == [(1, 8)]
    assert store.acknowledge(wire.Ack(epoch=store.epoch, upto=0)).new_epoch == ""


def test_a_conflict_moves_the_record_to_a_new_epoch_once(store: Store) -> None:
    store.append([window(1), window(2), window(4)])
    old = store.epoch
    store.mark_sent(old, (1, 2, 3))
    ack = wire.Ack(epoch=old, upto=3, conflict=(2,))
    assert store.acknowledge(ack).new_epoch == "conflict"
    epoch = store.epoch
    assert epoch != old
    assert [(r.seq, ok_of([r])) for r in waiting(store)] == [(1, 2)]
    assert store.acknowledge(ack).new_epoch == ""
    assert store.epoch == epoch
    assert ok_of(waiting(store)) == 2


def test_a_full_outbox_merges_windows_and_counts_stay_exact(tmp_path: Path) -> None:
    store, _ = reopen(tmp_path / "state.db", bound=12_000)
    other = KEY._replace(stage=1)
    for _ in range(100):
        store.append([window(1), window(2, other)])
    store.mark_sent(store.epoch, (1, 2, 3))
    frozen = [r for r in waiting(store) if r.seq <= 3]
    store.compact(AT)
    assert store.pending()[1] <= 12_000
    records = waiting(store)
    assert ok_of(records) == 300
    assert [r for r in records if r.seq <= 3] == frozen
    covered = [s for r in records for low, high in (*r.replaces, (r.seq, r.seq)) for s in range(low, high + 1)]
    assert sorted(covered) == sorted(set(covered)) == list(range(1, store.last_seq + 1))
    assert store.lost() == {}


def test_what_must_be_dropped_leaves_one_tombstone_that_names_it(tmp_path: Path) -> None:
    store, _ = reopen(tmp_path / "state.db", bound=6_000)
    for i in range(200):
        store.append([window(1, KEY._replace(stage=i))])
        store.compact(AT)
    records = waiting(store)
    tombs = [r for r in records if r.kind == "tombstone"]
    assert len(tombs) == 1
    told = wire.decode(wire.Tombstone, tombs[0].body)
    assert told.inferences == told.records == 200 - ok_of(records) > 0
    assert store.lost()["inferences_dropped"] == told.inferences
    covered = [s for r in records for low, high in (*r.replaces, (r.seq, r.seq)) for s in range(low, high + 1)]
    assert sorted(covered) == list(range(1, store.last_seq + 1))


def test_a_record_that_can_never_be_sent_becomes_a_tombstone(store: Store) -> None:
    store.append([window(7), window(1)])
    store.drop(store.epoch, 1, AT, "too_large")
    tomb = next(r for r in waiting(store) if r.kind == "tombstone")
    assert tomb.replaces == ((1, 1),)
    assert store.lost() == {"too_large": 1, "inferences_dropped": 7}


def test_a_record_of_a_former_epoch_that_can_never_be_sent_is_counted_with_its_inferences(store: Store) -> None:
    store.append([window(7), window(1)])
    old = store.epoch
    store.close()
    moved, _ = reopen(store.path, binding="machine-b")
    moved.drop(old, 1, AT, "too_large")
    assert ok_of(waiting(moved)) == 1
    assert moved.lost() == {"too_large": 1, "inferences_dropped": 7}


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4), st.integers(0, 2)),
        st.tuples(st.just("send"), st.integers(1, 5), st.just(0)),
        st.tuples(st.just("ack"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("compact"), st.just(0), st.just(0)),
        st.tuples(st.just("reopen"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_whatever_happens_each_inference_reaches_the_server_once(script: list[tuple[str, int, int]]) -> None:
    """A server that takes each (epoch, seq) once, refuses overlaps, and sees every record that was not acknowledged again."""
    with tempfile.TemporaryDirectory() as folder:
        store, _ = reopen(Path(folder) / "state.db", bound=1500)
        taken: dict[int, wire.Record] = {}
        held: set[int] = set()
        appended = 0

        def take(record: wire.Record) -> None:
            spans = [(record.seq, record.seq), *record.replaces]
            seqs = {s for low, high in spans for s in range(low, high + 1)}
            if record.seq in taken:
                assert wire.digest(taken[record.seq]) == wire.digest(record), "the same seq with another content"
                return
            assert not seqs & held, "a seq that was taken is replaced"
            taken[record.seq] = record
            held.update(seqs)

        for what, n, stage in script:
            if what == "append":
                store.append([window(1, KEY._replace(stage=stage)) for _ in range(n)])
                appended += n
            elif what == "send":
                batch = store.next_batch((), max_bytes=1 << 20, max_records=n)
                if batch is not None:
                    store.mark_sent(batch.epoch, tuple(r.seq for r in batch.records))
                    for record in batch.records:
                        take(record)
            elif what == "ack":
                above = tuple((s, s) for s in sorted(held) if s <= n)
                store.acknowledge(wire.Ack(epoch=store.epoch, upto=0, extra_ranges=above))
            elif what == "compact":
                store.compact(AT)
            else:
                store.close()
                store, opened = reopen(store.path, bound=1500)
                assert opened.new_epoch == ""
        for record in waiting(store):
            take(record)
        told = sum(wire.decode(wire.Tombstone, r.body).inferences for r in taken.values() if r.kind == "tombstone")
        # A tombstone may be taken up by a later one, which then tells of both: the last word counts.
        assert ok_of(list(taken.values())) + store.lost().get("inferences_dropped", 0) == appended
        assert told <= appended
        store.close()


# --- damage and death ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"garbage" * 500,
        lambda data: data[: len(data) // 2],
        lambda data: data[:4096] + bytes(random.Random(1).randbytes(len(data) - 4096)),
        lambda data: b"\0" * len(data),
    ],
)  # fmt: skip
def test_a_damaged_file_is_moved_aside_and_the_loss_is_counted(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    store, _ = reopen(tmp_path / "state.db")
    store.append([window(1, pad=200) for _ in range(50)])
    epoch = store.epoch
    store.close()
    store.path.write_bytes(damage(store.path.read_bytes()))
    for suffix in ("-wal", "-shm"):
        Path(f"{store.path}{suffix}").unlink(missing_ok=True)
    again, opened = reopen(tmp_path / "state.db")
    assert not any(target.startswith(opened.moved_aside) for target in open_below(tmp_path)), "still held open"
    assert opened.new_epoch == "damaged"
    assert opened.moved_aside == str(tmp_path / "state.db.damaged-1000")
    assert Path(opened.moved_aside).exists()
    assert again.epoch != epoch
    assert again.lost()["store_damaged"] == 1
    assert again.append([window(1)]) == (1,)


def test_a_suspect_store_is_moved_aside_with_what_could_be_counted(store: Store) -> None:
    store.append([window(3), window(4)])
    store.mark_suspect()
    store.close()
    again, opened = reopen(store.path)
    assert (opened.new_epoch, opened.lost_records, opened.lost_inferences) == ("damaged", 2, 7)
    assert again.lost() == {"store_damaged": 1, "records_in_damaged_store": 2, "inferences_in_damaged_store": 7}
    again.close()
    assert reopen(store.path)[1].new_epoch == ""


def test_a_mark_that_outlived_its_file_does_not_move_the_next_one_aside(store: Store) -> None:
    """Power failed after the damaged file went aside, before the mark was taken down."""
    store.mark_suspect()
    store.close()
    store.path.replace(store.path.with_name("aside"))
    fresh, _ = reopen(store.path)
    fresh.append([window(1)])
    fresh.close()
    again, opened = reopen(store.path)
    assert (opened.new_epoch, again.pending()[0]) == ("", 1)


def test_what_a_damaged_store_held_is_counted_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "50%41 ?x#y"
    folder.mkdir()
    store, _ = reopen(folder / "state.db")
    store.append([window(3), window(4)])
    store.mark_suspect()
    store.close()
    assert reopen(store.path)[1].lost_inferences == 7


def test_a_page_that_cannot_be_read_is_named_whoever_reads_it(store: Store) -> None:
    store.append([window(1, pad=100) for _ in range(200)])
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with store.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (store.path.stat().st_size - 4096))
    # Pages that are still in memory would be right.
    store._db.execute("PRAGMA shrink_memory")
    for read in (
        store.pending, store.pending_inferences, lambda: store.get("update"), lambda: store.ring_upto("r"),
        lambda: store.next_batch((), max_bytes=1, max_records=1), lambda: store.compact(AT),
        lambda: store.acknowledge(wire.Ack(epoch=store.epoch, upto=1)),
    ):  # fmt: skip
        with pytest.raises(Degraded) as caught:
            read()
        assert caught.value.code == "store_damaged"


def test_a_lock_of_another_program_is_no_damage(store: Store) -> None:
    store._db.execute("PRAGMA busy_timeout = 10")
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Degraded) as caught:
            store.append([window(1)])
        assert caught.value.code == "store_busy"
    assert store.append([window(1)]) == (1,)


def test_a_store_of_a_newer_agent_is_left_alone(store: Store) -> None:
    store.close()
    with closing(sqlite3.connect(store.path)) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
        db.execute(f"PRAGMA application_id = {len(MIGRATIONS) + 1}")
    before = store.path.read_bytes()
    with pytest.raises(Degraded) as caught:
        reopen(store.path)
    assert caught.value.code == "store_too_new"
    assert open_below(store.path.parent) == []
    assert store.path.read_bytes() == before


def test_a_full_disk_takes_nothing_and_still_frees(store: Store) -> None:
    store.append([window(1, pad=100) for _ in range(20)])
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(Degraded) as caught:
        for _ in range(200):
            store.append([window(1, pad=100)])
    assert caught.value.code == "store_full"
    last = store.last_seq
    store.mark_sent(store.epoch, range(1, last + 1))
    assert store.acknowledge(wire.Ack(epoch=store.epoch, upto=last)).freed == last
    assert store.append([window(1)]) == (last + 1,)


CHILD = """
import itertools, sys
from pathlib import Path
from skerry_agent.store import Entry, RingAt, open_store
store, _ = open_store(Path(sys.argv[1]), binding="m", device="d-1", new_epoch=lambda: "e" * 32, wall_s=0.0)
for n in itertools.count(store.ring_upto("ring") or 0):
    seqs = store.append([Entry(kind="event", body=b"%d" % n)], [RingAt(ring="ring", upto=n + 1)])
    print(seqs[0], n, flush=True)
"""


def test_kill_9_in_the_middle_of_appends_loses_nothing_and_repeats_no_seq(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    said: dict[int, int] = {}
    rng = random.Random(7)
    for _ in range(8):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        time.sleep(rng.uniform(0.0, 0.08))
        os.kill(child.pid, signal.SIGKILL)
        lines += child.stdout.readlines()
        child.wait()
        child.stdout.close()
        for line in lines:
            if line.endswith("\n"):
                seq, n = map(int, line.split())
                assert seq not in said, "a seq was given out twice"
                said[seq] = n
    store, opened = open_store(path, binding="m", device="d-1", new_epoch=lambda: "f" * 32, wall_s=0.0)
    assert opened.new_epoch == ""
    bodies = {r.seq: int(r.body) for r in waiting(store)}
    assert {seq: bodies[seq] for seq in said} == said, "something committed is lost"
    # Each ring position is in exactly one record, also when the child died between its commit and its word.
    assert sorted(bodies.values()) == list(range(len(bodies)))
    assert store.ring_upto("ring") == len(bodies)
    store.close()


def test_the_durable_state_and_its_counters_survive(store: Store) -> None:
    store.put("update", {"state": "trial", "n": [1, 2]})
    assert [store.count_up("birth"), store.count_up("birth"), store.count_up("birth", 9)] == [1, 2, 10]
    store.close()
    again, _ = reopen(store.path)
    assert again.get("update") == {"state": "trial", "n": [1, 2]}
    assert again.count_up("birth") == 11
    again.delete("update")
    assert again.get("update", "gone") == "gone"


def test_the_file_is_private(store: Store) -> None:
    assert store.path.stat().st_mode & 0o777 == 0o600


def test_a_long_backlog_is_not_loaded_whole(store: Store) -> None:
    with store.transaction():
        for _ in range(3000):
            store.append([event()])
    read: list[Any] = []
    store._db.set_trace_callback(read.append)
    batch = store.next_batch((), max_bytes=100_000, max_records=10)
    assert batch is not None
    # The newest events first; within a batch seqs ascend.
    assert [r.seq for r in batch.records] == list(range(2991, 3001))
    assert sum("body, crc FROM outbox" in line for line in read) == 10
