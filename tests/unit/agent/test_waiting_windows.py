"""What cannot be stored for weeks waits in the supervisor in constant memory, and every inference of it is stored once at last."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from skerry_agent import workerwire as ww
from skerry_agent.clock import Clock
from skerry_agent.serving.rings import Rings
from skerry_agent.serving.waiting import MANY
from skerry_agent.store import Store, open_store
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire

AT = w.Instant("b" * 32, 1, 2, True)


@dataclass
class Worker:
    """Where a worker's channel begins."""

    committed: dict[str, int] = field(default_factory=dict)

    def send(self, message: ww.Message, fd: int | None = None) -> None:
        assert isinstance(message, ww.Committed)
        self.committed[message.ring] = message.upto


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found, _ = open_store(
        tmp_path / "state.db", binding="m", device="d-1", new_epoch=lambda: os.urandom(16).hex(), wall_s=1.0
    )
    yield found
    found.close()


@contextmanager
def held(store: Store) -> Iterator[None]:
    """Another program holds the file, as long as this lasts."""
    store._db.execute("PRAGMA busy_timeout = 1")
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def rings_of(store: Store, folder: Path) -> Rings:
    def fault(error: Exception) -> None:
        raise AssertionError(error)

    return Rings(folder / "rings", store, Clock(), on_records=lambda: None, on_fault=fault)


def cut(ring: str, start: int, upto: int, *, rng: random.Random, stage: int = 0) -> ww.WindowCut:
    key = w.Key("gas", "a" * 64, "v", "none", "", stage)
    counts = tuple(rng.randrange(9) for _ in range(64))
    feature = w.FeatureCounts(counts, 0, 0, h.Moments(n=upto - start, total=3, squares=7))
    found = w.Window(
        key=key, start=AT, end=AT, counts=w.Counts(ok=upto - start), features={f"f{i}": feature for i in range(16)}
    )
    return ww.WindowCut(ring=ring, start=start, upto=upto, body=wire.encode(found), inferences=upto - start)


def stored(store: Store) -> list[w.Window]:
    batch = store.next_batch(set(), max_bytes=1 << 24, max_records=1000)
    return [wire.decode_window(record.body) for record in batch.records] if batch is not None else []


def store_all(rings: Rings) -> None:
    rings._retry_at_s = 0.0
    rings.retry()


def test_weeks_without_room_take_no_more_memory_and_every_inference_is_stored_at_last(
    store: Store, tmp_path: Path
) -> None:
    rng, rings, worker, process = random.Random(1), rings_of(store, tmp_path), Worker(), psutil.Process()
    upto = {"one": 0, "two": 0}
    with held(store):
        for n in range(3000):
            if n == 2 * MANY:
                before = process.memory_info().rss
            ring = ("one", "two")[n % 2]
            rings.commit(worker, cut(ring, upto[ring], upto[ring] + 5, rng=rng, stage=n // 1500))
            upto[ring] += 5
            assert len(rings._unstored) <= 2 * MANY
        # 2,500 windows of 1.2 kB each, and what holds them.
        assert process.memory_info().rss - before < 2_000_000
        assert worker.committed == {}
        assert rings.continued(Path("one")) == upto["one"]
    store_all(rings)
    found = stored(store)
    assert sum(window.counts.ok for window in found) == store.pending_inferences() == 15_000
    assert {window.key.stage: 0 for window in found}.keys() == {0, 1}
    assert [sum(wi.counts.ok for wi in found if wi.key.stage == stage) for stage in (0, 1)] == [7_500, 7_500]
    assert worker.committed == upto == {ring: store.ring_upto(ring) for ring in upto}
    assert len(rings._unstored) == 0


@pytest.mark.parametrize("seed", range(4))
def test_what_was_sent_twice_while_it_waited_counts_once_and_takes_nothing_with_it(
    store: Store, tmp_path: Path, seed: int
) -> None:
    rng, rings, worker, heir = random.Random(seed), rings_of(store, tmp_path), Worker(), Worker()
    spans = [(5 * n, 5 * n + 5) for n in range(400)]
    rings.commit(worker, cut("one", *spans[0], rng=rng))
    assert store.ring_upto("one") == 5
    with held(store):
        died = rng.randrange(100, 300)
        again = rng.randrange(3) if seed % 2 else rng.randrange(died)
        for start, upto in spans[1:died]:
            rings.commit(worker, cut("one", start, upto, rng=rng))
        # The heir did not hear of any commit: it begins with what is stored, or what waits.
        for start, upto in spans[again:]:
            rings.commit(heir, cut("one", start, upto, rng=rng))
        assert len(rings._unstored) < 400 + died - again
    store_all(rings)
    assert store.pending_inferences() == 2000
    assert sum(window.counts.ok for window in stored(store)) == 2000
    assert store.ring_upto("one") == 2000
    assert heir.committed == {"one": 2000}
