"""Whole systems: a server with its broker, agents and applications, each a process of its own, on free ports of loopback."""

from __future__ import annotations

import datetime as dt
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from skerry_cli import catalog, publishing
from skerry_cli.demo.application import Counts
from skerry_cli.demo.fleet import GROUP, SERVER_SETTINGS, Fleet
from skerry_cli.demo.models import MODEL, Made
from skerry_cli.demo.processes import Processes
from skerry_cli.demo.reckoning import server_counts
from skerry_cli.errors import CliError

from tests import trained

DEVICES = ("gas-1", "gas-2", "gas-3")


def utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class Rig:
    """A small fleet and what tests do to it."""

    def __init__(self, folder: Path, devices: Sequence[str] = DEVICES, *, tflite: Sequence[str] = ()) -> None:
        self.devices = tuple(devices)
        self.processes = Processes(folder, leashed=True)
        self.fleet = Fleet(folder, self.processes, seed=1)
        self.fleet.tflite = frozenset(tflite)

    def start(self, *, world: int = 2) -> None:
        self.fleet.start_server()
        self.fleet.hold_ceremony(utc_now())
        self.fleet.change_world(world)
        for device in self.devices:
            self.fleet.enrol(device)
        for device in self.devices:
            self.fleet.finish_enrolment(device)

    def publish(self, version: str, batches: tuple[int, ...], seed: int = 0) -> Made:
        """Trains, builds, pushes, approves."""
        made = trained.make_bundle(self.fleet.folder / version, version=version, batches=batches, seed=seed)
        pushed = publishing.push(self.fleet.api, made.bundle)
        assert pushed.state == "validated", pushed
        addition = catalog.Addition(model=MODEL, version=version, digest=made.bundle.digest, submitter="test")
        self.fleet.approver.change(catalog.Change(add=(addition,)), now=utc_now(), folder=made.bundle.folder)
        return made

    def start_rollout(self, rollout: str, made: Made, stages: list[dict[str, Any]], **more: Any) -> None:
        body = {
            "id": rollout,
            "group": GROUP,
            "model": MODEL,
            "candidate": made.bundle.digest,
            "stages": stages,
            "gates": {"max_error_rate": 0.5, "latency_p95_ms": 5000.0},
            **more,
        }
        self.fleet.api.post("/api/v1/rollouts", body)

    def wait_for_version(self, version: str, timeout_s: float = 90.0) -> None:
        def confirmed() -> bool:
            items = self.fleet.listed()
            told = [self.fleet.running(items[device]) for device in self.devices]
            return all(v == version and state.startswith("confirmed") for v, state in told)

        self.fleet.wait(f"every device to run {version}", confirmed, timeout_s)

    def wait_for_answers(self, device: str, more: int, timeout_s: float = 40.0) -> None:
        there = self.fleet.counts(device).answered
        self.fleet.wait(
            f"{more} more answers on {device}",
            lambda: self.fleet.counts(device).answered >= there + more,
            timeout_s,
        )

    def kill(self, name: str) -> None:
        """kill -9 of a process that this rig started, alone: its children are left to notice."""
        os.kill(self.processes.pid(name), signal.SIGKILL)
        self.processes.wait(name, 10.0)

    def forget(self, name: str) -> None:
        """Takes a killed process off the list of those that must live; kills what is left of its group."""
        self.processes.stop([name])

    def restart_server(self) -> None:
        self.start_server_again()
        self.fleet.wait("the server to answer again", self._answers, 30.0)

    def start_server_again(self) -> None:
        """On the data of the one that ended; returns at once."""
        self.processes.start(
            "server",
            [sys.executable, "-m", "skerry_server", "run", "--data", str(self.fleet.server.data)],
            environment=SERVER_SETTINGS,
        )

    def _answers(self) -> bool:
        try:
            return bool(self.fleet.api.get("/api/v1/info"))
        except CliError:
            return False

    def broker_pid(self) -> int:
        for child in psutil.Process(self.processes.pid("server")).children(recursive=True):
            if "nats-server" in child.name():
                return child.pid
        raise AssertionError("the server has no broker child")

    def worker_pid(self, device: str) -> int:
        return int(self.fleet.status(device)["worker"]["pid"])

    def reckon(self, timeout_s: float = 60.0) -> dict[str, tuple[Counts, int]]:
        """Stops the applications; per device what its application counted and what the server counted in the end."""
        self.fleet.processes.stop(f"app-{device}" for device in self.devices)
        told = {device: self.fleet.counts(device) for device in self.devices}
        assert all(counts.done for counts in told.values())
        deadline = time.monotonic() + timeout_s
        steady = 0
        before: dict[str, int] = {}
        while time.monotonic() < deadline and steady < 8:
            items, _ = server_counts(self.fleet)
            counted = {device: sum(row["ok"] for row in items if row["device"] == device) for device in self.devices}
            enough = all(counted[device] >= told[device].answered for device in self.devices)
            steady = steady + 1 if enough and counted == before else 0
            before = counted
            time.sleep(0.5)
        return {device: (told[device], before[device]) for device in self.devices}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Three enrolled devices without a model."""
    rig = Rig(tmp_path)
    try:
        rig.start()
        yield rig
    finally:
        rig.processes.stop()
