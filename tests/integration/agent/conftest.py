from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.agent.rig import Broker, Device, Server


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    found = Broker(tmp_path / "nats").start()
    yield found
    found.stop(kill=True)


@pytest.fixture
def server(broker: Broker) -> Iterator[Server]:
    found = Server(broker.port)
    yield found
    found.close()


@pytest.fixture
def make_device(tmp_path: Path, broker: Broker) -> Iterator[Callable[..., Device]]:
    made: list[Device] = []

    def make(**timing: float) -> Device:
        folder = tmp_path / f"device-{len(made)}"
        folder.mkdir()
        made.append(Device(folder, broker.port, **timing))
        return made[-1]

    yield make
    for device in made:
        device.close()


@pytest.fixture
def device(make_device: Callable[..., Device]) -> Device:
    return make_device()
