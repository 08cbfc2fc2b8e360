"""What this device remembers of bundles that failed: how often and for what, and until when not to try again.

It lies in the durable state. How many failures are too many is ``core.lifecycle``'s, how long to wait ``core.backoff``'s.
"""

from __future__ import annotations

from collections.abc import Callable

from skerry_agent.clock import Clock
from skerry_agent.core import admission, backoff
from skerry_agent.core.lifecycle import Update
from skerry_agent.store import Store

_OF_THIS_DEVICE = frozenset(
    {"agent_too_old", "below_floor", "no_variant", "not_enough_disk", "not_enough_memory", "runtime_missing"}
)
"""Refusals that speak of this device: while they hold, it takes what the group document offers instead."""


class Failures:
    """Failures and waits by digest. ``draw``: uniform in [0, 1); ``scale``: of the waits."""

    def __init__(self, store: Store, clock: Clock, draw: Callable[[], float], scale: float) -> None:
        self._store = store
        self._clock = clock
        self._draw = draw
        self._scale = scale

    def penalise(self, update: Update) -> None:
        """Counts a failure under its penalty; the oftener the bundle failed, the longer it waits."""
        failures = self._store.get("failures", {})
        mine = failures.setdefault(update.digest, {})
        mine[update.penalty] = mine.get(update.penalty, 0) + 1
        waits = self._store.get("waits", {})
        tries = sum(mine.values())
        delay_s = backoff.delay_s("update", tries, self._draw(), scale=self._scale)
        waits[update.digest] = {
            "code": update.code, "boot_id": self._clock.boot_id, "until_s": self._clock.boot_s() + delay_s,
        }  # fmt: skip
        with self._store.transaction():
            self._store.put("failures", failures)
            self._store.put("waits", waits)

    def forgive(self, digest: str) -> None:
        """Nothing is held against the bundle any more: it was confirmed, or the fault was not its own."""
        with self._store.transaction():
            for name in ("failures", "waits"):
                kept = self._store.get(name, {})
                if kept.pop(digest, None) is not None:
                    self._store.put(name, kept)

    def was_said(self, update: Update) -> bool:
        """Whether saying it again is of no use. Remembers a refusal."""
        refused = update.code if update.state in ("revert", "idle") else ""
        known = self._store.get("recorded", {}).get(update.digest)
        if refused:
            self._store.put("recorded", {update.digest: refused})
        # A bundle that is refused again and again for the same reason is worth one line, not one per try.
        return update.attempt > 3 and (update.state == "fetch" or refused == known)

    def of(self, digest: str) -> dict[str, int]:
        """Penalty -> how often the bundle failed so."""
        return dict(self._store.get("failures", {}).get(digest, {}))

    def refused(self) -> tuple[set[str], set[str]]:
        """Digests not to try now: (for good or until a person clears it, until their wait is over)."""
        failures, waits = self._store.get("failures", {}), self._store.get("waits", {})
        spent = {digest for digest, mine in failures.items() if admission.exhausted(mine) is not None}
        held: set[str] = set()
        waiting: set[str] = set()
        for digest, wait in waits.items():
            if digest in spent or wait["boot_id"] != self._clock.boot_id or wait["until_s"] <= self._clock.boot_s():
                continue
            (held if wait["code"] in _OF_THIS_DEVICE else waiting).add(digest)
        return spent | held, waiting

    def next_try_s(self) -> float | None:
        """Seconds until the earliest wait of a bundle is over; None without any."""
        now = self._clock.boot_s()
        ends = [
            w["until_s"] - now for w in self._store.get("waits", {}).values() if w["boot_id"] == self._clock.boot_id
        ]
        ahead = [end for end in ends if end > 0]
        return min(ahead) if ahead else None

    def attempt_of(self, digest: str) -> int:
        """The number of the next try of a bundle, from 1."""
        return int(sum(self.of(digest).values())) + 1

    def pardon(self) -> int:
        """A person clears all failures. Returns how many bundles had some."""
        cleared = len(self._store.get("failures", {}))
        with self._store.transaction():
            for key in ("failures", "waits", "recorded"):
                self._store.delete(key)
        return cleared
