"""What models run on, for people: which of them fell back to the CPU although something else was configured, told once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skerry_agent import workerwire as ww
from skerry_agent.slots import Slot

MOST_DETAIL = 500


class Fallbacks:
    """Which fallbacks were told."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def news(self, models: Mapping[str, Slot], proofs: Mapping[str, ww.Proved]) -> list[dict[str, Any]]:
        """An event's data for each model that fell back for another reason, or as another bundle, than was told last."""
        found = []
        for name, proved in sorted(proofs.items()):
            slot = models.get(name)
            if slot is None:
                continue
            now = f"{slot.digest} {proved.fallback}" if proved.fallback else ""
            if now and self._told.get(name) != now:
                detail = proved.fallback[:MOST_DETAIL]
                found.append({"model": name, "digest": slot.digest, "variant": slot.variant, "detail": detail})
            self._told[name] = now
        return found


def engines_of(proofs: Mapping[str, ww.Proved]) -> dict[str, dict[str, Any]]:
    """For the status: what each model runs on, and why not on what was configured."""
    return {
        name: {"runs_on": list(proved.runs_on), "fallback": proved.fallback} for name, proved in sorted(proofs.items())
    }
