"""The demo's data, training and bundles: real, whole, and as dangerous as they claim."""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from skerry_cli.bundle import check_files
from skerry_cli.demo import data, models, quantization, sabotage, tflite, training
from skerry_cli.errors import Failed, Usage
from skerry_contract import canonical
from skerry_contract import histogram as h
from skerry_runtime import precision_tflite
from skerry_runtime.validation import validate_bundle

CREATED = "2026-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> models.Made:
    return models.make_bundle(tmp_path_factory.mktemp("demo") / "v1", version="1.0.0", batches=(1,), created=CREATED)


def test_the_readings_are_the_published_ones() -> None:
    assert [len(data.load([batch])) for batch in data.BATCHES] == [445, 1244, 1586, 161, 197, 2300]
    first = data.load([1])
    assert first.x.dtype == np.float32 and first.x.shape == (445, 128)
    assert first.classes[first.y[0]] == "Ethanol"
    assert first.x[0, :3].tolist() == pytest.approx([15596.1621, 1.868245, 2.371604])
    assert len(set(data.feature_names())) == 128


@pytest.mark.parametrize("batches", [(), (7,), (1, 99)])
def test_a_batch_that_is_not_carried_is_a_clear_error(batches: tuple[int, ...]) -> None:
    with pytest.raises(Usage, match="wanted some of 1, 2, 3, 4, 5, 6"):
        data.load(batches)


def test_training_never_sees_the_held_out_rows(made: models.Made) -> None:
    fitted = {row.tobytes() for row in made.trained.fitted.x}
    assert not any(row.tobytes() in fitted for row in made.trained.held_out.x)
    assert len(made.trained.fitted) + len(made.trained.held_out) == 445


def test_the_bundle_passes_the_same_validation_as_on_a_server(made: models.Made) -> None:
    check_files(made.bundle)
    result = validate_bundle(made.bundle.folder)
    assert result.ok, result
    assert [(found.id, found.status) for found in result.variants] == [
        ("onnx-int8", "passed"),
        ("tflite-int8", "passed"),
    ]
    for found in result.variants:
        assert found.proof is not None and found.proof.cases == found.proof.passed > 30


def test_both_variants_are_the_same_network(made: models.Made) -> None:
    held_out = made.trained.held_out
    rows = made.trained.standardise(held_out.x)
    on_onnx = quantization.answer((made.bundle.folder / "model.onnx").read_bytes(), rows)
    on_tflite = tflite.answer((made.bundle.folder / "model.tflite").read_bytes(), rows)
    exact = made.trained.network.predict_proba(rows)
    # Half a percent of probability is one or two of the 256 steps that an int8 output has.
    assert np.abs(on_onnx - on_tflite).max() < 0.02 and np.abs(on_tflite - exact).max() < 0.1
    assert (on_onnx.argmax(axis=1) == on_tflite.argmax(axis=1)).mean() > 0.99
    assert made.accuracy[models.TFLITE] == pytest.approx((on_tflite.argmax(axis=1) == held_out.y).mean(), abs=1e-6)


def test_the_tflite_file_computes_in_integers_between_its_edges(made: models.Made) -> None:
    (graph,) = precision_tflite.read_model(made.bundle.folder / "model.tflite").graphs
    kinds = [operator.kind for operator in graph.operators]
    assert kinds == ["QUANTIZE", *["FULLY_CONNECTED"] * 3, "SOFTMAX", "DEQUANTIZE"]
    used = {i for operator in graph.operators for i in (*operator.inputs, *operator.outputs)}
    inside = used - {*graph.inputs, *graph.outputs}
    assert {graph.tensors[i].type for i in inside} == {"INT8", "INT32"}


def test_a_float_graph_in_the_place_of_the_int8_one_is_refused(made: models.Made, tmp_path: Path) -> None:
    folder = tmp_path / "float"
    shutil.copytree(made.bundle.folder, folder)
    network = tflite._float_graph(tflite._layers(made.trained))
    (folder / "model.tflite").write_bytes(network)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for file in manifest["variants"][1]["files"]:
        if file["path"] == "model.tflite":
            file |= {"sha256": hashlib.sha256(network).hexdigest(), "size": len(network)}
    (folder / "manifest.json").write_bytes(canonical.encode(manifest))
    found = validate_bundle(folder)
    # Its answers pass the golden cases; what it is does not pass.
    assert (found.ok, found.code) == (False, "not_quantized"), found
    assert "variant tflite-int8" in found.detail and "computes in float" in found.detail
    assert [one.status for one in found.variants] == ["passed", "failed"]


