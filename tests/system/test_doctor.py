"""``skerry-agent doctor`` on a real device of a real fleet: well, with its agent down, and cut off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from skerry_cli.demo.control import ask_agent

from tests.system.conftest import Rig, utc_now

DEVICE = "gas-1"
CHECKS = {
    "configuration", "agent", "address", "state folder", "disk", "store", "outbox", "clock", "identity", "root of trust", "slots",
    "runtime", "worker", "update", "fleet", "server", "broker", "access", "applications",
}  # fmt: skip


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Rig]:
    """One enrolled device that runs 1.0.0."""
    rig = Rig(tmp_path)
    fleet = rig.fleet
    try:
        fleet.start_server()
        fleet.hold_ceremony(utc_now())
        fleet.enrol(DEVICE)
        fleet.finish_enrolment(DEVICE)
        made = rig.publish("1.0.0", (1,))
        rig.start_rollout("first", made, [{"share": 1.0, "min_inferences": 0, "max_seconds": 120}])
        fleet.wait("the model", lambda: fleet.running(fleet.listed()[DEVICE])[0] == "1.0.0", 90.0)
        yield rig
    finally:
        rig.processes.stop()


def examine(rig: Rig, *options: str) -> tuple[int, str]:
    config = rig.fleet.device_folder(DEVICE) / "agent.toml"
    ended = subprocess.run(
        [sys.executable, "-m", "skerry_agent", "doctor", "--config", str(config), *options],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ended.stderr == ""
    return ended.returncode, ended.stdout


def findings(rig: Rig) -> tuple[int, dict[str, dict[str, Any]]]:
    status, said = examine(rig, "--json")
    body = json.loads(said)
    assert body["ok"] is (status == 0)
    for finding in body["findings"]:
        assert (finding["advice"] == "") is (finding["verdict"] == "ok"), finding
    return status, {finding["check"]: finding for finding in body["findings"]}


def failed(found: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, finding in found.items() if finding["verdict"] == "fail"}


def test_a_well_device_has_no_failure_and_each_thing_that_breaks_is_named(one: Rig) -> None:
    fleet = one.fleet
    fleet.wait("a session", lambda: fleet.status(DEVICE)["link"]["server_online"], 30.0)
    status, found = findings(one)
    assert failed(found) == set(), found
    assert status == 0
    assert set(found) - {"losses"} == CHECKS
    assert "golden cases passed" in found["runtime"]["detail"]
    assert found["broker"]["verdict"] == found["server"]["verdict"] == found["store"]["verdict"] == "ok"
    # Looking changed nothing: the same link is up, and no second agent was made of it.
    assert fleet.status(DEVICE)["link"]["connected"]

    # Another CA's certificate in the device's place: the broker refuses it, the server is not asked for it.
    identity = fleet.device_folder(DEVICE) / "state" / "identity"
    stranger = fleet.folder / "stranger"
    stranger.mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
         "-subj", f"/CN={DEVICE}", "-keyout", str(stranger / "key"), "-out", str(stranger / "pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    own = {name: (identity / name).read_bytes() for name in ("device.key", "device.pem")}
    (identity / "device.key").write_bytes((stranger / "key").read_bytes())
    (identity / "device.pem").write_bytes((stranger / "pem").read_bytes())
    status, found = findings(one)
    assert (status, failed(found)) == (1, {"broker"})
    for name, data in own.items():
        (identity / name).write_bytes(data)

    # Revoked: the ports answer as before, and the agent knows better.
    fleet.api.post(f"/api/v1/devices/{DEVICE}/revoke", {"reason": "stolen"})
    ask_agent(fleet.device_folder(DEVICE) / "state" / "run" / "control.sock", "POST", "/skerry/v1/sync")
    fleet.wait("the refusal to be known", lambda: fleet.status(DEVICE)["sync"]["membership"] != "", 30.0)
    status, found = findings(one)
    assert (status, failed(found)) == (1, {"fleet"})

    # The agent is down: what can be seen without it is still seen.
    fleet.processes.stop([DEVICE])
    status, found = findings(one)
    assert (status, failed(found)) == (1, {"agent"})
    assert set(found) - {"losses"} == CHECKS - {"worker", "update", "fleet", "applications"}

    fleet.processes.stop(["server"])
    status, text = examine(one)
    assert status == 1
    lines = text.splitlines()
    assert lines[0].startswith("ok    configuration: ")
    assert {line[6:].partition(":")[0] for line in lines if line.startswith("fail ")} == {"agent", "server", "broker"}
