"""How fast an outbox leaves: at its rate in the mean, a pause earns a bounded burst, and news go before what a long outage held up."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from skerry_agent.store import Entry, Store, open_store
from skerry_agent.upload import BURST_S, Upload
from skerry_contract import window as w
from skerry_contract import wire

AT = w.Instant("b" * 32, 1, 2, True)
RATE = 2000.0
BURST = RATE * BURST_S


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found, _ = open_store(
        tmp_path / "state.db", binding="m", device="d-1", new_epoch=lambda: "e" * 32, wall_s=0.0, bound_bytes=1 << 30
    )
    found._db.execute("PRAGMA synchronous = OFF")
    rng = random.Random(1)
    found.append([Entry(kind="window", body=rng.randbytes(300), key="gas", inferences=1) for _ in range(400)])
    yield found
    found.close()


class Wire:
    """Takes messages, and acknowledges none."""

    def __init__(self, store: Store, **choices: float) -> None:
        self.sent: list[bytes] = []
        self.up = Upload(store, self._publish, window=1 << 30, batch_bytes=1200, ack_s=1e12, **choices)
        self.up.open = True

    def _publish(self, payload: bytes) -> bool:
        self.sent.append(payload)
        return True

    def bytes(self) -> int:
        return sum(map(len, self.sent))

    def largest(self) -> int:
        return max(map(len, self.sent))


def test_what_waits_leaves_at_the_rate(store: Store) -> None:
    link = Wire(store, rate_bytes_s=RATE)
    link.up.pump(5.0, AT)
    assert BURST <= link.bytes() < BURST + link.largest()
    for step in range(1, 41):
        link.up.pump(5.0 + step / 4, AT)
        assert link.bytes() < BURST + step * RATE / 4 + link.largest()
    assert link.bytes() >= BURST + 10 * RATE


def test_a_pause_of_years_earns_one_burst(store: Store) -> None:
    link = Wire(store, rate_bytes_s=RATE)
    link.up.pump(5.0, AT)
    before = link.bytes()
    link.up.pump(3e8, AT)
    assert link.bytes() - before < BURST + link.largest()


def test_what_is_sent_again_counts_too(store: Store) -> None:
    link = Wire(store, rate_bytes_s=RATE)
    for step in range(20):
        link.up.again()
        link.up.pump(step / 10, AT)
    assert link.bytes() < BURST + 2 * RATE + link.largest()


def test_news_go_before_the_backlog_while_it_drains(store: Store) -> None:
    link = Wire(store, rate_bytes_s=RATE)
    link.up.pump(0.0, AT)
    store.append([Entry(kind="event", body=wire.encode(wire.Event(at=AT, name="update")))])
    count = len(link.sent)
    for step in range(1, 9):
        link.up.pump(step / 4, AT)
    assert any(record.kind == "event" for record in wire.decode_batch(link.sent[count]).records)


def test_without_a_rate_all_leaves_at_once(store: Store) -> None:
    link = Wire(store)
    link.up.pump(0.0, AT)
    assert sum(len(wire.decode_batch(payload).records) for payload in link.sent) == 400


def test_what_is_not_acknowledged_is_sent_again_after_a_longer_wait_each_time_and_never_while_a_copy_lies_here(
    store: Store,
) -> None:
    sent: list[float] = []
    owed = False

    def publish(payload: bytes) -> bool:
        sent.append(now_s)
        return True

    up = Upload(store, publish, window=1, batch_bytes=1200, ack_s=10.0, owed=lambda: owed)
    up.open = True
    for now_s in map(float, range(400)):
        up.pump(now_s, AT)
    assert sent == [0.0, 10.0, 30.0, 70.0, 150.0, 310.0]
    owed = True
    for now_s in map(float, range(400, 2000)):
        up.pump(now_s, AT)
    assert len(sent) == 6
    owed = False
    up.acknowledged(wire.Ack(epoch="e" * 32, upto=0))
    for now_s in map(float, range(2000, 2025)):
        up.pump(now_s, AT)
    assert sent[6:] == [2000.0, 2020.0]
