"""What an update took on the wire: bytes that came, and what deltas spared. Told with the update's events.

Kept in the store, so that it holds over restarts of the agent; of a courier that ended without an answer the last that it said
counts. It decides nothing: where it cannot be stored, the update goes on.
"""

from __future__ import annotations

import logging
from typing import Any

from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.store import Store

log = logging.getLogger(__name__)

_KEY = "fetched"
_SUMS = ("bytes", "delta_bytes", "patched_bytes")
_MOST_REASONS = 16


class Fetched:
    """See the module."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._received = 0

    def begin(self) -> None:
        """A courier sets out."""
        self._received = 0

    def take(self, said: dict[str, Any]) -> None:
        """A courier's line of progress."""
        received = said.get("received")
        if isinstance(received, int) and received > self._received:
            self._received = received

    def end(self, digest: str, size_bytes: int, answer: dict[str, Any] | None) -> None:
        """The courier is back with an answer, or without one.

        Args:
            digest: of the bundle; size_bytes: of its files.
        """
        answer = answer if answer is not None else {"bytes": self._received}
        before = self.of(digest)
        sums = {name: _number(before.get(name)) + _number(answer.get(name)) for name in _SUMS}
        refused = {str(code): _number(n) for code, n in dict(before.get("refused") or {}).items()}
        for code, n in list(dict(answer.get("refused") or {}).items())[:_MOST_REASONS]:
            refused[str(code)] = refused.get(str(code), 0) + _number(n)
        found = {"digest": digest, "size_bytes": size_bytes, **sums, "refused": refused}
        carried = _number(before.get("carried_files")) + _number(dict(answer.get("files") or {}).get("folder"))
        if carried:
            found["carried_files"] = carried
        try:
            self._store.put(_KEY, found)
        except Degraded as error:
            log.warning("bytes not noted", extra=kv(code=error.code, detail=error.detail))

    def forget(self) -> None:
        """It was confirmed, and told: should the bundle come once more, that is another update. Raises ``Degraded``."""
        self._store.put(_KEY, {})

    def of(self, digest: str) -> dict[str, Any]:
        """``bytes`` that came, ``size_bytes`` of the files, ``delta_bytes`` of those that came and ``patched_bytes`` that were made of them,
        ``refused`` {reason: files}, ``carried_files`` where some came from an imported folder; empty for a bundle of which nothing was fetched.
        """
        kept = dict(self._store.get(_KEY, {}))
        return {name: value for name, value in kept.items() if name != "digest"} if kept.get("digest") == digest else {}


def _number(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 53 else 0
