"""Memory of an idle worker that has answered 5,000 requests, beside bare Python with numpy and onnxruntime that has loaded
the same file and run it as often."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests import models
from tests.bench.http_client import Client
from tests.bench.result import Result
from tests.integration.worker.rig import Rig

FEATURES, CLASSES, REQUESTS = 30, 6, 5000

_BARE = f"""
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for _ in range({REQUESTS}):
    session.run(None, {{"x": numpy.zeros((1, {FEATURES}), numpy.float32)}})
print("up", flush=True)
sys.stdin.read()
"""


def run() -> Result:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        models.build_bundle(folder / "b", n_features=FEATURES, classes=CLASSES, n_golden=CLASSES)
        x, _ = models.rows(1, FEATURES, CLASSES)
        tensor = {"name": "x", "shape": [1, FEATURES], "datatype": "FP32", "data": x.ravel().tolist()}
        with Rig(folder) as rig:
            worker = rig.start(rig.served(folder / "b"), fold_interval_s=0.5)
            with Client(rig.port, "/v2/models/gas/infer", json.dumps({"inputs": [tensor]}).encode()) as client:
                client.block(REQUESTS)
            time.sleep(2.0)
            memory = psutil.Process(worker.pid).memory_info()
        bare = _bare(folder / "b" / "model.onnx")
    return Result(
        bench="rss_worker",
        value=memory.rss / 1e6,
        unit="MB",
        peer="bare Python, numpy, onnxruntime",
        peer_value=bare,
        n=REQUESTS,
        note=f"+{memory.rss / 1e6 - bare:.1f} MB, of it {memory.shared / 1e6:.1f} shared (libraries, ring); budget +15",
    )


def _bare(model: Path) -> float:
    with subprocess.Popen(
        [sys.executable, "-c", _BARE, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as bare:
        assert bare.stdin is not None
        assert bare.stdout is not None
        bare.stdout.readline()
        found = psutil.Process(bare.pid).memory_info().rss / 1e6
        bare.stdin.close()
    return found
