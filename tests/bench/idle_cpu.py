"""CPU that an idle device spends: agent (supervisor and worker), connected to a real broker, one model, nobody asking; beside MLServer.

Percent of one core over half a minute after it settled. The agent's part includes its reports, its keep-alive and its look at the clock.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import psutil

from tests.bench.mlserver_peer import MLServer
from tests.bench.result import Result
from tests.integration.agent.rig import Broker, Device, Server

SETTLE_S, SECONDS = 5.0, 30.0


def run() -> Result:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        broker = Broker(folder / "nats").start()
        server = Server(broker.port)
        (folder / "device").mkdir()
        # The intervals of the product, not those that the tests' device has.
        device = Device(folder / "device", broker.port, fold_interval_s=0, health_interval_s=2, sync_s=300)
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
    return Result(
        bench="idle_cpu",
        value=sum(percent[:-1]),
        unit="% of a core",
        peer="MLServer 1.7.1, one process, idle",
        peer_value=percent[-1],
        n=int(SECONDS),
        note=f"supervisor {percent[0]:.2f}, worker {sum(percent[1:-1]):.2f}; over {SECONDS:g} s in ticks of 10 ms",
    )


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
