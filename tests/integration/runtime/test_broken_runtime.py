"""A runtime that is installed and does not work, or not at this moment, is told apart from a model file that does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ai_edge_litert", reason="the extra litert is not installed")

PROGRAM = """
import pathlib, sys
from skerry_runtime.engines import load_engine
from skerry_runtime.errors import BundleFault
try:
    load_engine(sys.argv[1], pathlib.Path("none.of-this"))
except BundleFault as fault:
    print(type(fault).__name__, fault)
"""
MODULES = {"onnx": "onnxruntime", "tflite": "ai_edge_litert"}
BROKEN = {
    "import": ('raise ImportError("numpy.core.multiarray failed to import")', "numpy.core.multiarray"),
    "library": ('import ctypes\nctypes.CDLL("/nowhere/libLiteRt.so")', "OSError: /nowhere/libLiteRt.so"),
    "attribute": ('raise AttributeError("module has no attribute MallocInfo")', "AttributeError: module has no"),
    "empty": ("", "AttributeError"),
    "tls": ('raise ImportError("libgomp.so: cannot allocate memory in static TLS block")', "static TLS block"),
}
SHORT = {
    "segment": 'raise ImportError("libpywrap.so: failed to map segment from shared object")',
    "library": 'raise OSError("libLiteRt.so: failed to map segment from shared object")',
    "memory": "raise MemoryError",
    "allocate": 'raise ImportError("libpywrap.so: cannot allocate memory")',
}


def with_package(folder: Path, module: str, text: str) -> None:
    package = folder / module
    package.mkdir()
    (package / "__init__.py").write_text(text)
    (package / "interpreter.py").write_text("")


def told(folder: Path, *command: str) -> tuple[int, str]:
    """Exit code and what was said, with the folder's packages in front of those that are installed."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path}
    )
    return done.returncode, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("runtime", MODULES)
@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_a_runtime_raises_when_it_is_imported_it_is_missing(tmp_path: Path, runtime: str, kind: str) -> None:
    text, says = BROKEN[kind]
    with_package(tmp_path, MODULES[runtime], text)
    code, words = told(tmp_path, "-c", PROGRAM, runtime)
    assert words.startswith(f"Degraded runtime_missing: {runtime}: ")
    assert says in words
    assert code == 0


@pytest.mark.parametrize("runtime", MODULES)
@pytest.mark.parametrize("kind", SHORT)
def test_a_moment_without_memory_is_no_missing_runtime(tmp_path: Path, runtime: str, kind: str) -> None:
    with_package(tmp_path, MODULES[runtime], SHORT[kind])
    assert told(tmp_path, "-c", PROGRAM, runtime)[1].startswith("Degraded out_of_memory: ")
    assert told(tmp_path, "-m", "skerry_runtime.engines", runtime)[0] == 2


INTERPRETER = """
class Interpreter:
    def __init__(self, **_): self.value = None
    def allocate_tensors(self): pass
    def set_tensor(self, _, value): self.value = value
    def invoke(self): INVOKE
    def get_tensor(self, _): return self.value.clip(0)
"""


def test_the_next_module_of_a_runtime_is_tried_when_the_first_does_not_load(tmp_path: Path) -> None:
    with_package(tmp_path, "ai_edge_litert", BROKEN["library"][0])
    with_package(tmp_path, "tflite_runtime", "")
    (tmp_path / "tflite_runtime" / "interpreter.py").write_text(INTERPRETER.replace("INVOKE", "pass"))
    assert told(tmp_path, "-m", "skerry_runtime.engines", "tflite") == (0, "")


@pytest.mark.parametrize(
    ("error", "code"),
    [('MemoryError("bad_alloc")', 2), ('RuntimeError("Out of memory")', 2), ('RuntimeError("no")', 1)],
)
def test_the_health_check_tells_a_short_moment_from_a_runtime_that_does_not_work(
    tmp_path: Path, error: str, code: int
) -> None:
    with_package(tmp_path, "ai_edge_litert", "")
    (tmp_path / "ai_edge_litert" / "interpreter.py").write_text(INTERPRETER.replace("INVOKE", f"raise {error}"))
    found, words = told(tmp_path, "-m", "skerry_runtime.engines", "tflite")
    assert found == code, words
    assert words.startswith(
        "out_of_memory: " if code == 2 else "runtime_missing: tflite: installed, but no interpreter"
    )


@pytest.mark.parametrize("runtime", MODULES)
def test_a_runtime_that_works_passes_the_health_check(tmp_path: Path, runtime: str) -> None:
    code, words = told(tmp_path, "-m", "skerry_runtime.engines", runtime)
    assert code == 0, words
