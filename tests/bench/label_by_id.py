"""What labels by clients' own ids cost the worker's event loop when nobody knows these: one present book and sixteen of former
keys, each with 65,536 ids, beside looking through every book for them. CPU time of the whole request but HTTP."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from skerry_agent.worker import book as b
from skerry_agent.worker import feedback as f
from skerry_agent.worker import http1
from skerry_agent.worker.plan import OutputColumn, Plan
from skerry_agent.worker.recorder import Recorder
from skerry_contract import window as w

from tests.bench.result import Result, median

FORMER, PREDICTIONS, MOST, ROUNDS = 16, 65536, f.MOST_LABELS, 200
_PLAN = Plan(outputs=(OutputColumn(name="p", classes=3, labels=("a", "b", "c")),))


def run() -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_run(Path(folder)))


async def _run(folder: Path) -> Result:
    loop = asyncio.get_running_loop()
    sent: list[Any] = []
    present = _full(folder / "0.ring")
    feedback = f.Feedback(
        {"gas": present}, f.Rules(max_age_s=86400.0, books=FORMER), boot_id="0" * 32, send=sent.append, loop=loop
    )
    books = [present.book]
    for number in range(1, FORMER + 1):
        books.append(_full(folder / f"{number}.ring").book)
        assert books[-1] is not None
        feedback.keep(books[-1])

    async def ask(n: int) -> tuple[float, float]:
        """Milliseconds of CPU of the answer, and of the longest turn of the loop before it."""
        body = json.dumps({"feedback": [{"id": f"request-{i}", "label": 0} for i in range(n)]}).encode()
        head = http1.Head(
            method="POST", path=b"/skerry/v1/feedback", keep_alive=True, length=len(body), has_length=True
        )
        replies: list[bytes] = []
        turn = 0.0
        begin = last = time.thread_time()
        reply = feedback.answer(http1.Request(head, body, len(body)), replies.append)
        while reply is None and not replies:
            await asyncio.sleep(0)
            now = time.thread_time()
            turn, last = max(turn, now - last), now
        spent = time.thread_time() - begin
        assert (reply or replies[0]).count(b'"unknown"') == n
        for window in sent:
            feedback.committed(window.ring, window.upto)
        sent.clear()
        return 1e3 * spent, 1e3 * turn

    wanted = np.sort(np.array([f.digest_of(f"request-{i}") for i in range(MOST)], np.uint64))
    through = median([_looked_through(books, wanted) for _ in range(10)])
    indexing, turn = await ask(1)
    one = median([(await ask(1))[0] for _ in range(ROUNDS)])
    thousand = median([(await ask(MOST))[0] for _ in range(ROUNDS)])
    return Result(
        bench="label_by_id",
        value=thousand,
        unit="ms",
        peer="the same books looked through",
        peer_value=through,
        n=ROUNDS,
        note=(
            f"{MOST:,} unknown ids; one {one:.2f} ms; indexing once, {FORMER + 1} books {indexing:.0f} ms, "
            f"longest turn of the loop {turn:.2f} ms; budget 10, one id 1"
        ),
    )


def _full(ring: Path) -> Recorder:
    recorder = Recorder(
        w.Key("gas", "d" * 64, "onnx-int8", "none", "", 0),
        _PLAN,
        ring=str(ring),
        boot_id="0" * 32,
        send=lambda _: None,
        later=lambda act: act(),
        predictions=PREDICTIONS,
    )
    answer = {"p": np.array([[0.2, 0.5, 0.3]], np.float32)}
    for ident in np.random.default_rng(int(ring.stem)).integers(1, 1 << 64, PREDICTIONS, dtype=np.uint64).tolist():
        recorder.ok({}, answer, 1, 1, 0, 0, 1, time.clock_gettime_ns(time.CLOCK_BOOTTIME), ident=ident)
    recorder.cut()
    return recorder


def _looked_through(books: list[b.Book | None], wanted: Any) -> float:
    """Milliseconds: a book without an index is looked through."""
    begin = time.thread_time()
    for book in books:
        assert book is not None
        assert book.unindexed == PREDICTIONS
        book.positions_of(wanted)
    return 1e3 * (time.thread_time() - begin)
