"""What the store takes on disk: bounded with its log, given back when it is empty, and asked for cheaply."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from skerry_agent.errors import Degraded
from skerry_agent.migrations import MIGRATIONS
from skerry_agent.store import Entry, RingAt, Store, open_store
from skerry_agent.store.database import WAL_PAGES
from skerry_contract import window as w
from skerry_contract import wire

AT = w.Instant("b" * 32, 1, 2, True)
BOUND = 8_000_000


def opened(path: Path, **bounds: int) -> Store:
    return open_store(path, binding="m", device="d-1", new_epoch=lambda: os.urandom(16).hex(), wall_s=0.0, **bounds)[0]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = opened(tmp_path / "state.db", bound_bytes=BOUND, files_bound_bytes=BOUND)
    # Not what is measured here, and most of the time: what is written is the same.
    found._db.execute("PRAGMA synchronous = OFF")
    yield found
    found.close()


def window(stage: int, pad: int) -> Entry:
    key = w.Key("gas", "a" * 64, "v", "none", "", stage)
    found = w.Window(
        key=key, start=AT, end=AT, counts=w.Counts(ok=1), resources={f"reading_{i}_sum": i for i in range(pad)}
    )
    return Entry(kind="window", body=wire.encode(found), key=f"gas/{stage}", inferences=1)


def sample(rng: random.Random, size: int) -> Entry:
    return Entry(kind="sample", body=rng.randbytes(size))


def on_disk(store: Store) -> int:
    return sum(path.stat().st_size for path in store.path.parent.iterdir())


def waiting(store: Store) -> list[wire.Record]:
    found: list[wire.Record] = []
    flying: set[tuple[str, int]] = set()
    while (batch := store.next_batch(flying, max_bytes=1 << 20, max_records=1000)) is not None:
        found += batch.records
        flying |= {(batch.epoch, record.seq) for record in batch.records}
    return found


def fill(store: Store, rng: random.Random, times: int) -> tuple[int, int]:
    """Appends and compacts as the supervisor does. Returns (inferences appended, most bytes on disk at any moment)."""
    made = most = 0
    for _ in range(times):
        stage = rng.randrange(3)
        store.append([*(window(stage, 100) for _ in range(8)), sample(rng, rng.choice([200, 900, 2100, 5000]))])
        made += 8
        while (load := store.load())[0] > load[1] and store.compact(AT, rounds=2):
            most = max(most, on_disk(store))
        most = max(most, on_disk(store))
    return made, most


def test_what_is_on_disk_stays_within_the_bound_log_included_and_no_inference_is_lost_to_it(store: Store) -> None:
    made, most = fill(store, random.Random(1), 900)
    assert 4_000_000 < most <= BOUND
    found = waiting(store)
    counted = sum(wire.decode_window(r.body).counts.ok for r in found if r.kind == "window")
    assert counted == made == store.pending_inferences()
    assert store.lost().get("samples_thinned", 0) + sum(r.kind == "sample" for r in found) == 900


def test_a_long_backlog_that_is_acknowledged_at_once_keeps_the_log_short_and_gives_the_room_back(store: Store) -> None:
    rng = random.Random(2)
    while store.live_bytes() < 12_000_000:
        seqs = store.append([sample(rng, 1400) for _ in range(50)])
        store.mark_sent(store.epoch, seqs)
    assert store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    logs: list[int] = []
    store._db.set_trace_callback(lambda _: logs.append(store.log_bytes()))
    assert store.acknowledge(wire.Ack(epoch=store.epoch, upto=store.last_seq)).freed == store.last_seq
    store._db.set_trace_callback(None)
    # In one transaction it took 14 MB.
    assert max(logs) <= 2 * WAL_PAGES * store.page_bytes
    before = on_disk(store)
    steps = 0
    while (given_back := store.tidy()) > 0:
        steps += 1
        assert given_back <= 256
    assert steps <= 12
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert on_disk(store) < before // 2
    # What stays is for the next records; they do not make the file longer.
    size = store.path.stat().st_size
    store.append([sample(rng, 1400) for _ in range(50)])
    store.checkpoint()
    assert store.path.stat().st_size == size


def test_a_reader_of_another_program_cannot_make_the_log_grow_without_end(store: Store) -> None:
    rng = random.Random(3)
    store.append([sample(rng, 100)])
    store._db.execute("PRAGMA busy_timeout = 5")
    taken = 1
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN")
        assert other.execute("SELECT count(*) FROM outbox").fetchone() == (1,)
        with pytest.raises(Degraded) as caught:
            for _ in range(20_000):
                store.append([sample(rng, 1400)])
                taken += 1
        assert caught.value.code == "store_busy"
        assert on_disk(store) <= BOUND
        other.execute("ROLLBACK")
    store.append([sample(rng, 1400)])
    assert store.pending()[0] == taken + 1


def test_an_outbox_on_a_file_system_that_others_fill_gives_way_and_keeps_an_eighth(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    free = found.f_bavail * found.f_frsize
    store = opened(tmp_path / "state.db", bound_bytes=BOUND, files_bound_bytes=BOUND, free_bytes=free + (1 << 30))
    store._db.execute("PRAGMA synchronous = OFF")
    try:
        made, _ = fill(store, random.Random(4), 300)
        assert store.live_bytes() <= BOUND // 8
        assert store.pending_inferences() == made
        assert waiting(store)
    finally:
        store.close()


def test_what_waits_is_told_without_reading_the_records(store: Store) -> None:
    rng = random.Random(5)
    for _ in range(40):
        store.append([window(1, 100), sample(rng, 3000)])
    plans = {
        query: " ".join(row[3] for row in store._db.execute(f"EXPLAIN QUERY PLAN {query}"))
        for query in (
            "SELECT records, bytes FROM waiting",
            "SELECT seq, kind, '', size, 0 FROM outbox INDEXED BY outbox_waiting WHERE epoch = 'e' AND kind = 'sample' ORDER BY seq LIMIT 9",
        )
    }  # fmt: skip
    assert ["outbox" in plan and "COVERING INDEX" not in plan for plan in plans.values()] == [False, False]
    read: list[str] = []
    store._db.set_trace_callback(read.append)
    store.pending()
    store.pending_inferences()
    assert all("FROM waiting" in line for line in read)


def test_the_sums_of_what_waits_are_those_of_the_rows_whatever_happened(store: Store) -> None:
    rng = random.Random(6)
    for step in range(60):
        store.append([window(step % 2, 3), sample(rng, 50)], [RingAt(ring="r", upto=step)])
        store.mark_sent(store.epoch, (step,))
        if step % 7 == 0:
            store.acknowledge(wire.Ack(epoch=store.epoch, upto=step, conflict=(step - 1,) if step % 14 else ()))
        if step % 11 == 0:
            with pytest.raises(RuntimeError), store.transaction():
                store.append([window(0, 3)])
                raise RuntimeError
    store.bound_bytes = 2000
    store.compact(AT)
    ((records, size, inferences),) = store._db.execute(
        "SELECT count(*), sum(size), sum(inferences) FROM outbox"
    ).fetchall()
    assert (*store.pending(), store.pending_inferences()) == (records, size, inferences)


def test_a_store_of_the_first_schema_is_taken_up_with_what_waits_in_it(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        for statement in MIGRATIONS[0]:
            db.execute(statement)
        db.execute("PRAGMA user_version = 1")
        db.execute("INSERT INTO state VALUES ('device', '\"d-1\"')")
        db.execute("INSERT INTO epochs VALUES (?, 'm', 3, 1)", ("e" * 32,))
        for seq in (1, 2):
            db.execute(
                "INSERT INTO outbox (epoch, seq, kind, key, size, inferences, replaces, body) VALUES (?, ?, 'event', '', 70, 4, '[]', 'x')",
                ("e" * 32, seq),
            )
    store = opened(path)
    assert (store.pending(), store.pending_inferences(), store.epoch) == ((2, 140), 8, "e" * 32)
    store.mark_sent(store.epoch, (1,))
    store.acknowledge(wire.Ack(epoch=store.epoch, upto=1))
    assert store.pending() == (1, 70)
    store.close()


def test_what_an_older_agent_put_in_meanwhile_is_counted_at_the_next_start(store: Store) -> None:
    store.append([window(1, 3)])
    epoch, path = store.epoch, store.path
    store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as older:
        older.execute(
            "INSERT INTO outbox (epoch, seq, kind, key, size, inferences, replaces, body) VALUES (?, 2, 'event', '', 70, 4, '[]', 'x')",
            (epoch,),
        )
        older.execute("UPDATE epochs SET next_seq = 3, crc = NULL")
    again = opened(path)
    ((records, size, inferences),) = again._db.execute("SELECT count(*), sum(size), sum(inferences) FROM outbox")
    assert (*again.pending(), again.pending_inferences()) == (records, size, inferences)
    assert (records, inferences) == (2, 5)
    again.close()
    # And only then: a start reads no records to count them.
    once_more = opened(path)
    read: list[str] = []
    once_more._db.set_trace_callback(read.append)
    once_more.adopt("m", "d-1")
    assert not any("count(*)" in line for line in read)
    once_more.close()


@pytest.mark.parametrize("count", [1, 24, 25, 26, 50, 77])
def test_rows_that_share_a_statement_are_each_its_own_record(store: Store, count: int) -> None:
    rng = random.Random(count)
    entries = [sample(rng, rng.randrange(1, 200)) for _ in range(count)]
    assert store.append(entries) == tuple(range(1, count + 1))
    assert [(record.seq, record.body) for record in waiting(store)] == [
        (seq, entry.body) for seq, entry in enumerate(entries, 1)
    ]
    assert store.pending()[0] == count


def test_sums_are_right_within_a_transaction_and_after_one_that_failed(store: Store) -> None:
    store.append([window(1, 3)])
    with store.transaction():
        store.append([window(1, 3), window(1, 3)])
        assert (store.pending()[0], store.pending_inferences()) == (3, 3)
        store.begin_epoch("m")
    assert (store.pending()[0], store.pending_inferences()) == (3, 3)
    with pytest.raises(RuntimeError), store.transaction():
        store.append([window(1, 3)])
        raise RuntimeError
    assert (store.pending()[0], store.pending_inferences()) == (3, 3)
    ((records, told),) = store._db.execute("SELECT records, told FROM waiting")
    assert (records, told) == (3, f"{store.epoch} 1")


@pytest.mark.parametrize(("body", "most"), [(1400, 2200), (2200, 4300), (4160, 4800)])
def test_a_megabyte_of_outbox_holds_as_many_windows_as_the_documentation_says(
    store: Store, body: int, most: int
) -> None:
    before, key = store.live_bytes(), f"gas/{'a' * 64}/v/none//0"
    for _ in range(10):
        store.append([Entry(kind="window", body=os.urandom(body), key=key, inferences=500) for _ in range(20)])
    assert (store.live_bytes() - before) / 200 < most
