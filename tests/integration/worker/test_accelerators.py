"""What is configured to run models and is not here, or does not take them: the CPU answers, and it is said and counted."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skerry_agent import workerwire as ww
from skerry_runtime import proof, runner
from skerry_runtime.acceleration import Acceleration, Delegate
from skerry_runtime.bundle import open_bundle

from tests import models, streaming
from tests.integration.worker.rig import Rig

DELEGATE = r"""
#include <stdint.h>
#include <stdlib.h>
struct delegate {
  void* data;
  int (*prepare)(void* context, struct delegate* self);
  void* handles[3];
  int64_t flags;
  void* builder;
};
struct plan { int size; int nodes[]; };
struct kernel { void* init; void* free; void* prepare; int (*invoke)(void* context, void* node); };
struct context {
  size_t tensors;
  int (*plan)(struct context*, struct plan**);
  void* unused[5];
  int (*node)(struct context*, int number, void** node, struct kernel** kernel);
};
static int nothing(void* context, void* node) { return 0; }
static int prepare(void* given, struct delegate* self) {
  struct context* context = given;
  struct plan* plan;
  struct kernel* kernel;
  void* node;
  if (self->data != (void*)1L) return self->data ? 1 : 0;
  if (context->plan(context, &plan)) return 1;
  for (int i = 0; i < plan->size; i++) {
    if (context->node(context, plan->nodes[i], &node, &kernel)) return 1;
    kernel->invoke = nothing;
  }
  return 0;
}
struct delegate* tflite_plugin_create_delegate(char** keys, char** values, size_t count, void (*report)(const char*)) {
  struct delegate* made = calloc(1, sizeof *made);
  for (size_t i = 0; i < count; i++) {
    if (values[i][0] == 'n') { report("told not to"); free(made); return NULL; }
    if (values[i][0] == 'r') made->data = (void*)2L;
    if (values[i][0] == 'w') made->data = (void*)1L;
  }
  made->prepare = prepare;
  return made;
}
void tflite_plugin_destroy_delegate(struct delegate* made) { free(made); }
"""
"""A delegate of TFLite that takes no node: as its option says it agrees, refuses every model, computes nothing, or does not load."""


# The runtimes' own objects complain when what they load is no delegate.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def library(tmp_path: Path) -> str:
    if shutil.which("gcc") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("gcc is not here")
        pytest.skip("gcc is not here")
    (tmp_path / "delegate.c").write_text(DELEGATE)
    made = tmp_path / "libdelegate.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", made, tmp_path / "delegate.c"], check=True)
    return str(made)


def ask(rig: Rig, x: np.ndarray) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
    given = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    connection.request("POST", "/v2/models/gas/infer", json.dumps({"inputs": [given]}))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer["outputs"][0]["data"]


def test_a_provider_that_is_not_here_leaves_the_model_to_the_cpu_and_is_counted(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle), acceleration={"providers": ["CUDAExecutionProvider"]})
    (proved,) = worker.wait_for(ww.Ready).models
    assert proved.runs_on == ("cpu",)
    assert proved.fallback.startswith("CUDAExecutionProvider is not in this onnxruntime, which has ")
    assert proved.proof.passed == proved.proof.cases == 12
    x, _ = models.rows(3)
    np.testing.assert_allclose(ask(rig, x), models.probabilities(x).ravel(), atol=1e-5)
    rig.flush(worker)
    ((_, window),) = rig.windows
    assert window.tallies == {"provider.fallback": 1}
    # What runs where it should is not counted.
    worker = rig.swap(worker, rig.served(bundle))
    ask(rig, x)
    rig.flush(worker)
    assert rig.windows[-1][1].tallies == {}


def test_a_provider_that_is_here_is_used_before_the_cpu(bundle: Path) -> None:
    # The one that comes with every wheel beside the CPU's; it takes no node of this model.
    wished = Acceleration(providers=("TensorrtExecutionProvider", "AzureExecutionProvider"), threads=2)
    ready = runner.load(open_bundle(bundle), "onnx-fp32", acceleration=wished)
    assert ready.engine.runs_on == ("AzureExecutionProvider", "cpu")
    assert "TensorrtExecutionProvider is not in" in ready.fallback
    assert "Azure" not in ready.fallback.partition(", which has")[0]
    assert proof.prove(ready).ok


def test_a_stateful_model_is_accelerated_in_every_stream(tmp_path: Path) -> None:
    folder = streaming.build(tmp_path)
    wished = Acceleration(providers=("AzureExecutionProvider",))
    ready = runner.load(open_bundle(folder), "onnx-fp32", acceleration=wished)
    assert (ready.fallback, ready.engine.again().runs_on) == ("", ("AzureExecutionProvider", "cpu"))
    assert proof.prove(ready).ok


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = pytest.importorskip("skerry_cli.demo.models", reason="the demo's models are not installed")
    out: Path = tmp_path_factory.mktemp("demo") / "bundle"
    made.make_bundle(out, version="1.0.0", batches=(1,), created="2026-01-01T00:00:00Z")
    return out


def variant(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    return next(v["id"] for v in manifest["variants"] if v["runtime"] == "tflite")


def loaded(folder: Path, *delegates: Delegate, **wishes: Any) -> runner.Runner:
    wished = Acceleration(delegates=delegates, **wishes)
    return runner.load(open_bundle(folder), variant(folder), acceleration=wished)


def test_a_delegate_that_takes_the_model_is_in_use(demo: Path, library: str) -> None:
    ready = loaded(demo, Delegate(library=library, options={"mode": "yes"}))
    assert (ready.engine.runs_on, ready.fallback) == (("libdelegate.so", "cpu"), "")
    assert proof.prove(ready).ok


@pytest.mark.parametrize(
    ("delegate", "why"),
    [
        (Delegate(library="/nowhere/libedgetpu.so.1"), "/nowhere/libedgetpu.so.1 does not load: "),
        (Delegate(library="libc.so.6"), "libc.so.6 does not load: "),
        (Delegate(library="HERE", options={"mode": "no"}), "HERE does not load: "),
        (Delegate(library="HERE", options={"mode": "refuse"}), "libdelegate.so does not take the model: "),
    ],
    ids=["not there", "no delegate", "will not", "refuses the model"],
)
def test_a_delegate_that_does_not_load_or_take_the_model_leaves_it_to_the_cpu(
    demo: Path, library: str, delegate: Delegate, why: str
) -> None:
    options = {"library": delegate.library.replace("HERE", library), "options": delegate.options}
    ready = loaded(demo, Delegate(**options))  # type: ignore[arg-type]
    assert ready.engine.runs_on == ("cpu",)
    assert ready.fallback.startswith(why.replace("HERE", library))
    assert proof.prove(ready).ok


def test_xnnpack_can_be_left_out(demo: Path) -> None:
    def delegated(ready: runner.Runner) -> bool:
        engine: Any = ready.engine
        return any(op["op_name"] == "DELEGATE" for op in engine._interpreter._get_ops_details())

    usual, without = loaded(demo), loaded(demo, xnnpack=False)
    assert (delegated(usual), delegated(without)) == (True, False)
    assert proof.prove(without).ok


def test_a_delegate_that_answers_otherwise_is_left_out_and_the_model_proved_anew(
    rig: Rig, demo: Path, library: str
) -> None:
    wished = {"delegates": [{"library": library, "options": {"mode": "wrong"}}], "xnnpack": False}
    bad = loaded(demo, Delegate(library=library, options={"mode": "wrong"}), xnnpack=False)
    assert bad.engine.runs_on == ("libdelegate.so", "cpu")
    assert not proof.prove(bad).ok
    worker = rig.start(rig.served(demo, variant=variant(demo)), acceleration=wished)
    (proved,) = worker.wait_for(ww.Ready).models
    assert proved.runs_on == ("cpu",)
    assert proved.fallback.startswith("libdelegate.so, cpu fails the golden cases: case 1, probabilities")
    assert proved.proof.passed == proved.proof.cases


def test_a_worker_says_what_a_delegate_did(rig: Rig, demo: Path, library: str) -> None:
    delegates = [{"library": library, "options": {"mode": "refuse"}}]
    worker = rig.start(rig.served(demo, variant=variant(demo)), acceleration={"delegates": delegates})
    (proved,) = worker.wait_for(ww.Ready).models
    assert proved.fallback.startswith("libdelegate.so does not take the model: ")
    case = json.loads((demo / "golden-tflite.jsonl").read_text().splitlines()[0])
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
    connection.request("POST", "/v2/models/gas/infer", json.dumps({"inputs": case["inputs"]}))
    assert connection.getresponse().status == 200
    connection.close()
    rig.flush(worker)
    ((_, window),) = rig.windows
    assert window.tallies == {"provider.fallback": 1}
