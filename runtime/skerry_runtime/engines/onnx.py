"""ONNX Runtime on the CPU, one thread by default, and silent: its wheels carry their maker's telemetry, which is on unless told otherwise."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skerry_runtime.acceleration import CPU, Acceleration
from skerry_runtime.engines.faults import Words, one_line
from skerry_runtime.engines.onnx_row import bind_row
from skerry_runtime.errors import BadInput, Degraded, Violation
from skerry_runtime.tensors import Array, Spec, Tensors

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_WORDS = Words(
    no_memory=("Failed to allocate memory", "bad_alloc", "BFCArena"),
    unknown_operator=(
        "is not a registered function/op",
        "No Op registered for",
        "Could not find an implementation for",
        "Unsupported model IR version",
        "ONNX Runtime only *guarantees* support for models stamped with",
        "is under development and support for this is limited",
    ),
    bad_input=("INVALID_ARGUMENT", "Got invalid dimensions for input", "Unexpected input data type"),
)


_CPU = "CPUExecutionProvider"
_RELU = base64.b64decode("CAc6MwoMCgF4EgF5IgRSZWx1EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQDQ==")
"""An ONNX file of 61 bytes: y = relu(x), one float."""


def check_health() -> None:
    """Builds and runs a session.

    Raises:
        Degraded: ``runtime_missing`` when that does not work here, ``out_of_memory`` when it does not now.
    """
    try:
        (found,) = _session(_RELU, CPU, ()).run(None, {"x": np.array([2.0], np.float32)})
    except Degraded:
        raise
    except Exception as error:
        raise _WORDS.runtime_fault("onnx: installed, but no session can be built", error) from None
    if found.tolist() != [2.0]:
        raise Degraded("runtime_missing", f"onnx: installed, but relu(2) gives {found.tolist()}")


def _session(model: str | bytes, acceleration: Acceleration, providers: Sequence[str]) -> Any:
    """A session on these providers and the CPU's. Raises ``Degraded`` when the package does not load, and the package's own exceptions after that."""
    # Read at import. Without it: an id of this device and a database of events below the home folder, and a thread.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = acceleration.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # what fails comes as an exception; the runtime's own lines would only repeat it
        build = ort.InferenceSession
    except Exception as error:
        raise _WORDS.runtime_fault("onnx", error) from None
    wished = [(name, acceleration.provider_options.get(name, {})) for name in providers]
    found = build(model, options, providers=[*wished, _CPU] if wished else [_CPU])
    found.disable_fallback()  # what a provider cannot run fails: it must not quietly become another session
    return found


def _accelerated(path: str, acceleration: Acceleration) -> tuple[Any, str]:
    """A session on the wished providers that take the model, and why not all of them."""
    if not acceleration.providers:
        return _session(path, acceleration, ()), ""
    here = _providers()
    faults = [
        f"{name} is not in this onnxruntime, which has {', '.join(here)}"
        for name in acceleration.providers
        if name not in here
    ]
    left = [name for name in acceleration.providers if name in here and name != _CPU]
    while left:
        try:
            session = _session(path, acceleration, left)
        except Degraded:
            raise
        except Exception as error:
            # Which of them it was is not told: without the least preferred it may do.
            faults.append(f"{left.pop()} does not take the model: {one_line(error)}")
            continue
        missing = [name for name in left if name not in session.get_providers()]
        faults += [f"{name} does not take the model" for name in missing]
        return session, "; ".join(faults)
    return _session(path, acceleration, ()), "; ".join(faults)


def _providers() -> list[str]:
    try:
        import onnxruntime as ort

        return list(ort.get_available_providers())
    except Exception as error:
        raise _WORDS.runtime_fault("onnx", error) from None


class OnnxEngine:
    """A session of ONNX Runtime; see ``base.Engine``."""

    runtime = "onnx"

    def __init__(self, path: Path, *, acceleration: Acceleration = CPU, version: str = "") -> None:
        """Loads the file.

        Raises:
            Rejected: ``model_damaged``, ``operator_unknown``.
            Degraded: ``runtime_missing`` when the package does not load, ``out_of_memory``.
        """
        try:
            self._session, self.fallback = _accelerated(str(path), acceleration)
        except Degraded:
            raise
        except Exception as error:
            raise _WORDS.load_fault(path.name, error) from None
        self.runtime_version = version
        self._loaded = (path, acceleration)
        self.runs_on = tuple(name if name != _CPU else "cpu" for name in self._session.get_providers())
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())
        self._names = [spec.name for spec in self.outputs]

    def run(self, feeds: Tensors) -> Tensors:
        """See ``base.Engine``."""
        texts = [spec.name for spec in self.inputs if spec.datatype == "BYTES"]
        try:
            return dict(zip(self._names, self._session.run(self._names, _with_strings(feeds, texts)), strict=True))
        except BadInput:
            raise
        except Exception as error:
            raise _run_fault(error) from None

    def prepare(self, outputs: Sequence[str]) -> Callable[[Tensors], Sequence[Array]]:
        """See ``base.Engine``."""
        names = list(outputs)
        texts = [spec.name for spec in self.inputs if spec.datatype == "BYTES"]
        run = self._prepare(names)
        if texts:
            return lambda feeds: run(_with_strings(feeds, texts))
        if self.runs_on != ("cpu",):
            return run
        given = {spec.name: spec for spec in self.outputs}
        return bind_row(self._session, self.inputs, [given[name] for name in names], run)

    def again(self) -> OnnxEngine:
        """See ``base.Engine``."""
        path, acceleration = self._loaded
        return OnnxEngine(path, acceleration=acceleration, version=self.runtime_version)

    def _prepare(self, names: list[str]) -> Callable[[Tensors], Sequence[Array]]:
        # InferenceSession.run spends about 1 us per call on checks that the guard has made already (names, owners). The
        # inner session has been there since the first releases; without it the public method does the same, slower.
        inner = getattr(self._session, "_sess", None)
        if inner is None:
            session_run = self._session.run

            def run_public(feeds: Tensors) -> Sequence[Array]:
                try:
                    return session_run(names, feeds)  # type: ignore[no-any-return]
                except Exception as error:
                    raise _run_fault(error) from None

            return run_public
        inner_run = inner.run

        def run_inner(feeds: Tensors) -> Sequence[Array]:
            try:
                return inner_run(names, feeds, None)  # type: ignore[no-any-return]
            except Exception as error:
                raise _run_fault(error) from None

        return run_inner


def _with_strings(feeds: Tensors, names: Sequence[str]) -> Tensors:
    """The same with texts as ``str``: of ``bytes`` ONNX Runtime would take Python's notation, ``b'...'``.

    Raises:
        BadInput: a text is no UTF-8.
    """
    found = feeds
    for name in names:
        values = feeds[name].ravel().tolist()
        if any(isinstance(value, bytes) for value in values):
            array = np.empty(len(values), np.object_)
            try:
                array[:] = [value.decode() if isinstance(value, bytes) else value for value in values]
            except UnicodeDecodeError as error:
                raise BadInput(Violation(name, f"bytes that are none: {error.reason}", "UTF-8")) from None
            found = {**found, name: array.reshape(feeds[name].shape)}
    return found


def _spec(node: Any) -> Spec:
    # Dimensions are ints, names, or None when unknown.
    shape = tuple(d if isinstance(d, int) and d > 0 else -1 for d in node.shape)
    return Spec(node.name, _DATATYPES.get(node.type, node.type), shape)


def _run_fault(error: Exception) -> Exception:
    # A node that fails may say INVALID_ARGUMENT as well.
    return _WORDS.run_fault(error, of_model="while running" in str(error))
