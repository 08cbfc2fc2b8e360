"""What can go wrong with a bundle or its runtime, grouped by what the caller does next.

``Rejected``: the bundle is wrong; report it, never try again. ``Degraded``: this machine is short of something; another one,
or this one later, may do better. ``BadInput``: the request is wrong, answer 400. ``EngineFailed``: the runtime failed on an
admissible request, answer 500. Each has a stable ``code`` and an ``advice`` for the person who reads it.
"""

from __future__ import annotations

from typing import NamedTuple

ADVICE = {
    "malformed_manifest": "build the bundle again with `skerry bundle build`; never edit manifest.json by hand",
    "hash_mismatch": "the file differs from the one that was listed: fetch or build the bundle again",
    "size_mismatch": "the file is cut short or padded: fetch or build the bundle again",
    "file_missing": "the bundle is incomplete: fetch or build it again",
    "file_unlisted": "remove the file, or list it in the manifest and build again",
    "not_a_file": "a bundle holds regular files and folders only: no links, devices or sockets",
    "no_variant": "add a variant for this architecture and runtime",
    "model_damaged": "export the model again and check that it loads before building the bundle",
    "operator_unknown": "export for an opset this runtime knows, or raise the variant's `min`",
    "runtime_missing": "install the extra of the runtime, e.g. skerry-runtime[onnx]",
    "runtime_crashed": "the runtime died on this model: export it differently, or use another runtime version",
    "golden_failed": "compare the golden cases with this runtime and CPU; int8 kernels differ between CPUs",
    "not_quantized": "quantize statically to int8 (ONNX: QDQ) with the scaling kept outside the graph as a transform",
    "needs_understated": "state what the variant needs on a device in `needs`, with room to spare",
    "out_of_memory": "the model needs more memory than this process may use",
    "timeout": "the model loads or runs too slowly for this machine",
    "bad_signature": "the signature is of another key, or the files changed after signing",
    "transform_invalid": "correct the step in the manifest's transforms",
}


class Violation(NamedTuple):
    """What does not fit: a field (a tensor's name, or a place in it), what it got and what it wanted.

    ``kind`` is one of the contract's ``GUARD_KINDS`` where a guard of the manifest refused a value, else empty.

    >>> str(Violation("x", "FP64", "FP32"))
    'x: wanted FP32, got FP64'
    """

    field: str
    got: str
    wanted: str
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.field}: wanted {self.wanted}, got {self.got}"


class BundleFault(Exception):
    """Something is wrong with a bundle or with what runs it.

    Attributes:
        code: stable, from the vocabulary of update reasons.
        detail: what, where, and what was expected.
    """

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{code}: {detail}")

    @property
    def advice(self) -> str:
        """What a person can do about it; empty when there is nothing general to say."""
        return ADVICE.get(self.code, "")


class Rejected(BundleFault):
    """The bundle is wrong wherever it goes."""


class Degraded(BundleFault):
    """This machine lacks something: a runtime, memory, time."""


class EngineFailed(BundleFault):
    """The runtime failed while it answered an admissible request."""


class BadInput(ValueError):
    """The caller's tensors do not fit the model.

    Attributes:
        violation: which field, what it got and what it wanted.
    """

    code = "bad_input"

    def __init__(self, violation: Violation) -> None:
        self.violation = violation
        super().__init__(str(violation))
