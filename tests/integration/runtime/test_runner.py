"""A loaded variant on the real ONNX Runtime: right answers, and every wrong part refused with its code."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from skerry_contract import canonical
from skerry_runtime import engines, runner
from skerry_runtime.bundle import open_bundle
from skerry_runtime.engines.onnx import OnnxEngine
from skerry_runtime.errors import BadInput, Degraded, EngineFailed, Rejected


def loaded(folder, **options):
    bundle = open_bundle(folder)
    return runner.load(bundle, bundle.manifest.variants[0], **options)


def rewrite(folder, change):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    (folder / "manifest.json").write_bytes(canonical.encode(manifest))


def put_model(folder, data):
    import hashlib

    (folder / "model.onnx").write_bytes(data)

    def relist(manifest):
        for file in manifest["variants"][0]["files"]:
            if file["path"] == "model.onnx":
                file.update(sha256=hashlib.sha256(data).hexdigest(), size=len(data))

    rewrite(folder, relist)


@pytest.mark.parametrize("kind", ["classifier", "int8"])
def test_the_answers_are_the_ones_worked_out_by_hand(models, tmp_path, kind):
    models.build_bundle(tmp_path, kind=kind)
    ready = loaded(tmp_path)
    x, truth = models.rows(64, draw=11)
    found = ready.infer({"x": x})
    assert list(found.outputs) == ["probabilities"]
    np.testing.assert_allclose(found.outputs["probabilities"], models.probabilities(x), atol=0.02)
    np.testing.assert_array_equal(found.outputs["probabilities"].argmax(1), truth)
    assert found.infer_ns > 0
    assert found.transform_ns == 0
    assert ready.engine.runtime == "onnx"
    assert ready.engine.runtime_version == engines.available()["onnx"]


def test_steps_run_before_and_after_and_are_timed_apart(models, tmp_path):
    models.build_bundle(tmp_path, transforms=True)
    x, truth = models.rows(9, draw=5)
    raw = {"x": (10 * x + 5).astype(np.float32)}
    kept = raw["x"].copy()
    found = loaded(tmp_path).infer(raw)
    assert found.outputs["label"].tolist() == [f"class-{k}" for k in truth]
    assert found.transform_ns > 0
    np.testing.assert_array_equal(raw["x"], kept)
    assert list(raw) == ["x"]


def test_a_bad_request_names_the_field_and_the_next_one_is_answered(models, tmp_path):
    models.build_bundle(tmp_path)
    ready = loaded(tmp_path)
    for wrong in (
        {},
        {"y": np.zeros((1, 4), np.float32)},
        {"x": np.zeros((1, 5), np.float32)},
        {"x": np.zeros((1, 4))},
    ):
        with pytest.raises(BadInput) as caught:
            ready.infer(wrong)
        assert caught.value.violation.field in ("x", "y")
    assert ready.infer({"x": np.zeros((1, 4), np.float32)}).outputs["probabilities"].shape == (1, 3)


@pytest.mark.parametrize(("kind", "code"), [("damaged", "model_damaged"), ("unknown-operator", "operator_unknown")])
def test_a_model_that_does_not_load_says_why(models, tmp_path, kind, code):
    models.build_bundle(tmp_path, kind=kind)
    with pytest.raises(Rejected) as caught:
        loaded(tmp_path)
    assert caught.value.code == code
    assert "model.onnx" in caught.value.detail
    assert caught.value.advice


def test_an_operator_set_from_the_future_is_unknown_not_damaged(models, tmp_path):
    models.build_bundle(tmp_path)
    model = onnx.load_model_from_string(models.onnx_bytes("classifier"))
    model.opset_import[0].version = 900
    put_model(tmp_path, model.SerializeToString())
    with pytest.raises(Rejected, match="operator_unknown"):
        loaded(tmp_path)


def test_an_empty_file_is_damaged(models, tmp_path):
    models.build_bundle(tmp_path)
    put_model(tmp_path, b"")
    with pytest.raises(Rejected, match="model_damaged"):
        loaded(tmp_path)


def test_a_runtime_that_is_too_old_or_absent_is_this_machines_lack(models, tmp_path):
    models.build_bundle(tmp_path)
    rewrite(tmp_path, lambda m: m["variants"][0].update(min="99.0"))
    with pytest.raises(Degraded, match=r"wanted at least 99\.0"):
        loaded(tmp_path)
    if "tflite" not in engines.available():
        rewrite(tmp_path, lambda m: m["variants"][0].update(min="", runtime="tflite"))
        with pytest.raises(Degraded, match="runtime_missing"):
            loaded(tmp_path)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda m: m["inputs"][0].update(name="z") or m.update(features=[], reference={"n": 0}),
         "malformed_manifest", "nothing gives 'x'"),
        (lambda m: m["inputs"][0].update(datatype="FP64"), "malformed_manifest", "x wants FP32, FP64 comes"),
        (lambda m: m["inputs"][0].update(shape=[-1, 9]), "malformed_manifest", "wants shape [-1, 4]"),
        (lambda m: m["outputs"][0].update(name="scores"), "malformed_manifest", "nothing gives 'scores'"),
        (lambda m: m["outputs"][0].update(shape=[-1, 7]), "malformed_manifest", "wants shape [-1, 7]"),
        (lambda m: m.update(transforms={"pre": [{"op": "scale", "input": "x", "params": {"mean": [1], "scale": 2}}]}),
         "transform_invalid", "wanted 4 numbers for x, got 1"),
        (lambda m: m.update(transforms={"pre": [{"op": "select", "input": "x", "params": {"columns": [0]}}]}),
         "malformed_manifest", "wants shape [-1, 4], [-1, 1] comes"),
        (lambda m: m.update(transforms={"post": [{"op": "exec", "input": "probabilities"}]}),
         "transform_invalid", "transforms.post[0] (exec): unknown op"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_at_load(models, tmp_path, change, code, words):
    models.build_bundle(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(Rejected) as caught:
        loaded(tmp_path)
    assert caught.value.code == code
    assert words in caught.value.detail


def test_an_unknown_variant_is_named(models, tmp_path):
    models.build_bundle(tmp_path)
    with pytest.raises(Rejected, match=r"no_variant: wanted 'gpu', the bundle has onnx-fp32"):
        runner.load(open_bundle(tmp_path), "gpu")


def test_intermediate_tensors_do_not_come_out(models, tmp_path):
    models.build_bundle(tmp_path, transforms=True)
    rewrite(
        tmp_path,
        lambda m: m["outputs"].pop(0) and m["reference"].pop("outputs") and m["reference"].pop("validated_error"),
    )
    x, _ = models.rows(2)
    assert list(loaded(tmp_path).infer({"x": x}).outputs) == ["label"]


def test_a_step_that_adds_an_input_feeds_it(models, tmp_path):
    models.build_bundle(tmp_path)
    x, truth = models.rows(6)
    raw = np.concatenate([np.full((6, 1), 7, np.float32), x], axis=1)
    rewrite(
        tmp_path,
        lambda m: (
            m["inputs"][0].update(name="raw", shape=[-1, 5]),
            m.update(features=[], reference={"n": 0}),
            m.update(
                transforms={
                    "pre": [{"op": "select", "input": "raw", "output": "x", "params": {"columns": [1, 2, 3, 4]}}]
                }
            ),
        ),
    )
    found = loaded(tmp_path).infer({"raw": raw}).outputs["probabilities"]
    np.testing.assert_array_equal(found.argmax(1), truth)


def test_the_quick_call_and_the_public_one_agree(models, tmp_path):
    # The engine calls the session behind InferenceSession; this guards the shortcut across upgrades of the runtime.
    path = models.write_onnx(tmp_path / "m.onnx")
    engine = OnnxEngine(path)
    x, _ = models.rows(5)
    (quick,) = engine.prepare(["probabilities"])({"x": x})
    np.testing.assert_array_equal(quick, engine.run({"x": x})["probabilities"])
    assert getattr(engine._session, "_sess", None) is not None, "the shortcut is gone: the engine works, 1 us slower"


def test_onnx_runtime_makes_no_id_of_this_device_and_no_database_of_reports(models, tmp_path):
    """Its wheels carry their maker's telemetry, on unless the environment says otherwise before they are imported."""
    path = models.write_onnx(tmp_path / "m.onnx")
    (tmp_path / "home").mkdir()
    script = (
        "import pathlib, sys; from skerry_runtime.engines.onnx import OnnxEngine; OnnxEngine(pathlib.Path(sys.argv[1]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(
        [sys.executable, "-c", script, str(path)],
        env={**environment, "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": ""},
        check=True,
        timeout=60,
    )
    assert list((tmp_path / "home").rglob("*")) == []


