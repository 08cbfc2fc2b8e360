"""Rows a second that the outbox commits, ``GROUP`` to a commit, each on disk before the next: beside bare sqlite3 with the same
durability, persist-queue and litequeue. Rounds alternate, so that what else the machine does falls on all."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from skerry_agent.store import Entry, RingAt, open_store
from skerry_agent.store.database import WAL_PAGES

from tests.bench.peer_environment import interpreter
from tests.bench.result import Result, median, scratch

GROUP = 50
BODY_BYTES = 1400
"""A window of a model with some thirty features."""
COMMITS, ROUNDS = 40, 7

_QUEUES = """
import json, os, sys, time
from pathlib import Path
import litequeue, persistqueue

folder, group, size, commits, rounds = Path(sys.argv[1]), *map(int, sys.argv[2:])
bodies = [os.urandom(size) for _ in range(group)]
lite = litequeue.LiteQueue(folder / "lite.db")
lite.conn.execute("PRAGMA synchronous = FULL")
persist = persistqueue.SQLiteQueue(str(folder / "persist"), auto_commit=True)
took = {"lite": [], "persist": []}
for _ in range(rounds):
    begin = time.perf_counter()
    for _ in range(commits):
        with lite.transaction():
            for body in bodies:
                lite.put(body)
    took["lite"].append(group * commits / (time.perf_counter() - begin))
    begin = time.perf_counter()
    for body in bodies:
        persist.put(body)
    took["persist"].append(group / (time.perf_counter() - begin))
print(json.dumps(took))
"""


def _rate(commit: Callable[[int], None], start: int) -> float:
    begin = time.perf_counter()
    for number in range(start, start + COMMITS):
        commit(number)
    return GROUP * COMMITS / (time.perf_counter() - begin)


def run() -> Result:
    bodies = [os.urandom(BODY_BYTES) for _ in range(GROUP)]
    # Beside this file, not in a folder that may lie in memory: a commit there costs nothing.
    with tempfile.TemporaryDirectory(prefix="outbox-", dir=scratch()) as name:
        folder = Path(name)
        store, _ = open_store(
            folder / "state.db", binding="m", device="d-1", new_epoch=lambda: "e" * 32, wall_s=0.0, bound_bytes=1 << 30
        )
        with ExitStack() as files:

            def plain(name: str, *settings: str) -> Callable[[int], None]:
                bare = files.enter_context(closing(sqlite3.connect(folder / f"{name}.db", isolation_level=None)))
                for setting in ("journal_mode = WAL", "synchronous = FULL", *settings):
                    bare.execute(f"PRAGMA {setting}")
                bare.execute("CREATE TABLE queue (id INTEGER PRIMARY KEY, at REAL NOT NULL, body BLOB NOT NULL)")

                def commit(_: int) -> None:
                    bare.execute("BEGIN IMMEDIATE")
                    bare.executemany("INSERT INTO queue (at, body) VALUES (?, ?)", [(0.0, body) for body in bodies])
                    bare.execute("COMMIT")

                return commit

            def ours(number: int) -> None:
                entries = [Entry(kind="window", body=body, key="gas", inferences=1) for body in bodies]
                store.append(entries, [RingAt(ring="ring", upto=number)])

            bare = plain("bare")
            bounded = plain("bounded", f"wal_autocheckpoint = {WAL_PAGES}")
            rates: dict[str, list[float]] = {"ours": [], "bare": [], "bounded": []}
            for number in range(ROUNDS):
                rates["ours"].append(_rate(ours, number * COMMITS))
                rates["bare"].append(_rate(bare, 0))
                rates["bounded"].append(_rate(bounded, 0))
        store.close()
        command = [str(interpreter("outboxqueues")), "-c", _QUEUES, str(folder)]
        numbers = map(str, (GROUP, BODY_BYTES, COMMITS, ROUNDS))
        peers = json.loads(subprocess.run([*command, *numbers], check=True, capture_output=True, text=True).stdout)
    return Result(
        bench="outbox_rows",
        value=median(rates["ours"]),
        unit="rows/s",
        peer="bare sqlite3, a table of bodies",
        peer_value=median(rates["bare"]),
        n=GROUP * COMMITS * ROUNDS,
        note=(
            f"{GROUP} rows of {BODY_BYTES} bytes a commit, WAL, synchronous FULL; ring position, seq, its two indexes, sums and checksums are ours "
            f"alone; bare with a log as short as ours {median(rates['bounded']):.0f} rows/s; "
            f"litequeue 0.9 with FULL {median(peers['lite']):.0f} rows/s, persist-queue 1.1.0, which commits each row, "
            f"{median(peers['persist']):.0f}; budget >= 0.8"
        ),
    )
