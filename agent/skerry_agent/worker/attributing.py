"""What one answer hangs on, for who asked it: the model's explanation in the words of an answer, without personal data.

Made on first use and kept: most models are never asked. Who computes it, and when, is the caller's: with the answer
(``parameters.explain``), beside the answering (``explaining``), or in the application's process (the SDK).
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from skerry_contract import manifest as m
from skerry_runtime import explain, proof
from skerry_runtime.errors import BadInput, Violation
from skerry_runtime.runner import Runner
from skerry_runtime.tensors import Tensors

FIELD = "parameters.explain"


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """Attributions by feature, of ``value``, which is what ``output`` says (of the class ``label``); ``withheld``: features that are
    personal data.
    """

    output: str
    value: float
    attributions: dict[str, float]
    label: str = ""
    withheld: tuple[str, ...] = ()


class Attributing:
    """Explains answers of one loaded variant."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._made: explain.Occluder | explain.NotExplainable | None = None

    @property
    def occluder(self) -> explain.Occluder:
        """Raises ``NotExplainable``, always for the same reason."""
        found = self._made
        if found is None:
            try:
                found = _occluder(self._runner)
            except explain.NotExplainable as error:
                found = error
            self._made = found
        if isinstance(found, explain.NotExplainable):
            raise found
        return found

    def wanted(self, wish: Any, inputs: Tensors, name: str, field: str = FIELD) -> explain.Occluder | None:
        """What explains a request for these raw inputs, where it wishes so; None where it does not.

        Raises:
            BadInput: a wish that is neither true nor false, several rows, or a model that cannot be explained.
        """
        if not isinstance(wish, bool):
            raise BadInput(Violation(field, repr(wish)[:80], "true or false"))
        if not wish:
            return None
        try:
            occluder = self.occluder
        except explain.NotExplainable as error:
            raise BadInput(
                Violation(field, "true", f"a model that can be explained, and {name} cannot: {error}")
            ) from None
        for given, array in inputs.items():
            if array.shape[:1] != (1,):
                raise BadInput(Violation(field, f"{given} of shape {list(array.shape)}", "a request of one row"))
        return occluder

    def tell(self, found: explain.Explanation) -> Told:
        """An explanation in the words of an answer."""
        manifest = self._runner.bundle.manifest
        attributions, withheld = open_part(manifest, self.occluder, found)
        labels = next(t.labels for t in manifest.outputs if t.name == found.output)
        label = labels[found.column] if labels else ""
        return Told(found.output, found.value, attributions, label, withheld)


def open_part(
    manifest: m.Manifest, occluder: explain.Occluder, found: explain.Explanation
) -> tuple[dict[str, float], tuple[str, ...]]:
    """(attributions of features that are no personal data, names of the others)."""
    personal = {f.name for f in manifest.features if f.pii}
    pairs: list[tuple[str, Any]] = list(zip(occluder.features, found.attributions.tolist(), strict=True))
    shown = {name: value for name, value in pairs if name not in personal}
    return shown, tuple(name for name, _ in pairs if name in personal)


def _occluder(runner: Runner) -> explain.Occluder:
    occluder = explain.occluder_of(runner)
    outputs = runner.bundle.manifest.outputs
    if not any(t.labels for t in outputs):
        name = next(t.name for t in outputs if t.datatype.startswith("FP"))
        cases = proof.read_cases(runner.bundle, runner.variant)
        answers = [case.outputs[name].ravel()[:1] for case in cases if name in case.outputs]
        occluder.scale = explain.attribution_scale(np.concatenate(answers) if answers else None, classifier=False)
    return occluder
