"""One inference over local HTTP with a binary 1x3x224x224 float tensor, telemetry on, beside MLServer given the same bytes raw.

MLServer's REST side takes no binary tensors, its gRPC side does: that is the peer, its client in its own environment. LitServe, which
takes them as a file of a form, stands in the note.
"""

from __future__ import annotations

import json
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tests.bench import image_bundle
from tests.bench.http_client import Client
from tests.bench.litserve_peer import LitServe, form
from tests.bench.mlserver_peer import GrpcClient, MLServer
from tests.bench.result import Result, percentile
from tests.integration.worker.rig import Rig

SHAPE, CLASSES = (1, 3, 224, 224), 6
BLOCK, ROUNDS = 20, 20


def run() -> Result:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        image_bundle.build(folder / "b", SHAPE[-1], CLASSES)
        x = np.random.default_rng(1).random(SHAPE, np.float32)
        tensor = {
            "name": "x",
            "shape": list(SHAPE),
            "datatype": "FP32",
            "parameters": {"binary_data_size": x.nbytes},
        }
        # Asked and answered in binary.
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        body, headers = head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
        (folder / "tensor").write_bytes(x.tobytes())
        posted, form_headers = form(x.tobytes())
        with (
            Rig(folder) as rig,
            MLServer(folder / "mlserver", folder / "b" / "model.onnx") as peer,
            LitServe(folder / "litserve", folder / "b" / "model.onnx", shape=SHAPE) as second,
        ):
            worker = rig.start(rig.served(folder / "b"), fold_interval_s=5.0)
            with (
                Client(rig.port, "/v2/models/gas/infer", body, headers) as ours,
                GrpcClient(peer.grpc_port, folder / "tensor", SHAPE) as theirs,
                Client(second.port, "/predict", posted, form_headers) as lit,
            ):
                theirs.block(1)
                np.testing.assert_allclose(_answer(ours.ask()), theirs.answer, rtol=1e-4)
                np.testing.assert_allclose(json.loads(lit.ask())["data"], theirs.answer, rtol=1e-4)
                mine: list[float] = []
                other: list[float] = []
                third: list[float] = []
                for i in range(ROUNDS + 2):
                    a, b, c = ours.block(BLOCK), theirs.block(BLOCK), lit.block(BLOCK)
                    if i >= 2:  # warm on all sides
                        mine += a
                        other += b
                        third += c
            rig.flush(worker)
            asked = 1 + BLOCK * (ROUNDS + 2)
            if rig.total().ok != asked:
                raise RuntimeError(f"telemetry is off: {asked} asked, {rig.total().ok} counted")
            bare = _bare(folder / "b" / "model.onnx", x)
    return Result(
        bench="http_binary",
        value=percentile(mine, 0.5),
        unit="ms",
        peer="MLServer 1.7.1, one process, gRPC with raw tensors",
        peer_value=percentile(other, 0.5),
        n=len(mine),
        note=(
            f"p50, {x.nbytes} bytes in binary, mean over each channel and a small classifier; p99 {percentile(mine, 0.99):.2f} "
            f"against {percentile(other, 0.99):.2f}; LitServe 0.2.19 with a form {percentile(third, 0.5):.2f}, p99 "
            f"{percentile(third, 0.99):.2f}; the runtime alone {bare:.2f}; budget ratio 0.5"
        ),
    )


def _answer(body: bytes) -> np.ndarray:
    """The last tensor of a binary answer, whose JSON part the least of clients does not measure."""
    return np.array(struct.unpack(f"<{CLASSES}f", body[-4 * CLASSES :]))


def _bare(model: Path, x: np.ndarray) -> float:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    took = []
    for _ in range(200):
        begin = time.perf_counter_ns()
        session.run(None, {"x": x})
        took.append((time.perf_counter_ns() - begin) / 1e6)
    return percentile(took, 0.5)
