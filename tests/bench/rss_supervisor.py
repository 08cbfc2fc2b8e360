"""Memory of an agent's supervisor, idle after 100 update cycles, beside a bare process that imports the same libraries.

The agent is the product with real workers and a real broker; only the repository is a stand-in's folder. A cycle is one whole
update: sync, download, verify, stage, prove, hand-over, trial of 20 inferences, confirm; it goes back and forth between two
versions.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.bench.result import Result
from tests.integration.agent.rig import Broker, Device, Server

CYCLES = 100
SETTLE_S = 5.0

_BARE = """
import asyncio, ssl, sqlite3, sys, msgspec, psutil, paho.mqtt.client
ssl.create_default_context()
print("up", flush=True)
sys.stdin.read()
"""


def run() -> Result:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        broker = Broker(folder / "nats").start()
        server = Server(broker.port)
        (folder / "device").mkdir()
        device = Device(folder / "device", broker.port)
        try:
            first, last, took_s = _cycle(device)
        finally:
            device.close()
            server.close()
            broker.stop(kill=True)
    return Result(
        bench="rss_supervisor",
        value=last,
        unit="MB",
        peer="bare Python with the same libraries",
        peer_value=_bare(),
        n=CYCLES,
        note=f"RSS idle after {CYCLES} update cycles in {took_s:.0f} s; {first:.1f} after the first; budget 45",
    )


def _cycle(device: Device) -> tuple[float, float, float]:
    versions = ("1.0.0", "1.1.0")
    digests = [device.bundle(version, seed=seed) for seed, version in enumerate(versions)]
    device.publish(digests[0])
    device.start()
    assert device.process is not None
    supervisor = psutil.Process(device.process.pid)
    _confirm(device, versions[0])
    time.sleep(1.0)
    first = supervisor.memory_info().rss / 1e6
    began = time.monotonic()
    for i in range(1, CYCLES + 1):
        device.publish(digests[i % 2])
        device.sync()
        _confirm(device, versions[i % 2])
    took_s = time.monotonic() - began
    time.sleep(SETTLE_S)
    return first, supervisor.memory_info().rss / 1e6, took_s


def _confirm(device: Device, version: str) -> None:
    device.wait_running(version, "trial", "confirmed")
    device.infer(25)
    device.wait_running(version, "confirmed")


def _bare() -> float:
    with subprocess.Popen(
        [sys.executable, "-c", _BARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as bare:
        assert bare.stdin is not None
        assert bare.stdout is not None
        bare.stdout.readline()
        found = psutil.Process(bare.pid).memory_info().rss / 1e6
        bare.stdin.close()
    return found
