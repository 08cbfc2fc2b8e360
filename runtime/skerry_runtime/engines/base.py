"""The seam between a loaded model and the runtime that executes it.

An engine knows nothing of bundles: no transforms, guards, golden cases. It takes arrays by name, trusts that they fit its
``inputs`` (the guard has looked), and gives arrays by name. A Python exception of the runtime becomes one of ours with a
code; a runtime that kills the process cannot be caught here, which is why workers and validation run in their own process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from skerry_runtime.tensors import Array, Spec, Tensors


class Engine(Protocol):
    """A model loaded in a runtime. Made by ``load(path, threads)``; see ``skerry_runtime.engines.load_engine``."""

    @property
    def runtime(self) -> str:
        """Name of the runtime as the manifest has it."""

    @property
    def runtime_version(self) -> str:
        """Version of the runtime's distribution."""

    @property
    def inputs(self) -> tuple[Spec, ...]:
        """What the model file takes."""

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """What the model file can give."""

    @property
    def runs_on(self) -> tuple[str, ...]:
        """Execution providers or delegates in use, the CPU last, e.g. ``("cpu",)``."""

    @property
    def fallback(self) -> str:
        """Why it runs on less than was wished for; empty when it does not."""

    def run(self, feeds: Tensors) -> Tensors:
        """Runs the model once and gives all outputs.

        Raises:
            EngineFailed: ``out_of_memory``, or ``model_failed`` with the runtime's words.
            BadInput: the runtime refused the tensors themselves.
        """

    def prepare(self, outputs: Sequence[str]) -> Callable[[Tensors], Sequence[Array]]:
        """A function that runs the model and gives just these outputs, in this order, with the least overhead.

        Raises as ``run`` does.
        """

    def again(self) -> Engine:
        """The same file loaded once more, the same way: whatever a runtime keeps between runs begins anew.

        Raises as loading does.
        """
