"""A ring that lay in memory and is gone: what went with it is named, by the worker's last report, or as a ring."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from skerry_agent.memory_folder import file_system

from tests.integration.agent.rig import Device, Server, wait_for
from tests.integration.agent.test_full_disk import fill, lacking, small_disk


@contextmanager
def kept_full(device: Device) -> Iterator[None]:
    """Whatever is freed on the device's disk, another program takes."""
    filler, stop = fill(device), threading.Event()

    def take() -> None:
        with filler.open("ab", buffering=0) as file:
            while not stop.is_set():
                try:
                    file.write(bytes(4096))
                except OSError:
                    time.sleep(0.001)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        filler.unlink()


def kill_worker(device: Device) -> None:
    pid = device.status()["worker"]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: device.status()["worker"]["pid"] not in (0, pid), why="the next worker")


def flushed(device: Device) -> None:
    device.call("POST", "/skerry/v1/flush", {})


def test_a_worker_that_is_killed_on_a_full_disk_takes_nothing_along_that_is_not_named(
    make_device: Callable[..., Device], server: Server, tmp_path: Path
) -> None:
    why = lacking()
    if why and os.environ.get("CI") == "true":
        pytest.fail(why)
    if why:
        pytest.skip(why)
    device = make_device(fold_interval_s=60)
    device.publish(device.bundle("1.0.0"))
    with small_disk(device.state_dir, tmp_path / "disk.img", "tmpfs"):
        try:
            device.start()
            device.wait_running("1.0.0", "trial")
            device.infer(30)
            device.wait_running("1.0.0", "confirmed")
            flushed(device)
            wait_for(lambda: server.inferences() == 30, why="a quiet start")
            with kept_full(device):
                kill_worker(device)
                assert "kept in memory" in device.log()
                device.infer(50)
                # Its reports come ten times a second.
                time.sleep(1.0)
                kill_worker(device)
                device.infer(5)
            flushed(device)
            wait_for(lambda: server.inferences() == 35, why=lambda: f"35, got {server.inferences()}")
            wait_for(lambda: server.events("ring"), why="what is named")
            lost = device.status()["outbox"]["lost"]
            assert (lost["rings_gone"], lost["inferences_in_gone_rings"]) == (1, 50)
            (event,) = server.events("ring")
            assert (event.code, event.data["inferences"]) == ("ring_gone", 50)
        finally:
            device.close()


@pytest.mark.skipif(file_system(Path("/dev/shm")) != "tmpfs", reason="no tmpfs at /dev/shm")
def test_rings_that_a_power_cut_took_out_of_memory_are_named(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = make_device(fold_interval_s=60)
    with device.config.open("a") as file:
        file.write("[telemetry]\nencrypt = true\n")
    device.publish(device.bundle("1.0.0"))
    device.start()
    target = (device.state_dir / "rings").readlink()
    try:
        device.wait_running("1.0.0", "trial")
        device.infer(30)
        device.wait_running("1.0.0", "confirmed")
        worker = device.status()["worker"]["pid"]
        device.kill()
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(worker), why="the worker's end")
        shutil.rmtree(target)
        device.start()
        device.wait_running("1.0.0", "confirmed")
        wait_for(lambda: server.events("ring"), why="what is named")
        assert [event.code for event in server.events("ring")] == ["ring_gone"]
        assert device.status()["outbox"]["lost"]["rings_gone"] == 1
    finally:
        device.close()
        # The start after the cut drew another name.
        shutil.rmtree((device.state_dir / "rings").readlink(), ignore_errors=True)