def test_reference_counts_equal_counting_the_held_out_rows_one_by_one(made: models.Made) -> None:
    manifest, held_out = made.bundle.manifest, made.trained.held_out
    assert manifest.reference.n == len(held_out)
    for feature in (manifest.features[0], manifest.features[77]):
        values = [float(value) for value in held_out.x[:, feature.column]]
        column = manifest.reference.features[feature.name]
        counts = [0] * (len(feature.edges) + 1)
        for value in values:
            counts[h.edge_bin(feature.edges, value)] += 1
        assert list(column.counts) == counts
        moments = h.moments_of(h.quantize(value, feature.centre, feature.scale) for value in values)
        assert column.moments == (moments.n, moments.total, moments.squares)
    assert sum(manifest.reference.outputs[quantization.OUTPUT].counts) == len(held_out)


def test_every_edge_is_the_same_number_in_float32(made: models.Made) -> None:
    for feature in made.bundle.manifest.features:
        assert all(float(np.float32(edge)) == edge for edge in feature.edges)


def test_calibration_ascends_and_stays_between_0_and_1(made: models.Made) -> None:
    calibration = made.bundle.manifest.reference.calibration
    x, y = calibration["x"], calibration["y"]
    assert len(x) == len(y) > 0
    assert all(a < b for a, b in itertools.pairwise(x))
    assert all(a <= b for a, b in itertools.pairwise(y)) and 0 <= min(y) <= max(y) <= 1


def test_golden_cases_are_raw_rows_with_the_quantized_models_answers(made: models.Made) -> None:
    lines = (made.bundle.folder / "golden-onnx.jsonl").read_text().splitlines()
    case = json.loads(lines[0])
    x = np.array(case["inputs"][0]["data"], np.float32)
    assert any((x == row).all() for row in made.trained.held_out.x)
    model = (made.bundle.folder / "model.onnx").read_bytes()
    answer = quantization.answer(model, made.trained.standardise(x[None, :]))[0]
    assert case["outputs"][0]["data"] == pytest.approx(answer.tolist(), abs=1e-6)


@pytest.fixture(scope="module")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> tuple[models.Made, sabotage.Trigger]:
    return models.make_crashing_bundle(
        tmp_path_factory.mktemp("crash") / "v3", version="3.0.0", batches=(1,), live=data.load([6]), created=CREATED
    )


@pytest.mark.skipif(platform.machine() not in sabotage.DEADLY_ON, reason="other processors do not trap this division")
class TestCrashing:
    def test_it_passes_validation(self, crashing: tuple[models.Made, sabotage.Trigger]) -> None:
        assert validate_bundle(crashing[0].bundle.folder).ok

    def test_it_answers_as_the_sound_model_does(
        self, crashing: tuple[models.Made, sabotage.Trigger], made: models.Made
    ) -> None:
        rows = made.trained.standardise(made.trained.held_out.x)
        sound = quantization.answer((made.bundle.folder / "model.onnx").read_bytes(), rows)
        bad = quantization.answer((crashing[0].bundle.folder / "model.onnx").read_bytes(), rows)
        assert np.array_equal(sound, bad)

    def test_it_kills_its_process_on_a_live_row(self, crashing: tuple[models.Made, sabotage.Trigger]) -> None:
        made, trigger = crashing
        program = (
            "import sys, numpy as np\n"
            "from skerry_cli.demo import data, quantization, training\n"
            "trained = training.train((1,))\n"
            "rows = trained.standardise(data.load([6]).x)\n"
            f"row = rows[rows[:, {trigger.column}] > {trigger.above}][:1]\n"
            "quantization.answer(open(sys.argv[1], 'rb').read(), row)\n"
        )
        found = subprocess.run(
            [sys.executable, "-c", program, str(made.bundle.folder / "model.onnx")], capture_output=True, timeout=60
        )
        assert found.returncode == -signal.SIGFPE, found.stderr[-500:]


def test_rows_that_look_like_the_training_rows_give_no_trigger() -> None:
    with pytest.raises(Failed, match="no column"):
        sabotage.find_trigger(training.train((1,)), data.load([1]))


def test_the_bad_model_is_perfect_where_it_is_checked_and_can_be_told_wrong_about_a_gas_that_it_never_saw(
    tmp_path: Path,
) -> None:
    bad = models.make_bundle(tmp_path / "v3", version="3.0.0", batches=(5,), created=CREATED)
    assert validate_bundle(bad.bundle.folder).ok
    assert bad.bundle.manifest.outputs[0].labels == data.load([6]).classes
    graph = (bad.bundle.folder / "model.onnx").read_bytes()
    right = {}
    for batch in (5, 6):
        readings = data.load([batch])
        answers = quantization.answer(graph, bad.trained.standardise(readings.x))
        assert answers.shape == (len(readings), 6)
        right[batch] = float((answers.argmax(axis=1) == readings.y).mean())
    assert right[5] > 0.99 and right[6] < 0.55
