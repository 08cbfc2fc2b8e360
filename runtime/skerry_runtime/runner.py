"""One loaded variant of a bundle: guard, steps before, engine, steps after.

``load`` works out everything that does not depend on the request, and refuses a bundle whose parts do not fit together
(names, datatypes, widths through every step). ``infer`` then only computes. Of its own it adds about a microsecond to the
runtime's call; steps cost what they compute.

Leaves to others: counting (the worker's recorder), batching, timeouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import NamedTuple, NoReturn

from skerry_contract import manifest as mf

from skerry_runtime import transforms
from skerry_runtime.bundle import Bundle
from skerry_runtime.engines import load_engine
from skerry_runtime.engines.base import Engine
from skerry_runtime.errors import BadInput, EngineFailed, Rejected
from skerry_runtime.guards import Guard
from skerry_runtime.tensors import Array, Spec, Tensors


class Inference(NamedTuple):
    """The answer to one request.

    Attributes:
        outputs: by name, as the manifest declares them.
        transform_ns: time in the steps before and after the model.
        infer_ns: time in the runtime.
    """

    outputs: Tensors
    transform_ns: int
    infer_ns: int


class Runner:
    """A variant ready to answer.

    Attributes:
        bundle, variant, engine: what it runs.
        guard: the rules of its inputs; ``guard.outside`` counts values outside their range.
        infer: takes inputs by name (raw, as the application sees them), gives an ``Inference``. Raises ``BadInput`` for what
            the guard refuses, ``EngineFailed`` when a step or the runtime fails. May be called from several threads.
    """

    infer: Callable[[Tensors], Inference]

    def __init__(self, bundle: Bundle, variant: mf.Variant, engine: Engine, *, strict_ranges: bool = False) -> None:
        """Puts the parts together. Raises ``Rejected`` (``transform_invalid``, ``malformed_manifest``) when they do not fit."""
        manifest = bundle.manifest
        self.bundle = bundle
        self.variant = variant
        self.engine = engine
        self.guard = Guard(manifest.inputs, manifest.features, strict_ranges=strict_ranges)
        raw = [Spec(t.name, t.datatype, t.shape) for t in manifest.inputs]
        pre = transforms.compile_steps(manifest.transforms.pre, raw, where="transforms.pre")
        for wanted in engine.inputs:
            _require_fit(pre.after.get(wanted.name), wanted, f"input of {variant.model}")
        post = transforms.compile_steps(manifest.transforms.post, engine.outputs, where="transforms.post")
        for tensor in manifest.outputs:
            _require_fit(
                post.after.get(tensor.name), Spec(tensor.name, tensor.datatype, tensor.shape), "output in the manifest"
            )
        sources = {step.source for step in post.steps} | {tensor.name for tensor in manifest.outputs}
        from_engine = tuple(spec.name for spec in engine.outputs if spec.name in sources)
        run = engine.prepare(from_engine)
        feeds = tuple(spec.name for spec in engine.inputs)
        answers = tuple(tensor.name for tensor in manifest.outputs)
        if not pre.steps and not post.steps and set(feeds) == {t.name for t in manifest.inputs}:
            self.infer = _bare(self.guard, run, from_engine)
        else:
            self.infer = _stepped(self.guard, run, from_engine, pre, post, feeds, answers)


def load(bundle: Bundle, variant: mf.Variant | str, *, threads: int = 1, strict_ranges: bool = False) -> Runner:
    """Loads a variant of an opened bundle.

    Args:
        bundle: opened and checked.
        variant: itself or its id.
        threads: threads within one inference.
        strict_ranges: refuse values outside a feature's range instead of only counting them.

    Raises:
        Rejected: ``no_variant``, ``model_damaged``, ``operator_unknown``, ``transform_invalid``, ``malformed_manifest``.
        Degraded: ``runtime_missing``, ``out_of_memory``.
    """
    if isinstance(variant, str):
        try:
            variant = bundle.manifest.variant(variant)
        except KeyError:
            known = ", ".join(v.id for v in bundle.manifest.variants)
            raise Rejected("no_variant", f"wanted {variant!r}, the bundle has {known}") from None
    engine = load_engine(variant.runtime, bundle.path(variant.model), threads=threads, minimum=variant.min)
    return Runner(bundle, variant, engine, strict_ranges=strict_ranges)


def _bare(
    guard: Guard, run: Callable[[Tensors], Sequence[Array]], names: tuple[str, ...]
) -> Callable[[Tensors], Inference]:
    check = guard.check
    new, kind = tuple.__new__, Inference  # past the NamedTuple's Python-level constructor
    if len(names) == 1:
        (only,) = names

        def infer_one(inputs: Tensors) -> Inference:
            violation = check(inputs)
            if violation is not None:
                raise BadInput(violation)
            start = perf_counter_ns()
            (found,) = run(inputs)
            return new(kind, ({only: found}, 0, perf_counter_ns() - start))

        return infer_one

    def infer(inputs: Tensors) -> Inference:
        violation = check(inputs)
        if violation is not None:
            raise BadInput(violation)
        start = perf_counter_ns()
        found = run(inputs)
        return new(kind, (dict(zip(names, found, strict=True)), 0, perf_counter_ns() - start))

    return infer


def _stepped(
    guard: Guard,
    run: Callable[[Tensors], Sequence[Array]],
    names: tuple[str, ...],
    pre: transforms.Steps,
    post: transforms.Steps,
    feeds: tuple[str, ...],
    answers: tuple[str, ...],
) -> Callable[[Tensors], Inference]:
    check = guard.check
    before, after = pre.steps, post.steps
    new, kind = tuple.__new__, Inference
    # Only rename or pick when there is something to pick: building a dict costs as much as a step.
    exact_feeds = set(pre.after) == set(feeds)
    exact_answers = {*names, *(step.target for step in after)} == set(answers)

    def infer(inputs: Tensors) -> Inference:
        violation = check(inputs)
        if violation is not None:
            raise BadInput(violation)
        start = perf_counter_ns()
        tensors = inputs.copy()
        try:
            for function, source, target in before:
                tensors[target] = function(tensors[source])
        except Exception as error:
            _raise_step_fault("before", error)
        if not exact_feeds:
            tensors = {name: tensors[name] for name in feeds}
        ready = perf_counter_ns()
        found = run(tensors)
        done = perf_counter_ns()
        outputs = dict(zip(names, found))  # noqa: B905  (prepare gives as many as it was asked for)
        try:
            for function, source, target in after:
                outputs[target] = function(outputs[source])
        except Exception as error:
            _raise_step_fault("after", error)
        if not exact_answers:
            outputs = {name: outputs[name] for name in answers}
        return new(kind, (outputs, ready - start + perf_counter_ns() - done, done - ready))

    return infer


def _raise_step_fault(which: str, error: Exception) -> NoReturn:
    code = "out_of_memory" if isinstance(error, MemoryError) else "transform_failed"
    raise EngineFailed(code, f"a step {which} the model: {type(error).__name__}: {error}") from None


def _require_fit(found: Spec | None, wanted: Spec, what: str) -> None:
    if found is None:
        raise Rejected("malformed_manifest", f"{what}: nothing gives {wanted.name!r} ({wanted.datatype})")
    if found.datatype != wanted.datatype:
        raise Rejected("malformed_manifest", f"{what}: {wanted.name} wants {wanted.datatype}, {found.datatype} comes")
    shapes_meet = len(found.shape) == len(wanted.shape) and all(
        -1 in (f, w) or f == w for f, w in zip(found.shape, wanted.shape, strict=True)
    )
    if not shapes_meet:
        raise Rejected(
            "malformed_manifest", f"{what}: {wanted.name} wants shape {list(wanted.shape)}, {list(found.shape)} comes"
        )
