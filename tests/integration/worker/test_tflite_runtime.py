"""The demo's bundle on tflite-runtime with numpy 1: the same proof and answers as on LiteRT, and a worker that serves it.

These run a second Python, in the environment that ``make test-tflite`` makes: tflite-runtime ends at Python 3.11, and needs a numpy
that the rest of the tests do not.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from skerry_cli.demo import data, models, quantization, tflite
from skerry_contract import canonical
from skerry_runtime.transforms import apply

from tests import real_models
from tests.integration.worker.rig import Rig

ENVIRONMENT = Path(__file__).parents[3] / ".venv-tflite"
STEP = 1 / 256
"""The smallest difference between two probabilities of an int8 softmax."""


@pytest.fixture(scope="module")
def python() -> str:
    if not (ENVIRONMENT / ".ready").exists():
        why = f"{ENVIRONMENT.name} is not there: `make test-tflite` makes it"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return str(ENVIRONMENT / "bin" / "python")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> models.Made:
    out = tmp_path_factory.mktemp("demo") / "bundle"
    return models.make_bundle(out, version="1.0.0", batches=(1,), created="2026-01-01T00:00:00Z")


def run(python: str, program: str, *arguments: object, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [python, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_environment_is_the_one_meant(python: str) -> None:
    program = (
        "import importlib.util as u, numpy, json\n"
        "from skerry_runtime import engines\n"
        "from skerry_runtime.engines import tflite\n"
        "tflite.check_health()\n"
        "print(json.dumps([engines.available(), numpy.__version__, u.find_spec('ai_edge_litert') is None]))\n"
    )
    available, numpy_version, without_litert = json.loads(run(python, program))
    assert available == {"tflite": "2.14.0"}
    assert numpy_version.startswith("1.")
    assert without_litert


def test_the_bundle_proves_itself_there(python: str, made: models.Made) -> None:
    program = (
        "import sys, json\n"
        "from skerry_runtime import proof, runner\n"
        "from skerry_runtime.bundle import open_bundle\n"
        "ready = runner.load(open_bundle(sys.argv[1]), sys.argv[2])\n"
        "found = proof.prove(ready)\n"
        "print(json.dumps([found.cases, found.passed, found.max_abs_diff, found.detail, proof.prove_batch(ready)]))\n"
    )
    cases, passed, worst, detail, batch = json.loads(run(python, program, made.bundle.folder, models.TFLITE))
    assert cases == passed > 30, detail
    assert worst <= STEP
    assert batch == ""


def test_it_answers_every_live_row_as_litert_does(python: str, made: models.Made, tmp_path: Path) -> None:
    live = data.load([6]).x
    np.save(tmp_path / "rows.npy", live)
    program = (
        "import sys, numpy as np\n"
        "from skerry_runtime import runner\n"
        "from skerry_runtime.bundle import open_bundle\n"
        "ready = runner.load(open_bundle(sys.argv[1]), sys.argv[2])\n"
        "rows = np.load(sys.argv[3])\n"
        f"one = [ready.infer({{'{quantization.INPUT}': row[None, :]}}).outputs['{quantization.OUTPUT}'][0] for row in rows]\n"
        "np.save(sys.argv[4], np.array(one))\n"
    )
    run(python, program, made.bundle.folder, models.TFLITE, tmp_path / "rows.npy", tmp_path / "answers.npy")
    there = np.load(tmp_path / "answers.npy")
    here = tflite.answer((made.bundle.folder / "model.tflite").read_bytes(), made.trained.standardise(live))
    assert there.shape == here.shape == (2300, 6)
    # The kernels of the two round a value within the graph differently once in a while; a step of a logit is worth much more
    # than one of a probability. So: nearly every row to the bit, and another class only where two are nearly as likely.
    assert (there == here).all(axis=1).mean() > 0.95
    other_class = there.argmax(axis=1) != here.argmax(axis=1)
    assert other_class.mean() < 0.002
    second, first = np.sort(here[other_class], axis=1)[:, -2:].T
    assert (first - second < 0.25).all()


def test_a_worker_serves_and_counts_there(python: str, made: models.Made, tmp_path: Path) -> None:
    cases = [json.loads(line) for line in (made.bundle.folder / "golden-tflite.jsonl").read_text().splitlines()]
    with Rig(tmp_path, python) as rig:
        worker = rig.start(rig.served(made.bundle.folder, variant=models.TFLITE))
        connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=10)
        connection.request("GET", "/v2/models/gas")
        assert json.loads(connection.getresponse().read())["platform"] == "tflite_tflite"
        for case in cases:
            connection.request("POST", "/v2/models/gas/infer", json.dumps({"inputs": case["inputs"]}))
            (output,) = json.loads(connection.getresponse().read())["outputs"]
            assert output["data"] == pytest.approx(case["outputs"][0]["data"], abs=STEP)
        connection.close()
        rig.flush(worker)
        assert rig.total(where=lambda key: key.variant == models.TFLITE).ok == rig.total().ok == len(cases)
        assert rig.stop(worker) == 0


def test_guards_and_steps_hold_there(python: str, made: models.Made, tmp_path: Path) -> None:
    folder = tmp_path / "guarded"
    shutil.copytree(made.bundle.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    first, second = manifest["features"][:2]
    first.update(on_null="impute", impute=0.5, on_stale="reject", ttl_s=1.0)
    second.update(on_outside="reject", range=[-1e9, 1e9])
    (folder / "manifest.json").write_bytes(canonical.encode({**manifest, "requires": ["guards"]}))
    case = json.loads((folder / "golden-tflite.jsonl").read_text().splitlines()[0])

    def changed(column: int, value: float | None) -> list[dict[str, object]]:
        (tensor,) = case["inputs"]
        return [{**tensor, "data": [value if i == column else v for i, v in enumerate(tensor["data"])]}]

    with Rig(tmp_path, python) as rig:
        worker = rig.start(rig.served(folder, variant=models.TFLITE))
        answers = []
        for inputs, age_ms in (
            (changed(first["column"], None), 0),
            (changed(first["column"], 0.5), 0),
            (changed(second["column"], 2e9), 0),
            (case["inputs"], 1001),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=10)
            connection.request(
                "POST", "/v2/models/gas/infer", json.dumps({"inputs": inputs, "parameters": {"age_ms": age_ms}})
            )
            response = connection.getresponse()
            answers.append((response.status, json.loads(response.read())))
            connection.close()
        assert [status for status, _ in answers] == [200, 200, 400, 400]
        assert answers[0][1]["outputs"] == answers[1][1]["outputs"]
        rig.flush(worker)
        ((_, window),) = rig.windows
        assert window.tallies == {"null.imputed": 1, "outside.rejected": 1, "stale.rejected": 1}
        assert window.features[first["name"]].null == 1


def test_steps_that_look_back_give_the_same_bits_there(python: str, tmp_path: Path) -> None:
    steps = [
        {"op": "lag", "input": "x", "params": {"rows": [1, 3], "keep": True}},
        {
            "op": "rolling",
            "input": "x",
            "params": {"rows": 5, "statistics": ["mean", "min", "max", "sd"], "keep": True},
        },
        {"op": "impute", "input": "x", "params": {"value": 0.25}},
        {"op": "scale", "input": "x", "params": {"mean": 0.5, "scale": 3.0}},
        {"op": "clip", "input": "x", "params": {"low": -2.0, "high": 2.0}},
        {"op": "one_hot", "input": "x", "output": "y", "params": {"values": [-2.0, 2.0]}},
    ]
    np.save(tmp_path / "rows.npy", np.random.default_rng(5).normal(0, 3, (200, 4)).astype(np.float32))
    program = (
        "import sys, json, numpy as np\n"
        "from skerry_contract import manifest as mf\n"
        "from skerry_runtime.tensors import Spec\n"
        "from skerry_runtime.transforms import compile_steps\n"
        "steps = compile_steps([mf.Transform(**s) for s in json.loads(sys.argv[1])], [Spec('x', 'FP32', (-1, 4))])\n"
        "memory, found = steps.begin(), []\n"
        "for row in np.load(sys.argv[2]):\n"
        "    tensors = {'x': row[None]}\n"
        "    memory = steps.run_on(tensors, memory)\n"
        "    found.append(tensors)\n"
        "np.savez(sys.argv[3], **{name: np.concatenate([f[name] for f in found]) for name in ('x', 'y')})\n"
    )
    run(python, program, json.dumps(steps), tmp_path / "rows.npy", tmp_path / "there.npz")
    there = np.load(tmp_path / "there.npz")
    for name, wanted in apply(steps, {"x": np.load(tmp_path / "rows.npy")}).items():
        assert wanted.tobytes() == there[name].tobytes()


def test_the_wakeword_keeps_its_streams_apart_there(python: str, tmp_path: Path) -> None:
    try:
        folder = real_models.wakeword(tmp_path / "bundle")
    except real_models.Unavailable as fault:
        if os.environ.get("CI") == "true":
            pytest.fail(str(fault))
        pytest.skip(str(fault))
    np.save(tmp_path / "frames.npy", np.stack([real_models.speech_frames(seed, 60) for seed in (1854, 2070)]))
    program = (
        "import sys, numpy as np\n"
        "from tflite_runtime.interpreter import Interpreter\n"
        "from skerry_runtime.transforms import apply\n"
        "import json\n"
        "found = []\n"
        "for frames in np.load(sys.argv[2]):\n"
        "    bare = Interpreter(model_path=sys.argv[1], num_threads=1)\n"
        "    bare.allocate_tensors()\n"
        "    i, o = bare.get_input_details()[0]['index'], bare.get_output_details()[0]['index']\n"
        "    said = []\n"
        "    for frame in frames:\n"
        "        bare.set_tensor(i, apply(json.loads(sys.argv[3]), {'features': frame[None]})['input_audio'])\n"
        "        bare.invoke()\n"
        "        said.append(float(bare.get_tensor(o)[0, 0]) / 256)\n"
        "    found.append(said)\n"
        "print(json.dumps(found))\n"
    )
    model = folder / "hey_mycroft.tflite"
    wanted = json.loads(run(python, program, model, tmp_path / "frames.npy", json.dumps(real_models.QUANTIZE)))
    assert all(max(said) > 0.9 for said in wanted)
    frames = np.load(tmp_path / "frames.npy")
    with Rig(tmp_path, python) as rig:
        rig.start(rig.served(folder, name="wakeword"))
        connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=10)
        for t in range(60):
            for stream in (0, 1):
                body = {
                    "inputs": [real_models.tensor("features", frames[stream][t][None])],
                    "parameters": {"sequence_id": stream + 1},
                }
                connection.request("POST", "/v2/models/wakeword/infer", json.dumps(body))
                answer = json.loads(connection.getresponse().read())
                assert answer["outputs"][0]["data"] == [wanted[stream][t]]
                assert answer.get("parameters", {}).get("sequence_begun", False) == (t == 0)
        connection.close()


def test_the_health_check_sees_a_runtime_that_only_imports(python: str, tmp_path: Path) -> None:
    # The numpy of this environment in front of the other's: tflite-runtime imports, and then builds no interpreter.
    if sys.version_info[:2] != (3, 11):
        pytest.skip("needs a numpy 2 that was built for Python 3.11")
    for name in ("numpy", "numpy.libs"):
        (tmp_path / name).symlink_to(Path(np.__file__).parents[1] / name)
    program = (
        "import numpy\n"
        "from tflite_runtime.interpreter import Interpreter\n"
        "from skerry_runtime.engines import tflite\n"
        "from skerry_runtime.errors import Degraded\n"
        "try:\n"
        "    tflite.check_health()\n"
        "except Degraded as fault:\n"
        "    print(numpy.__version__, fault)\n"
    )
    told = run(python, program, environment={"PYTHONPATH": str(tmp_path)})
    assert told.startswith("2.")
    assert "runtime_missing: tflite: installed, but no interpreter can be built" in told
