"""A store put back from a backup, then full: whatever it merges, nothing counts twice, and what is missing is named."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from skerry_agent.store import Entry, Store, open_store
from skerry_agent.upload import Upload
from skerry_contract import window as w
from skerry_contract import wire

from tests.unit.agent.test_outbox_model import Server

AT = w.Instant("b" * 32, 1, 2, True)
KEY = w.Key("gas", "a" * 64, "v", "none", "", 0)
OK = 10
moments = itertools.count(1)


def window() -> Entry:
    """No two are the same, as no two moments are."""
    at = w.Instant("b" * 32, next(moments), 2, True)
    readings = {f"r{i}_n": 1 for i in range(60)}
    found = w.Window(key=KEY, start=at, end=at, counts=w.Counts(ok=OK), resources=readings)
    return Entry(kind="window", body=wire.encode(found), key="k", inferences=OK)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[str], Store]]:
    numbers, stores = itertools.count(1), []

    def make(name: str) -> Store:
        for store in stores:
            store.close()
        stores.clear()
        store, _ = open_store(
            tmp_path / name, binding="m", device="d-1", new_epoch=lambda: f"{next(numbers):032x}", wall_s=0.0
        )
        store._db.execute("PRAGMA synchronous = OFF")
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()


def make(store: Store, n: int, bound: int = 1 << 20) -> int:
    store.bound_bytes = bound
    for _ in range(n):
        store.append([window()])
        store.compact(AT)
    return n * OK


def drain(store: Store, server: Server) -> None:
    acks: list[bytes] = []

    def publish(payload: bytes) -> bool:
        acks.append(server.take(payload))
        return True

    upload = Upload(store, publish, window=1, batch_bytes=4000, ack_s=5.0)
    upload.open = True
    now_s = 0.0
    while store.pending()[0] and now_s < 1000:
        now_s += 1
        upload.pump(now_s, AT)
        for payload in acks:
            ack = wire.decode(wire.Ack, payload)
            new = store.acknowledge(ack).new_epoch
            upload.acknowledged(ack)
            if new:
                upload.again()
        acks.clear()
    assert store.pending()[0] == 0


@pytest.mark.parametrize("more", [0, 3, 9, 20, 60])
@pytest.mark.parametrize("further", [0, 11, 30])
@pytest.mark.parametrize("restarts", [0, 1])
def test_what_the_other_life_sent_is_counted_once(
    opened: Callable[[str], Store], tmp_path: Path, more: int, further: int, restarts: int
) -> None:
    server = Server()
    store = opened("state.db")
    made = make(store, 16)
    store.close()
    shutil.copy(tmp_path / "state.db", tmp_path / "backup.db")
    # The first life sends all of it, and what comes later.
    store = opened("state.db")
    made += make(store, further)
    drain(store, server)
    assert server.inferences() == made
    # The backup is put back while the network is away, and the outbox fills.
    store = opened("backup.db")
    for i in range(restarts + 1):
        if i:
            store = opened("backup.db")
        made += make(store, more, bound=6000)
    drain(store, server)
    lost = store.lost()
    assert server.conflicts or not more
    assert server.inferences() <= made
    named = lost.get("inferences_dropped", 0)
    assert server.inferences() + named >= made
    if not restarts:
        # Without another start in between it is known which window is whose: nothing is given up, and what was dropped is exact.
        assert "windows_disputed" not in lost
        _, dropped = server.told_lost()
        assert server.inferences() + dropped == made


def test_a_window_merged_of_what_the_server_has_in_part_is_given_up_and_named(
    opened: Callable[[str], Store], tmp_path: Path
) -> None:
    server = Server()
    store = opened("state.db")
    made = make(store, 16)
    store.close()
    shutil.copy(tmp_path / "state.db", tmp_path / "backup.db")
    store = opened("state.db")
    batch = store.next_batch(set(), max_bytes=1 << 20, max_records=5)
    assert batch is not None
    server.take(wire.encode_batch(batch))
    sent = 5 * OK
    store = opened("backup.db")
    made += make(store, 4, bound=6000)
    drain(store, server)
    lost = store.lost()
    assert lost["windows_disputed"] >= 1
    assert sent < server.inferences() <= made <= server.inferences() + lost["inferences_dropped"]
