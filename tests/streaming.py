"""Small bundles of models that look back, for tests of streams; what they answer is worked out in numpy.

* ``summing``: ``y`` is the sum of all rows of the stream so far, handed on as the state tensor ``h``.
* ``smoothing``: ``y = x`` after a step that takes the mean of the last three rows: no state but the step's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto as T
from onnx import helper as h
from skerry_contract import manifest as mf

WIDTH = 2
STATE = mf.StateTensor(input="h", output="hn", datatype="FP32", shape=(1, WIDTH))
MEAN = mf.Transform(op="rolling", input="x", params={"rows": 3, "statistics": ["mean"]})


def rows(n: int, seed: int = 0) -> np.ndarray:
    """Whole numbers, so that sums are exact: float32[n, WIDTH]."""
    return np.random.default_rng(seed).integers(-50, 50, (n, WIDTH)).astype(np.float32)


def sums(x: np.ndarray) -> np.ndarray:
    """What ``summing`` answers to each row in turn."""
    return x.cumsum(0).astype(np.float32)


def means(x: np.ndarray) -> np.ndarray:
    """What ``smoothing`` answers to each row in turn."""
    return np.array([x[max(0, t - 2) : t + 1].astype(np.float64).mean(0) for t in range(len(x))]).astype(np.float32)


def build(folder: Path, kind: str = "summing", *, model: str = "gas", golden: int = 6, **changes: Any) -> Path:
    """Writes a bundle. ``changes``: fields of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    summing = kind == "summing"
    nodes = [h.make_node("Add", ["x", "h"], ["y"]), h.make_node("Identity", ["y"], ["hn"])]
    names = (["x", "h"], ["y", "hn"]) if summing else (["x"], ["y"])
    size: list[Any] = [1 if summing else "n", WIDTH]
    graph = h.make_graph(
        nodes if summing else [h.make_node("Identity", ["x"], ["y"])],
        kind,
        [h.make_tensor_value_info(name, T.FLOAT, size) for name in names[0]],
        [h.make_tensor_value_info(name, T.FLOAT, size) for name in names[1]],
    )
    model_bytes = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8).SerializeToString()
    x = rows(golden, seed=9)
    y = sums(x) if summing else means(x)
    lines = [json.dumps({"inputs": [_tensor("x", a)], "outputs": [_tensor("y", b)]}) for a, b in zip(x, y, strict=True)]
    written = {"model.onnx": model_bytes, "golden.jsonl": ("\n".join(lines) + "\n").encode()}
    for name, data in written.items():
        (folder / name).write_bytes(data)
    variant = mf.Variant(
        id="onnx-fp32",
        runtime="onnx",
        model="model.onnx",
        files=tuple(
            mf.File(path=n, sha256=hashlib.sha256(d).hexdigest(), size=len(d)) for n, d in sorted(written.items())
        ),
        golden=mf.Golden(cases="golden.jsonl"),
        needs=mf.Needs(rss_mb=200, disk_mb=1),
    )
    shape = (1, WIDTH) if summing else (-1, WIDTH)
    fields: dict[str, Any] = {
        "schema": mf.SCHEMA,
        "model": model,
        "version": "1.0.0",
        "created": "2026-01-01T00:00:00Z",
        "owner": mf.Owner(name="Test Owner", contact="owner@example.org"),
        "licence": "Apache-2.0",
        "variants": (variant,),
        "inputs": (mf.Tensor(name="x", datatype="FP32", shape=shape),),
        "outputs": (mf.Tensor(name="y", datatype="FP32", shape=shape),),
        "features": (mf.Feature(name="f0", input="x", column=0),),
        "transforms": mf.Transforms() if summing else mf.Transforms(pre=(MEAN,)),
        "reference": mf.Reference(n=0),
        "requires": ("states",),
        "streams": mf.Streams(states=(STATE,) if summing else ()),
    }
    (folder / "manifest.json").write_bytes(mf.encode(mf.Manifest(**{**fields, **changes})))
    return folder


def _tensor(name: str, row: np.ndarray) -> dict[str, Any]:
    return {"name": name, "shape": [1, len(row)], "datatype": "FP32", "data": row.tolist()}
