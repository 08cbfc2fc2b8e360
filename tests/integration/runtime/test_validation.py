"""Validation in a child process: whatever a bundle does to that process, the caller gets a value."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import onnx
import psutil
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from skerry_contract import canonical
from skerry_runtime import child
from skerry_runtime.validation import ValidationResult, validate_bundle

from tests import streaming

X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the division traps on x86 only")


def rewrite(folder, change):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    (folder / "manifest.json").write_bytes(canonical.encode(manifest))


def put_model(folder, data):
    put_file(folder, "model.onnx", data)


def put_file(folder, name, data):
    (folder / name).write_bytes(data)

    def relist(manifest):
        for file in manifest["variants"][0]["files"]:
            if file["path"] == name:
                file.update(sha256=hashlib.sha256(data).hexdigest(), size=len(data))

    rewrite(folder, relist)


def serialized(nodes, inputs=("n", 4), outputs=("n", 4), initializers=()):
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info("x", T.FLOAT, list(inputs))],
        [h.make_tensor_value_info("y", T.FLOAT, list(outputs))],
        list(initializers),
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.mark.parametrize(("kind", "transforms"), [("classifier", True), ("int8", False), ("identity", False)])
def test_a_good_bundle_is_valid_and_measured(models, tmp_path, kind, transforms):
    digest = models.build_bundle(tmp_path, kind=kind, transforms=transforms, version="3.1.4")
    found = validate_bundle(tmp_path, digest=digest)
    assert found.ok, found
    assert (found.code, found.detail, found.digest, found.model, found.version) == ("", "", digest, "gas", "3.1.4")
    (variant,) = found.variants
    assert variant.status == "passed"
    assert variant.proof.passed == variant.proof.cases == 12
    assert variant.load_ms > 0
    assert 0 < variant.latency_p50_us <= variant.latency_p95_us
    assert 0 < variant.rss_mb < variant.process_rss_mb < 400
    assert found.machine["arch"] == platform.machine()
    assert variant.runtime_version == found.machine["onnx"]
    again = json.loads(found.to_json())
    assert again["ok"] is True
    assert again["variants"][0]["proof"]["cases"] == 12


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("damaged", "model_damaged", "model.onnx"),
        ("unknown-operator", "operator_unknown", "FluxCapacitor"),
        ("always-one", "golden_failed", "case 2, probabilities"),
        ("quiet-defect", "golden_failed", "recall of 'class-1'"),
        ("wrong-golden", "golden_failed", "case 1, probabilities"),
        ("float-as-int8", "not_quantized", "takes float 'x'"),
        ("dynamic-as-int8", "not_quantized", "DynamicQuantizeLinear"),
    ],
)
def test_a_bad_bundle_is_refused_with_its_reason(models, tmp_path, kind, code, words):
    digest = models.build_bundle(tmp_path, kind=kind)
    found = validate_bundle(tmp_path)
    assert not found.ok
    assert found.code == code
    assert words in found.detail
    assert found.advice
    assert found.digest == digest
    assert found.variants[0].status == "failed"


@X86
def test_a_model_that_kills_the_runtime_while_it_loads_is_a_value(models, tmp_path):
    digest = models.build_bundle(tmp_path, kind="crash-on-load")
    found = validate_bundle(tmp_path)
    assert not found.ok
    assert found.code == "runtime_crashed"
    assert found.detail.startswith("killed by SIGFPE, in loading variant onnx-fp32")
    assert found.digest == digest


@X86
def test_a_model_that_kills_the_runtime_on_a_golden_case_is_a_value(models, tmp_path):
    models.build_bundle(tmp_path, kind="crash-on-rows")
    assert validate_bundle(tmp_path).ok
    cases = (tmp_path / "golden.jsonl").read_text().splitlines()
    first = json.loads(cases[0])
    first["inputs"][0]["data"][0] = float(models.CRASH_VALUE)
    golden = "\n".join([json.dumps(first), *cases[1:]]).encode()
    (tmp_path / "golden.jsonl").write_bytes(golden)

    def relist(manifest):
        for file in manifest["variants"][0]["files"]:
            if file["path"] == "golden.jsonl":
                file.update(sha256=hashlib.sha256(golden).hexdigest(), size=len(golden))

    rewrite(tmp_path, relist)
    found = validate_bundle(tmp_path)
    assert found.code == "runtime_crashed"
    assert "killed by SIGFPE, in proving variant onnx-fp32" in found.detail


def test_a_model_that_never_ends_is_stopped_in_time(models, tmp_path):
    # A loop of 2**62 turns.
    body = h.make_graph(
        [h.make_node("Identity", ["go"], ["go_on"]), h.make_node("Sin", ["v"], ["w"])],
        "body",
        [
            h.make_tensor_value_info("i", T.INT64, []),
            h.make_tensor_value_info("go", T.BOOL, []),
            h.make_tensor_value_info("v", T.FLOAT, ["n", 4]),
        ],
        [h.make_tensor_value_info("go_on", T.BOOL, []), h.make_tensor_value_info("w", T.FLOAT, ["n", 4])],
    )
    turns = onnx.numpy_helper.from_array(__import__("numpy").array(2**62), "turns")
    models.build_bundle(tmp_path, kind="identity")
    put_model(tmp_path, serialized([h.make_node("Loop", ["turns", "", "x"], ["y"], body=body)], initializers=[turns]))
    start = time.monotonic()
    found = validate_bundle(tmp_path, timeout_s=3)
    assert found.code == "timeout"
    assert "in proving variant onnx-fp32" in found.detail
    assert time.monotonic() - start < 8


def test_a_model_that_eats_memory_is_a_value(models, tmp_path):
    numpy = __import__("numpy")
    # Expands one row to 4 x 2**34 floats: 275 GB.
    shape = onnx.numpy_helper.from_array(numpy.array([2**34, 4], numpy.int64), "shape")
    models.build_bundle(tmp_path, kind="identity")
    put_model(tmp_path, serialized([h.make_node("Expand", ["x", "shape"], ["y"])], initializers=[shape]))
    found = validate_bundle(tmp_path, memory_mb=3000)
    assert (found.ok, found.code) == (False, "out_of_memory")
    assert "golden case 1" in found.detail


@pytest.mark.parametrize("memory_mb", [60, 150])
def test_a_child_without_room_to_start_is_a_value(models, tmp_path, memory_mb):
    # 60 MB do not hold the graph's reader, 150 not the runtime's library.
    models.build_bundle(tmp_path)
    found = validate_bundle(tmp_path, memory_mb=memory_mb)
    assert (found.ok, found.code) == (False, "out_of_memory")
    assert found.detail


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda f: (f / "model.onnx").write_bytes(b"x"), "size_mismatch"),
        (lambda f: (f / "model.onnx").unlink(), "file_missing"),
        (lambda f: (f / "extra").write_text("x"), "file_unlisted"),
        (lambda f: (f / "link").symlink_to("/etc/passwd"), "not_a_file"),
        (lambda f: (f / "manifest.json").write_text("{" * 10_000), "malformed_manifest"),
        (lambda f: (f / "manifest.json").unlink(), "file_missing"),
    ],
)
def test_a_folder_that_is_no_bundle_is_a_value(models, tmp_path, spoil, code):
    models.build_bundle(tmp_path)
    spoil(tmp_path)
    found = validate_bundle(tmp_path)
    assert (found.ok, found.code) == (False, code)


def test_another_digest_than_the_one_meant_is_refused(models, tmp_path):
    models.build_bundle(tmp_path)
    assert validate_bundle(tmp_path, digest="0" * 64).code == "hash_mismatch"


def test_what_a_variant_says_it_needs_is_held_against_what_it_takes(models, tmp_path):
    models.build_bundle(tmp_path)
    rewrite(tmp_path, lambda m: m["variants"][0].update(needs={"rss_mb": 1, "disk_mb": 1}))
    found = validate_bundle(tmp_path)
    assert found.code == "needs_understated"
    assert "needs.rss_mb is 1" in found.detail
    models.build_bundle(tmp_path, padding=3_000_000)
    rewrite(tmp_path, lambda m: m["variants"][0].update(needs={"rss_mb": 200, "disk_mb": 1}))
    assert "needs.disk_mb is 1" in validate_bundle(tmp_path).detail


def test_weights_outside_the_bundle_are_refused(models, tmp_path):
    folder = tmp_path / "b"
    models.build_bundle(folder)
    model = onnx.load_model_from_string(models.onnx_bytes("classifier"))
    onnx.save(model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0)
    found = onnx.load(str(tmp_path / "m.onnx"), load_external_data=False)
    for tensor in found.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../w.bin"
    put_model(folder, found.SerializeToString())
    assert validate_bundle(folder).code == "file_unlisted"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m["reference"]["features"].update(ghost={"counts": [300]}),
            "reference.features.ghost: no such feature",
        ),
        (lambda m: m["reference"].update(n=299), "add up to 300, the reference has 299 rows"),
        (lambda m: m["reference"]["outputs"]["probabilities"].update(counts=[300]), "wanted 3 counts, one per label"),
        (lambda m: m["reference"]["validated_error"].update(unicorn=0.5), "'unicorn' is no label"),
        (lambda m: m["variants"][0]["golden"]["minimum_recall"].update(unicorn=0.5), "'unicorn' is no label"),
        (lambda m: m["outputs"][0].update(labels=["a"]), "outputs.probabilities.labels: wanted 3, got 1"),
    ],
)
def test_a_reference_that_cannot_be_is_refused(models, tmp_path, change, words):
    models.build_bundle(tmp_path)
    rewrite(tmp_path, change)
    found = validate_bundle(tmp_path)
    assert found.code == "malformed_manifest"
    assert words in found.detail


def test_a_bundle_of_which_nothing_can_run_here_is_not_called_valid(models, tmp_path):
    models.build_bundle(tmp_path)
    rewrite(tmp_path, lambda m: m["variants"][0].update(arch=["riscv128"]))
    found = validate_bundle(tmp_path)
    assert (found.ok, found.code) == (False, "runtime_missing")
    assert found.variants[0].status == "skipped"
    assert "for riscv128" in found.detail


def test_a_variant_for_another_machine_is_skipped_beside_one_that_passes(models, tmp_path):
    models.build_bundle(tmp_path)
    rewrite(tmp_path, lambda m: m["variants"].append({**m["variants"][0], "id": "onnx-arm", "arch": ["riscv128"]}))
    found = validate_bundle(tmp_path)
    assert found.ok
    assert [variant.status for variant in found.variants] == ["passed", "skipped"]


def test_many_threads_may_validate_at_once(models, tmp_path):
    models.build_bundle(tmp_path / "good")
    models.build_bundle(tmp_path / "bad", kind="damaged")
    found: dict[int, ValidationResult] = {}

    def one(i):
        found[i] = validate_bundle(tmp_path / ("bad" if i % 2 else "good"))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i].ok for i in range(4)] == [True, False, True, False]


def test_the_child_prints_its_verdict_and_says_it_by_its_exit_code(models, tmp_path):
    for kind, code in (("classifier", 0), ("damaged", 1)):
        models.build_bundle(tmp_path / kind, kind=kind)
        run = subprocess.run(
            [sys.executable, "-m", "skerry_runtime.validation", str(tmp_path / kind)], capture_output=True, timeout=60
        )
        assert run.returncode == code, run
        last = json.loads(run.stdout.splitlines()[-1])
        assert last["result"]["ok"] == (code == 0)


CHILD = Path(__file__).with_name("naughty.py")


@pytest.fixture
def naughty(tmp_path, monkeypatch):
    (tmp_path / "naughty_child.py").write_text(CHILD.read_text())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return lambda *arguments, timeout_s=20.0: child.run_module("naughty_child", arguments, timeout_s=timeout_s)


def test_a_child_that_hangs_is_killed_with_all_it_started(naughty, tmp_path):
    pid_file = tmp_path / "pid"
    start = time.monotonic()
    found = naughty("spawn-and-hang", str(pid_file), timeout_s=2.0)
    assert found.timed_out
    assert found.signal_name == "SIGKILL"
    assert time.monotonic() - start < 6
    assert _gone(int(pid_file.read_text()))


def test_a_grandchild_that_holds_the_pipes_does_not_hold_the_caller(naughty, tmp_path):
    pid_file = tmp_path / "pid"
    found = naughty("spawn-and-leave", str(pid_file))
    assert not found.timed_out
    assert found.returncode == 0
    assert found.took_s < 10
    assert _gone(int(pid_file.read_text()))


def test_a_child_that_never_stops_talking_is_cut_off(naughty):
    found = naughty("talk")
    assert found.overflowed
    assert len(found.stdout) < child.MAX_STDOUT_BYTES + (1 << 17)
    found = naughty("talk-stderr", timeout_s=2.0)
    assert found.timed_out
    assert len(found.stderr) <= child.MAX_STDERR_BYTES + (1 << 16)


def test_a_child_inherits_no_descriptor_and_no_secret(naughty, monkeypatch):
    monkeypatch.setenv("SKERRY_TOKEN", "secret")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        said = json.loads(naughty("look").stdout)
    finally:
        os.close(read)
        os.close(write)
    assert said["descriptors"] == [0, 1, 2]
    assert "SKERRY_TOKEN" not in said["environment"]
    assert said["cwd"] == "/"


# On a busy machine the wall clock runs out before the CPU seconds do.
@pytest.mark.parametrize(
    ("verb", "signals"),
    [("spin", ("SIGXCPU", "SIGKILL", "SIGALRM")), ("sleep", ("SIGALRM",)), ("segfault", ("SIGSEGV",))],
)
def test_the_limits_a_child_sets_itself_end_it(naughty, verb, signals):
    found = naughty(verb, timeout_s=30.0)
    assert found.signal_name in signals
    assert not found.timed_out


def test_a_limited_child_writes_no_file(naughty, tmp_path):
    found = naughty("write", timeout_s=30.0)
    assert b"File too large" in found.stderr
    assert not (tmp_path / "written").exists() or (tmp_path / "written").stat().st_size == 0


def _gone(pid):
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("kind", ["summing", "smoothing"])
def test_a_stateful_bundle_proves_itself_as_one_sequence_from_zeros(tmp_path, kind):
    streaming.build(tmp_path, kind)
    found = validate_bundle(tmp_path)
    assert found.ok, found
    assert found.variants[0].proof.passed == 6
    cases = (tmp_path / "golden.jsonl").read_text().splitlines()
    put_file(tmp_path, "golden.jsonl", "\n".join(reversed(cases)).encode())
    assert validate_bundle(tmp_path).code == "golden_failed"


def test_all_streams_that_a_bundle_may_have_are_held_against_its_needs(tmp_path):
    streaming.build(tmp_path)
    assert validate_bundle(tmp_path).ok
    wide = onnx.load(tmp_path / "model.onnx")
    for value in (*wide.graph.input, *wide.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = 200_000
    put_file(tmp_path, "model.onnx", wide.SerializeToString())
    row = {"shape": [1, 200_000], "datatype": "FP32", "data": [0.0] * 200_000}
    case = json.dumps({"inputs": [{"name": "x", **row}], "outputs": [{"name": "y", **row}]})
    put_file(tmp_path, "golden.jsonl", case.encode())

    def widen(manifest, most):
        manifest["inputs"][0]["shape"] = manifest["outputs"][0]["shape"] = [1, 200_000]
        manifest["streams"] = {"states": [{**manifest["streams"]["states"][0], "shape": [1, 200_000]}], "most": most}
        manifest["variants"][0]["needs"] = {"rss_mb": 200, "disk_mb": 9}

    # 0.8 MB each: 100 take 80 MB, 1000 take 800.
    rewrite(tmp_path, lambda manifest: widen(manifest, 100))
    assert validate_bundle(tmp_path).ok
    rewrite(tmp_path, lambda manifest: widen(manifest, 1000))
    found = validate_bundle(tmp_path)
    assert found.code == "needs_understated"
    assert "needs.rss_mb is 200" in found.detail


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (
            lambda m: m["streams"]["states"][0].update(shape=[1, 3]),
            "malformed_manifest",
            "state input of model.onnx: h wants",
        ),
        (lambda m: m["streams"]["states"][0].update(output="h2"), "malformed_manifest", "nothing gives 'h2'"),
        (
            lambda m: m["streams"]["states"][0].update(input="x"),
            "malformed_manifest",
            "x is no state, requests bring it",
        ),
        (lambda m: m.update(streams={"internal": True}), "malformed_manifest", "onnx keeps nothing between runs"),
        (lambda m: m.pop("streams"), "malformed_manifest", "nothing gives 'h'"),
        (
            lambda m: m["outputs"].append({"name": "hn", "datatype": "FP32", "shape": [1, 2]}),
            "malformed_manifest",
            "nothing gives 'hn'",
        ),
    ],
)
def test_streams_that_do_not_fit_the_model_are_refused(tmp_path, change, code, words):
    streaming.build(tmp_path)
    rewrite(tmp_path, change)
    found = validate_bundle(tmp_path)
    assert (found.ok, found.code) == (False, code)
    assert words in found.detail


def test_a_step_that_looks_back_wants_streams(tmp_path):
    streaming.build(tmp_path, "smoothing")
    rewrite(tmp_path, lambda m: m.pop("streams"))
    found = validate_bundle(tmp_path)
    assert (found.code, found.detail.rpartition(": ")[2]) == ("transform_invalid", "wanted streams in the manifest")


def test_a_bundle_with_policies_is_proved_through_them(models, tmp_path):
    models.build_bundle(tmp_path)
    cases = (tmp_path / "golden.jsonl").read_text().splitlines()
    first = json.loads(cases[0])
    first["inputs"][0]["data"][3] = None
    put_file(tmp_path, "golden.jsonl", "\n".join([json.dumps(first), *cases[1:]]).encode())

    def policy(manifest, **fields):
        manifest["requires"] = ["guards"]
        manifest["features"][3].update(fields)

    true_value = json.loads(cases[0])["inputs"][0]["data"][3]
    rewrite(tmp_path, lambda m: policy(m, on_null="impute", impute=true_value))
    assert validate_bundle(tmp_path).ok
    rewrite(tmp_path, lambda m: (policy(m, on_null="fallback"), m.update(fallback="spare")))
    found = validate_bundle(tmp_path)
    assert found.code == "golden_failed"
    assert "case 1: x[0][3] (f3): wanted a number, got NaN" in found.detail
    rewrite(tmp_path, lambda m: policy(m, on_null="count", on_stale="reject"))
    assert "f3: on_stale reject wants a ttl_s above 0" in validate_bundle(tmp_path).detail
