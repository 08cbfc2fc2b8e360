"""TFLite files on LiteRT (``ai-edge-litert``) or, where that has no wheel, ``tflite-runtime``; on the CPU.

An interpreter holds the tensors of one inference, so calls take turns under a lock. A batch of another size than the last
resizes it. Quantized inputs and outputs are given as the file has them (INT8 stays INT8).

``tflite-runtime`` imports under numpy 2 and then fails in every interpreter: ``check_health`` builds and runs a tiny one.
"""

from __future__ import annotations

import base64
import importlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skerry_runtime.acceleration import CPU, Acceleration
from skerry_runtime.engines.faults import Words, one_line
from skerry_runtime.errors import BadInput, Degraded, Violation
from skerry_runtime.tensors import Array, Spec, Tensors, datatype_of

_MODULES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")
_WORDS = Words(
    no_memory=("Failed to allocate", "bad_alloc", "Out of memory"),
    unknown_operator=("unresolved custom op", "Didn't find op for builtin opcode", "Op builtin_code out of range"),
    bad_input=("Cannot set tensor",),
)

_RELU = base64.b64decode(
    "GAAAAFRGTDMAAA4AFAAQAAwACAAAAAQADgAAABAAAAAcAAAA0AAAAAMAAAABAAAACAAAAAQABAAEAAAAAQAAABAAAAAMABQAEAAMAAgABAAMAAAAEAAAADwA"
    "AABAAAAARAAAAAEAAAAQAAAAAAAKAAwAAAAIAAQACgAAAAgAAAAMAAAAAQAAAAEAAAABAAAAAAAAAAEAAAABAAAAAQAAAAAAAAACAAAAMAAAAAQAAADk////"
    "CAAAAAwAAAABAAAAeQAAAAEAAAABAAAADAAMAAgAAAAAAAQADAAAAAgAAAAMAAAAAQAAAHgAAAABAAAAAQAAAAEAAAAQAAAADAAMAAsAAAAAAAQADAAAABMA"
    "AAAAAAAT"
)
"""A TFLite file of 276 bytes: y = relu(x), one float."""


def check_health() -> None:
    """Builds and runs an interpreter.

    Raises:
        Degraded: ``runtime_missing`` when that does not work here, ``out_of_memory`` when it does not now.
    """
    try:
        interpreter = _interpreter_class()(model_content=_RELU, num_threads=1)
        interpreter.allocate_tensors()
        interpreter.set_tensor(0, np.array([2.0], np.float32))
        interpreter.invoke()
        found = float(interpreter.get_tensor(1)[0])
    except Degraded:
        raise
    except Exception as error:
        raise _WORDS.runtime_fault("tflite: installed, but no interpreter can be built", error) from None
    if found != 2.0:
        raise Degraded("runtime_missing", f"tflite: installed, but relu(2) gives {found}")


