"""A way back from a confirmed bundle that came while an update was under way: it goes first.

A person's revert and the way out of a crash loop wait for no update, of whichever model: what is under way makes way (``yielded``), and is
taken up again with what it has fetched. Until it has, the way back is owed, on disk, so that power that fails in between loses no
person's order. ``updating`` feeds it to the table then; the table forgets it in the transaction that takes it.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from skerry_agent.core import effects as e
from skerry_agent.core.lifecycle import CONFIRMED, STEPS_BACK_EVENTS, Update
from skerry_agent.logs import kv
from skerry_agent.slots import Slots
from skerry_agent.store import Store

log = logging.getLogger(__name__)

_OWED, _LAST = "way_back", "last_confirmed"

WayBack = e.RevertOrdered | e.CrashLooped


class Returning:
    """See the module.

    Attributes:
        owed: what is to be fed as soon as nothing is under way; None for nothing.
    """

    def __init__(self, store: Store, slots: Slots) -> None:
        self._store = store
        self._slots = slots
        self.owed: WayBack | None = _read(store.get(_OWED))

    def owe(self, event: WayBack) -> None:
        """Keeps it until nothing is under way.

        Raises:
            Degraded: it cannot be stored.
        """
        kind = "looped" if isinstance(event, e.CrashLooped) else "ordered"
        self._store.put(_OWED, {"kind": kind, **msgspec.structs.asdict(event)})
        self.owed = event
        log.info(
            "a way back waits for what is under way", extra=kv(model=event.model, version=event.version, kind=kind)
        )

    def due(self) -> WayBack | None:
        """What is owed, if it still leads anywhere; else it is owed no more."""
        event = self.owed
        if event is None:
            return None
        pointers = self._slots.pointers(event.model)
        back, confirmed = pointers.previous, pointers.confirmed
        leads = confirmed is not None and confirmed.digest == event.digest and back is not None
        if back is not None and leads and self._slots.may_serve(event.model, back):
            return event
        log.warning("there is no way back any more", extra=kv(model=event.model, version=event.version))
        self._store.delete(_OWED)
        self.owed = None
        return None

    def note(self, update: Update, event: e.Event) -> None:
        """In the transaction that stores what follows from an event: a way back that was taken is owed no more."""
        if isinstance(event, STEPS_BACK_EVENTS) and self.owed is not None and self.owed.model == update.model:
            self._store.delete(_OWED)
        if update.state in CONFIRMED and isinstance(event, (e.TrialKept, e.TrialQuiet)):
            self._store.put(_LAST, {"model": update.model, "digest": update.digest})

    def noted(self, event: e.Event) -> None:
        """Behind that transaction."""
        if isinstance(event, STEPS_BACK_EVENTS) and self.owed is not None and self.owed.model == event.model:
            self.owed = None

    def last_confirmed(self, update: Update) -> str:
        """The model of which a bundle was confirmed last; empty where that one runs no more."""
        found: dict[str, str] = self._store.get(_LAST, {})
        if update.state in CONFIRMED:
            # An older agent left no note of it.
            found = {"model": update.model, "digest": update.digest}
        confirmed = self._slots.pointers(found.get("model", "")).confirmed
        return found["model"] if confirmed is not None and confirmed.digest == found["digest"] else ""


def _read(found: dict[str, Any] | None) -> WayBack | None:
    if found is None:
        return None
    if found.pop("kind") == "looped":
        return msgspec.convert(found, e.CrashLooped)
    return msgspec.convert(found, e.RevertOrdered)
