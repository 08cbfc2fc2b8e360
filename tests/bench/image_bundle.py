"""A bundle that takes a picture: the mean of each channel and a small linear classifier. What it costs is moving the bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper
from skerry_contract import manifest as mf

from tests import models


def build(folder: Path, side: int, classes: int) -> None:
    """Writes the bundle of model ``gas``: input ``x`` [-1, 3, side, side], output ``probabilities``."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, classes)).astype(np.float32)
    nodes = [
        h.make_node("GlobalAveragePool", ["x"], ["m"]),
        h.make_node("Flatten", ["m"], ["f"]),
        h.make_node("MatMul", ["f", "w"], ["l"]),
        h.make_node("Softmax", ["l"], ["probabilities"], axis=1),
    ]
    graph = h.make_graph(
        nodes,
        "image",
        [h.make_tensor_value_info("x", T.FLOAT, ["n", 3, side, side])],
        [h.make_tensor_value_info("probabilities", T.FLOAT, ["n", classes])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8).SerializeToString()
    black = np.zeros((1, 3, side, side), np.int64)
    case = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": list(black.shape), "data": black.ravel().tolist()}],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [1, classes], "data": [1 / classes] * classes}
        ],
    }
    written = {"model.onnx": model, "golden.jsonl": json.dumps(case).encode() + b"\n"}
    for name, data in written.items():
        (folder / name).write_bytes(data)
    files = tuple(
        mf.File(path=name, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        for name, data in sorted(written.items())
    )
    variant = mf.Variant(
        id="onnx-fp32", runtime="onnx", precision="fp32", model="model.onnx", files=files,
        golden=mf.Golden(cases="golden.jsonl", tolerance={"FP32": 1e-4}), needs=mf.Needs(rss_mb=200, disk_mb=1),
    )  # fmt: skip
    manifest = mf.Manifest(
        schema=mf.SCHEMA, model="gas", version="1.0.0", created="2026-01-01T00:00:00Z",
        owner=mf.Owner(name="Test Owner", contact="owner@example.org"), licence="Apache-2.0", variants=(variant,),
        inputs=(mf.Tensor(name="x", datatype="FP32", shape=(-1, 3, side, side)),),
        outputs=(
            mf.Tensor(name="probabilities", datatype="FP32", shape=(-1, classes), labels=models.labels(classes)),
        ),
        reference=mf.Reference(n=1),
        slo=mf.Slo(latency_p95_ms=50.0, success=0.99),
        provenance=mf.Provenance(commit="0" * 40, trainer="tests/bench/image_bundle.py"),
    )  # fmt: skip
    (folder / mf.MANIFEST_FILE).write_bytes(mf.encode(manifest))
