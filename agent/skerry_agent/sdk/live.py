"""What one inference needs of the bundle that answers: the bundle under its key, values on their way in, and the answer."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
from skerry_contract import window as w
from skerry_runtime.errors import BadInput, Violation
from skerry_runtime.policies import KIND, MOST_AGE_MS, Ages, Judged
from skerry_runtime.runner import Inference
from skerry_runtime.streams import Sequence
from skerry_runtime.tensors import Tensors

from skerry_agent import workerwire as ww
from skerry_agent.errors import Rejected
from skerry_agent.sdk.loading import Loaded
from skerry_agent.worker.attributing import Attributing, Told
from skerry_agent.worker.recorder import Recorder

Array = npt.NDArray[Any]


class Answer:
    """What came of one inference.

    Attributes:
        outputs: by name, as the manifest declares them.
        version, digest: of the bundle that answered.
        explanation: what it hangs on, where that was asked for.
    """

    __slots__ = ("_position", "_prefix", "digest", "explanation", "outputs", "version")

    def __init__(
        self, outputs: Mapping[str, Array], live: Live, position: int, explanation: Told | None = None
    ) -> None:
        self.outputs = outputs
        self.explanation = explanation
        self.version = live.version
        self.digest = live.digest
        self._prefix = live.prefix
        self._position = position

    @property
    def prediction_id(self) -> str:
        """For a late label: ``Model.feedback``; empty where this model's answers cannot be labelled."""
        return f"{self._prefix}{self._position:x}" if self._prefix else ""


class Live:
    """One bundle under one key."""

    __slots__ = (
        "attributing",
        "digest",
        "dtypes",
        "infer",
        "kinds",
        "loaded",
        "max_rows",
        "name",
        "other",
        "prefix",
        "recorder",
        "served",
        "special",
        "streams",
        "version",
    )

    def __init__(self, served: ww.Served, loaded: Loaded, recorder: Recorder) -> None:
        self.served = served
        self.loaded = loaded
        self.recorder = recorder
        runner = loaded.runner
        self.infer = runner.infer
        self.kinds = KIND["provider.fallback"] if runner.fallback else 0
        self.streams = None if runner.streams is None else loaded.streams
        self.special = runner.policies is not None or runner.streams is not None
        self.other = recorder.other
        self.dtypes = loaded.dtypes
        self.max_rows = recorder.max_rows
        self.attributing = Attributing(runner)
        self.name, self.version, self.digest = served.name, served.version, served.digest
        self.prefix = recorder.prediction_prefix.decode()

    def judge(self, inputs: Mapping[str, Array], ages: Ages) -> Judged:
        """What policies make of a request; without any, what the guard does."""
        runner = self.loaded.runner
        if runner.policies is not None:
            return runner.policies.judge(dict(inputs), ages)
        violation = runner.guard.check(dict(inputs))
        if violation is not None:
            raise BadInput(violation)
        return Judged(dict(inputs), 0, None)

    def special_infer(self, inputs: Tensors, stream: int | str | None, begin: bool, end: bool) -> Inference:
        """Computes what ``judge`` has passed, of a stream where one is named."""
        if stream is None:
            return self.loaded.runner.compute(inputs)
        if isinstance(stream, bool) or not isinstance(stream, int | str):
            raise BadInput(Violation("stream", type(stream).__name__, "a number or a text"))
        for field, mark in (("begin", begin), ("end", end)):
            if not isinstance(mark, bool):
                raise BadInput(Violation(field, repr(mark)[:80], "True or False"))
        if self.streams is None:
            raise BadInput(Violation("stream", repr(stream)[:80], "none: this model keeps no state"))
        found: Inference = self.streams.infer(Sequence(stream, begin, end), inputs)[0]
        return found

    def explain(self, inputs: Mapping[str, Array], wish: bool) -> Told | None:
        """What the answer to these inputs hangs on, where that is wished for.

        Raises:
            BadInput: several rows, or a model that cannot be explained.
        """
        occluder = self.attributing.wanted(wish, dict(inputs), self.name, "explain")
        return None if occluder is None else self.attributing.tell(occluder.explain(dict(inputs)))


def key_of(served: ww.Served) -> w.Key:
    """What its windows count under."""
    return w.Key(served.name, served.digest, served.variant, served.arm, served.rollout, served.stage)


def named_of(inputs: Any) -> Mapping[str, Any]:
    """Inputs by name. Raises ``BadInput`` for anything else."""
    if not isinstance(inputs, Mapping):
        raise BadInput(Violation("inputs", type(inputs).__name__, "a mapping from names of inputs to arrays"))
    return inputs


def label_of(prediction_id: Any, label: Any, row: Any) -> tuple[str | int, int | None]:
    """A label and its row, as strict as the endpoint is; whole numbers of numpy are whole numbers.

    Raises:
        Rejected: ``invalid_label``.
    """
    if not isinstance(prediction_id, str):
        raise Rejected("invalid_label", f"prediction_id: wanted a text, got {type(prediction_id).__name__}")
    if not isinstance(label, str):
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            raise Rejected("invalid_label", f"label: wanted a class by name or index, got {type(label).__name__}")
        label = int(label)
    if row is not None:
        if isinstance(row, bool) or not isinstance(row, int | np.integer):
            raise Rejected("invalid_label", f"row: wanted a whole number, got {type(row).__name__}")
        row = int(row)
    return label, row


def age_of(age_ms: float) -> float:
    """Raises ``BadInput`` for what is no age."""
    if isinstance(age_ms, bool) or not isinstance(age_ms, Real):
        raise BadInput(Violation("age_ms", type(age_ms).__name__, "a number of milliseconds"))
    if not 0 <= age_ms <= MOST_AGE_MS:
        raise BadInput(Violation("age_ms", f"{age_ms:g}", f"milliseconds from 0 to {MOST_AGE_MS:g}"))
    return float(age_ms)


def arrays_of(inputs: Mapping[str, Any], dtypes: Mapping[str, npt.DTypeLike]) -> dict[str, Array]:
    """Arrays of the manifest's datatypes, of lists too. Raises ``BadInput``."""
    found = {}
    for name, value in inputs.items():
        try:
            found[name] = value if type(value) is np.ndarray else np.asarray(value, dtypes.get(name))
        except (TypeError, ValueError, OverflowError) as error:
            raise BadInput(Violation(name, type(value).__name__, f"an array of {dtypes.get(name)}: {error}")) from None
    return found


def rows_of(inputs: Mapping[str, Any], most: int) -> int:
    """How many rows; raises ``BadInput`` for too many."""
    for name, array in inputs.items():
        rows: int = array.shape[0] if array.ndim else 1
        if rows > most:
            raise BadInput(Violation(name, f"{rows} rows", f"at most {most} in one inference"))
        return rows
    return 0
