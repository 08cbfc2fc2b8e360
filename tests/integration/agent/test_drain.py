"""A device comes back after weeks: what it holds leaves at its rate, news first, in as much memory as ever, and each inference once."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from skerry_agent import config, facts
from skerry_agent.identity import identity
from skerry_agent.store import Entry, open_store
from skerry_agent.upload import BURST_S
from skerry_contract import window as w
from skerry_contract import wire

from tests.integration.agent.rig import DEVICE, Broker, Device, wait_for
from tests.integration.agent.test_outbox_life import Server

WINDOW_S, DAY_S = 300, 86_400
MODELS = ("gas", "pump", "fan")
EVENTS = 900
ROOM_MB = 6.0
"""What draining may add to the supervisor at its peak: the messages in flight, and pages that SQLite keeps."""


class Arrivals(Server):
    """Notes what came when."""

    def __init__(self, port: int) -> None:
        self.came: list[tuple[float, int, wire.Batch]] = []
        self.order: list[str] = []
        super().__init__(port)

    def _message(self, client: Any, data: Any, message: Any) -> None:
        if message.topic.endswith("/state"):
            self.order.append("state")
        elif message.topic.endswith("/up"):
            self.order.append("records")
            self.came.append((time.monotonic(), len(message.payload), wire.decode_batch(message.payload)))
        super()._message(client, data, message)


@pytest.fixture
def server(broker: Broker) -> Iterator[Arrivals]:
    found = Arrivals(broker.port)
    yield found
    found.close()


@pytest.mark.parametrize(
    ("days", "readings", "kib_s"),
    [pytest.param(1, 30, 32, id="a day"), pytest.param(30, 30, 256, id="30 days", marks=pytest.mark.slow)],
)
def test_after_an_outage_news_leave_first_and_the_backlog_at_its_rate_in_constant_memory(
    make_device: Callable[..., Device], server: Arrivals, days: int, readings: int, kib_s: int
) -> None:
    device = make_device()
    device.config.write_text(
        device.config.read_text().replace("[limits]\n", f"[limits]\nupload_kib_s = {float(kib_s)}\n")
    )
    server.announce("offline")
    made = outage(device, days, readings)
    windows = days * DAY_S // WINDOW_S * len(MODELS)
    backlog = windows + EVENTS
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    assert device.process is not None
    supervisor = device.process.pid
    assert server.came == []
    before = peak_anew_mb(supervisor)
    server.order.clear()
    server.birth += 1
    began = time.monotonic()
    server.announce("online")

    wait_for(lambda: server.ledger.taken, why="the first records")
    os.kill(device.status()["workers"][0]["pid"], 9)
    end = began + 200
    while device.status()["outbox"]["pending"] and time.monotonic() < end:
        # Not as often as elsewhere: what the answers cost is not what is measured.
        time.sleep(0.5)
    assert device.status()["outbox"]["pending"] == 0
    took_s = server.came[-1][0] - began
    grown_mb = peak_mb(supervisor) - before

    device.wait_running("1.0.0", "confirmed")
    device.infer(5)
    wait_for(lambda: server.inferences() == made + 25, why=lambda: f"{made + 25}, got {server.inferences()}")
    assert server.ledger.conflicts == 0
    assert device.status()["outbox"]["lost"] == {}
    written_mb = device.status()["written_mb"]
    assert (written_mb is not None) == Path("/proc/self/io").exists()

    sent = sum(size for _, size, _ in server.came)
    largest = max(size for _, size, _ in server.came)
    print(
        f"{backlog} records, {sent} bytes in {took_s:.1f} s, {sent / 1024 / took_s:.0f} KiB/s at {kib_s} allowed, "
        f"{sent / backlog:.0f} bytes a record; supervisor {before:.1f} MB, {grown_mb:+.1f} at its peak"
    )
    assert server.order[0] == "state"
    # News first, the newest of them before the others.
    batches = [batch.records for _, _, batch in server.came]
    events = [[r.seq for r in records if r.kind == "event" and r.seq <= backlog] for records in batches]
    last = max(i for i, seqs in enumerate(events) if seqs)
    first = min(i for i, records in enumerate(batches) if any(r.kind == "window" for r in records))
    assert first >= last
    told = [seqs for seqs in events if seqs]
    assert len(told) > 1
    assert all(min(newer) > max(older) for newer, older in itertools.pairwise(told))
    # What happens meanwhile overtakes the backlog; windows come in their order.
    crash = next(i for i, records in enumerate(batches) if any(crashed(record) for record in records))
    seen = [r.seq for records in batches for r in records if r.kind == "window" and r.seq <= backlog]
    assert len(seen) == windows
    assert seen == sorted(seen)
    assert crash < max(i for i, records in enumerate(batches) if any(r.seq == seen[-1] for r in records))
    # The rate, over the whole and over each stretch of it.
    assert sent > 1.5 * BURST_S * kib_s * 1024, "too little to tell a rate"
    total = 0
    for at, size, _ in server.came:
        total += size
        assert total <= (at - began + BURST_S) * kib_s * 1024 + largest
    assert grown_mb <= ROOM_MB


def crashed(record: wire.Record) -> bool:
    return record.kind == "event" and wire.decode(wire.Event, record.body).code == "runtime_crashed"


def outage(device: Device, days: int, readings: int) -> int:
    """What an agent keeps that has no network for so many days: windows of three models, events among them. Returns their inferences."""
    found = config.load(device.config, {})
    store, _ = open_store(
        device.state_dir / "state.db", binding=facts.binding(identity(found)), device=DEVICE,
        new_epoch=lambda: os.urandom(16).hex(), wall_s=0.0, bound_bytes=1 << 30,
    )  # fmt: skip
    store._db.execute("PRAGMA synchronous = OFF")
    rng = random.Random(days)
    made = 0
    steps = days * DAY_S // WINDOW_S
    began_ms = int(time.time() * 1000) - days * DAY_S * 1000
    due = [step * steps // EVENTS for step in range(EVENTS)]
    for step in range(steps):
        at = w.Instant("b" * 32, step * WINDOW_S * 10**9, began_ms + step * WINDOW_S * 1000, True)
        end = w.Instant("b" * 32, (step + 1) * WINDOW_S * 10**9, began_ms + (step + 1) * WINDOW_S * 1000, True)
        entries = []
        for model in MODELS:
            ok = rng.randrange(1, 500)
            made += ok
            held = {f"reading_{i}_sum": rng.getrandbits(40) for i in range(readings)}
            key = w.Key(model, "a" * 64, "v", "none", "", 0)
            body = wire.encode(w.Window(key=key, start=at, end=end, counts=w.Counts(ok=ok), resources=held))
            entries.append(Entry(kind="window", body=body, key="/".join(map(str, key)), inferences=ok))
        for _ in range(due.count(step)):
            body = wire.encode(wire.Event(at=at, name="slot", data={"detail": rng.randbytes(20).hex()}))
            entries.append(Entry(kind="event", body=body))
        store.append(entries)
    store.close()
    return made


def peak_anew_mb(pid: int) -> float:
    """Resident now; the peak is counted from here."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_mb(pid)


def peak_mb(pid: int) -> float:
    """The most that was resident at once."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000
    raise AssertionError("no peak")
