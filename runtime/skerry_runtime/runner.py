"""One loaded variant of a bundle: guard, policies, steps before, engine, steps after.

``load`` works out everything that does not depend on the request, and refuses a bundle whose parts do not fit together
(names, datatypes, widths through every step). ``infer`` then only computes. Of its own it adds about a microsecond to the
runtime's call; steps cost what they compute. A bundle with policies or streams takes a longer way; one without pays nothing
for theirs.

Leaves to others: counting (the worker's recorder), batching, timeouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import NamedTuple, NoReturn

from skerry_contract import manifest as mf

from skerry_runtime import transforms
from skerry_runtime.acceleration import CPU, Acceleration
from skerry_runtime.bundle import Bundle
from skerry_runtime.engines import load_engine
from skerry_runtime.engines.base import Engine
from skerry_runtime.errors import BadInput, EngineFailed, Rejected, Violation
from skerry_runtime.guards import Check, Guard
from skerry_runtime.policies import Policies
from skerry_runtime.streams import States
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
        policies: what strange values do to a request; None when the manifest asks for nothing.
        fallback: why it runs on less than was wished for; empty when it does not.
        streams: the manifest's, when an inference depends on those before it; else None.
        infer: takes inputs by name (raw, as the application sees them), gives an ``Inference``. Raises ``BadInput`` for what
            the guard or a policy refuses (and for what the fallback model should answer: there is none in here),
            ``EngineFailed`` when a step or the runtime fails. May be called from several threads. With ``streams`` each
            call is a stream of its own, from zeros.
        compute: the same for inputs that ``policies.judge`` has passed: nothing is looked at again.
    """

    infer: Callable[[Tensors], Inference]
    compute: Callable[[Tensors], Inference]

    def __init__(self, bundle: Bundle, variant: mf.Variant, engine: Engine, *, strict_ranges: bool = False) -> None:
        """Puts the parts together. Raises ``Rejected`` (``transform_invalid``, ``malformed_manifest``) when they do not fit."""
        manifest = bundle.manifest
        self.bundle = bundle
        self.variant = variant
        self.engine = engine
        self.guard = Guard(manifest.inputs, manifest.features, strict_ranges=strict_ranges)
        self.streams = manifest.streams
        self.fallback = engine.fallback
        raw = [Spec(t.name, t.datatype, t.shape) for t in manifest.inputs]
        pre = transforms.compile_steps(manifest.transforms.pre, raw, where="transforms.pre")
        post = self._compile_post(pre)
        sources = {step.source for step in post.steps} | {tensor.name for tensor in manifest.outputs}
        self._parts = _Parts(
            pre=pre,
            post=post,
            names=tuple(spec.name for spec in engine.outputs if spec.name in sources),
            feeds=tuple(spec.name for spec in engine.inputs if spec.name not in self._state_inputs),
            answers=tuple(tensor.name for tensor in manifest.outputs),
        )
        policies = self._policies = Policies(manifest.inputs, manifest.features, self.guard.check)
        self.policies = policies if policies.any else None
        if self.streams is not None:
            self.compute = self._alone
            self.infer = _guarded(policies, self.compute)
            return
        run = engine.prepare(self._parts.names)
        plain = not pre.steps and not post.steps and set(self._parts.feeds) == {t.name for t in manifest.inputs}

        def assemble(check: Check) -> Callable[[Tensors], Inference]:
            if plain:
                return _bare(check, run, self._parts.names)
            source = _chain_from(self._parts)
            return _stepped(check, run, self._parts) if source is None else _chained(check, run, self._parts, source)

        self.compute = assemble(_passed)
        self.infer = _guarded(policies, self.compute) if policies.always else assemble(self.guard.check)

    def begin_stream(self) -> Callable[[Tensors], Inference]:
        """An inference like ``compute`` that begins a stream: each call goes on where the last that succeeded left off.

        Raises:
            ValueError: the manifest has no streams.
            Rejected, Degraded: as ``load``, where each stream has an interpreter.
        """
        if self.streams is None:
            raise ValueError(f"{self.bundle.manifest.model}: the manifest has no streams")
        engine = self.engine
        if self.streams.internal:
            engine = self.engine.again()
        names = (*self._parts.names, *(state.output for state in self.streams.states))
        return _streamed(engine.prepare(names), names, self._parts, States(self.streams.states))

    def _alone(self, inputs: Tensors) -> Inference:
        return self.begin_stream()(inputs)

    def steady(self) -> Callable[[Tensors], Inference]:
        """What requests usually run, for proof and timing: one stream where there are streams, else ``infer``."""
        if self.streams is None:
            return self.infer
        return _guarded(self._policies, self.begin_stream())

    @property
    def _state_inputs(self) -> frozenset[str]:
        return frozenset(state.input for state in self.streams.states) if self.streams else frozenset()

    def _compile_post(self, pre: transforms.Steps) -> transforms.Steps:
        """The steps after the model, everything held against everything. Raises ``Rejected``."""
        manifest, engine, file = self.bundle.manifest, self.engine, self.variant.model
        states = manifest.streams.states if manifest.streams else ()
        for state in states:
            for name, specs, what in ((state.input, engine.inputs, "input"), (state.output, engine.outputs, "output")):
                found = next((spec for spec in specs if spec.name == name), None)
                _require_fit(found, Spec(name, state.datatype, state.shape), f"state {what} of {file}")
            if state.input in pre.after:
                raise Rejected("malformed_manifest", f"streams.states: {state.input} is no state, requests bring it")
        if manifest.streams is not None and manifest.streams.internal and engine.runtime == "onnx":
            raise Rejected(
                "malformed_manifest", "streams.internal: onnx keeps nothing between runs: wanted streams.states"
            )
        for wanted in engine.inputs:
            if wanted.name not in self._state_inputs:
                _require_fit(pre.after.get(wanted.name), wanted, f"input of {file}")
        handed_on = {state.output for state in states}
        given = [spec for spec in engine.outputs if spec.name not in handed_on]
        post = transforms.compile_steps(manifest.transforms.post, given, where="transforms.post")
        for tensor in manifest.outputs:
            _require_fit(
                post.after.get(tensor.name), Spec(tensor.name, tensor.datatype, tensor.shape), "output in the manifest"
            )
        if manifest.streams is None and (pre.windows or post.windows):
            raise Rejected(
                "transform_invalid", "lag and rolling look back over a stream: wanted streams in the manifest"
            )
        return post


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What a request goes through: steps, ``names`` of the engine's outputs they read, what it feeds, what is answered."""

    pre: transforms.Steps
    post: transforms.Steps
    names: tuple[str, ...]
    feeds: tuple[str, ...]
    answers: tuple[str, ...]


