"""Megabytes on disk of an agent with each runtime, installed into an empty environment, beside MLServer with onnxruntime.

What pip itself takes is left out. The network is needed: everything comes as a device would get it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.peer_environment import interpreter
from tests.bench.result import Result

ROOT = Path(__file__).parents[2]
RUNTIMES = ("onnx", "litert")


def run() -> Result:
    sizes = {runtime: _installed(runtime) for runtime in RUNTIMES}
    peer = _packages_mb(interpreter("mlserver").parents[1])
    return Result(
        bench="install_size",
        value=sizes["onnx"][0],
        unit="MB",
        peer="MLServer 1.7.1 with onnxruntime",
        peer_value=peer,
        n=1,
        note="; ".join(
            f"with {runtime}: {size:.0f} MB in all, of it {ours:.1f} Skerry" for runtime, (size, ours) in sizes.items()
        ),
    )


def _installed(runtime: str) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name) / "venv"
        make = [str(ROOT / ".ci" / "make-venv"), str(folder)]
        subprocess.run(make, check=True, env={**os.environ, "PYTHON": sys.executable}, stdout=subprocess.DEVNULL)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
        parts = [str(ROOT / "contract"), f"{ROOT / 'runtime'}[{runtime}]", f"{ROOT / 'agent'}[{runtime},uvloop]"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *parts], check=True, stderr=subprocess.DEVNULL)
        (packages,) = folder.glob("lib/python*/site-packages")
        ours = sum(_tree_mb(path) for path in packages.glob("skerry_*"))
        return _packages_mb(folder), ours


def _packages_mb(environment: Path) -> float:
    (packages,) = environment.glob("lib/python*/site-packages")
    installers = ("pip", "setuptools", "_distutils_hack")
    return sum(_tree_mb(path) for path in packages.iterdir() if path.name.split("-")[0] not in installers)


def _tree_mb(path: Path) -> float:
    """Without compiled modules: whether there are any is the installer's choice."""
    if path.is_file():
        return path.stat().st_size / 1e6
    files = (one for one in path.rglob("*") if one.is_file() and one.suffix != ".pyc")
    return sum(one.stat().st_size for one in files) / 1e6