class TfliteEngine:
    """An interpreter; see ``base.Engine``."""

    runtime = "tflite"

    def __init__(self, path: Path, *, acceleration: Acceleration = CPU, version: str = "") -> None:
        """Loads the file.

        Raises:
            Rejected: ``model_damaged``, ``operator_unknown``.
            Degraded: ``runtime_missing`` when no interpreter can be built at all, ``out_of_memory``.
        """
        try:
            self._interpreter, self.runs_on, self.fallback = _accelerated(str(path), acceleration)
            inputs, outputs = _details(self._interpreter)
        except Degraded:
            raise
        except Exception as error:
            check_health()  # when that fails too, the file is not to blame
            raise _WORDS.load_fault(path.name, error) from None
        self.runtime_version = version
        # What fell back once need not try again for every stream.
        self._loaded = (path, acceleration.on_cpu() if self.runs_on == ("cpu",) else acceleration)
        self._indices = {name: int(detail["index"]) for name, detail in (inputs | outputs).items()}
        self.inputs = tuple(_spec(name, detail) for name, detail in inputs.items())
        self.outputs = tuple(_spec(name, detail) for name, detail in outputs.items())
        self._shapes = {name: tuple(int(n) for n in detail["shape"]) for name, detail in inputs.items()}
        self._allocated = True
        self._lock = threading.Lock()

    def run(self, feeds: Tensors) -> Tensors:
        """See ``base.Engine``."""
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._invoke(feeds, names), strict=True))

    def prepare(self, outputs: Sequence[str]) -> Callable[[Tensors], Sequence[Array]]:
        """See ``base.Engine``."""
        names = list(outputs)
        return lambda feeds: self._invoke(feeds, names)

    def again(self) -> TfliteEngine:
        """See ``base.Engine``."""
        path, acceleration = self._loaded
        return TfliteEngine(path, acceleration=acceleration, version=self.runtime_version)

    def _invoke(self, feeds: Tensors, names: list[str]) -> list[Array]:
        interpreter = self._interpreter
        with self._lock:
            try:
                self._fit(feeds)
                for spec in self.inputs:
                    interpreter.set_tensor(self._indices[spec.name], feeds[spec.name])
                interpreter.invoke()
                return [interpreter.get_tensor(self._indices[name]) for name in names]
            except BadInput:
                raise
            except Exception as error:
                raise _WORDS.run_fault(error) from None

    def _fit(self, feeds: Tensors) -> None:
        for spec in self.inputs:
            shape = feeds[spec.name].shape
            if not spec.takes(shape):
                raise BadInput(Violation(spec.name, f"shape {list(shape)}", f"shape {list(spec.shape)}"))
            if shape != self._shapes[spec.name]:
                self._allocated = False
                self._interpreter.resize_tensor_input(self._indices[spec.name], list(shape))
                self._shapes[spec.name] = shape
        if not self._allocated:
            # Stays unset when this fails, so that the next call allocates again before it runs.
            self._interpreter.allocate_tensors()
            self._allocated = True


def _accelerated(path: str, acceleration: Acceleration) -> tuple[Any, tuple[str, ...], str]:
    """An interpreter with its tensors, on the wished delegates if they load and take the model: what it runs on, and why not."""
    delegates, faults = [], []
    for wished in acceleration.delegates:
        try:
            delegates.append(_interpreter_module().load_delegate(wished.library, dict(wished.options)))
        except Degraded:
            raise
        except Exception as error:
            faults.append(f"{wished.library} does not load: {one_line(error)}")
    if delegates and not faults:
        names = tuple(Path(wished.library).name for wished in acceleration.delegates)
        try:
            return _interpreter(path, acceleration, delegates), (*names, "cpu"), ""
        except Exception as error:
            faults.append(f"{', '.join(names)} does not take the model: {one_line(error)}")
    return _interpreter(path, acceleration, []), ("cpu",), "; ".join(faults)


def _interpreter(path: str, acceleration: Acceleration, delegates: list[Any]) -> Any:
    module = _interpreter_module()
    options: dict[str, Any] = {}
    if not acceleration.xnnpack:
        options["experimental_op_resolver_type"] = module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    if delegates:
        options["experimental_delegates"] = delegates
    found = module.Interpreter(model_path=path, num_threads=acceleration.threads, **options)
    found.allocate_tensors()
    return found


def _interpreter_class() -> Any:
    return _interpreter_module().Interpreter


def _interpreter_module() -> Any:
    faults = []
    for module in _MODULES:
        try:
            found = importlib.import_module(module)
            found.Interpreter  # noqa: B018  (a package of another version lacks it)
            return found
        except Exception as error:
            # Not ImportError alone: a native library that does not load raises OSError, one of another version AttributeError.
            fault = _WORDS.runtime_fault(module.partition(".")[0], error)
            if fault.code == "out_of_memory":
                raise fault from None
            faults.append(fault.detail)
    raise Degraded("runtime_missing", f"tflite: {'; '.join(faults)}")


def _details(interpreter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs by name: the signature's names when the file has exactly one, else the tensors' own."""
    signatures = interpreter.get_signature_list()
    if len(signatures) == 1:
        runner = interpreter.get_signature_runner(next(iter(signatures)))
        return dict(runner.get_input_details()), dict(runner.get_output_details())
    inputs = {detail["name"]: detail for detail in interpreter.get_input_details()}
    outputs = {detail["name"]: detail for detail in interpreter.get_output_details()}
    return inputs, outputs


def _spec(name: str, detail: Any) -> Spec:
    shape = detail.get("shape_signature")
    if shape is None or len(shape) == 0:
        shape = detail["shape"]
    return Spec(name, datatype_of(np.empty(0, detail["dtype"])), tuple(int(n) if n > 0 else -1 for n in shape))
