"""The runtimes that execute a model file, behind one Protocol (``base.Engine``).

Importing this package loads no runtime and no numpy: ``available`` only looks at what is installed.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from skerry_contract.manifest import UNKNOWN_RUNTIME, runtime_suffices

from skerry_runtime.acceleration import CPU, Acceleration
from skerry_runtime.errors import Degraded

if TYPE_CHECKING:
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
            found[runtime] = _beside(spec.origin, distribution) or _recorded(module, distribution)
            break
    return found


def _beside(origin: str, distribution: str) -> str:
    """The version in the name of the folder that an installer left beside the module; empty where that is not so plain.

    ``importlib.metadata`` would read the same out of that folder, and takes 3 MB with all that it imports (``email``, ``csv``, ``zipfile``).
    """
    name = re.compile(re.escape(distribution.replace("-", "_")) + r"-([0-9][^-]*)\.dist-info", re.IGNORECASE)
    try:
        found = [match[1] for path in Path(origin).parent.parent.iterdir() if (match := name.fullmatch(path.name))]
    except OSError:
        return ""
    # Several are left when an upgrade was cut short: which of them holds is for others to say.
    return found[0] if len(found) == 1 else ""


def _recorded(module: str, distribution: str) -> str:
    import importlib.metadata

    # A GPU or vendor build is the same module under another distribution's name.
    for name in (distribution, *importlib.metadata.packages_distributions().get(module, ())):
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
