"""What a request asks beyond its tensors, and who answers it: ages for the guards, streams, the fallback model, explanations.

Only requests that need it come here: of a model with policies or streams, or that say how old their values are. The words of
the request (``parameters``, docs/reference/local-inference.md) become a ``Call``, which then only computes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Final

import numpy as np
from skerry_contract import manifest as m
from skerry_runtime.errors import BadInput, Violation
from skerry_runtime.policies import KIND, MOST_AGE_MS, NO_AGES, Ages
from skerry_runtime.runner import Inference
from skerry_runtime.streams import Sequence
from skerry_runtime.tensors import Tensors

from skerry_agent.worker import oip
from skerry_agent.worker import ring as r
from skerry_agent.worker.model import Model

MOST_ID_BYTES: Final = 256
"""Of a ``sequence_id`` that is text."""


class Unserved(Exception):
    """The fallback model must answer and cannot here.

    Attributes:
        why: the finding for which it must.
        kinds: bits of ``GUARD_KINDS``; age_ms: as in ``Call``.
    """

    def __init__(self, message: str, why: Violation, kinds: int, age_ms: int) -> None:
        self.why = str(why)
        self.kinds = kinds
        self.age_ms = age_ms
        super().__init__(message)


class Call:
    """One request, ready to be computed.

    Attributes:
        answerer: the model that answers: the one that was asked, or its fallback.
        run: computes; may be called in another thread.
        kinds, age_ms, flags: for the record.
        notes: parameters of the answer; complete once ``run`` is over.
        header: of the answer.
        more_us: what it should take beyond the model's usual inference.
        explain_ns: what its explanation took, once ``run`` is over; 0 without one.
    """

    __slots__ = ("age_ms", "answerer", "explain_ns", "flags", "header", "kinds", "more_us", "notes", "run")

    def __init__(self, answerer: Model, run: Callable[[], Inference], kinds: int, age_ms: int) -> None:
        self.answerer = answerer
        self.run = run
        self.kinds = kinds
        self.age_ms = age_ms
        self.flags = 0
        self.notes: dict[str, Any] = {}
        self.header = b""
        self.more_us = 0.0
        self.explain_ns = 0


def prepare(model: Model, asked: oip.InferRequest, client: str = "") -> Call:
    """Judges a request and decides who answers it.

    Args:
        client: who asks, whose streams it may go on with.

    Raises:
        BadInput: a parameter is wrong, or a policy refuses a value.
        Unserved: the fallback model must answer, and is not served here or cannot.
    """
    call = _prepared(model, asked, client)
    if asked.more is not None and "explain" in asked.more:
        _explain(call, asked.more["explain"], asked.inputs)
    return call


def _prepared(model: Model, asked: oip.InferRequest, client: str) -> Call:
    ages = ages_of(asked)
    sequence = sequence_of(asked, client)
    age_ms = ages.oldest_ms()
    policies = model.policies
    inputs, kinds = asked.inputs, model.kinds
    if policies is None:
        return _computed(model, asked, lambda: model.infer(inputs), inputs, sequence, kinds, age_ms)
    judged = policies.judge(inputs, ages)
    kinds |= judged.kinds
    if judged.fallback is not None:
        return _by_fallback(model, inputs, ages, judged.fallback, kinds)
    ready = judged.inputs
    return _computed(model, asked, lambda: model.compute(ready), ready, sequence, kinds, age_ms)


def _explain(call: Call, wish: Any, inputs: Tensors) -> None:
    """Has the answer explained with it, as ``parameters.explain`` wishes: by the model that answers."""
    model, answer = call.answerer, call.run
    attributing = model.attributing
    occluder = attributing.wanted(wish, inputs, model.name)
    if occluder is None:
        return

    def run() -> Inference:
        result = answer()
        begun = monotonic_ns()
        call.notes["explanation"] = attributing.tell(occluder.explain(inputs))
        call.explain_ns = monotonic_ns() - begun
        return result

    call.run = run
    rows = 1 + len(occluder.features)
    call.more_us += model.expected_us(rows) if occluder.batched else rows * model.expected_us(1)


def _computed(
    model: Model,
    asked: oip.InferRequest,
    run: Callable[[], Inference],
    inputs: Tensors,
    sequence: Sequence | None,
    kinds: int,
    age_ms: int,
) -> Call:
    call = Call(model, run, kinds, age_ms)
    next_of = model.go_on
    if next_of is None:
        return call
    if sequence is None:
        call.more_us = model.begin_us
        return call
    # What would be refused must be refused now: the stream is a step further afterwards.
    if model.policies is None:
        model.check(inputs)
    outputs = [tensor.name for tensor in model.manifest.outputs]
    for name, _ in asked.wanted or ():
        if name not in outputs:
            raise _bad(name, "an unknown output", f"one of {', '.join(outputs)}")

    def go_on() -> Inference:
        found: Inference
        found, begun = next_of(sequence, inputs)
        if begun:
            call.notes["sequence_begun"] = True
        return found

    call.run = go_on
    return call


def _by_fallback(model: Model, inputs: Tensors, ages: Ages, why: Violation, kinds: int) -> Call:
    other = model.fallback
    name = model.manifest.fallback
    if other is None:
        message = f"{why}; {name} should answer instead: {model.no_fallback}"
        raise Unserved(message, why, kinds, ages.oldest_ms())
    run: Callable[[], Inference]
    if other.policies is None:
        run = lambda: other.infer(inputs)  # noqa: E731
    else:
        judged = other.policies.judge(inputs, ages)
        if judged.fallback is not None:
            message = f"{why}; {name} should answer instead, and refuses {judged.fallback}"
            raise Unserved(message, why, kinds, ages.oldest_ms())
        ready = judged.inputs
        run = lambda: other.compute(ready)  # noqa: E731
    call = Call(other, run, kinds, ages.oldest_ms())
    call.flags = r.FALLBACK
    call.notes = notes_of(model, str(why))
    call.header = header_of(model)
    return call


def notes_of(model: Model, why: str) -> dict[str, Any]:
    """Parameters of an answer that the fallback of ``model`` gave."""
    return {"fallback": True, "fallback_for": model.name, "fallback_reason": why}


def header_of(model: Model) -> bytes:
    """The header line of such an answer."""
    return b"Skerry-Fallback: %b\r\n" % model.name.encode()


def link_fallbacks(models: dict[str, Model]) -> None:
    """Shows each model its fallback, where that is served beside it and takes and gives the same."""
    for model in models.values():
        wanted = model.manifest.fallback
        if not wanted:
            continue
        other = models.get(wanted)
        model.fallback, model.no_fallback = None, "it is not served here"
        if other is None:
            # Another worker may serve it (``standing_in``).
            model.fallback_tensors = tensors_of(model.manifest)
            continue
        fault = _misfit(model, other)
        if fault:
            model.no_fallback = fault
        else:
            model.fallback = other


def tensors_of(manifest: m.Manifest) -> str:
    """Names what a model takes and gives: the same for two models that can stand in for each other."""
    both = [
        sorted((t.name, t.datatype, tuple(t.shape)) for t in found) for found in (manifest.inputs, manifest.outputs)
    ]
    return hashlib.sha256(repr(both).encode()).hexdigest()[:32]


def _misfit(model: Model, other: Model) -> str:
    for kind in ("inputs", "outputs"):
        mine, its = getattr(model.manifest, kind), getattr(other.manifest, kind)
        wanted = {tensor.name: (tensor.datatype, tensor.shape) for tensor in mine}
        found = {tensor.name: (tensor.datatype, tensor.shape) for tensor in its}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                return f"its {kind[:-1]} {name} is not the same"
    return ""


def unknown_outputs(model: Model, rows: int) -> Tensors:
    """What stands in the asked model's record where another answered: no class, no confidence."""
    plan = model.recorder.plan
    return {output.name: np.full((rows, output.classes), np.nan, plan.dtype) for output in plan.outputs}


