"""Orders of an operator to this one device, read in ``/self``: each number is obeyed once, over restarts too.

They come over the fleet's TLS in answer to a request that this device signed; a bell only makes it look. What an order can do is what a
person at the device can do with ``skerry-agent sync --pardon`` and ``skerry-agent cancel``: no order chooses what runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from skerry_agent.core.lifecycle import Update
from skerry_agent.errors import Degraded, Rejected
from skerry_agent.logs import kv
from skerry_agent.store import Store
from skerry_agent.updating import Updating

log = logging.getLogger(__name__)

_KEPT = 32
"""Numbers of each kind that are remembered: a server that a backup took back says an earlier one again, which is not obeyed again."""


class Obeying:
    """See the module. ``on_event``: something to tell the server: name, code, data."""

    def __init__(
        self, store: Store, updating: Updating, *, on_event: Callable[[str, str, dict[str, Any]], None]
    ) -> None:
        self._store = store
        self._updating = updating
        self._on_event = on_event

    def told(self, orders: object) -> bool:
        """The newest order of each kind, kind -> number; what is no order of these is ignored, as of a later server.

        Returns:
            Whether one was obeyed now.

        Raises:
            Degraded: the store takes nothing.
        """
        if not isinstance(orders, dict):
            return False
        before = _read(self._store.get("obeyed", {}))
        known = {
            kind: number for kind, number in orders.items() if kind in _ACTS and type(number) is int and number > 0
        }
        obeyed = dict(before)
        for kind, number in sorted(known.items(), key=lambda item: item[1]):
            if number in obeyed.get(kind, ()):
                continue
            last, obeyed = obeyed, {**obeyed, kind: [*obeyed.get(kind, ()), number][-_KEPT:]}
            # Noted first: a power cut in between loses an order, which a person can repeat, and never obeys one twice.
            self._store.put("obeyed", obeyed)
            try:
                code, done = _ACTS[kind](self._updating)
            except Degraded as error:
                # It was not obeyed, and those behind it wait for it: all are heard again at the next look.
                log.error("order not obeyed", extra=kv(kind=kind, number=number, code=error.code, detail=error.detail))
                self._store.put("obeyed", last)
                obeyed = last
                break
            log.info("order obeyed", extra=kv(kind=kind, number=number, code=code, **done))
            self._on_event("order", code, {"kind": kind, "number": number, **done})
        return bool(obeyed != before)


def _read(kept: object) -> dict[str, list[int]]:
    """Kind -> the numbers that were obeyed, the latest last. Earlier agents kept one of each kind."""
    found = kept if isinstance(kept, dict) else {}
    return {kind: numbers if isinstance(numbers, list) else [numbers] for kind, numbers in found.items()}


def _retry(updating: Updating) -> tuple[str, dict[str, Any]]:
    return "", {"pardoned": updating.pardon()}


def _cancel(updating: Updating) -> tuple[str, dict[str, Any]]:
    try:
        cancelled = updating.cancel("an operator")
    except Rejected as error:
        return error.code, {}
    first = cancelled[0]
    return "", {"model": first.model, "digest": first.digest, "version": first.version, **_further(cancelled)}


def _further(cancelled: tuple[Update, ...]) -> dict[str, Any]:
    return {"also": [f"{one.model} {one.version}" for one in cancelled[1:]]} if len(cancelled) > 1 else {}


def _renew(_updating: Updating) -> tuple[str, dict[str, Any]]:
    """Nothing is forgiven: having heard an order, the device asks for its certificate again at once."""
    return "", {}


_ACTS: dict[str, Callable[[Updating], tuple[str, dict[str, Any]]]] = {
    "retry": _retry,
    "cancel": _cancel,
    "renew": _renew,
}
