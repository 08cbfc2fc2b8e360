"""``skerry device logs`` from end to end: the tool, a real server with its broker, a real agent with its courier."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cli.conftest import Cli
from tests.rig_server import DeviceRig, ServerRig

OK, FAILED, USAGE = 0, 1, 2
AGENT = (sys.executable, "-m", "skerry_agent")


class Agent:
    """A whole agent, enrolled with a token of the operator's tool."""

    def __init__(self, cli: Cli, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.config = folder / "agent.toml"
        folder.mkdir()
        self.config.write_text(
            f'state_dir = "{folder / "state"}"\n[serving]\nport = 0\n[limits]\ndisk_reserve_mb = 0.0\n'
            "[timing]\njitter_s = 0.0\nbackoff_scale = 0.1\n"
        )
        token = cli("device", "token", "--group", "field", "--device", name).out.strip()
        environment = {**os.environ, "SKERRY_ENROLMENT_TOKEN": token}
        done = subprocess.run(
            [*AGENT, "enrol", "--config", str(self.config)], env=environment, capture_output=True, timeout=90
        )
        assert done.returncode == 0, done.stderr
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([*AGENT, "run", "--config", str(self.config)], stderr=log)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)


@pytest.fixture
def agent(cli: Cli, tmp_path: Path) -> Iterator[Agent]:
    found = Agent(cli, "far-away", tmp_path / "device")
    yield found
    found.stop()


def test_a_device_that_is_away_answers_when_it_is_back_and_one_that_is_there_at_once(
    cli: Cli, server: ServerRig, agent: Agent
) -> None:
    late = cli("device", "logs", agent.name, "--wait", "0.5")
    assert late.code == FAILED
    assert "far-away is offline, never heard of: it answers when it is back" in late.err
    assert "no answer within 0.5 s" in late.err
    number = server.good("GET", f"/api/v1/devices/{agent.name}/logs")["items"][-1]["number"]
    assert f"skerry device logs far-away --request {number}" in late.err

    agent.start()
    found = cli("device", "logs", agent.name, "--request", str(number), "--wait", "60", "--json")
    assert found.code == OK, found.err + (agent.folder / "log").read_text()
    told = found.json()
    assert (told["state"], told["number"]) == ("answered", number)
    assert "agent up" in [line["message"] for line in told["lines"]]

    server.wait("the link", lambda: server.good("GET", f"/api/v1/devices/{agent.name}")["online"])
    fresh = cli("device", "logs", agent.name, "--wait", "60")
    assert fresh.code == OK, fresh.err
    assert f"asked for its log: request {number + 1}" in fresh.err
    assert " info supervisor agent up device=far-away " in fresh.out
    assert f"log sent request={number} bytes=" in fresh.out
    own = subprocess.run(
        [*AGENT, "logs", "--config", str(agent.config)], check=True, capture_output=True, text=True, timeout=60
    )
    kept = [json.loads(line) for line in own.stdout.splitlines()]
    assert all(line in kept for line in told["lines"]), "what left the device is what stands in its ring"


def test_what_a_terminal_would_obey_is_written_out(cli: Cli, server: ServerRig, tmp_path: Path) -> None:
    device = DeviceRig(server, "hostile", tmp_path, group="field")
    device.enrol()
    number = server.good("POST", "/api/v1/devices/hostile/logs")["number"]
    lines = [
        json.dumps({"at": 0, "level": "info", "logger": "x", "message": "a\x1b[2Jb", "fields": {"n\x07": "\u202e"}}),
        "no json \x1b]0;title\x07",
        json.dumps({"at": "never", "level": ["x"], "message": None, "fields": 7}),
        '{"at": NaN}',
    ]
    packed = gzip.compress("\n".join(lines).encode())
    path = f"/device/v1/logs/{number}"
    headers = {"Authorization": device.signed(device.claims("POST", path, packed))}
    assert server.ask("POST", path, data=packed, headers=headers, token="").status == 200
    shown = cli("device", "logs", "hostile", "--request", str(number))
    assert shown.code == OK, shown.err
    assert not [c for c in shown.out if (ord(c) < 32 and c != "\n") or c == "\u202e"]
    assert len(shown.out.splitlines()) == len(lines)
    assert "a\\x1b[2Jb n\\x07=\\u202e" in shown.out
    assert cli("device", "logs", "hostile", "--request", str(number), "--json").json()["lines"][3] == '{"at": NaN}'


def test_what_ended_otherwise_is_told_in_words(cli: Cli, server: ServerRig, tmp_path: Path) -> None:
    device = DeviceRig(server, "odd", tmp_path, group="field")
    device.enrol()
    number = server.good("POST", "/api/v1/devices/odd/logs")["number"]
    path = f"/device/v1/logs/{number}"
    headers = {"Authorization": device.signed(device.claims("POST", path, b"no gzip"))}
    assert server.ask("POST", path, data=b"no gzip", headers=headers, token="").code == "bad_logs"
    refused = cli("device", "logs", "odd", "--request", str(number))
    assert refused.code == FAILED
    assert f"odd: request {number}: the device's answer was not taken: bad_logs" in refused.err

    waiting = server.good("POST", "/api/v1/devices/odd/logs")["number"]
    assert "waits already: no second one" in cli("device", "logs", "odd", "--wait", "0").err
    server.good("POST", "/api/v1/devices/odd/revoke", {"reason": "lost"})
    gone = cli("device", "logs", "odd", "--request", str(waiting))
    assert gone.code == FAILED
    assert "the device is revoked" in gone.err
    assert cli("device", "logs", "nobody").code == USAGE
