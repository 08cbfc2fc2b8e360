"""Environments of peers: each has its own, made at first use in an ignored folder, so that nothing of theirs is among ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]


def interpreter(name: str) -> Path:
    """The Python of a peer, with what ``NAME.txt`` beside this file pins."""
    environment = _ROOT / ".bench" / name
    python = environment / "bin" / "python"
    if not (environment / "ready").exists():
        print(f"making the environment of {name}, once", file=sys.stderr)
        environment.parent.mkdir(exist_ok=True)
        make = [str(_ROOT / ".ci" / "make-venv"), str(environment)]
        subprocess.run(make, check=True, env={**os.environ, "PYTHON": sys.executable})
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(_HERE / f"{name}.txt")]
        subprocess.run(install, check=True)
        (environment / "ready").touch()
    return python
