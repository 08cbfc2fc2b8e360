"""Which features an answer hangs on: occlusion against the reference medians.

The attribution of a feature is the answer less the answer with the reference median in that feature's place, all else as it
was. The answer is a number: of a classifier the probability of the class that it predicts for the row as it is, else the
first number of the first numeric output. Of a linear model ``y = w x + b`` the attribution of feature i is exactly
``w_i (x_i - median_i)``. Only features with a median in the manifest (``explanations.medians``) are explained.

All features of a row, and several rows, are one run of the model where its batch may vary; else each is a run of its own. A
model that keeps state between requests has no answer that could be asked again, and is not explained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from skerry_contract import manifest as mf

from skerry_runtime.runner import Runner
from skerry_runtime.tensors import Array, Tensors


class NotExplainable(Exception):
    """The model cannot be explained; the message says why."""


class Explanation(NamedTuple):
    """Of one row.

    Attributes:
        output: name of the output; column: of it, the predicted class for a classifier.
        value: the answer; attributions: by feature, in the order of ``Occluder.features``.
    """

    output: str
    column: int
    value: float
    attributions: npt.NDArray[np.float64]


class Occluder:
    """Explains rows of one model.

    Attributes:
        features: names, in the manifest's order, of those that have a median.
        scale: what attributions are quantized by, see ``attribution_scale``.
        batched: whether all features of a row, and several rows, are one run.
    """

    def __init__(self, manifest: mf.Manifest, infer: Callable[[Tensors], Tensors], *, batched: bool) -> None:
        """Args:
            infer: raw inputs to outputs, both by name.

        Raises:
            NotExplainable: no medians, no number in the answer, or state between requests.
        """
        medians = manifest.explanations.medians
        if not medians:
            raise NotExplainable("the manifest names no explanations.medians")
        if manifest.streams is not None:
            raise NotExplainable("the model keeps state between requests")
        numbers = [t for t in manifest.outputs if t.datatype.startswith("FP")]
        if not numbers:
            raise NotExplainable("the model answers no number")
        self._watched = tuple(f for f in manifest.features if f.name in medians)
        shapes = {t.name: t.shape for t in manifest.inputs}
        flat = all(
            len(shapes[f.input]) in (1, 2) and (len(shapes[f.input]) == 2 or not f.column) for f in self._watched
        )
        if not flat:
            raise NotExplainable("wanted features in inputs of one row each, of one or two dimensions")
        self.features = tuple(f.name for f in self._watched)
        self._medians = medians
        self._output = next((t for t in numbers if t.labels), numbers[0])
        self._infer = infer
        self.batched = batched
        self.scale = 1.0

    def explain(self, inputs: Tensors) -> Explanation:
        """Explains one row.

        Args:
            inputs: raw, as the application sends them; every first dimension is 1.

        Raises:
            BadInput, EngineFailed: as the model's own inference.
        """
        return self.explain_rows(inputs)[0]

    def explain_rows(self, inputs: Tensors) -> list[Explanation]:
        """Explains rows, of a model that is ``batched`` all in one run.

        Args:
            inputs: raw; every first dimension is the number of rows, 1 where the model is not ``batched``.

        Raises:
            BadInput, EngineFailed: as the model's own inference; also where only one of the rows is at fault.
        """
        values = self._batch(inputs) if self.batched else self._one_by_one(inputs)
        return [self._told(row) for row in values.reshape(-1, 1 + len(self._watched), values.shape[1])]

    def explain_each(self, inputs: Tensors) -> list[Explanation | Exception]:
        """``explain_rows``, where a row that the model refuses takes no other along: it has its error in its place."""
        try:
            return list(self.explain_rows(inputs))
        except Exception as error:
            rows = len(next(iter(inputs.values())))
            if rows == 1:
                return [error]
        return [one for i in range(rows) for one in self.explain_each({k: v[i : i + 1] for k, v in inputs.items()})]

    def _told(self, values: npt.NDArray[np.float64]) -> Explanation:
        column = int(values[0].argmax()) if self._output.labels else 0
        answers = values[:, column]
        return Explanation(self._output.name, column, float(answers[0]), answers[0] - answers[1:])

    def _batch(self, inputs: Tensors) -> npt.NDArray[np.float64]:
        step = 1 + len(self._watched)
        feeds = {name: np.repeat(array, step, axis=0) for name, array in inputs.items()}
        for i, feature in enumerate(self._watched, 1):
            _put(feeds[feature.input], slice(i, None, step), feature.column, self._medians[feature.name])
        return self._numbers(self._infer(feeds))

    def _one_by_one(self, inputs: Tensors) -> npt.NDArray[np.float64]:
        found = [self._numbers(self._infer(inputs))]
        for feature in self._watched:
            changed = inputs[feature.input].copy()
            _put(changed, slice(None), feature.column, self._medians[feature.name])
            found.append(self._numbers(self._infer({**inputs, feature.input: changed})))
        return np.concatenate(found)

    def _numbers(self, outputs: Tensors) -> npt.NDArray[np.float64]:
        array = np.asarray(outputs[self._output.name], np.float64)
        return array.reshape(len(array), -1)


def occluder_of(runner: Runner) -> Occluder:
    """For a loaded variant. Raises ``NotExplainable``."""
    manifest = runner.bundle.manifest
    # An interpreter of TFLite would be resized to and fro, at the next answer's cost.
    batched = runner.variant.runtime == "onnx" and all(t.shape[:1] == (-1,) for t in manifest.inputs)
    infer = runner.infer
    return Occluder(manifest, lambda inputs: infer(inputs).outputs, batched=batched)


def attribution_scale(occluder_output: Array | None, *, classifier: bool) -> float:
    """What attributions are divided by before they are quantized to 2**-12: 1 for probabilities.

    Else the smallest power of two that is no less than any of the golden cases' answers: the same for every device that runs
    the variant, so that sums merge exactly.

    >>> attribution_scale(np.array([3.0, -70.0]), classifier=False)
    128.0
    """
    if classifier or occluder_output is None or not occluder_output.size:
        return 1.0
    largest = float(np.nanmax(np.abs(occluder_output.astype(np.float64)), initial=0.0))
    return float(2.0 ** np.ceil(np.log2(largest))) if 0 < largest < np.inf else 1.0


def _put(array: Array, rows: slice, column: int, value: float) -> None:
    # A datatype of integers has its nearest.
    number = round(value) if array.dtype.kind in "iu" else value
    if array.ndim == 1:
        array[rows] = number
    else:
        array[rows, column] = number
