"""A server that uses a broker of somebody else's: certificate from the CA, address told to devices, life without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from skerry_contract import window as w
from skerry_contract import wire

from tests.integration.broker import mosquitto
from tests.rig_server import DeviceRig, ServerRig


class World:
    """A server's folder, and a Mosquitto with a certificate of its CA."""

    def __init__(self, folder: Path) -> None:
        self.server = ServerRig(folder / "server")
        certificates = folder / "certificates"
        command = [sys.executable, "-m", "skerry_server", "broker-certificate", "--data", str(self.server.data)]
        done = subprocess.run(
            [*command, "--out", str(certificates), "--name", "localhost", "--name", "127.0.0.1"],
            check=True,
            capture_output=True,
            timeout=60,
        )
        assert json.loads(done.stdout)["certificate"] == str(certificates / "broker.pem")
        assert (certificates / "broker.key").stat().st_mode & 0o777 == 0o600
        self.broker = mosquitto.Mosquitto(folder, certificates)
        self.server._settings |= {
            "BROKER_KIND": "external",
            "BROKER_URL": f"mqtts://127.0.0.1:{self.broker.server_port}",
            "BROKER_PUBLIC_URL": f"mqtts://localhost:{self.broker.port}",
        }

    def parts(self) -> dict[str, bool]:
        return dict(self.server.ask("GET", "/readyz", token="").json()["parts"])

    def until_broker_is(self, well: bool, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.parts()["broker"] is not well:
            assert time.monotonic() < deadline, self.server.log()[-3000:]
            time.sleep(0.1)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    if mosquitto.program() is None:
        why = "mosquitto is not installed (on Debian: apt install mosquitto)"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    found = World(tmp_path)
    yield found
    found.server.close()
    found.broker.stop()


def window(ok: int) -> tuple[str, bytes]:
    instant = w.Instant("b" * 32, 1, 1, True)
    key = w.Key("gas", "ab" * 32, "onnx-int8", "none", "", 0)
    return "window", wire.encode(w.Window(key=key, start=instant, end=instant, counts=w.Counts(ok=ok, rows=ok)))


def settled(device: DeviceRig, seq: int) -> bool:
    deadline = time.monotonic() + 20
    while device.acked < seq and time.monotonic() < deadline:
        time.sleep(0.05)
    return device.acked >= seq


def test_the_server_starts_without_it_says_so_and_takes_records_once_it_is_there(world: World, tmp_path: Path) -> None:
    server = world.server.start()
    assert server.ready["mqtt"] == {"host": "localhost", "port": world.broker.port}
    assert world.parts()["broker"] is False
    server.good("PUT", "/api/v1/groups/press", {"settings": {"window_s": 5}})
    world.broker.start()
    world.until_broker_is(True)
    # Nobody but a person makes it anew: its end is seen at each connect.
    metrics = server.ask("GET", "/metrics", token="").data.decode()
    (line,) = [
        line for line in metrics.splitlines() if line.startswith('skerry_certificate_expires_seconds{name="broker"}')
    ]
    assert 390 * 86_400 < float(line.split()[1]) <= 397 * 86_400

    device = DeviceRig(server, "dev-a", tmp_path / "device")
    assert device.enrol()["mqtt"] == server.ready["mqtt"]
    device.connect()
    device.report()
    seq = device.send(window(3), window(4))
    assert settled(device, seq)

    assert world.broker.pid is not None
    device.disconnect()
    os.kill(world.broker.pid, signal.SIGKILL)
    world.until_broker_is(False)
    world.until_broker_is(True)
    device.connect()
    seq = device.send(window(6))
    assert settled(device, seq)
    device.disconnect()


def test_no_broker_of_its_own_runs_beside(world: World) -> None:
    world.broker.start()
    server = world.server.start()
    world.until_broker_is(True)
    assert not (server.data / "nats").exists()
    kept = json.loads((server.data / "run.json").read_text())
    assert kept["mqtt"]["port"] == world.broker.port and "mqtt_port" not in kept
