"""A whole fleet on Mosquitto: real agents, one of them on TFLite, and kill -9 of the broker in the middle of their work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.broker import mosquitto
from tests.system.conftest import DEVICES, Rig


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mosquitto.Mosquitto]:
    if mosquitto.program() is None:
        why = "mosquitto is not installed (on Debian: apt install mosquitto)"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    data = tmp_path / "fleet" / "server"
    names = ["--out", str(tmp_path / "certificates"), "--name", "127.0.0.1"]
    for command in (["init"], ["broker-certificate", *names]):
        subprocess.run(
            [sys.executable, "-m", "skerry_server", command[0], "--data", str(data), *command[1:]],
            check=True,
            capture_output=True,
            timeout=60,
        )
    found = mosquitto.Mosquitto(tmp_path, tmp_path / "certificates")
    found.start()
    monkeypatch.setenv("SKERRY_SERVER_BROKER_KIND", "external")
    monkeypatch.setenv("SKERRY_SERVER_BROKER_URL", f"mqtts://127.0.0.1:{found.server_port}")
    monkeypatch.setenv("SKERRY_SERVER_BROKER_PUBLIC_URL", f"mqtts://127.0.0.1:{found.port}")
    yield found
    found.stop()


@pytest.mark.slow
def test_a_killed_mosquitto_in_the_middle_of_work_loses_and_doubles_nothing(
    broker: mosquitto.Mosquitto, tmp_path: Path
) -> None:
    rig = Rig(tmp_path / "fleet")
    fleet = rig.fleet
    fleet.tflite = frozenset({"gas-2"})
    try:
        rig.start()
        assert fleet.server.mqtt_port == broker.port
        made = rig.publish("1.0.0", (1,))
        rig.start_rollout("first", made, [{"share": 1.0, "min_inferences": 0, "max_seconds": 120}])
        for device in DEVICES:
            fleet.start_application(device)
        rig.wait_for_version("1.0.0")
        assert {fleet.variant(item) for item in fleet.listed().values()} == {"onnx-int8", "tflite-int8"}
        for round_ in range(3):
            rig.wait_for_answers("gas-2", 15)
            assert broker.pid is not None
            os.kill(broker.pid, signal.SIGKILL)
            fleet.wait("the broker's restart", lambda n=round_: broker.restarts == n + 1 and broker.pid, 20.0)
            time.sleep(1.5)
        for device, (told, counted) in rig.reckon().items():
            assert told.answered == counted == told.attempts > 50, (device, told.answered, counted, told.attempts)
    finally:
        rig.processes.stop()
