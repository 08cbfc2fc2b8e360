"""The label-free estimate (CBPE) against the truth, on real gas readings that neither training nor calibration saw.

Held-out rows of the distribution that the model was trained on: there it must be within 2 points at 1,000 rows. Where the model
is often wrong, chance alone moves the truth of 1,000 rows by more than a point, so there more rows are asked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from skerry_agent.worker.plan import OutputColumn, Plan
from skerry_agent.worker.recorder import Recorder
from skerry_cli.demo import data, quantization, reference, training
from skerry_contract import window as w
from skerry_contract import wire
from skerry_server.core import accuracy
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

POINTS = 0.02


def estimate(folder: Path, answers: NDArray[np.float32], calibration: dict[str, object]) -> accuracy.Estimate:
    """As a device counts it and the server shows it: through ring, fold, windows and their merge."""
    classes = answers.shape[1]
    output = OutputColumn(name="p", classes=classes, knots_x=tuple(calibration["x"]), knots_y=tuple(calibration["y"]))  # type: ignore[arg-type]
    windows: list[w.Window] = []
    recorder = Recorder(
        w.Key("gas", "0" * 64, "onnx-int8", "none", "", 0),
        Plan(outputs=(output,)),
        ring=str(folder / "estimate.ring"),
        boot_id="0" * 32,
        send=lambda cut: windows.append(wire.decode_window(cut.body)),
        later=lambda act: act(),
    )
    for low in range(0, len(answers), 100):
        part = answers[low : low + 100]
        recorder.ok({}, {"p": part}, len(part), 9, 0, 1, 1, 5)
        if low % 300 == 0:
            recorder.cut()
    recorder.cut()
    recorder.ring.close(remove=True)
    merged = windows[0]
    for window in windows[1:]:
        merged = w.merge(merged, window)
    found = merged.outputs["p"]
    assert found.moments.n == len(answers)
    return accuracy.estimated(found.estimated, found.moments.n)


@pytest.fixture(scope="module")
def answered() -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The demo's int8 model on rows that it was not trained on: probabilities, and which answers are right."""
    trained = training.train(data.BATCHES)
    answers = quantization.answer(quantization.quantize(trained), trained.standardise(trained.held_out.x))
    return answers, answers.argmax(1) == trained.held_out.y


@pytest.mark.parametrize("split", range(8))
def test_the_estimate_is_within_two_points_at_a_thousand_rows_of_the_same_distribution(
    tmp_path: Path, answered: tuple[NDArray[np.float32], NDArray[np.bool_]], split: int
) -> None:
    answers, right = answered
    order = np.random.default_rng(split).permutation(len(right))
    fitted, judged = order[:-1000], order[-1000:]
    calibration = reference.calibration(answers[fitted].max(1), right[fitted])
    found = estimate(tmp_path, answers[judged], calibration)
    assert found.rows == 1000
    assert found.estimate == pytest.approx(right[judged].mean(), abs=POINTS)


def test_it_stays_near_the_truth_of_a_model_that_is_often_wrong_and_far_too_sure(tmp_path: Path) -> None:
    readings = data.load(data.BATCHES)
    x = readings.x[:, [0, 24, 56, 90]]  # four of 128 columns: wrong in one answer of six
    errors, unfitted = [], []
    for split in range(5):
        order = np.random.default_rng(split).permutation(len(readings))
        train, fitted, judged = order[:1500], order[1500:3500], order[3500:]
        scaler = StandardScaler().fit(x[train])
        with threadpool_limits(limits=1):
            model = LogisticRegression(max_iter=300).fit(scaler.transform(x[train]), readings.y[train])
            answers = model.predict_proba(scaler.transform(x)).astype(np.float32)
        right = answers.argmax(1) == readings.y
        calibration = reference.calibration(answers[fitted].max(1), right[fitted])
        found = estimate(tmp_path, answers[judged], calibration)
        assert found.estimate is not None
        assert 0.7 < right[judged].mean() < 0.9
        errors.append(abs(found.estimate - right[judged].mean()))
        unfitted.append(abs(float(answers[judged].max(1).mean()) - right[judged].mean()))
    assert max(errors) < POINTS
    # Its bare confidence is off by ten points: without the calibration this test would fail.
    assert min(unfitted) > 5 * POINTS / 2


def test_every_estimate_says_that_it_is_one() -> None:
    for found in (accuracy.estimated((1 << 20,) * 300, 300), accuracy.estimated((), 0)):
        assert found.method.startswith("CBPE: an estimate")