def load(
    bundle: Bundle, variant: mf.Variant | str, *, acceleration: Acceleration = CPU, strict_ranges: bool = False
) -> Runner:
    """Loads a variant of an opened bundle.

    Args:
        bundle: opened and checked.
        variant: itself or its id.
        acceleration: what it should run on.
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
    engine = load_engine(variant.runtime, bundle.path(variant.model), acceleration=acceleration, minimum=variant.min)
    return Runner(bundle, variant, engine, strict_ranges=strict_ranges)


def _passed(_tensors: Tensors) -> Violation | None:
    """A check of what was checked before."""
    return None


def _guarded(policies: Policies, compute: Callable[[Tensors], Inference]) -> Callable[[Tensors], Inference]:
    judge = policies.judge

    def infer(inputs: Tensors) -> Inference:
        judged = judge(inputs)
        if judged.fallback is not None:
            raise BadInput(judged.fallback)
        return compute(judged.inputs)

    return infer


def _bare(
    check: Check, run: Callable[[Tensors], Sequence[Array]], names: tuple[str, ...]
) -> Callable[[Tensors], Inference]:
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


def _chain_from(parts: _Parts) -> str | None:
    """The input from which each step goes on with what the one before gave, until there is all that the engine wants; None for others."""
    if len(parts.feeds) != 1 or len(parts.names) != 1:
        return None
    wanted = parts.feeds[0]
    for step in reversed(parts.pre.steps):
        if step.target != wanted:
            return None
        wanted = step.source
    return wanted


def _chained(
    check: Check, run: Callable[[Tensors], Sequence[Array]], parts: _Parts, source: str
) -> Callable[[Tensors], Inference]:
    """As ``_stepped``, for the commonest steps: of a request little more than the functions themselves is run."""
    before, after = tuple(step.function for step in parts.pre.steps), parts.post.steps
    (name,), (feed,), answers = parts.names, parts.feeds, parts.answers
    new, kind = tuple.__new__, Inference
    exact_answers = {name, *(step.target for step in after)} == set(answers)

    def infer(inputs: Tensors) -> Inference:
        violation = check(inputs)
        if violation is not None:
            raise BadInput(violation)
        start = perf_counter_ns()
        array = inputs[source]
        try:
            for function in before:
                array = function(array)
        except Exception as error:
            _raise_step_fault("before", error)
        ready = perf_counter_ns()
        (found,) = run({feed: array})
        done = perf_counter_ns()
        outputs = {name: found}
        try:
            for function, read, target in after:
                outputs[target] = function(outputs[read])
        except Exception as error:
            _raise_step_fault("after", error)
        if not exact_answers:
            outputs = {answer: outputs[answer] for answer in answers}
        return new(kind, (outputs, ready - start + perf_counter_ns() - done, done - ready))

    return infer


def _stepped(check: Check, run: Callable[[Tensors], Sequence[Array]], parts: _Parts) -> Callable[[Tensors], Inference]:
    before, after = parts.pre.steps, parts.post.steps
    names, feeds, answers = parts.names, parts.feeds, parts.answers
    new, kind = tuple.__new__, Inference
    # Only rename or pick when there is something to pick: building a dict costs as much as a step.
    exact_feeds = set(parts.pre.after) == set(feeds)
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


def _streamed(
    run: Callable[[Tensors], Sequence[Array]], names: tuple[str, ...], parts: _Parts, states: States
) -> Callable[[Tensors], Inference]:
    pre, post, feeds, answers = parts.pre, parts.post, parts.feeds, parts.answers
    before, after = pre.begin(), post.begin()

    def infer(inputs: Tensors) -> Inference:
        nonlocal before, after
        start = perf_counter_ns()
        tensors = inputs.copy()
        try:
            next_before = pre.run_on(tensors, before)
        except Exception as error:
            _raise_step_fault("before", error)
        fed = {name: tensors[name] for name in feeds}
        fed.update(states.now)
        ready = perf_counter_ns()
        found = run(fed)
        done = perf_counter_ns()
        outputs = dict(zip(names, found, strict=True))
        next_states = states.take(outputs)
        try:
            next_after = post.run_on(outputs, after)
        except Exception as error:
            _raise_step_fault("after", error)
        # Only now, when nothing can fail any more: what failed can be sent again.
        before, after, states.now = next_before, next_after, next_states
        return Inference(
            {name: outputs[name] for name in answers}, ready - start + perf_counter_ns() - done, done - ready
        )

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