def ages_of(asked: oip.InferRequest) -> Ages:
    """How old the values are, as the request says: ``parameters.age_ms`` of it and of its inputs.

    Raises:
        BadInput: no number, negative (from the future), or as many as there are columns in no way.
    """
    whole = asked.more.get("age_ms") if asked.more is not None else None
    if whole is None and asked.ages is None:
        return NO_AGES
    inputs: dict[str, float | tuple[float, ...]] = {}
    for name, value in (asked.ages or {}).items():
        field = f"{name}.parameters.age_ms"
        if not isinstance(value, list):
            inputs[name] = _age(field, value)
            continue
        array = asked.inputs[name]
        width = array.shape[-1] if array.ndim > 1 else 1
        if len(value) != width:
            raise _bad(field, f"{len(value)} of them", f"a number, or one for each of {width} columns")
        inputs[name] = tuple(_age(f"{field}[{i}]", one) for i, one in enumerate(value))
    return Ages(None if whole is None else _age("parameters.age_ms", whole), inputs)


def sequence_of(asked: oip.InferRequest, client: str = "") -> Sequence | None:
    """The request's stream, as the protocol's sequence extension says it; None for a request of its own.

    Raises:
        BadInput: a parameter of another kind, or a start or end of no sequence.
    """
    more = asked.more
    if more is None:
        return None
    marks: dict[str, bool] = {}
    for name in ("sequence_start", "sequence_end"):
        value = more.get(name, False)
        if not isinstance(value, bool):
            raise _bad(f"parameters.{name}", value, "true or false")
        marks[name] = value
    found = more.get("sequence_id", 0)
    known = isinstance(found, str) or (isinstance(found, int) and not isinstance(found, bool))
    if not known or (isinstance(found, str) and len(found.encode("utf-8", "replace")) > MOST_ID_BYTES):
        raise _bad("parameters.sequence_id", found, f"a whole number, or text of at most {MOST_ID_BYTES} bytes")
    if isinstance(found, int) and not 0 <= found < 1 << 64:
        raise _bad("parameters.sequence_id", found, "a whole number from 0 to 2**64 - 1")
    if not found:
        # 0 and the empty text are the protocol's words for "none".
        if any(marks.values()):
            raise _bad("parameters.sequence_id", "none", "a sequence_id beside sequence_start or sequence_end")
        return None
    return Sequence(found, marks["sequence_start"], marks["sequence_end"], client)


def kind_of(error: BadInput) -> int:
    """The bit of the guard that refused; 0 when it was no policy."""
    return KIND.get(error.violation.kind, 0)


def _age(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _bad(field, value, "milliseconds")
    if not 0 <= value <= MOST_AGE_MS:
        raise _bad(field, value, f"milliseconds from 0, which is now, to {MOST_AGE_MS:.0f}")
    return float(value)


def _bad(field: str, got: Any, wanted: str) -> BadInput:
    text = str(got)
    return BadInput(Violation(field, text if len(text) <= 80 else text[:77] + "...", wanted))
