"""Seconds from starting the agent to its first answer, beside MLServer with the same file; and a worker's part of it.

The agent is enrolled and has a confirmed bundle, as after a boot: it opens its store, checks and proves the bundle, and serves.
A client knocks until it is answered.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from tests import models
from tests.bench.http_client import Client
from tests.bench.mlserver_peer import MLServer
from tests.bench.result import Result, median
from tests.integration.agent.rig import Broker, Device, Server
from tests.integration.worker.rig import Rig

ROUNDS = 7


def run() -> Result:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        x, _ = models.rows(1)
        tensor = {"name": "x", "shape": [1, x.shape[1]], "datatype": "FP32", "data": x.ravel().tolist()}
        body = json.dumps({"inputs": [tensor]}).encode()
        agent, model = _agent(folder, body)
        theirs = [_peer(folder / f"m{i}", model, body) for i in range(ROUNDS)]
        worker = [_worker(folder / f"w{i}", model.parent, body) for i in range(ROUNDS)]
    return Result(
        bench="cold_start",
        value=median(agent),
        unit="s",
        peer="MLServer 1.7.1, one process",
        peer_value=median(theirs),
        n=ROUNDS,
        note=(
            f"from exec to the first answer over HTTP, small classifier, proof included; least {min(agent):.2f}, most "
            f"{max(agent):.2f}; a worker alone {median(worker):.2f}"
        ),
    )


def _agent(folder: Path, body: bytes) -> tuple[list[float], Path]:
    broker = Broker(folder / "nats").start()
    server = Server(broker.port)
    (folder / "device").mkdir()
    device = Device(folder / "device", broker.port)
    try:
        digest = device.bundle("1.0.0", seed=1)
        device.publish(digest)
        device.start()
        device.wait_running("1.0.0", "trial", "confirmed")
        device.infer(25)
        device.wait_running("1.0.0", "confirmed")
        took = []
        for _ in range(ROUNDS):
            device.stop()
            begin = time.monotonic()
            device.start()  # until it answers about itself, which it does before it serves
            _first_answer(device.port, body)
            took.append(time.monotonic() - begin)
        return took, Path(device.world["bundles"][digest]) / "model.onnx"
    finally:
        device.close()
        server.close()
        broker.stop(kill=True)


def _peer(folder: Path, model: Path, body: bytes) -> float:
    begin = time.monotonic()
    peer = MLServer(folder, model)
    try:
        _first_answer(peer.port, body)
        return time.monotonic() - begin
    finally:
        peer.__exit__()


def _worker(folder: Path, bundle: Path, body: bytes) -> float:
    folder.mkdir()
    with Rig(folder) as rig:
        served = rig.served(bundle)
        begin = time.monotonic()
        rig.start(served)
        _first_answer(rig.port, body)
        return time.monotonic() - begin


def _first_answer(port: int, body: bytes) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            with Client(port, "/v2/models/gas/infer", body) as client:
                client.ask()
                return
        except (OSError, RuntimeError) as error:
            if time.monotonic() > end:
                raise RuntimeError(f"no answer within 60 s: {error}") from error
            time.sleep(0.005)
