"""Updates from a folder that a person carried here, on a whole device without a network; the server hears of it when the link is back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.agent.rig import Broker, Device, Server, wait_for


def carried(device: Device, stable: str) -> Path:
    """A folder that gives ``stable`` to the group. The device's own repository does not answer any more, and gave nothing new."""
    before = dict(device.world)
    device.publish(stable)
    folder = device.folder / "stick"
    folder.mkdir(exist_ok=True)
    (folder / "world.json").write_text(json.dumps(device.world))
    device.world = {**before, "bundles": {}, "down": True}
    device.save()
    return folder


def imported(device: Device, folder: Path | str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skerry_agent", "import", str(folder), "--config", str(device.config), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def serving(make_device: Any, server: Server) -> Device:
    """A device that confirmed 1.0.0."""
    device: Device = make_device(trial_s=0.5)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "confirmed_on_golden")
    return device


def test_a_folder_brings_an_update_without_network_and_the_server_hears_of_it_later(
    serving: Device, server: Server, broker: Broker
) -> None:
    folder = carried(serving, serving.bundle("2.0.0"))
    broker.stop()
    done = imported(serving, folder)
    assert done.returncode == 0, done.stderr + serving.log()[-3000:]
    assert "gas 2.0.0 confirmed_on_golden" in done.stdout
    assert "looking at the folder" in done.stderr
    assert serving.infer(1) == ["2.0.0"]
    assert not server.events("import")
    broker.start()
    taken, ended = wait_for(lambda: (found := server.events("import")) and len(found) == 2 and found, why="the link")
    assert (taken.code, taken.data["state"], taken.data["folder"]) == ("", "taken", str(folder))
    assert (ended.code, ended.data["state"], ended.data["running"]) == ("", "ended", {"gas": "2.0.0"})
    assert [one["state"] for one in ended.data["updates"]] == ["confirmed_on_golden"]
    ends = [
        event.data
        for event in server.events()
        if event.data["version"] == "2.0.0" and event.data["state"] == "confirmed_on_golden"
    ]
    assert [(data["source"], data["fetched"]["carried_files"] > 0) for data in ends] == [("import", True)]
    # Once more: it gives nothing new, which is no failure.
    again = imported(serving, folder, "--json")
    told = json.loads(again.stdout)
    assert (again.returncode, told["state"], told["updates"]) == (0, "ended", [])


def test_a_refused_folder_changes_nothing_and_says_why(serving: Device, server: Server) -> None:
    folder = carried(serving, serving.bundle("2.0.0"))
    world = json.loads((folder / "world.json").read_text())
    refusal = ["rejected", "rollback", "timestamp: wanted version 7 or later, got 3"]
    (folder / "world.json").write_text(json.dumps({**world, "errors": {"sync": refusal}}))
    done = imported(serving, folder)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        3,
        "skerry-agent: rollback: timestamp: wanted version 7 or later, got 3",
    )
    told = wait_for(lambda: server.events("import"), why="the server hears of it")
    assert [(event.code, event.data["state"]) for event in told] == [("rollback", "refused")]
    assert serving.running() == ("1.0.0", "confirmed_on_golden")
    for wrong in ("/nowhere/at/all", serving.config):
        done = imported(serving, wrong)
        assert (done.returncode, "folder_unreadable" in done.stderr) == (3, True)
    assert serving.call("POST", "/skerry/v1/import", {"folder": "stick"}).status == 400


@pytest.mark.slow
def test_a_bad_bundle_of_a_folder_goes_back_as_any_other_and_is_said(serving: Device) -> None:
    digest = serving.bundle("2.0.0")
    folder = carried(serving, digest)
    world = json.loads((folder / "world.json").read_text())
    (folder / "world.json").write_text(json.dumps({**world, "flip": [digest]}))
    done = imported(serving, folder)
    assert done.returncode == 1
    assert "gas 2.0.0" in done.stdout
    assert "hash_mismatch" in done.stdout
    assert serving.running() == ("1.0.0", "confirmed_on_golden")


@pytest.mark.slow
def test_what_did_not_come_at_the_first_try_is_tried_again_from_the_folder_without_any_network(serving: Device) -> None:
    folder = carried(serving, serving.bundle("2.0.0"))
    world = json.loads((folder / "world.json").read_text())
    (folder / "world.json").write_text(
        json.dumps({**world, "errors": {"fetch": ["degraded", "not_enough_disk", "full"]}})
    )
    imported(serving, folder, "--no-wait")
    serving.wait_update("idle", "not_enough_disk", version="2.0.0")
    (folder / "world.json").write_text(json.dumps(world))
    serving.wait_running("2.0.0", "confirmed_on_golden")
    ended = serving.call("GET", "/skerry/v1/import").body
    assert (ended["state"], [one["code"] for one in ended["updates"]]) == ("ended", [""])


def test_an_import_goes_on_where_the_power_was_cut_with_no_network(serving: Device) -> None:
    digest = serving.bundle("2.0.0")
    folder = carried(serving, digest)
    world = json.loads((folder / "world.json").read_text())
    (folder / "world.json").write_text(json.dumps({**world, "slow_fetch": {digest: 60}}))
    assert imported(serving, folder, "--no-wait").returncode == 0
    serving.wait_update("fetch", version="2.0.0")
    serving.kill()
    (folder / "world.json").write_text(json.dumps(world))
    serving.start()
    serving.wait_running("2.0.0")


@pytest.mark.slow
def test_an_update_that_waits_for_the_network_is_taken_from_the_folder_at_once(
    make_device: Any, server: Server
) -> None:
    device: Device = make_device(trial_s=0.5, backoff_scale=100)
    digest = device.bundle("1.0.0")
    folder = carried(device, digest)
    device.world = {
        **json.loads((folder / "world.json").read_text()),
        "errors": {"fetch": ["transient", "unreachable", "no route"]},
    }
    device.save()
    device.start()
    device.wait_update("idle", "unreachable", version="1.0.0")
    device.world["errors"] = {}
    device.world["down"] = True
    device.save()
    done = imported(device, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert device.running()[0] == "1.0.0"


def test_without_an_agent_an_import_says_that_none_answers(device: Device, tmp_path: Path) -> None:
    assert "not_running" in imported(device, tmp_path).stderr
