"""Occlusion: of a linear model exactly w (x - median), in one run as one by one, and of a real network as worked out in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_contract import manifest as mf
from skerry_runtime import explain
from skerry_runtime.bundle import open_bundle
from skerry_runtime.runner import load
from skerry_runtime.tensors import Tensors

from tests import models


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> mf.Manifest:
    """Four features, one number without classes."""
    folder = tmp_path_factory.mktemp("linear")
    outputs = [{"name": "y", "datatype": "FP64", "shape": [-1, 1]}]
    models.build_bundle(
        folder, kind="identity", changes={"explanations": {"medians": {f"f{i}": 2.0 * i - 3.0 for i in range(4)}}}
    )
    found = mf.parse((folder / mf.MANIFEST_FILE).read_bytes())
    return msgspec.structs.replace(found, outputs=msgspec.convert(outputs, tuple[mf.Tensor, ...]))


# Small whole numbers: every product and sum of them is exact in floating point, so equality is asked for and not nearness.
whole = st.integers(-1000, 1000).map(float)


@given(st.lists(whole, min_size=4, max_size=4), st.lists(whole, min_size=4, max_size=4), whole)
@settings(max_examples=60, deadline=None)
def test_of_a_linear_model_it_is_exactly_weight_times_distance_from_the_median(
    regression: mf.Manifest, weights: list[float], row: list[float], offset: float
) -> None:
    w = np.array(weights)

    def infer(inputs: Tensors) -> Tensors:
        return {"y": inputs["x"].astype(np.float64) @ w[:, None] + offset}

    x = np.array([row], np.float32)
    for batched in (True, False):
        found = explain.Occluder(regression, infer, batched=batched).explain({"x": x})
        assert found.value == float(w @ x[0] + offset)
        assert found.attributions.tolist() == [w[i] * (row[i] - (2.0 * i - 3.0)) for i in range(4)]


def test_all_features_of_a_row_are_one_run_where_the_batch_may_vary(regression: mf.Manifest) -> None:
    sizes: list[int] = []

    def infer(inputs: Tensors) -> Tensors:
        sizes.append(len(inputs["x"]))
        return {"y": inputs["x"].sum(1, keepdims=True, dtype=np.float64)}

    x = np.ones((1, 4), np.float32)
    explain.Occluder(regression, infer, batched=True).explain({"x": x})
    explain.Occluder(regression, infer, batched=False).explain({"x": x})
    assert sizes == [5, 1, 1, 1, 1, 1]
    assert x.tolist() == [[1.0] * 4]


def test_several_rows_are_one_run_and_each_is_explained_as_if_alone(regression: mf.Manifest) -> None:
    sizes: list[int] = []
    weights = np.array([3.0, -1.0, 0.5, 7.0])

    def infer(inputs: Tensors) -> Tensors:
        sizes.append(len(inputs["x"]))
        return {"y": inputs["x"].astype(np.float64) @ weights[:, None]}

    x = np.arange(28, dtype=np.float32).reshape(7, 4)
    occluder = explain.Occluder(regression, infer, batched=True)
    together = occluder.explain_rows({"x": x})
    assert sizes == [35]
    alone = [occluder.explain({"x": row[None]}) for row in x]
    assert [t.value for t in together] == [a.value for a in alone] == (x @ weights).tolist()
    assert [t.attributions.tolist() for t in together] == [a.attributions.tolist() for a in alone]


def test_a_row_that_the_model_refuses_takes_no_other_along(regression: mf.Manifest) -> None:
    def infer(inputs: Tensors) -> Tensors:
        if (inputs["x"] == 99).any():
            raise ValueError("99")
        return {"y": inputs["x"].sum(1, keepdims=True, dtype=np.float64)}

    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    x[2, 1] = 99
    found = explain.Occluder(regression, infer, batched=True).explain_each({"x": x})
    assert [one.value if isinstance(one, explain.Explanation) else str(one) for one in found] == [6.0, 22.0, "99", 54.0]


def test_a_real_network_is_explained_as_numpy_says_and_one_run_is_as_many(tmp_path: Path) -> None:
    medians = {"f0": 0.5, "f2": -0.25}
    digest = models.build_bundle(tmp_path, changes={"explanations": {"medians": medians}})
    runner = load(open_bundle(tmp_path, digest=digest), "onnx-fp32")
    occluder = explain.occluder_of(runner)
    single = explain.Occluder(runner.bundle.manifest, lambda inputs: runner.infer(inputs).outputs, batched=False)
    assert occluder.batched
    assert occluder.features == ("f0", "f2")
    x, _ = models.rows(20)
    for row in x:
        found, one_by_one = occluder.explain({"x": row[None]}), single.explain({"x": row[None]})
        answer = models.probabilities(row[None])[0]
        k = int(answer.argmax())
        wanted = []
        for i, median in ((0, 0.5), (2, -0.25)):
            changed = row.copy()
            changed[i] = median
            wanted.append(answer[k] - models.probabilities(changed[None])[0][k])
        assert (found.output, found.column) == ("probabilities", k)
        assert found.value == pytest.approx(answer[k], abs=1e-6)
        assert found.attributions == pytest.approx(wanted, abs=1e-6)
        assert one_by_one.attributions == pytest.approx(found.attributions, abs=1e-6)


def test_transforms_are_part_of_what_is_explained(tmp_path: Path) -> None:
    digest = models.build_bundle(tmp_path, transforms=True, changes={"explanations": {"medians": {"f1": 5.0}}})
    occluder = explain.occluder_of(load(open_bundle(tmp_path, digest=digest), "onnx-fp32"))
    x, _ = models.rows(1)
    found = occluder.explain({"x": (10 * x + 5).astype(np.float32)})
    changed = x.copy()
    changed[0, 1] = 0.0  # 5 as the application sends it
    k = int(models.probabilities(x)[0].argmax())
    assert found.attributions == pytest.approx(
        [models.probabilities(x)[0][k] - models.probabilities(changed)[0][k]], abs=1e-5
    )


def test_a_model_that_cannot_be_explained_says_why(tmp_path: Path, regression: mf.Manifest) -> None:
    def make(**changes: Any) -> None:
        explain.Occluder(msgspec.structs.replace(regression, **changes), lambda inputs: inputs, batched=True)

    for changes, why in (
        ({"explanations": mf.Explanations()}, "no explanations.medians|names no"),
        ({"streams": mf.Streams(internal=True)}, "keeps state"),
        ({"outputs": (mf.Tensor(name="y", datatype="BYTES", shape=(-1,)),)}, "no number"),
        ({"inputs": (mf.Tensor(name="x", datatype="FP32", shape=(-1, 2, 4)),)}, "one or two dimensions"),
    ):
        with pytest.raises(explain.NotExplainable, match=why):
            make(**changes)


@pytest.mark.parametrize(
    ("answers", "scale"),
    [([3.0, -70.0], 128.0), ([64.0], 64.0), ([0.01], 2.0**-6), ([0.0], 1.0), ([], 1.0), ([np.inf], 1.0)],
)
def test_attributions_of_numbers_are_scaled_by_a_power_of_two(answers: list[float], scale: float) -> None:
    assert explain.attribution_scale(np.array(answers), classifier=False) == scale
    assert explain.attribution_scale(np.array(answers), classifier=True) == 1.0
