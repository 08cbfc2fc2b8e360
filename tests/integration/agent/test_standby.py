"""What ran before a trial is kept loaded beside it: the way back is a hand-over, and works all the same without."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
import pytest

from tests import models
from tests.integration.agent.rig import Device, Load, Server, wait_for
from tests.integration.agent.test_update import offer


@pytest.fixture
def serving(device: Device, server: Server) -> Device:
    """A device that confirmed 1.0.0."""
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    return device


def standby(device: Device) -> dict[str, Any]:
    return dict(device.status()["standby"])


def waiting(device: Device) -> int:
    """Process that keeps what ran before loaded."""
    found = wait_for(lambda: (s := standby(device))["state"] == "ready" and s["pids"], why=lambda: str(standby(device)))
    assert len(found) == 1
    return int(found[0])


def crash(device: Device) -> None:
    with pytest.raises((OSError, AssertionError)):
        device.infer(1, value=models.CRASH_VALUE + 0.5)


def test_a_crash_in_the_trial_is_answered_by_what_was_kept_loaded(serving: Device, server: Server) -> None:
    assert standby(serving) == {"state": "none", "pids": []}
    offer(serving, "1.1.0", "crash-on-rows")
    serving.wait_running("1.1.0", "trial")
    pid = waiting(serving)
    crash(serving)
    serving.wait_update("idle", "trial_crashed")
    assert serving.infer(3) == ["1.0.0"] * 3
    status = serving.status()
    assert (status["worker"]["pid"], status["standby"]["state"]) == (pid, "none")
    wait_for(lambda: server.inferences() >= 23, why="what it answered is counted")


def test_a_trial_that_is_kept_ends_what_waited(serving: Device) -> None:
    offer(serving, "1.1.0", seed=1)
    serving.wait_running("1.1.0", "trial")
    pid = waiting(serving)
    serving.infer(20)
    serving.wait_running("1.1.0", "confirmed")
    wait_for(lambda: not psutil.pid_exists(pid), why="its end")
    assert standby(serving) == {"state": "none", "pids": []}
    wait_for(lambda: len(list((serving.state_dir / "rings").glob("*.ring"))) == 1, why="only the live ring")


def test_the_way_back_works_when_what_waited_was_killed_or_had_to_go(serving: Device) -> None:
    offer(serving, "1.1.0", "crash-on-rows")
    serving.wait_running("1.1.0", "trial")
    os.kill(waiting(serving), signal.SIGKILL)
    crash(serving)
    serving.wait_update("idle", "trial_crashed")
    assert serving.infer(3) == ["1.0.0"] * 3
    # Memory gets short in the middle of the trial: it goes, the trial goes on.
    serving.sync(pardon=True)
    serving.wait_running("1.1.0", "trial")
    pid = waiting(serving)
    text = serving.config.read_text()
    serving.config.write_text(text.replace("[limits]", "[limits]\nmemory_reserve_mb = 1e8"))
    assert serving.call("POST", "/skerry/v1/reload", {}).body["live"] == ["limits.memory_reserve_mb"]
    wait_for(lambda: standby(serving)["state"] == "no_memory", why="its end")
    wait_for(lambda: not psutil.pid_exists(pid), why="its process gone")
    assert serving.running() == ("1.1.0", "trial")
    with Load(serving, clients=2) as load:
        wait_for(lambda: load.ok > 5, why="load")
        assert serving.call("POST", "/skerry/v1/cancel", {}).status == 200
        serving.wait_running("1.0.0", "confirmed")
    assert load.failed == []
