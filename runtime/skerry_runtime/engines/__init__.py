"""The runtimes that execute a model file, behind one Protocol (``base.Engine``).

Importing this package loads no runtime and no numpy: ``available`` only looks at what is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING

from skerry_contract.manifest import UNKNOWN_RUNTIME, runtime_suffices

from skerry_runtime.acceleration import CPU, Acceleration
from skerry_runtime.errors import Degraded

if TYPE_CHECKING:
    from pathlib import Path

    from skerry_runtime.engines.base import Engine

_INSTALLED_AS: dict[str, tuple[tuple[str, str], ...]] = {
    "onnx": (("onnxruntime", "onnxruntime"),),
    "tflite": (("ai_edge_litert", "ai-edge-litert"), ("tflite_runtime", "tflite-runtime")),
}
"""Runtime of the manifest -> modules that provide it and their distributions, the preferred first."""


def available() -> dict[str, str]:
    """Runtimes installed here and their versions, e.g. ``{"onnx": "1.32.0"}``. Looks only; nothing is imported or run."""
    found: dict[str, str] = {}
    for runtime, providers in _INSTALLED_AS.items():
        for module, distribution in providers:
            spec = importlib.util.find_spec(module)
            # A folder without code is what an uninstalled package may leave behind.
            if spec is None or spec.origin is None:
                continue
            try:
                found[runtime] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                found[runtime] = _of_a_vendor(module)
            break
    return found


def _of_a_vendor(module: str) -> str:
    """The version of a GPU or vendor build: the same module under another distribution's name."""
    for name in importlib.metadata.packages_distributions().get(module, ()):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return UNKNOWN_RUNTIME


def load_engine(runtime: str, path: Path, *, acceleration: Acceleration = CPU, minimum: str = "") -> Engine:
    """Loads a model file.

    Args:
        runtime: ``onnx`` or ``tflite``, as in the manifest.
        path: the model file, verified by the caller.
        acceleration: what it should run on; where that does not take the model, the CPU does.
        minimum: lowest version of the runtime, empty for any.

    Raises:
        Degraded: ``runtime_missing`` when it is not installed, too old or broken; ``out_of_memory``.
        Rejected: ``model_damaged``, ``operator_unknown``.
    """
    version = available().get(runtime)
    if version is None:
        raise Degraded("runtime_missing", f"{runtime}: not installed here")
    if not runtime_suffices(version, minimum):
        raise Degraded("runtime_missing", f"{runtime}: wanted at least {minimum}, got {version}")
    if runtime == "onnx":
        from skerry_runtime.engines.onnx import OnnxEngine

        return OnnxEngine(path, acceleration=acceleration, version=version)
    from skerry_runtime.engines.tflite import TfliteEngine

    return TfliteEngine(path, acceleration=acceleration, version=version)


def check_health(runtime: str) -> None:
    """Builds and runs the smallest model there is, so that a file is not blamed for what its runtime does.

    A runtime that is built for another CPU ends the process: ask in a child (``python -m skerry_runtime.engines``).

    Raises:
        Degraded: ``runtime_missing`` when the runtime does not work here, ``out_of_memory`` when it does not now.
    """
    if runtime not in available():
        raise Degraded("runtime_missing", f"{runtime}: not installed here")
    if runtime == "onnx":
        from skerry_runtime.engines import onnx as engine
    else:
        from skerry_runtime.engines import tflite as engine  # type: ignore[no-redef]
    engine.check_health()
