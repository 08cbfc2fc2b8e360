"""TFLite on the real LiteRT, where it is installed (extra ``litert``)."""

import hashlib
import json

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="the extra litert is not installed")

from skerry_contract import manifest as mf
from skerry_runtime import engines, runner
from skerry_runtime.bundle import open_bundle
from skerry_runtime.engines import tflite
from skerry_runtime.errors import BadInput, Rejected
from skerry_runtime.proof import prove
from skerry_runtime.validation import validate_bundle


def tensor(name, value):
    return {"name": name, "datatype": "FP32", "shape": list(value.shape), "data": value.ravel().tolist()}


def build(folder, model, cases, shape):
    golden = "\n".join(json.dumps({"inputs": [tensor("x", a)], "outputs": [tensor("y", b)]}) for a, b in cases).encode()
    written = {"model.tflite": model, "golden.jsonl": golden}
    for name, data in written.items():
        (folder / name).write_bytes(data)
    files = tuple(mf.File(path=n, sha256=hashlib.sha256(d).hexdigest(), size=len(d)) for n, d in written.items())
    variant = mf.Variant(
        id="tflite-fp32",
        runtime="tflite",
        model="model.tflite",
        files=files,
        golden=mf.Golden(cases="golden.jsonl", tolerance={"FP32": 1e-5}),
        needs=mf.Needs(rss_mb=100, disk_mb=1),
    )
    spec = mf.Tensor(name="x", datatype="FP32", shape=shape)
    manifest = mf.Manifest(
        schema=1,
        model="relu",
        version="1.0.0",
        created="2026-01-01T00:00:00Z",
        owner=mf.Owner(name="Test Owner", contact="owner@example.org"),
        licence="Apache-2.0",
        variants=(variant,),
        inputs=(spec,),
        outputs=(mf.Tensor(name="y", datatype="FP32", shape=shape),),
        reference=mf.Reference(n=0),
    )
    (folder / "manifest.json").write_bytes(mf.encode(manifest))


def relu_of_rows(width):
    """y = relu(x) over [-1, width]."""
    flatbuffers = pytest.importorskip("flatbuffers", reason="the extra litert is not installed")
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT()
    model.version, model.buffers = 3, [schema.BufferT()]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.RELU
    code.version = 1
    graph = schema.SubGraphT()
    graph.tensors = []
    for name in ("x", "y"):
        made = schema.TensorT()
        made.name, made.type, made.buffer = name.encode(), schema.TensorType.FLOAT32, 0
        made.shape, made.shapeSignature = [1, width], [-1, width]
        graph.tensors.append(made)
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0], [1]
    graph.operators, graph.inputs, graph.outputs = [operator], [0], [1]
    model.operatorCodes, model.subgraphs = [code], [graph]
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def one(value):
    return np.array([value], np.float32)


def test_the_health_check_builds_an_interpreter():
    tflite.check_health()
    assert "tflite" in engines.available()


def test_a_bundle_for_tflite_is_valid_and_answers(tmp_path):
    build(tmp_path, tflite._RELU, [(one(2), one(2)), (one(-3), one(0))], (1,))
    found = validate_bundle(tmp_path)
    assert found.ok, found
    assert found.variants[0].proof.passed == 2
    ready = runner.load(open_bundle(tmp_path), "tflite-fp32")
    assert ready.infer({"x": one(-1.5)}).outputs["y"].tolist() == [0.0]
    with pytest.raises(BadInput):
        ready.infer({"x": np.zeros(2, np.float32)})


def test_wrong_golden_outputs_fail(tmp_path):
    build(tmp_path, tflite._RELU, [(one(2), one(3))], (1,))
    assert not prove(runner.load(open_bundle(tmp_path), "tflite-fp32")).ok


def test_batches_of_changing_size_are_answered(tmp_path):
    rows = np.array([[-1.0, 2.0, -3.0]], np.float32)
    build(tmp_path, relu_of_rows(3), [(rows, np.maximum(rows, 0))], (-1, 3))
    ready = runner.load(open_bundle(tmp_path), "tflite-fp32")
    for count in (1, 5, 5, 2, 1):
        x = np.repeat(rows, count, axis=0)
        np.testing.assert_array_equal(ready.infer({"x": x}).outputs["y"], np.maximum(x, 0))


@pytest.mark.parametrize("data", [b"", b"junk" * 50, tflite._RELU[:100]])
def test_a_damaged_file_is_refused(tmp_path, data):
    (tmp_path / "m.tflite").write_bytes(data)
    with pytest.raises(Rejected, match="model_damaged"):
        engines.load_engine("tflite", tmp_path / "m.tflite")
