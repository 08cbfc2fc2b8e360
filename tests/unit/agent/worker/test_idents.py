"""Clients' own ids are found through an index as they would be by looking through every prediction."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skerry_agent.worker import book as b
from skerry_agent.worker import feedback as f
from skerry_agent.worker import http1, idents
from skerry_agent.worker.plan import OutputColumn, Plan
from skerry_agent.worker.recorder import Recorder
from skerry_contract import window as w

PLAN = Plan(outputs=(OutputColumn(name="p", classes=2, labels=("no", "yes")),))
ANSWERS = {"p": np.array([[0.2, 0.8]] * 2048, np.float32)}


def recorder_at(path: Path, *, capacity: int, predictions: int) -> Recorder:
    return Recorder(
        w.Key("gas", "a" * 64, "onnx-fp32", "none", "", 0),
        PLAN,
        ring=str(path),
        boot_id="0" * 32,
        send=lambda _: None,
        later=lambda act: act(),
        capacity=capacity,
        predictions=predictions,
    )


def predict(recorder: Recorder, ident: int, rows: int = 1) -> None:
    answers = {"p": ANSWERS["p"][:rows]}
    # As old as it is: on a machine that has been up for a day, what was answered at its start is late for a label.
    recorder.ok({}, answers, rows, 1, 0, 0, 1, time.clock_gettime_ns(time.CLOCK_BOOTTIME), ident=ident)


@pytest.mark.parametrize(("seed", "kinds"), [(1, 40), (2, 40_000), (3, 1 << 63), (4, 1 << 63)])
def test_ids_are_found_at_their_newest_position_whatever_was_indexed_when(
    tmp_path: Path, seed: int, kinds: int
) -> None:
    # Several times round the book, indexes made in full and in part, older than what was written since.
    rng = random.Random(seed)
    recorder = recorder_at(tmp_path / "1.ring", capacity=8192, predictions=16384)
    book = recorder.book
    assert book is not None
    newest: dict[int, int] = {}
    slices: Iterator[None] = iter(())
    indexed = checked = 0
    while recorder.ring.written < 70_000:
        for _ in range(rng.choice([1, 30, 100])):
            ident = rng.choice([0, rng.randrange(1, kinds)])
            if ident:
                newest[ident] = recorder.ring.written
            predict(recorder, ident, rng.choice([1, 1, 1, 1, 1, 1, 1, 2, 200]))
        if not next(slices, "over"):
            indexed += 1
        elif rng.random() < 0.4:
            slices = book.index()
        if rng.random() < 0.5:
            continue
        recorder.fold()
        oldest = max(0, book.filled - 16384)
        asked = [*rng.sample(sorted(newest), min(len(newest), 50)), *(rng.randrange(1, kinds) for _ in range(20))]
        for some in (sorted(set(asked)), asked[:1]):
            wanted = {ident: newest[ident] for ident in some if newest.get(ident, -1) >= oldest}
            assert book.positions_of(np.array(some, np.uint64)) == wanted
            checked += len(wanted)
    assert indexed > 20
    assert checked > 500


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 8191, 8192, 70_000])
def test_an_index_holds_every_id_once_however_many_there_are(n: int) -> None:
    column = np.random.default_rng(n).integers(1, 1 << 64, n, dtype=np.uint64)
    making = idents.build(column, 0, np.ones(n, np.bool_))
    while True:
        try:
            next(making)
        except StopIteration as end:
            index: idents.Index = end.value
            break
    order = np.argsort(column)
    found = index.find(column, column[order])
    assert sorted(set(found.tolist())) == list(range(n))
    assert not len(index.find(column, np.setdiff1d(np.arange(1, 99, dtype=np.uint64), column)))
    # Three bytes each, five above 65,536, and part of a block.
    assert index.size_bytes <= (3 if n <= 65536 else 5) * n + 40


class Device:
    """The feedback of a worker with one model and some books of former keys, each full of ids of its own."""

    def __init__(self, folder: Path, *, former: int, requests: int) -> None:
        self.sent: list[Any] = []
        self.recorder = recorder_at(folder / "now.ring", capacity=8192, predictions=65536)
        self.feedback = f.Feedback(
            {"gas": self.recorder},
            f.Rules(max_age_s=86400.0, books=16),
            boot_id="0" * 32,
            send=self.sent.append,
            loop=asyncio.get_running_loop(),
        )
        for number in range(former):
            recorder = recorder_at(folder / f"{number}.ring", capacity=8192, predictions=65536)
            for i in range(requests):
                predict(recorder, f.digest_of(f"{number}/{i}"), 512)
            recorder.cut()
            assert recorder.book is not None
            self.feedback.keep(recorder.book)
        self.replies: list[bytes] = []

    def label(self, *names: str) -> list[str] | None:
        """What each was taken for; None when the answer is not there yet."""
        body = json.dumps({"feedback": [{"id": name, "label": 1, "row": 0} for name in names]}).encode()
        head = http1.Head(
            method="POST", path=b"/skerry/v1/feedback", keep_alive=True, length=len(body), has_length=True
        )
        reply = self.feedback.answer(http1.Request(head, body, len(body)), self.replies.append)
        return None if reply is None else outcomes(reply)


def outcomes(reply: bytes) -> list[str]:
    assert reply.startswith(b"HTTP/1.1 200 "), reply
    return [one["outcome"] for one in json.loads(reply.partition(b"\r\n\r\n")[2])["feedback"]]


async def turns_until_answered(device: Device) -> int:
    for turn in range(2000):
        if device.replies:
            return turn
        await asyncio.sleep(0)
    raise AssertionError("never answered")


def test_the_first_label_by_an_own_id_waits_for_indexes_made_between_other_work(tmp_path: Path) -> None:
    async def run() -> None:
        device = Device(tmp_path, former=4, requests=20)
        assert device.label("0/3", "3/19", "nobody's", "2/0") is None
        # Each time round the loop others had their turn.
        assert await turns_until_answered(device) > 4 * 3
        assert outcomes(device.replies[0]) == ["matched", "matched", "unknown", "matched"]
        # From now on at once.
        assert device.label("0/3", "1/7", "nobody's") == ["duplicate", "matched", "unknown"]

    asyncio.run(run())


def test_few_predictions_of_former_keys_are_looked_through_without_waiting(tmp_path: Path) -> None:
    async def run() -> None:
        device = Device(tmp_path, former=4, requests=4)
        assert device.label("0/3", "3/0", "3/4") == ["matched", "matched", "unknown"]

    asyncio.run(run())


def test_what_is_still_predicted_is_found_at_once_and_indexed_meanwhile(tmp_path: Path) -> None:
    async def run() -> None:
        device = Device(tmp_path, former=0, requests=0)
        for i in range(30):
            predict(device.recorder, f.digest_of(f"now/{i}"), 512)
        book = device.recorder.book
        assert book is not None
        assert device.label("now/2") == ["matched"]
        assert book.unindexed == 30 * 512
        for _ in range(100):
            await asyncio.sleep(0)
        assert book.unindexed == 0
        predict(device.recorder, f.digest_of("now/2"))
        assert device.label("now/2", "now/1", "now/30") == ["matched", "matched", "unknown"]
        assert book.unindexed == 1

    asyncio.run(run())


def test_a_worker_that_leaves_answers_the_label_that_waits_for_its_index(tmp_path: Path) -> None:
    async def run() -> None:
        device = Device(tmp_path, former=4, requests=20)
        assert device.label("0/3", "nobody's") is None
        device.feedback.leave()
        await turns_until_answered(device)
        assert outcomes(device.replies[0]) == ["matched", "unknown"]

    asyncio.run(run())


def test_a_book_that_is_forgotten_while_it_is_indexed_does_no_harm(tmp_path: Path) -> None:
    async def run() -> None:
        device = Device(tmp_path, former=16, requests=20)
        assert device.label("0/3", "15/3") is None
        for number in range(3):
            await asyncio.sleep(0)
            recorder = recorder_at(tmp_path / f"later-{number}.ring", capacity=8192, predictions=65536)
            predict(recorder, 7)
            recorder.cut()
            assert recorder.book is not None
            device.feedback.keep(recorder.book)
        await turns_until_answered(device)
        assert outcomes(device.replies[0]) == ["unknown", "matched"]

    asyncio.run(run())


def test_books_give_up_their_index_with_their_mapping(tmp_path: Path) -> None:
    recorder = recorder_at(tmp_path / "1.ring", capacity=64, predictions=64)
    predict(recorder, 5)
    recorder.fold()
    assert isinstance(recorder.book, b.Book)
    list(recorder.book.index())
    assert recorder.book.positions_of(np.array([5], np.uint64)) == {5: 0}
    recorder.book.close()
