"""Windows that arrive within an interval share a commit; nothing of them is sent, and no slot of a ring is free, before it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from skerry_agent import workerwire as ww
from skerry_agent.serving import Generation
from skerry_contract import window as w
from skerry_contract import wire
from skerry_contract.errors import Malformed

from tests.integration.agent.test_serving import GAS, Bench, until

AT = w.Instant("b" * 32, 1, 2, True)


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def cut(ring: str, n: int) -> ww.WindowCut:
    key = w.Key("gas", "a" * 64, "v", "none", "", 0)
    body = wire.encode(w.Window(key=key, start=AT, end=AT, counts=w.Counts(ok=3)))
    return ww.WindowCut(ring=ring, start=3 * n, upto=3 * n + 3, body=body, inferences=3)


def on_disk(folder: Path) -> tuple[int, dict[str, int]]:
    """What another program reads of the file: (inferences, positions of rings of which it has something)."""
    with closing(sqlite3.connect(f"file:{folder / 'state.db'}?mode=ro", uri=True)) as other:
        (inferences,) = other.execute("SELECT coalesce(sum(inferences), 0) FROM outbox").fetchone()
        return inferences, dict(other.execute("SELECT ring, upto FROM rings WHERE upto > 0"))


def commits(statements: list[str]) -> int:
    return sum(line == "COMMIT" for line in statements)


def test_what_arrives_within_the_interval_is_one_commit_and_told_after_it(tmp_path: Path, loop: asyncio.Runner) -> None:
    async def act() -> None:
        bench = Bench(tmp_path)
        try:
            generation = await bench.serve(gas=GAS)
            rings = bench.serving.site.rings
            assert rings._commit_s == 0.5
            statements: list[str] = []
            bench.store._db.set_trace_callback(statements.append)
            begun = asyncio.get_running_loop().time()
            for n in range(5):
                for ring in ("one", "two"):
                    rings.commit(generation.worker, cut(ring, n))
                await asyncio.sleep(0.02)
            assert on_disk(tmp_path) == (0, {})
            assert bench.store.next_batch((), max_bytes=1 << 20, max_records=100) is None
            assert not bench.heard(str(generation.number), "committed", "")
            await until(lambda: bench.store.pending()[0] == 10)
            assert 0.45 < asyncio.get_running_loop().time() - begun < 5
            assert commits(statements) == 1
            assert on_disk(tmp_path) == (30, {"one": 15, "two": 15})
            await until(lambda: told(bench, generation) == 10)
        finally:
            await bench.end()

    loop.run(act())


def told(bench: Bench, generation: Generation) -> int:
    lines = (bench.folder / "heard").read_text().splitlines()
    return lines.count(f"{generation.number} committed ")


def test_a_supervisor_that_dies_before_the_commit_has_the_ring_folded_again_from_where_it_was(
    tmp_path: Path, loop: asyncio.Runner
) -> None:
    async def act() -> None:
        bench = Bench(tmp_path)
        try:
            generation = await bench.serve(gas=GAS)
            rings = bench.serving.site.rings
            rings.commit(generation.worker, cut("one", 0))
            rings.retry()
            rings.commit(generation.worker, cut("one", 1))
            # Whoever reads the file now, as the next supervisor would, finds the window and its position together, or neither.
            assert on_disk(tmp_path) == (3, {"one": 3})
            # Its heir sends the span once more, and the first one, since it did not hear of its commit.
            for n in (0, 1):
                rings.commit(generation.worker, cut("one", n))
            rings.retry()
            assert on_disk(tmp_path) == (6, {"one": 6})
        finally:
            await bench.end()

    loop.run(act())


def test_without_an_interval_each_window_has_a_commit_of_its_own(tmp_path: Path, loop: asyncio.Runner) -> None:
    async def act() -> None:
        bench = Bench(tmp_path)
        try:
            generation = await bench.serve(gas=GAS)
            rings = bench.serving.site.rings
            rings._commit_s = 0.0
            statements: list[str] = []
            bench.store._db.set_trace_callback(statements.append)
            for n in range(3):
                rings.commit(generation.worker, cut("one", n))
                assert on_disk(tmp_path) == (3 * n + 3, {"one": 3 * n + 3})
            assert commits(statements) == 3
        finally:
            await bench.end()

    loop.run(act())


def test_a_window_that_cannot_be_read_stops_no_other(tmp_path: Path, loop: asyncio.Runner) -> None:
    async def act() -> None:
        bench = Bench(tmp_path)
        try:
            generation = await bench.serve(gas=GAS)
            rings = bench.serving.site.rings
            with pytest.raises(Malformed, match="MessagePack"):
                rings.commit(generation.worker, msgspec.structs.replace(cut("one", 0), body=b"\xc1"))
            rings.commit(generation.worker, cut("two", 0))
            rings.retry()
            assert on_disk(tmp_path) == (3, {"two": 3})
        finally:
            await bench.end()

    loop.run(act())
