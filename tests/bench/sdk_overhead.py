"""What an application pays that runs its model by ``skerry_agent.sdk``: one ``Model.infer`` against bare ``session.run`` of the same file.

With a real agent beside it that takes the windows, on the same cores; alternating blocks, CPU time of the calling thread.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from skerry_agent import sdk

from tests import models
from tests.bench.infer_overhead import BLOCK, block, each_us
from tests.bench.result import Result, median, percentile
from tests.integration.agent.rig import Broker, Device, Server

FEATURES, CLASSES = 30, 6
ROUNDS = 25


def run() -> Result:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = Broker(folder / "nats").start()
        server = Server(broker.port)
        (folder / "device").mkdir()
        device = Device(folder / "device", broker.port, trial_inferences=0, trial_s=1, fold_interval_s=0)
        try:
            return _beside(device)
        finally:
            device.close()
            server.close()
            broker.stop()


def _beside(device: Device) -> Result:
    digest = device.bundle("1.0.0", n_features=FEATURES, classes=CLASSES, n_golden=CLASSES, transforms=False)
    device.publish(digest)
    device.start()
    device.wait_running("1.0.0")
    with sdk.open("gas", socket=device.state_dir / "run" / "apps.sock", wait_s=60) as model:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        (file,) = (device.state_dir / "slots" / digest).rglob("*.onnx")
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        rows, _ = models.rows(64, FEATURES, CLASSES)
        inputs = [{"x": np.ascontiguousarray(row[None], np.float32)} for row in rows]
        infer = model.infer

        def bare(feeds: dict[str, Any]) -> None:
            session.run(["probabilities"], feeds)

        for act in (bare, infer):
            block(act, inputs)
        differences, bare_means, each_bare, each = [], [], [], []
        for _ in range(ROUNDS):
            a, b = block(bare, inputs), block(infer, inputs)
            differences.append(b - a)
            bare_means.append(a)
            each_bare += each_us(bare, inputs)
            each += each_us(infer, inputs)
    p50, p99 = (percentile(each, q) - percentile(each_bare, q) for q in (0.5, 0.99))
    return Result(
        bench="sdk_overhead",
        value=median(differences),
        unit="us",
        peer="bare onnxruntime session.run",
        peer_value=median(bare_means),
        n=BLOCK * ROUNDS,
        note=f"added mean of the calling thread's CPU time, {FEATURES}-feature MLP; wall p50 +{p50:.2f} p99 +{p99:.2f}; folds are the "
        "connection thread's",
    )
