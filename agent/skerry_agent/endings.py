"""How the last update of each model ended, where it ended badly: one model's news must not make another's forgotten.

The update under way, or that ended last, is ``updating``'s; beside it a device with several models has others that wait for their
next try or for a person.
"""

from __future__ import annotations

from typing import Any

import msgspec

from skerry_agent.core.lifecycle import Update
from skerry_agent.store import Store

_KEY = "ended"


class Endings:
    """See the module."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def note(self, update: Update) -> None:
        """Takes an update as it is stored now; of its model, nothing older is of interest once it rests."""
        if not update.resting or not update.model:
            return
        before: dict[str, Any] = self._store.get(_KEY, {})
        after = {model: one for model, one in before.items() if model != update.model}
        if update.state == "idle" and update.code:
            after[update.model] = msgspec.to_builtins(update)
        if after != before:
            self._store.put(_KEY, after)

    def beside(self, model: str) -> tuple[Update, ...]:
        """Those of the other models, by name."""
        return tuple(
            msgspec.convert(one, Update) for name, one in sorted(self._store.get(_KEY, {}).items()) if name != model
        )
