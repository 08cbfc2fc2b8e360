"""Holds an update in a state: ``hold.json`` in the world's folder says which steps wait, and how short deadlines are.

``verify`` and ``stage``: a disk that hangs; ``worker``: a machine so busy that a new worker does not get to start. ``deadlines``: state ->
seconds, in place of the product's minutes. The stand-in courier holds a fetch by itself (``slow_fetch``). Run as a program it is the
product's worker, once it may start.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 0.02


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(path: Path, **hold: Any) -> None:
    path.with_suffix(".new").write_text(json.dumps(hold))
    path.with_suffix(".new").replace(path)


def wait(path: Path, what: str, *, parent: int = 0) -> None:
    """Returns when it is held no more, or its parent is gone."""
    while what in read(path).get("held", []) and parent in (0, os.getppid()):
        time.sleep(POLL_S)


class Deadlines(dict[str, float]):
    """The product's, but for those that the file gives."""

    def __init__(self, path: Path, usual: dict[str, float]) -> None:
        super().__init__(usual)
        self._path = path

    def get(self, key: str, default: Any = None) -> Any:
        return read(self._path).get("deadlines", {}).get(key, super().get(key, default))


def install(path: Path) -> None:
    """From here on the agent of this process is held by the file."""
    from skerry_agent.core import lifecycle
    from skerry_agent.slots import Slots

    lifecycle.DEADLINES_S = Deadlines(path, dict(lifecycle.DEADLINES_S))  # type: ignore[arg-type, assignment]
    for name in ("verify", "stage"):
        step = getattr(Slots, name)

        def slow(self: Slots, *given: Any, _name: str = name, _step: Any = step, **named: Any) -> Any:
            wait(path, _name)
            return _step(self, *given, **named)

        setattr(Slots, name, slow)


if __name__ == "__main__":
    wait(Path(sys.argv.pop(1)), "worker", parent=os.getppid())
    runpy.run_module("skerry_agent.worker", run_name="__main__", alter_sys=True)
