"""A store with a long backlog that was torn or had bits turned over: the agent answers as soon as ever, and tells what it cost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest

from tests.integration.agent.rig import Broker, Device, wait_for
from tests.integration.agent.test_outbox_life import Server, empty, prefill

LONGER_S = 2.0
"""What a damaged store may add to a start."""


@pytest.fixture
def server(broker: Broker) -> Iterator[Server]:
    found = Server(broker.port)
    yield found
    found.close()


def torn(data: bytearray) -> None:
    """What a card that lied about its writes leaves: the end is missing, and a stretch in the middle is of another time."""
    del data[len(data) * 2 // 3 :]
    middle = len(data) // 2 & ~4095
    data[middle : middle + 8 * 4096] = bytes(8 * 4096)


def flipped(data: bytearray) -> None:
    """Bits that turned over, everywhere."""
    rng = random.Random(7)
    for _ in range(300):
        data[rng.randrange(100, len(data))] ^= 1 << rng.randrange(8)


@pytest.mark.parametrize("size", [10_000_000, pytest.param(50_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [torn, pytest.param(flipped, marks=pytest.mark.slow)])
def test_a_damaged_store_adds_less_than_two_seconds_to_a_start(
    device: Device, server: Server, damage: Callable[[bytearray], None], size: int
) -> None:
    server.announce("offline")
    device.config.write_text(device.config.read_text().replace("[limits]\n", "[limits]\nupload_kib_s = 0.0\n"))
    prefill(device, size)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    took = []
    for harm in (None, damage):
        device.kill()
        if harm is not None:
            path = device.state_dir / "state.db"
            data = bytearray(path.read_bytes())
            harm(data)
            path.write_bytes(data)
        begun = time.monotonic()
        device.start()
        wait_for(lambda: device.infer() == ["1.0.0"], why=lambda: f"an answer: {device.log()[-3000:]}")
        took.append(time.monotonic() - begun)
    print(f"{size / 1e6:.0f} MB, start to first answer {took[0]:.2f} s, {damage.__name__} {took[1]:.2f} s")
    assert took[1] < took[0] + LONGER_S
    server.birth += 1
    server.announce("online")
    wait_for(lambda: empty(device), why="an empty outbox")
    lost = device.status()["outbox"]["lost"]
    assert lost.get("store_damaged") == 1 or lost.get("record_damaged", 0) > 0, lost
    if "store_damaged" in lost:
        assert list(device.state_dir.glob("state.db.damaged-*"))
        wait_for(lambda: server.events("epoch"), why="the report")
    device.infer(3)
    wait_for(lambda: empty(device), why="an empty outbox again")
