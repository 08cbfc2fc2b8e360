"""A loaded and proved model of a generation, and what its requests need to know."""

from __future__ import annotations

from time import monotonic, perf_counter_ns

from skerry_contract import manifest as m
from skerry_runtime.errors import BadInput
from skerry_runtime.policies import KIND
from skerry_runtime.runner import Runner
from skerry_runtime.streams import StreamTable
from skerry_runtime.tensors import Tensors

from skerry_agent import workerwire as ww
from skerry_agent.worker.attributing import Attributing
from skerry_agent.worker.distinct import Clients
from skerry_agent.worker.expectation import Expectation
from skerry_agent.worker.intake import Takes
from skerry_agent.worker.recorder import Recorder
from skerry_agent.worker.tee import Tee


class Model:
    """A loaded and proved model with its recorder.

    Args:
        infer_us: what one golden case took.
        fell_back: it runs on the CPU although something else was wished for.

    Attributes:
        expectation: of what a request takes; expected_us: the same by rows.
        clients: counts how different the requests of each client are; None when nobody does.
        cold: starts for which requests have waited.
        tee: shows a share of the requests to a bundle in shadow; None without one.
        infer: raw inputs to an answer; compute: the same past the policies.
        streams: of a stateful model; go_on: the next inference of one of them; policies: of one whose requests are judged.
        begin_us: what it takes to begin a stream.
        special: whether every request takes the longer way (``calls``).
        kinds: bits of ``GUARD_KINDS`` that every request of the model has.
        fallback: the model that answers where a policy says so; ``no_fallback`` says why there is none; ``fallback_tensors``: what
            it must take and give where another worker may serve it, else empty.
        takes: what a request of it may hold.
        attributing: explains its answers; explain_ns: what that took for the request answered last, for its spans.
    """

    def __init__(
        self,
        name: str,
        version: str,
        manifest: m.Manifest,
        runner: Runner,
        recorder: Recorder,
        *,
        infer_us: float,
        fell_back: bool = False,
    ) -> None:
        self.name = name
        self.version = version
        self.manifest = manifest
        self.recorder = recorder
        self.runner = runner
        self.tee: Tee | None = None
        self.cold = ww.Cold()
        self.clients: Clients | None = None
        self.infer = runner.infer
        self.compute = runner.compute
        self.policies = runner.policies
        self.streams = (
            None if runner.streams is None else StreamTable(runner.streams, runner.begin_stream, clock=monotonic)
        )
        self.begin_us = _begin_us(runner) if runner.streams is not None else 0.0
        self.go_on = None if self.streams is None else self.streams.infer
        self.kinds = KIND["provider.fallback"] if fell_back else 0
        judged = self.policies is not None and self.policies.always
        self.special = judged or self.streams is not None or bool(self.kinds)
        self.fallback: Model | None = None
        self.no_fallback, self.fallback_tensors = "it is not served here", ""
        self.takes = Takes(manifest.inputs, recorder.max_rows)
        self.attributing = Attributing(runner)
        self.explain_ns = 0
        self._check = runner.guard.check
        self.platform = {"onnx": "onnx_onnxv1", "tflite": "tflite_tflite"}[runner.variant.runtime]
        self.expectation = Expectation(infer_us)
        self.expected_us = self.expectation.us

    def check(self, inputs: Tensors) -> None:
        """Raises ``BadInput`` for inputs that do not fit."""
        violation = self._check(inputs)
        if violation is not None:
            raise BadInput(violation)

    def forget_quiet(self) -> None:
        """Lets go of streams that were quiet for too long."""
        if self.streams is not None:
            self.streams.forget_quiet()


def _begin_us(runner: Runner) -> float:
    start = perf_counter_ns()
    runner.begin_stream()
    return (perf_counter_ns() - start) / 1e3
