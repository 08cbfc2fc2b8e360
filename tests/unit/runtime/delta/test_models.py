"""Deltas of model files: tensors are found by hand-written readers, matched, and given by the method that suits them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from skerry_runtime import delta
from skerry_runtime.delta import parts
from skerry_runtime.delta.summary import Summary


def onnx_file(tensors: dict[str, np.ndarray], note: str = "") -> bytes:
    """A graph that adds its tensors up; what it computes does not matter here."""
    nodes = [helper.make_node("Identity", [name], [f"{name}.out"]) for name in tensors]
    inside = helper.make_graph([], "inside", [], [], [numpy_helper.from_array(np.arange(64, dtype=np.float32), "deep")])
    nodes.append(helper.make_node("If", ["c"], ["y"], then_branch=inside, else_branch=inside))
    graph = helper.make_graph(nodes, "g", [], [], [numpy_helper.from_array(a, name) for name, a in tensors.items()])
    graph.initializer.append(helper.make_tensor("listed", TensorProto.FLOAT, [20], np.arange(20.0).tolist()))
    return helper.make_model(graph, doc_string=note).SerializeToString(deterministic=True)


def tflite_file(tensors: dict[str, np.ndarray]) -> bytes:
    flatbuffers = pytest.importorskip("flatbuffers", reason="the extra litert is not installed")
    from ai_edge_litert import schema_py_generated as schema

    kinds = {"float32": schema.TensorType.FLOAT32, "int8": schema.TensorType.INT8, "int32": schema.TensorType.INT32}
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.description = 3, "test"
    model.buffers, graph.tensors = [schema.BufferT()], []
    for name, array in tensors.items():
        buffer, tensor = schema.BufferT(), schema.TensorT()
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
        tensor.name, tensor.shape, tensor.type = name, list(array.shape), kinds[str(array.dtype)]
        tensor.buffer = len(model.buffers)
        model.buffers.append(buffer)
        graph.tensors.append(tensor)
    graph.inputs, graph.outputs, graph.operators = [0], [0], []
    model.subgraphs, model.operatorCodes = [graph], []
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "dense": rng.normal(0, 0.05, (64, 96)).astype(np.float32),
        "half": rng.normal(0, 0.05, (40, 50)).astype(np.float16),
        "double": rng.normal(0, 0.05, 300),
        "quantized": rng.integers(-90, 90, (32, 64)).astype(np.int8),
        "bias": rng.integers(-9999, 9999, 64).astype(np.int32),
        "table": np.arange(500, dtype=np.int64),
    }


def tuned(tensors: dict[str, np.ndarray], seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def near(array: np.ndarray) -> np.ndarray:
        if array.dtype.kind == "f":
            return (array + rng.normal(0, 2e-4, array.shape)).astype(array.dtype)
        return (array + rng.integers(-1, 2, array.shape)).astype(array.dtype)

    return {name: near(array) for name, array in tensors.items()}


def through(folder: Path, base: bytes, target: bytes) -> Summary:
    (folder / "base").write_bytes(base)
    (folder / "target").write_bytes(target)
    summary = delta.make(folder / "base", folder / "target", folder / "patch")
    digest = hashlib.sha256(target).hexdigest()
    delta.apply(folder / "base", folder / "patch", folder / "made", sha256=digest, size=len(target))
    assert (folder / "made").read_bytes() == target
    assert summary.size_bytes == (folder / "patch").stat().st_size
    assert sum(summary.bytes_by_method().values()) == len(target)
    return summary


def test_tensors_of_onnx_are_found_where_they_lie() -> None:
    tensors = weights()
    data = onnx_file(tensors)
    kind, found = parts.find(data)
    assert kind == "onnx"
    by_name = {part.name: part for part in found}
    assert set(by_name) == {*tensors, "listed", "y/then_branch/deep", "y/else_branch/deep"}
    for name, array in tensors.items():
        part = by_name[name]
        assert data[part.start : part.start + part.size] == array.tobytes()
        assert (part.width, part.floats, part.shape) == (array.itemsize, array.dtype.kind == "f", array.shape)


def test_tensors_of_tflite_are_found_where_they_lie() -> None:
    tensors = {name: weights()[name] for name in ("dense", "quantized", "bias")}
    data = tflite_file(tensors)
    kind, found = parts.find(data)
    assert kind == "tflite"
    for part in found:
        array = tensors[part.name.removeprefix("0/")]
        assert data[part.start : part.start + part.size] == array.tobytes()
        assert (part.width, part.floats, part.shape) == (array.itemsize, array.dtype.kind == "f", array.shape)
    assert len(found) == 3


def test_floats_that_stand_one_by_one_are_found_with_their_tags() -> None:
    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", nodes_values=[0.5] * 40)
    data = helper.make_model(helper.make_graph([node], "g", [], [])).SerializeToString()
    ((part,),) = [parts.find(data)[1]]
    assert (part.tag, part.stride, part.count) == (0x3D, 5, 40)
    assert data[part.start : part.start + 5] == b"\x3d" + np.float32(0.5).tobytes()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_a_damaged_model_is_read_as_far_as_it_goes_or_as_bytes(seed: int, lite: bool) -> None:
    rng = np.random.default_rng(seed)
    tensors = {name: weights()[name] for name in ("dense", "quantized", "bias")}
    data = bytearray(tflite_file(tensors) if lite else onnx_file(tensors))
    for _ in range(rng.integers(1, 6)):
        data[rng.integers(0, len(data)) if rng.random() < 0.5 else rng.integers(0, 200)] = rng.integers(0, 256)
    _, found = parts.find(bytes(data))
    end = 0
    for part in found:
        assert end <= part.start
        assert part.count > 0
        assert part.size % part.stride == 0
        end = part.start + part.size
    assert end <= len(data)


def test_a_fine_tune_of_onnx_is_given_by_differences(tmp_path: Path) -> None:
    old, new = weights(), tuned(weights())
    summary = through(tmp_path, onnx_file(old), onnx_file(new, note="tuned"))
    assert summary.kind == "onnx"
    methods = {segment.name: segment.method for segment in summary.segments if segment.name}
    assert methods["dense"].startswith("float_difference")
    assert methods["quantized"] in ("integer_difference", "rescaled", "byte_planes_difference")
    assert summary.bytes_by_method()["copy"] > 0
    assert summary.size_bytes < 0.6 * summary.target_bytes


def test_a_fine_tune_of_tflite_is_given_by_differences(tmp_path: Path) -> None:
    old = {name: weights()[name] for name in ("dense", "quantized", "bias")}
    summary = through(tmp_path, tflite_file(old), tflite_file(tuned(old)))
    assert summary.kind == "tflite"
    assert summary.size_bytes < 0.7 * summary.target_bytes


def test_tensors_that_were_renamed_moved_left_out_and_put_in_are_found(tmp_path: Path) -> None:
    old = weights()
    same = onnx_file({"other": old["half"], "dense": old["dense"], "late": old["quantized"], "table": old["table"]})
    assert through(tmp_path, onnx_file(old), same).size_bytes < 800
    new = tuned(old)
    moved = through(tmp_path, onnx_file(old), onnx_file({"quantized": new["quantized"], "called": new["dense"]}))
    methods = {segment.name: segment.method for segment in moved.segments if segment.name}
    assert methods["called"].startswith("float_difference")


def test_a_table_that_grew_costs_its_new_rows(tmp_path: Path) -> None:
    old = weights()["dense"]
    new = np.concatenate([old, weights(3)["dense"][:8]])
    summary = through(tmp_path, onnx_file({"dense": old}), onnx_file({"dense": new}))
    assert summary.size_bytes < 8 * 96 * 4 + 600


def test_a_model_that_nobody_can_predict_costs_less_than_it_holds(tmp_path: Path) -> None:
    old, new = (
        {"dense": np.random.default_rng(seed).normal(0, 0.05, (200, 300)).astype(np.float32)} for seed in (1, 2)
    )
    summary = through(tmp_path, onnx_file(old), onnx_file(new))
    assert summary.size_bytes < 0.88 * summary.target_bytes


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32))
def test_any_two_models_round_trip(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = {name: array for name, array in weights(seed).items() if rng.random() < 0.7}
    new = {name: array for name, array in tuned(weights(seed), seed).items() if rng.random() < 0.7}
    for name in list(new):
        if rng.random() < 0.3:
            new[name] = rng.permutation(new[name].ravel())[: rng.integers(1, new[name].size + 1)]
    through(tmp_path_factory.mktemp("delta"), onnx_file(old), onnx_file(new))


def test_the_readers_agree_with_the_library_of_the_format() -> None:
    data = onnx_file(weights())
    named = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(data).graph.initializer}
    for part in parts.find(data)[1]:
        if part.name in named:
            assert named[part.name].tobytes() == data[part.start : part.start + part.size]


def test_shapes_that_are_no_shapes_do_not_matter(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old, new = (rng.integers(-9, 9, 64).astype(np.int8).tobytes() for _ in range(2))

    def model(data: bytes, dims: list[int]) -> bytes:
        tensor = TensorProto(name="w", data_type=TensorProto.INT8, raw_data=data, dims=dims)
        return helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString()

    for dims in ([-8, -8], [0, 5], [2**62, 2**62], [64, 64], [-1]):
        assert through(tmp_path, model(old, dims), model(new, dims)).kind == "onnx"


def test_neither_end_needs_the_library_of_a_format(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(onnx_file(weights()))
    (tmp_path / "target").write_bytes(onnx_file(tuned(weights())))
    size, digest = (tmp_path / "target").stat().st_size, hashlib.sha256((tmp_path / "target").read_bytes()).hexdigest()
    program = f"""
import sys
from pathlib import Path
from skerry_runtime import delta
assert "numpy" not in sys.modules, "the name alone loads it"
base, patch, target, made = map(Path, ("base", "patch", "target", "made"))
if sys.argv[1] == "make":
    delta.make(base, target, patch)
else:
    delta.apply(base, patch, made, sha256="{digest}", size={size})
tops = {{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names) - {{"__main__"}}
print(*sorted(name for name in tops if not name.startswith(("_", "sitecustomize"))))
"""
    for what in ("make", "apply"):
        done = subprocess.run(
            [sys.executable, "-c", program, what], cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.split()) <= {"numpy", "cython_runtime", "skerry_runtime", "skerry_contract", "msgspec"}
