"""Files that rot or are torn: whatever is read afterwards is right, or the file goes aside, a new epoch begins, and the loss is told."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from skerry_agent.errors import Degraded
from skerry_agent.store import Entry, Opened, RecordDamaged, RingAt, Store, open_store
from skerry_contract import window as w
from skerry_contract import wire

AT = w.Instant("b" * 32, 1, 2, True)
EPOCH = "e" * 32
RECORDS = 60
Damage = Callable[[bytes, random.Random], bytes]


def opened(folder: Path) -> tuple[Store, Opened]:
    return open_store(
        folder / "state.db", binding="m", device="d-1", new_epoch=lambda: "f" * 32, wall_s=1000.0, bound_bytes=1 << 20
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as a killed agent leaves it: much in the file, some in the log."""
    folder = tmp_path_factory.mktemp("whole")
    store, _ = open_store(folder / "live.db", binding="m", device="d-1", new_epoch=lambda: EPOCH, wall_s=0.0)
    for n in range(RECORDS):
        key = w.Key("gas", "a" * 64, "v", "none", "", n % 3)
        body = wire.encode(
            w.Window(key=key, start=AT, end=AT, counts=w.Counts(ok=n), resources={f"r{i}_n": i for i in range(90)})
        )
        store.append([Entry(kind="window", body=body, key="k", inferences=n)], [RingAt(ring="r", upto=n)])
        store.put("update", {"state": "confirmed", "n": n})
        if n == RECORDS - 20:
            store.checkpoint()
    for suffix in ("", "-wal", "-shm"):
        shutil.copy(folder / f"live.db{suffix}", folder / f"state.db{suffix}")
    store.close()
    return folder


def copy(whole: Path, to: Path) -> Path:
    to.mkdir()
    for path in whole.glob("state.db*"):
        shutil.copy(path, to / path.name)
    return to


