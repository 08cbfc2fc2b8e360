"""What is noted and told of workers: how starts and ends went, and how often a model was swapped.

What follows from it (going back, another plan) is not decided here. Ends are counted in the durable state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from skerry_agent import workerwire as ww
from skerry_agent.accelerators import Fallbacks
from skerry_agent.errors import AgentError, Degraded
from skerry_agent.logs import kv
from skerry_agent.runtimes import Runtimes
from skerry_agent.serving import Generation
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Store

log = logging.getLogger(__name__)


class Chronicle:
    """See the module.

    Args:
        on_event: something to tell the server: name, code, data.

    Attributes:
        swaps: model -> how often another bundle took over, in this life of the agent.
    """

    def __init__(
        self, store: Store, slots: Slots, runtimes: Runtimes, *, on_event: Callable[[str, str, dict[str, Any]], None]
    ) -> None:
        self._store = store
        self._slots = slots
        self._runtimes = runtimes
        self._on_event = on_event
        self._fallbacks = Fallbacks()
        self._served: dict[str, str] = {}
        self.swaps: dict[str, int] = {}

    def started(
        self, models: Mapping[str, Slot], error: AgentError | None, proofs: Mapping[str, ww.Proved]
    ) -> tuple[bool, bool]:
        """What the end of a start says of the runtimes.

        Returns:
            Whether it is news which runtimes work here; whether one was found missing, so that something else may have to run.
        """
        for data in self._fallbacks.news(models, proofs):
            self._on_event("worker", "provider_fallback", data)
        if error is None:
            proved = {variant.runtime for slot in models.values() if (variant := self._slots.variant(slot)) is not None}
            return self._runtimes.worked(proved), False
        slot = models.get(error.model) if error.code == "runtime_missing" else None
        variant = self._slots.variant(slot) if slot is not None else None
        if slot is None or variant is None or not self._runtimes.failed(variant, error.detail):
            return False, False
        told = {"model": error.model, "digest": slot.digest, "variant": slot.variant, "detail": error.detail[:500]}
        self._on_event("worker", error.code, told)
        return True, True

    def ended(self, generation: Generation, code: str, how: str) -> None:
        """A worker ended that should not have, or was ended for what it did."""
        self._on_event(
            "worker", code,
            {
                "how": how, "models": {n: s.digest for n, s in generation.models.items()}, "generation": generation.number,
                "suspects": list(generation.suspects),
            },
        )  # fmt: skip
        ends = self.ends()
        try:
            self._store.put("worker_ends", {**ends, code: ends.get(code, 0) + 1})
        except Degraded as error:
            log.error("end of a worker not counted", extra=kv(code=error.code, detail=error.detail))

    def set_apart(self, model: str, slot: Slot, how: str) -> None:
        """A bundle that takes its worker down got one of its own."""
        told = {"model": model, "digest": slot.digest, "version": slot.version, "how": how}
        self._on_event("worker", "model_set_apart", told)

    def ends(self) -> dict[str, int]:
        """Code -> how many workers ended so."""
        return dict(self._store.get("worker_ends", {}))

    def serves(self, models: Mapping[str, Slot]) -> None:
        """What serves now: counts swaps."""
        for model, slot in models.items():
            before = self._served.get(model)
            if before != slot.digest:
                self._served[model] = slot.digest
                if before is not None:
                    self.swaps[model] = self.swaps.get(model, 0) + 1
