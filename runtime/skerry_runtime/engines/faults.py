"""A runtime's own words, made into the faults that a bundle and a request have names for. Runtimes tell causes apart by text alone."""

from __future__ import annotations

from dataclasses import dataclass

from skerry_runtime.errors import BadInput, BundleFault, Degraded, EngineFailed, Rejected, Violation

_LOADER_SHORT = ("failed to map segment", "annot allocate memory")
"""The system's loader and its C library, whichever runtime they load."""
_NOT_SHORT = "static TLS"
"""``cannot allocate memory in static TLS block``: a library that this process can never load, however much is free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """What a runtime says, by cause: parts of its messages."""

    no_memory: tuple[str, ...]
    unknown_operator: tuple[str, ...]
    bad_input: tuple[str, ...]

    def runtime_fault(self, runtime: str, error: Exception) -> Degraded:
        """Why the runtime itself did not load, or cannot build anything: it does not work here, or memory is short now."""
        text = one_line(error)
        if not isinstance(error, ImportError):
            text = f"{type(error).__name__}: {text}"
        return Degraded("out_of_memory" if self._is_memory(error, text) else "runtime_missing", f"{runtime}: {text}")

    def load_fault(self, name: str, error: Exception) -> BundleFault:
        """Why the file ``name`` did not load."""
        text = one_line(error)
        if self._is_memory(error, text):
            return Degraded("out_of_memory", f"{name}: {text}")
        if any(part in text for part in self.unknown_operator):
            return Rejected("operator_unknown", f"{name}: {text}")
        return Rejected("model_damaged", f"{name}: {text}")

    def run_fault(self, error: Exception, *, of_model: bool = False) -> BadInput | EngineFailed:
        """Why a run failed. ``of_model``: it is known to be the model's arithmetic, not the caller's tensors."""
        text = one_line(error)
        if self._is_memory(error, text):
            return EngineFailed("out_of_memory", text)
        if not of_model and any(part in text for part in self.bad_input):
            return BadInput(Violation("inputs", text, "tensors that fit the model"))
        return EngineFailed("model_failed", text)

    def _is_memory(self, error: Exception, text: str) -> bool:
        if isinstance(error, MemoryError):
            return True
        return _NOT_SHORT not in text and any(part in text for part in (*self.no_memory, *_LOADER_SHORT))


def one_line(error: Exception) -> str:
    """What an exception says, at most 500 characters; its type when it says nothing."""
    return " ".join(str(error).split())[:500] or type(error).__name__
