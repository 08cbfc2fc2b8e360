"""Says in memory shared with the supervisor which model is in work, so that the one that kills the process can be named.

One byte for the event loop's thread, one for the inference thread: the model's number in the order of their names, from 1; 0 between
two inferences. Written only where several models share a worker: 0.2 us per inference there, nothing elsewhere.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from threading import get_ident
from typing import Any

from skerry_agent.worker.model import Model


def noted(models: Mapping[str, Model], descriptor: int) -> None:
    """Makes every model's inferences leave a note. Called in the event loop's thread; ``descriptor`` may be closed afterwards."""
    shared = mmap.mmap(descriptor, mmap.PAGESIZE)
    here = get_ident()
    for number, name in enumerate(sorted(models), start=1):
        model = models[name]
        model.infer = _noting(model.infer, shared, number, here)
        model.compute = _noting(model.compute, shared, number, here)
        if model.go_on is not None:
            model.go_on = _noting(model.go_on, shared, number, here)


def _noting(infer: Callable[..., Any], shared: mmap.mmap, number: int, loop_thread: int) -> Callable[..., Any]:
    def run(*args: Any, **choices: Any) -> Any:
        at = 0 if get_ident() == loop_thread else 1
        shared[at] = number
        try:
            return infer(*args, **choices)
        finally:
            shared[at] = 0

    return run
