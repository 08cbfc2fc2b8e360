"""Samples and readings of a whole agent: sealed on its disk, in the clear at the server, and raw values in memory alone."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from skerry_agent.memory_folder import file_system
from skerry_agent.sealing import MAGIC
from skerry_contract import group, wire

from tests.integration.agent.rig import Device, Server, wait_for

SEEN = 1.2345678
"""A value that the application sends, and its bytes in a ring and in a sample: a float32, and a float64 of it."""
IN_A_RING = struct.pack("<f", SEEN)
IN_A_SAMPLE = struct.pack(">d", struct.unpack("<f", IN_A_RING)[0])


def on_disk(device: Device) -> list[bytes]:
    with closing(sqlite3.connect(f"file:{device.state_dir / 'state.db'}?mode=ro", uri=True)) as db:
        return [body for (body,) in db.execute("SELECT body FROM outbox WHERE kind = 'sample'")]


def holds(folder: Path, needle: bytes) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and needle in p.read_bytes()]


def server_samples(server: Server) -> list[wire.Sample]:
    with server.lock:
        return [wire.decode(wire.Sample, r.body) for r in server.taken.values() if r.kind == "sample"]


@pytest.mark.skipif(file_system(Path("/dev/shm")) != "tmpfs", reason="no tmpfs at /dev/shm")
def test_with_encryption_no_value_of_a_request_reaches_the_disk_in_the_clear(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = make_device()
    with device.config.open("a") as file:
        file.write("[telemetry]\nencrypt = true\nreadings_s = 0.1\n")
    server.deaf = True
    device.publish(device.bundle("1.0.0"), settings=group.Settings(sample_rate=1.0, trial_inferences=1))
    device.start()
    folder = device.state_dir / "rings"
    target = folder.readlink()
    try:
        device.wait_running("1.0.0", "trial", "confirmed", "confirmed_on_golden")
        device.infer(7, value=SEEN)
        wait_for(lambda: len(on_disk(device)) == 7, why=lambda: f"seven samples: {device.log()[-2000:]}")
        assert all(body.startswith(MAGIC) for body in on_disk(device))
        assert holds(device.state_dir, IN_A_SAMPLE) == []
        assert holds(device.state_dir, IN_A_RING) == []
        assert holds(target, IN_A_RING) != []
        assert list(folder.glob("*.ring"))
        assert file_system(folder) == "tmpfs"
        server.deaf = False
        wait_for(lambda: len(server_samples(server)) == 7, why=lambda: f"samples: {device.log()[-2000:]}")
        assert [s.inputs["f0"] for s in server_samples(server)] == pytest.approx([SEEN] * 7)
        assert not server.conflicts
        wait_for(lambda: not on_disk(device), why="acknowledged samples to go")
        # The device's own readings come along with windows.
        wait_for(lambda: device.infer() and any("device_readings_n" in one.resources for one in server.windows()))
        assert device.stop() == 0
    finally:
        device.close()
        shutil.rmtree(target)


def test_a_group_without_a_sample_rate_gets_no_samples_and_needs_no_key(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = make_device()
    device.publish(device.bundle("1.0.0"), settings=group.Settings(trial_inferences=1))
    device.start()
    device.wait_running("1.0.0", "trial", "confirmed", "confirmed_on_golden")
    device.infer(5)
    wait_for(lambda: server.inferences() == 5)
    assert server_samples(server) == []
    assert not (device.state_dir / "identity" / "telemetry.key").exists()


def test_a_rate_that_the_group_sets_holds_at_once_and_the_hour_over_workers_that_end(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = make_device()
    with device.config.open("a") as file:
        file.write("[telemetry]\nsamples_per_hour = 8\n")
    digest = device.bundle("1.0.0")

    def settle(rate: float) -> None:
        device.publish(digest, settings=group.Settings(sample_rate=rate, trial_inferences=1))
        device.synced()

    device.publish(digest, settings=group.Settings(trial_inferences=1))
    device.start()
    device.wait_running("1.0.0", "trial", "confirmed", "confirmed_on_golden")
    made = 0

    def infer(n: int) -> int:
        """Samples at the server once all that was answered is counted there."""
        nonlocal made
        device.infer(n, value=SEEN)
        made += n
        wait_for(lambda: server.inferences() == made, why=lambda: f"{made}, got {server.inferences()}")
        wait_for(lambda: device.status()["outbox"]["pending"] == 0, why="nothing that waits")
        return len(server_samples(server))

    assert infer(30) == 0
    device.wait_running("1.0.0", "confirmed")
    settle(1.0)
    assert infer(3) == 3
    pid = device.status()["worker"]["pid"]
    settle(0.0)
    assert infer(4) == 3, "a worker that runs is told"
    settle(1.0)
    assert infer(2) == 5
    assert device.status()["worker"]["pid"] == pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: device.status()["worker"]["pid"] not in (0, pid), why="the next worker")
    assert infer(10) == 8, "of one reason, in one hour, by both workers"
