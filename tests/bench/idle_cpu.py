"""CPU that an idle device spends: agent (supervisor and worker), connected to a real broker, one model, nobody asking; beside MLServer.

Percent of one core over half a minute after it settled. The agent's part includes its reports, its keep-alive and its look at the clock.
A regular sync falls into half a minute seldom, its courier is a process of its own that has ended by then, and the tests' device has a
stand-in for it. So the courier is measured with a real server: some syncs that find nothing new, of which one counts per ``SYNC_S``.
"""

from __future__ import annotations

import datetime as dt
import tempfile
import time
from pathlib import Path

import psutil
from skerry_cli.demo.fleet import Fleet
from skerry_cli.demo.processes import Processes
from skerry_cli.errors import Failed

from tests.bench.mlserver_peer import MLServer
from tests.bench.result import Result
from tests.integration.agent.rig import Broker, Device, Server

SETTLE_S, SECONDS = 5.0, 30.0
DEVICE = "bench-1"
SYNC_S, SYNCS = 300.0, 5
"""The product's interval, and how many are measured."""


def run() -> Result:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        broker = Broker(folder / "nats").start()
        server = Server(broker.port)
        (folder / "device").mkdir()
        # The intervals of the product, not those that the tests' device has.
        device = Device(folder / "device", broker.port, fold_interval_s=0, health_interval_s=2, sync_s=SYNC_S)
        try:
            digest = device.bundle("1.0.0", seed=1)
            device.publish(digest)
            device.start()
            device.wait_running("1.0.0", "trial", "confirmed")
            device.infer(25)
            device.wait_running("1.0.0", "confirmed")
            assert device.process is not None
            supervisor = psutil.Process(device.process.pid)
            model = Path(device.world["bundles"][digest]) / "model.onnx"
            with MLServer(folder / "m", model) as peer:
                time.sleep(SETTLE_S)
                watched = [supervisor, *supervisor.children(recursive=True), psutil.Process(peer.pid)]
                before = [_cpu_s(process) for process in watched]
                time.sleep(SECONDS)
                used = [_cpu_s(process) - was for process, was in zip(watched, before, strict=True)]
        finally:
            device.close()
            server.close()
            broker.stop(kill=True)
    percent = [100.0 * seconds / SECONDS for seconds in used]
    courier_s = _courier_s()
    sync = 100.0 * courier_s / SYNC_S
    return Result(
        bench="idle_cpu",
        value=sum(percent[:-1]) + sync,
        unit="% of a core",
        peer="MLServer 1.7.1, one process, idle",
        peer_value=percent[-1],
        n=int(SECONDS),
        note=(
            f"supervisor {percent[0]:.2f}, worker {sum(percent[1:-1]):.2f}, over {SECONDS:g} s in ticks of 10 ms; courier {sync:.2f}: "
            f"{courier_s:.2f} s every {SYNC_S:g} s"
        ),
    )


def _courier_s() -> float:
    """CPU of a courier that finds nothing new, from its start to its end."""
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        processes = Processes(Path(name), leashed=False)
        try:
            fleet = Fleet(Path(name), processes, seed=1)
            fleet.start_server()
            fleet.hold_ceremony(dt.datetime.now(dt.UTC))
            fleet.enrol(DEVICE)
            fleet.finish_enrolment(DEVICE)
            fleet.wait("the first sync", lambda: _synced(fleet) > 0, 60.0)
            supervisor = psutil.Process(processes.pid(DEVICE))
            before = _ended_children_s(supervisor)
            for _ in range(SYNCS):
                last = _synced(fleet)
                fleet.sync(DEVICE)
                fleet.wait("a sync", lambda last=last: _synced(fleet) > last, 60.0)  # type: ignore[misc]
            took = (_ended_children_s(supervisor) - before) / SYNCS
        finally:
            processes.stop()
    assert took > 0, "couriers are children that the supervisor has waited for"
    return took


def _synced(fleet: Fleet) -> int:
    try:
        return int(fleet.status(DEVICE)["sync"]["at_ms"])
    except (OSError, Failed):
        return 0


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _ended_children_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.children_user + times.children_system)
