"""Golden cases replayed on the runtime and CPU that will serve, before anything is served.

Two questions, and both must be answered well. Does this runtime give what the bundle's maker got (int8 kernels differ
between CPUs and runtimes)? And does the model still know its classes: plain agreement hides a model that always says no,
because most cases are no. So outputs are compared case by case within a tolerance, labelled cases are scored per class, and
a classifier that says one class to cases of several is refused even when the bundle asks for no recall at all.

The format of a case stands in ``skerry_contract.manifest.Golden``.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from skerry_contract import manifest as mf

from skerry_runtime.bundle import Bundle
from skerry_runtime.errors import BadInput, Degraded, EngineFailed, Rejected
from skerry_runtime.runner import Runner
from skerry_runtime.tensors import DTYPES, Array, Tensors, datatype_of, from_json

MAX_BYTES = 64 << 20
MAX_CASES = 10_000
_REPORTED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One golden case: what goes in, what must come out, and the true class when it is known."""

    line: int
    inputs: Tensors
    outputs: Tensors
    label: str | None


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong in one case. ``line`` is the case's line in the file, from 1; 0 when it is about all of them."""

    line: int
    output: str = ""
    detail: str


class Proof(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The result of a replay.

    Attributes:
        cases: how many were replayed; passed: how many gave what they should.
        max_abs_diff: largest absolute difference of a number in any case, among finite ones.
        recall: per class label, the share of labelled cases predicted right.
        failures: the first ten; failed: how many there were in all, cases and rules.
    """

    cases: int
    passed: int
    max_abs_diff: float
    recall: dict[str, float] = {}
    failures: tuple[Failure, ...] = ()
    failed: int = 0

    @property
    def ok(self) -> bool:
        """Whether the variant has proved itself."""
        return self.cases > 0 and self.failed == 0

    @property
    def detail(self) -> str:
        """One line on why not; empty when ok."""
        if self.ok:
            return ""
        first = self.failures[0] if self.failures else Failure(line=0, detail="no golden case")
        place = f"case {first.line}{', ' + first.output if first.output else ''}: " if first.line else ""
        return f"{place}{first.detail} ({self.passed} of {self.cases} cases passed, {self.failed} failures)"


def read_cases(bundle: Bundle, variant: mf.Variant) -> tuple[Case, ...]:
    """Reads and checks a variant's golden cases.

    Raises:
        Rejected: ``golden_failed`` when the file is no JSON lines of cases, or holds none; ``hash_mismatch``.
    """
    data = bundle.read(variant.golden.cases, max_bytes=MAX_BYTES)
    lines = [(i, line) for i, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if not 0 < len(lines) <= MAX_CASES:
        raise Rejected("golden_failed", f"{variant.golden.cases}: wanted 1 to {MAX_CASES} cases, got {len(lines)}")
    return tuple(_read_case(f"{variant.golden.cases} line {i}", i, line) for i, line in lines)


def prove(runner: Runner) -> Proof:
    """Replays the golden cases of the runner's variant.

    Raises:
        Rejected: ``golden_failed`` when the cases themselves cannot be read. A case that fails is a value, not an exception.
        Degraded: ``out_of_memory``, which says nothing about the model's answers.
    """
    cases = read_cases(runner.bundle, runner.variant)
    golden = runner.variant.golden
    failures: list[Failure] = []
    passed = 0
    widest = 0.0
    # Cases of a stateful model are one sequence, from zeros.
    infer = runner.steady()
    truths: list[str] = []
    predictions: list[str | None] = []
    for case in cases:
        try:
            found = infer(case.inputs).outputs
        except (BadInput, EngineFailed) as error:
            if error.code == "out_of_memory":
                raise Degraded("out_of_memory", f"golden case {case.line}: {error}") from None
            failures.append(Failure(line=case.line, detail=str(error)))
            if case.label is not None:
                truths.append(case.label)
                predictions.append(None)
            continue
        before = len(failures)
        for name, wanted in case.outputs.items():
            if name not in found:
                failures.append(Failure(line=case.line, output=name, detail="the model has no such output"))
                continue
            detail, difference = _compare(found[name], wanted, golden.tolerance)
            widest = max(widest, difference)
            if detail:
                failures.append(Failure(line=case.line, output=name, detail=detail))
        passed += len(failures) == before
        if case.label is not None:
            truths.append(case.label)
            predictions.append(_predicted(runner.bundle.manifest, found))
    recall, rules = _score(truths, predictions, golden.minimum_recall)
    failures += rules
    return Proof(
        cases=len(cases),
        passed=passed,
        max_abs_diff=widest,
        recall=recall,
        failures=tuple(failures[:_REPORTED]),
        failed=len(failures),
    )


def prove_batch(runner: Runner, *, at_most: int = 16) -> str:
    """Replays golden cases of one row as one batch: a row's answer must not depend on the rows beside it.

    Returns:
        What differs; empty when nothing does, when the model takes one row at a time, or when rows go on from each other.

    Raises:
        BadInput, EngineFailed: the model does not take the batch that its manifest allows.
    """
    manifest = runner.bundle.manifest
    tensors = (*manifest.inputs, *manifest.outputs)
    # Rows of a stream do depend on those before them.
    if runner.streams is not None or not all(tensor.shape and tensor.shape[0] == -1 for tensor in tensors):
        return ""
    cases = [c for c in read_cases(runner.bundle, runner.variant) if {len(a) for a in c.inputs.values()} == {1}][
        :at_most
    ]
    first = cases[0] if cases else None
    cases = [c for c in cases if first and _shapes(c) == _shapes(first)]
    if len(cases) < 2 or first is None:
        return ""
    batch = {name: np.concatenate([c.inputs[name] for c in cases]) for name in first.inputs}
    found = runner.infer(batch).outputs
    for name in first.outputs:
        wanted = np.concatenate([c.outputs[name] for c in cases])
        detail, _ = _compare(found[name], wanted, runner.variant.golden.tolerance)
        if detail:
            return f"{len(cases)} golden cases as one batch, {name}{detail}"
    return ""


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for part in (case.inputs, case.outputs) for name, array in part.items()}


def _read_case(where: str, line: int, text: bytes) -> Case:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected("golden_failed", f"{where}: wanted JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("label"), (str, type(None))):
        raise Rejected("golden_failed", f"{where}: wanted an object with inputs, outputs and perhaps a label as text")
    inputs, outputs = _read_tensors(where, value, "inputs"), _read_tensors(where, value, "outputs")
    if not outputs and value.get("label") is None:
        raise Rejected("golden_failed", f"{where}: wanted outputs or a label to compare with")
    return Case(line=line, inputs=inputs, outputs=outputs, label=value.get("label"))


def _read_tensors(where: str, value: dict[str, Any], kind: str) -> Tensors:
    items = value.get(kind, [])
    if not isinstance(items, list):
        raise Rejected("golden_failed", f"{where}: wanted a list of {kind}")
    found: Tensors = {}
    for item in items:
        try:
            name = item["name"]
            found[name] = from_json(str(name), item["datatype"], item["shape"], item["data"])
        except (KeyError, TypeError) as error:
            raise Rejected("golden_failed", f"{where}: {kind} want name, datatype, shape, data: {error}") from None
        except BadInput as error:
            raise Rejected("golden_failed", f"{where}: {error}") from None
    return found


def _compare(found: Array, wanted: Array, tolerance: dict[str, float]) -> tuple[str, float]:
    """What differs, or an empty text; and the largest finite difference."""
    got_type, wanted_type = datatype_of(found), datatype_of(wanted)
    if got_type != wanted_type:
        return f"wanted {wanted_type}, got {got_type}", 0.0
    if found.shape != wanted.shape:
        return f"wanted shape {list(wanted.shape)}, got {list(found.shape)}", 0.0
    if DTYPES[got_type].kind not in "fiu":
        same = [_text(a) == _text(b) for a, b in zip(found.ravel().tolist(), wanted.ravel().tolist(), strict=True)]
        if all(same):
            return "", 0.0
        at = same.index(False)
        return f"[{at}]: wanted {_text(wanted.ravel()[at])!r}, got {_text(found.ravel()[at])!r}", 0.0
    allowed = tolerance.get(got_type, 0.0)
    if DTYPES[got_type].kind in "iu":
        differences = np.array(
            [abs(a - b) for a, b in zip(found.ravel().tolist(), wanted.ravel().tolist(), strict=True)]
        )
    else:
        a, b = found.ravel().astype(np.float64), wanted.ravel().astype(np.float64)
        with np.errstate(invalid="ignore"):
            differences = np.abs(a - b)
        differences[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0  # inf - inf is NaN, and equal all the same
        differences[np.isnan(differences)] = math.inf
    if not differences.size:
        return "", 0.0
    at = int(differences.argmax())
    worst = float(differences[at])
    finite = differences[np.isfinite(differences.astype(np.float64))]
    widest = float(finite.max()) if finite.size else 0.0
    if worst <= allowed:
        return "", widest
    return f"[{at}]: wanted {wanted.ravel()[at]} within {allowed}, got {found.ravel()[at]}", widest


def _text(value: object) -> object:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _predicted(manifest: mf.Manifest, outputs: Tensors) -> str | None:
    """The class a one-row answer names: by the output with labels, else by the only BYTES output."""
    for tensor in manifest.outputs:
        array = outputs[tensor.name]
        if tensor.labels and array.size == len(tensor.labels) and not np.isnan(array).any():
            return tensor.labels[int(array.ravel().argmax())]
    texts = [outputs[t.name] for t in manifest.outputs if t.datatype == "BYTES"]
    if len(texts) == 1 and texts[0].size == 1:
        return str(_text(texts[0].ravel()[0]))
    return None


def _score(
    truths: list[str], predictions: list[str | None], minimum: dict[str, float]
) -> tuple[dict[str, float], list[Failure]]:
    totals = Counter(truths)
    right = Counter(truth for truth, said in zip(truths, predictions, strict=True) if truth == said)
    recall = {label: right[label] / totals[label] for label in sorted(totals)}
    failures = []
    for label, wanted in sorted(minimum.items()):
        if label not in recall:
            failures.append(Failure(line=0, detail=f"class {label!r} has a minimum recall and no labelled case"))
        elif recall[label] < wanted:
            failures.append(Failure(line=0, detail=f"recall of {label!r}: wanted {wanted}, got {recall[label]:.3f}"))
    said = set(predictions)
    if len(totals) > 1 and len(said) == 1 and None not in said:
        failures.append(Failure(line=0, detail=f"says {said.pop()!r} to cases of {len(totals)} classes"))
    elif None in said:
        failures.append(
            Failure(line=0, detail="labelled cases, but no answer names a class (label the output's columns)")
        )
    return recall, failures