def flip(data: bytes, rng: random.Random, *, start: int = 0, upto: int = 0) -> bytes:
    at = rng.randrange(start, min(upto or len(data), len(data)))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def scribble(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    junk = rng.randbytes(rng.choice([16, 512, 4096, 20_000]))
    return (data[:at] + junk + data[at + len(junk) :])[: max(len(data), 1)]


DAMAGES: dict[str, Damage] = {
    "a bit anywhere": flip,
    "a bit of the first page's header": lambda data, rng: flip(data, rng, upto=100),
    "a bit of the first page": lambda data, rng: flip(data, rng, upto=4096),
    "a scribble": scribble,
    "torn": lambda data, rng: data[: rng.randrange(len(data))],
    "torn at a page": lambda data, rng: data[: 4096 * rng.randrange(len(data) // 4096)],
    "zeros from somewhere on": lambda data, rng: data[: (at := rng.randrange(len(data)))] + bytes(len(data) - at),
    "nothing": lambda data, rng: b"",
}


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_store_with_damage_opens_and_what_it_says_is_true_or_named_lost(
    whole: Path, tmp_path: Path, suffix: str, damage: str
) -> None:
    rng = random.Random(f"{suffix} {damage}")
    for number in range(6):
        folder = copy(whole, tmp_path / str(number))
        path = folder / f"state.db{suffix}"
        path.write_bytes(DAMAGES[damage](path.read_bytes(), rng))
        goes_on(folder)
        shutil.rmtree(folder)


def goes_on(folder: Path) -> str:
    """Opens it, reads all, and holds what it says against what was written. Returns why a new epoch began."""
    store, found = opened(folder)
    for _ in range(2):
        try:
            records, gone = held(store)
            break
        except Degraded as error:
            # What the check at the start does not see ends the agent at the first look; the next start moves the file aside.
            seen = error.code
            store.mark_suspect()
            store.close()
            store, found = opened(folder)
            assert (seen, found.new_epoch) == ("store_damaged", "damaged")
    if found.new_epoch == "damaged":
        assert store.lost()["store_damaged"] == 1
        assert (records, gone) == ({}, set())
        assert store.epoch == "f" * 32
    elif found.new_epoch == "first":
        # The file was empty: as if it had never been.
        assert (records, gone) == ({}, set())
    else:
        # Older than it was, at worst: a log that is torn ends where it is torn. What is there is what was written, the rest is named.
        assert all(records[seq] == seq - 1 for seq in records)
        assert not gone & records.keys()
        seqs = records.keys() | gone
        assert seqs == set(range(1, len(seqs) + 1))
        assert store.lost().get("record_damaged", 0) == len(gone)
        assert store.last_seq == len(seqs) + len(gone)
        assert (store.ring_upto("r") or 0) == max(0, len(seqs) - 1)
    before = store.pending()[0]
    store.append([Entry(kind="event", body=b"x")])
    assert store.pending()[0] == before + 1
    store.close()
    return found.new_epoch


def held(store: Store) -> tuple[dict[int, int], set[int]]:
    """(seq -> inferences out of the bodies, seqs of which tombstones tell)."""
    windows: dict[int, int] = {}
    gone: set[int] = set()
    flying: set[tuple[str, int]] = set()
    while True:
        try:
            batch = store.next_batch(flying, max_bytes=1 << 20, max_records=1000)
        except RecordDamaged as error:
            store.drop(error.epoch, error.seq, AT, "record_damaged")
            continue
        if batch is None:
            break
        for record in batch.records:
            flying.add((batch.epoch, record.seq))
            if record.kind == "window":
                windows[record.seq] = wire.decode_window(record.body).counts.ok
            else:
                assert wire.decode(wire.Tombstone, record.body).why == "record_damaged"
                gone |= {seq for low, high in record.replaces for seq in range(low, high + 1)}
    return windows, gone


def test_a_bit_that_turns_over_in_a_record_costs_that_record_and_is_told(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path / "it")
    store, _ = opened(folder)
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    path = folder / "state.db"
    data = bytearray(path.read_bytes())
    # A digit inside a count that stays a count: nothing but a sum can tell.
    at = data.index(b"r40_n") + 5
    data[at] ^= 1
    path.write_bytes(data)
    store, found = opened(folder)
    assert found.new_epoch == ""
    windows, gone = held(store)
    assert (len(windows), len(gone)) == (RECORDS - 1, 1)
    (seq,) = gone
    assert store.lost() == {"record_damaged": 1} | ({"inferences_dropped": seq - 1} if seq > 1 else {})
    store.close()


@pytest.mark.parametrize("table", ["state", "rings", "epochs"])
def test_a_number_that_turned_into_another_moves_the_store_aside(whole: Path, tmp_path: Path, table: str) -> None:
    folder = copy(whole, tmp_path / "it")
    with closing(sqlite3.connect(folder / "state.db", isolation_level=None)) as db:
        change = {
            "state": "UPDATE state SET value = replace(CAST(value AS TEXT), '59', '58') WHERE key = 'update'",
            "rings": "UPDATE rings SET upto = upto - 1",
            "epochs": "UPDATE epochs SET next_seq = next_seq - 1",
        }[table]
        assert db.execute(change).rowcount == 1
    assert goes_on(folder) == "damaged"


def test_a_merge_of_a_damaged_record_gives_up_that_record_alone(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path / "it")
    with closing(sqlite3.connect(folder / "state.db", isolation_level=None)) as db:
        db.execute("UPDATE outbox SET inferences = inferences + 1 WHERE seq = 2")
    store, _ = opened(folder)
    store.bound_bytes = 20_000
    store.compact(AT)
    windows, gone = held(store)
    assert gone == {2}
    # 0 + 1 + 2 + ... without the second record, whose one inference is lost and which says two.
    assert sum(windows.values()) == sum(range(RECORDS)) - 1
    store.close()


def test_a_file_that_may_not_be_written_is_no_damage(tmp_path: Path) -> None:
    store, _ = opened(tmp_path)
    store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(Degraded) as caught:
        store.put("update", {"n": 1})
    assert caught.value.code == "store_failed"
    store._db.execute("PRAGMA query_only = OFF")
    store.put("update", {"n": 1})
    assert not (tmp_path / "state.db.suspect").exists()
