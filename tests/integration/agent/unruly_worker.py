"""The product's worker in a process that misbehaves as the file says that is its first argument, as long as it says so.

``spin``: a thread that uses a core. ``leak N``: a thread that takes N MB and keeps them. ``leak-once N``: only the process that gets
hold of the file first. ``die-loading N``: dies of a signal where it should load version N of a model.
"""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from skerry_agent import workerwire as ww
from skerry_agent.worker import process

orders = Path(sys.argv.pop(1))
kept: list[bytearray] = []
load_generation = process.load_generation


def load(start: ww.Start, **rest: Any) -> Any:
    what, _, version = orders.read_text().partition(" ")
    for model in start.models:
        if what == "die-loading" and model.version == version:
            os.kill(os.getpid(), signal.SIGSEGV)
    return load_generation(start, **rest)


process.load_generation = load


def misbehave() -> None:
    while True:
        what, _, size = orders.read_text().partition(" ")
        if what == "leak-once":
            try:
                orders.with_name("leaked").touch(exist_ok=False)
            except FileExistsError:
                return
        if what.startswith("leak"):
            kept.append(bytearray(b"x" * (int(size) * 1_000_000)))
            return
        until = time.monotonic() + 0.2
        while what == "spin" and time.monotonic() < until:
            pass
        if what != "spin":
            time.sleep(0.1)


threading.Thread(target=misbehave, daemon=True).start()
runpy.run_module("skerry_agent.worker", run_name="__main__", alter_sys=True)