def test_what_the_guard_lets_through_and_the_runtime_does_not_is_a_bad_input(models, tmp_path):
    model = onnx.load_model_from_string(models.onnx_bytes("classifier"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    models.build_bundle(tmp_path)
    put_model(tmp_path, model.SerializeToString())
    ready = loaded(tmp_path)
    with pytest.raises(BadInput):
        ready.infer({"x": np.zeros((2, 4), np.float32)})
    assert ready.infer({"x": np.zeros((1, 4), np.float32)}).outputs


def test_a_runtime_error_on_a_request_is_a_value_with_a_code(models, tmp_path):
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper

    # Gathers row int(x[0]) of a table with three rows.
    graph = h.make_graph(
        [
            h.make_node("Cast", ["x"], ["i"], to=T.INT64),
            h.make_node("Gather", ["table", "i"], ["y"], axis=0),
        ],
        "g",
        [h.make_tensor_value_info("x", T.FLOAT, ["n", 4])],
        [h.make_tensor_value_info("y", T.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.arange(3, dtype=np.float32), "table")],
    )
    models.build_bundle(tmp_path, kind="identity")
    put_model(tmp_path, h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8).SerializeToString())
    ready = loaded(tmp_path)
    with pytest.raises(EngineFailed) as caught:
        ready.infer({"x": np.full((1, 4), 99, np.float32)})
    assert caught.value.code == "model_failed"
    assert "out of" in caught.value.detail
    assert ready.infer({"x": np.ones((1, 4), np.float32)}).outputs["y"].tolist() == [[1.0] * 4]


def test_several_threads_may_ask_at_once(models, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    models.build_bundle(tmp_path, transforms=True)
    ready = loaded(tmp_path)
    x, truth = models.rows(30)
    raw = (10 * x + 5).astype(np.float32)

    def ask(i):
        return ready.infer({"x": raw[i : i + 1]}).outputs["label"][0]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, list(range(30)) * 20))
    assert found == [f"class-{k}" for k in truth] * 20
