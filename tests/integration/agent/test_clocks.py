"""A running agent under clocks that are wrong: years off, never set, asleep. What it counted is all there, once, and in its place.

The agent and its workers are real processes; ``skewed`` turns their clocks. What they send is taken by the server's real intake.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from skerry_contract import window as w
from skerry_contract import wire
from skerry_server.db import migrations
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, sqlite_url, writing
from skerry_server.mqtt import Message
from sqlalchemy import insert

from tests.integration.agent import rig, skewed
from tests.integration.agent.rig import DEVICE, GROUP, Broker, Device, wait_for
from tests.unit.server.ingest import conftest as ingest

YEAR_NS, HOUR_NS = 365 * 86_400 * 10**9, 3600 * 10**9
FOLD_S = 0.2
NEAR_MS = 30_000
"""What may lie between a request and its place on the server, on a machine with other work."""


@dataclass(frozen=True)
class Heard:
    """A message, and when it came by a right clock."""

    true_ms: int
    topic: str
    payload: bytes


class Server(rig.Server):
    """Keeps every message as it came. ``slept_ns``: of the device, which right clocks ran on for."""

    def __init__(self, port: int) -> None:
        self.heard: list[Heard] = []
        self.slept_ns = 0
        super().__init__(port)

    def _message(self, client: Any, data: Any, message: Any) -> None:
        true_ms = (time.time_ns() + self.slept_ns) // 1_000_000
        self.heard.append(Heard(true_ms, message.topic, message.payload))
        super()._message(client, data, message)

    def sent(self) -> list[wire.Record]:
        """Records by seq."""
        with self.lock:
            return [record for (_, _), record in sorted(self.taken.items())]

    def spans(self) -> list[w.Window]:
        """Windows by seq."""
        return [wire.decode_window(record.body) for record in self.sent() if record.kind == "window"]


@pytest.fixture
def server(broker: Broker) -> Iterator[Server]:
    found = Server(broker.port)
    yield found
    found.close()


class Clocks:
    """Of the device: turns them, and keeps what a right clock would say."""

    def __init__(self, device: Device, server: Server, **at_first: int) -> None:
        self._path = device.folder / "clocks"
        self._server = server
        self.now = {"wall_ns": 0, "slept_ns": 0} | at_first
        skewed.write(self._path, **self.now)

    def turn(self, **to: int) -> None:
        self.now |= to
        self._server.slept_ns = self.now["slept_ns"]
        skewed.write(self._path, **self.now)


def counted(server: Server, made: int) -> None:
    wait_for(lambda: server.inferences() >= made, why=lambda: f"{made} inferences, got {server.inferences()}")
    assert server.inferences() == made


def in_order(windows: list[w.Window]) -> None:
    """Windows of one boot follow each other, none reaches into the next."""
    assert len({window.start.boot_id for window in windows}) == 1
    for window in windows:
        assert window.start.boot_ns <= window.end.boot_ns
    for earlier, later in itertools.pairwise(windows):
        assert earlier.end.boot_ns <= later.start.boot_ns, (earlier.end, later.start)


def test_a_running_agent_takes_jumps_of_its_clock_by_ten_years_and_a_sleep_of_eight_hours(
    device: Device, server: Server, tmp_path: Path
) -> None:
    clocks = Clocks(device, server)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    pid = device.status()["workers"][0]["pid"]
    true_ms = [now_ms()]
    made = 20
    counted(server, made)

    def asked(**to: int) -> None:
        nonlocal made
        windows = len(server.spans())
        began = time.monotonic()
        clocks.turn(**to)
        device.infer(5)
        made += 5
        true_ms.append((time.time_ns() + clocks.now["slept_ns"]) // 1_000_000)
        counted(server, made)
        # No storm: windows are cut as often as before, and one more for a sleep.
        assert len(server.spans()) - windows <= (time.monotonic() - began) / FOLD_S + 2
        assert device.running() == ("1.0.0", "confirmed")

    device.call("POST", "/skerry/v1/throttle", {"rate": 1000, "for_s": 3600})
    asked(wall_ns=10 * YEAR_NS)
    asked(wall_ns=-10 * YEAR_NS)
    asked(wall_ns=0)
    # A duration is one: no jump has ended it, and none has made it longer.
    assert 3000 < device.status()["serving"]["throttle"]["left_s"] <= 3600
    synced = device.status()["sync"]["at_ms"]

    # Counted just before the sleep: its window is of before.
    device.infer(3)
    made += 3
    before, slept_at_ns = made, time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    asked(slept_ns=8 * HOUR_NS)
    wait_for(lambda: device.status()["serving"]["throttle"] is None, why="the end of the throttle")
    # What came due meanwhile is done once.
    wait_for(lambda: device.status()["sync"]["at_ms"] > synced, timeout_s=30, why="a sync")
    asked(slept_ns=8 * HOUR_NS, wall_ns=YEAR_NS)
    assert device.log().count("sync failed") == 0

    spans = server.spans()
    in_order(spans)
    gap = max(b.start.boot_ns - a.end.boot_ns for a, b in itertools.pairwise(spans))
    assert 8 * HOUR_NS - 60 * 10**9 < gap < 8 * HOUR_NS + 60 * 10**9
    assert max(span.end.boot_ns - span.start.boot_ns for span in spans) < 60 * 10**9, "no window spans the sleep"
    # The clocks are compared at every report: what comes at once after the sleep may still count as of before, no more.
    assert before <= sum(span.counts.ok for span in spans if span.end.boot_ns < slept_at_ns + 60 * 10**9) <= before + 5
    assert device.status()["workers"][0]["pid"] == pid
    assert device.status()["worker"]["ends"] == {}
    assert device.status()["outbox"]["lost"] == {}
    for placed in on_the_server(server, tmp_path):
        assert min(abs(placed["start_ms"] - true) for true in true_ms) < NEAR_MS, placed


def test_a_device_whose_clock_was_never_set_is_placed_by_the_server_before_and_after_it_is_set(
    device: Device, server: Server, tmp_path: Path
) -> None:
    clocks = Clocks(device, server, wall_ns=1000 * 10**9 - time.time_ns())
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    counted(server, 20)
    assert all(span.end.wall_ms < 86_400_000 for span in server.spans())
    clocks.turn(wall_ns=0)
    device.infer(5)
    counted(server, 25)
    spans = server.spans()
    in_order(spans)
    assert abs(spans[-1].end.wall_ms - now_ms()) < NEAR_MS
    placed = on_the_server(server, tmp_path)
    assert len(placed) == len(spans)
    assert all(abs(row["start_ms"] - now_ms()) < 2 * NEAR_MS for row in placed), placed


def test_a_jump_in_the_middle_of_a_trial_ends_it_neither_early_nor_late(device: Device, server: Server) -> None:
    clocks = Clocks(device, server)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(10)
    for wall_ns in (10 * YEAR_NS, -10 * YEAR_NS):
        clocks.turn(wall_ns=wall_ns)
        time.sleep(1.2)
        assert device.running() == ("1.0.0", "trial")
    device.infer(10)
    device.wait_running("1.0.0", "confirmed")
    counted(server, 20)


@pytest.mark.slow
def test_restarts_under_other_clocks_keep_seqs_and_epoch(device: Device, server: Server) -> None:
    clocks = Clocks(device, server, wall_ns=10 * YEAR_NS)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    epoch = device.status()["outbox"]["epoch"]
    made = 20
    for wall_ns in (-10 * YEAR_NS, 1000 * 10**9 - time.time_ns(), 0):
        device.kill()
        clocks.turn(wall_ns=wall_ns)
        device.start()
        device.wait_running("1.0.0", "confirmed")
        device.infer(3)
        made += 3
    counted(server, made)
    assert device.status()["outbox"]["epoch"] == epoch
    assert device.status()["outbox"]["lost"] == {}
    seqs = [record.seq for record in server.sent()]
    assert seqs == list(range(1, len(seqs) + 1))
    in_order(server.spans())


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def on_the_server(server: Server, folder: Path) -> list[Any]:
    """Where the server's intake puts the windows, of messages as they came, each at its time."""
    engine = open_engine(sqlite_url(folder / "server.db"))
    migrations.migrate(engine)
    with writing(engine) as connection:
        connection.execute(insert(t.groups), [{"name": GROUP, "created_ms": 0}])
        connection.execute(insert(t.devices), [ingest.device_row(DEVICE)])
    intake = ingest.Server(engine)
    for one in list(server.heard):
        intake.now_ms = one.true_ms - 1000
        intake.take(Message(one.topic, one.payload, False, 1))
    assert intake.counted(DEVICE) == server.inferences()
    found = intake.rows(t.windows, device=DEVICE)
    engine.dispose()
    return found
