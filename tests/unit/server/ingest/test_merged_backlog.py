"""What a device merged and dropped while it was full arrives: no record stands for more ranges than the server takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from skerry_agent.store import Entry, Store, open_store
from skerry_agent.upload import Upload
from skerry_contract import topics, wire
from skerry_contract import window as w
from skerry_server import ledger
from skerry_server.db import tables as t
from skerry_server.mqtt import Message


def drain(store: Store, server: Any, at: w.Instant) -> wire.Ack:
    """Sends until nothing waits; each acknowledgement must free something sooner or later."""
    acks: list[wire.Ack] = []

    def publish(payload: bytes) -> bool:
        acks.extend(server.take(Message(topics.up("dev-a"), payload, False, 1)).acks.values())
        return True

    upload = Upload(store, publish, window=4, batch_bytes=65536, ack_s=30.0)
    upload.open = True
    now_s, still, last = 0.0, 0, None
    while store.pending()[0]:
        still = still + 1 if store.pending() == last else 0
        assert still < 100, f"{store.pending()} wait and nothing moves"
        last = store.pending()
        now_s += 0.5
        upload.pump(now_s, at)
        for ack in acks:
            store.acknowledge(ack)
            upload.acknowledged(ack)
            newest = ack
        acks.clear()
    return newest


def fill(store: Store, make: Any, n: int, models: int, *, sampled: bool) -> int:
    window = make.window(ok=10)
    windows = [
        wire.encode(w.Window(key=window.key._replace(stage=i), start=window.start, end=window.end, counts=window.counts,
                             resources={f"r{k}_n": k for k in range(40)}))
        for i in range(models)
    ]  # fmt: skip
    sample = wire.encode(wire.Sample(at=window.start, key=window.key, id="gas-1", why="share"))
    for i in range(0, n, 20):
        entries = []
        for j in range(i, i + 20):
            entries.append(Entry(kind="window", body=windows[j % models], key=str(j % models), inferences=10))
            if sampled:
                entries.append(Entry(kind="sample", body=sample))
        store.append(entries)
        store.compact(make.at())
    return 10 * n


@pytest.mark.parametrize(
    ("n", "models", "bound", "most", "sampled"),
    [
        pytest.param(600, 1, 130_000, 100, True, id="samples between the windows"),
        pytest.param(600, 6, 30_000, 100, False, id="six models, and a bound that drops"),
        pytest.param(14_000, 1, 4_000_000, wire.MAX_RANGES, True, id="48 days", marks=pytest.mark.slow),
        pytest.param(18_000, 6, 600_000, wire.MAX_RANGES, False, id="six models for long", marks=pytest.mark.slow),
    ],
)
def test_a_long_full_backlog_arrives_or_is_named(
    server: Any, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, models: int, bound: int,
    most: int, sampled: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(wire, "MAX_RANGES", most)
    monkeypatch.setattr(ledger, "MAX_EXTRA", min(most, ledger.MAX_EXTRA))
    store, _ = open_store(
        tmp_path / "state.db", binding="m", device="dev-a", new_epoch=lambda: make.EPOCH, wall_s=0.0, bound_bytes=bound
    )
    try:
        made = fill(store, make, n, models, sampled=sampled)
        widest = max(len(store.record(make.EPOCH, seq).replaces) for (seq,) in store.read("SELECT seq FROM outbox"))
        assert most // 4 < widest <= most, "long enough to meet the bound"
        ack = drain(store, server, make.at())
        assert (ack.upto, ack.extra_ranges) == (store.last_seq, ())
        named = sum(row["data"]["inferences"] for row in server.rows(t.events, name="tombstone"))
        assert server.rows(t.quarantine) == []
        assert server.counted() + named == made
        assert named == store.lost().get("inferences_dropped", 0)
    finally:
        store.close()


@pytest.mark.parametrize("kind", ["window", "tombstone"])
def test_a_record_that_replaces_too_much_is_refused_and_leaves_no_hole(
    server: Any, make: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(wire, "MAX_RANGES", 3)
    replaces = [(1, 1), (3, 3), (5, 6), (8, 8)]
    wide = make.tombstone(9, replaces) if kind == "tombstone" else make.record(9, replaces=replaces)
    assert server.take(make.up("dev-a", wide)).quarantined == 1
    ack = server.ack(make.up("dev-a", make.record(2), make.record(4), make.record(7)))
    assert (ack.upto, ack.extra_ranges, ack.conflict) == (9, (), ())
    assert server.counted() == 30
