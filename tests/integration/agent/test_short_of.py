"""A device that is short of descriptors for a while serves on, and is whole again afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.integration.agent.rig import Device, Load, Server, wait_for


@pytest.fixture
def serving(device: Device, server: Server) -> Device:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    return device


@contextlib.contextmanager
def short_of_descriptors(device: Device, left: int) -> Iterator[None]:
    """The supervisor may open ``left`` more and no others."""
    assert device.process is not None
    agent = psutil.Process(device.process.pid)
    before = agent.rlimit(psutil.RLIMIT_NOFILE)
    agent.rlimit(psutil.RLIMIT_NOFILE, (agent.num_fds() + left, before[1]))
    try:
        yield
    finally:
        agent.rlimit(psutil.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("left", [0, 3])
def test_a_worker_that_died_while_descriptors_were_short_is_replaced_when_there_are_some(
    serving: Device, server: Server, left: int
) -> None:
    pid = serving.status()["worker"]["pid"]
    with short_of_descriptors(serving, left):
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: "process_not_started" in serving.log(), why="a failed start")
    assert serving.infer(5) == ["1.0.0"] * 5
    assert serving.status()["worker"]["pid"] not in (0, pid)
    wait_for(lambda: server.inferences() == 25, why=f"25 counted, got {server.inferences()}")


def test_a_sync_without_descriptors_fails_alone_and_the_next_one_works(serving: Device, server: Server) -> None:
    with Load(serving, clients=1) as load:
        with short_of_descriptors(serving, 3):
            server.ring(77)
            wait_for(lambda: "process_not_started" in serving.log(), why="a failed sync")
        serving.publish(serving.bundle("1.1.0", seed=1))
        serving.sync()
        serving.wait_running("1.1.0")
    assert load.failed == []


def test_an_answer_that_nobody_foresaw_ends_no_sync_for_good(serving: Device, server: Server) -> None:
    serving.world["signed_at"] = {"not": "a number"}
    serving.save()
    serving.sync()
    wait_for(lambda: serving.status()["sync"]["code"] == "sync_failed", why="the failure")
    time.sleep(0.2)
    assert serving.infer(2) == ["1.0.0"] * 2
    serving.world["signed_at"] = 0
    serving.publish(serving.bundle("1.1.0", seed=1))
    serving.sync()
    serving.wait_running("1.1.0", "trial", "confirmed")
