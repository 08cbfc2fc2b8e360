"""A bundle that gives back what it gets, in every datatype of the protocol."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from onnx import TensorProto as T
from onnx import helper as h
from skerry_contract import manifest as mf

ONNX = {
    "BOOL": T.BOOL, "UINT8": T.UINT8, "UINT16": T.UINT16, "UINT32": T.UINT32, "UINT64": T.UINT64, "INT8": T.INT8,
    "INT16": T.INT16, "INT32": T.INT32, "INT64": T.INT64, "FP16": T.FLOAT16, "FP32": T.FLOAT, "FP64": T.DOUBLE,
    "BYTES": T.STRING,
}  # fmt: skip


def echo_bundle(
    folder: Path, *, model: str = "gas", shape: tuple[int, ...] = (3,), without: tuple[str, ...] = ()
) -> Path:
    """One input and one output of each datatype; a row of each is of that shape."""
    folder.mkdir()
    names = [name for name in ONNX if name not in without]
    elements = math.prod(shape)
    graph = h.make_graph(
        [h.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in names],
        "echo",
        [h.make_tensor_value_info(f"in_{name}", ONNX[name], ["n", *shape]) for name in names],
        [h.make_tensor_value_info(f"out_{name}", ONNX[name], ["n", *shape]) for name in names],
    )
    network = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8).SerializeToString()

    def golden(prefix: str) -> list[dict[str, object]]:
        zero = {"BOOL": False, "BYTES": "x"}
        return [
            {"name": f"{prefix}_{name}", "datatype": name, "shape": [1, *shape], "data": [zero.get(name, 0)] * elements}
            for name in names
        ]

    written = {
        "model.onnx": network,
        "golden.jsonl": json.dumps({"inputs": golden("in"), "outputs": golden("out")}).encode() + b"\n",
    }
    for name, data in written.items():
        (folder / name).write_bytes(data)
    files = tuple(
        mf.File(path=name, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        for name, data in sorted(written.items())
    )
    variant = mf.Variant(
        id="onnx-fp32", runtime="onnx", precision="fp32", model="model.onnx", files=files,
        golden=mf.Golden(cases="golden.jsonl", tolerance={}), needs=mf.Needs(rss_mb=200, disk_mb=1),
    )  # fmt: skip
    manifest = mf.Manifest(
        schema=mf.SCHEMA, model=model, version="1.0.0", created="2026-01-01T00:00:00Z",
        owner=mf.Owner(name="Test Owner", contact="owner@example.org"), licence="Apache-2.0", variants=(variant,),
        inputs=tuple(mf.Tensor(name=f"in_{name}", datatype=name, shape=(-1, *shape)) for name in names),
        outputs=tuple(mf.Tensor(name=f"out_{name}", datatype=name, shape=(-1, *shape)) for name in names),
        reference=mf.Reference(n=1), provenance=mf.Provenance(commit="0" * 40, trainer="test"),
    )  # fmt: skip
    (folder / mf.MANIFEST_FILE).write_bytes(mf.encode(manifest))
    return folder
