"""What this device remembers of bundles that failed: how often and for what, and until when not to try again.

It lies in the durable state. How many failures are too many is ``core.lifecycle``'s, how long to wait ``core.backoff``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skerry_agent.clock import Clock
from skerry_agent.core import admission, backoff
from skerry_agent.core.lifecycle import ATTEMPTS, MOST_MOVES, Update
from skerry_agent.store import Store

OF_THIS_DEVICE = frozenset(
    {
        "agent_too_old",
        "below_floor",
        "encryption_key_differs",
        "encryption_key_unusable",
        "must_pass_first",
        "no_memory_folder",
        "no_variant",
        "not_enough_disk",
        "not_enough_memory",
        "runtime_missing",
    }
)
"""Refusals that speak of this device: while they hold, it takes what the group document offers instead."""

_AFTER_BOOT_S = 300.0
_MOST_KEPT = 100
"""Bundles of which it is remembered how often they moved, the latest."""


class Failures:
    """Failures and waits by digest. ``draw``: uniform in [0, 1); ``scale``: of the waits."""

    def __init__(self, store: Store, clock: Clock, draw: Callable[[], float], scale: float) -> None:
        self._store = store
        self._clock = clock
        self._draw = draw
        self._scale = scale

    def penalise(self, update: Update) -> None:
        """Counts a failure under its penalty; the oftener the bundle failed, the longer it waits; for a mirror by what mirrors did."""
        failures = self._store.get("failures", {})
        mine = failures.setdefault(update.digest, {})
        mine[update.penalty] = mine.get(update.penalty, 0) + 1
        waits = self._store.get("waits", {})
        of_mirror = update.code == "mirror_wrong"
        # Each cause by its own: a week on the wrong network is no reason to wait hours for one wrong file of a mirror.
        tries = mine[update.penalty] if of_mirror else sum(mine.values()) - mine.get("mirror_wrong", 0)
        cause = "mirror" if of_mirror else "update"
        delay_s = backoff.delay_s(cause, tries, self._draw(), scale=self._scale)
        waits[update.digest] = {
            "code": update.code, "boot_id": self._clock.boot_id, "until_s": self._clock.boot_s() + delay_s, "delay_s": delay_s,
        }  # fmt: skip
        with self._store.transaction():
            self._store.put("failures", failures)
            self._store.put("waits", waits)

    def hold(self, digest: str, code: str) -> None:
        """Does not try a bundle again before a person's pardon; ``code`` is one of ``ATTEMPTS``."""
        failures = self._store.get("failures", {})
        failures.setdefault(digest, {})[code] = ATTEMPTS[code]
        self._store.put("failures", failures)

    def forgive(self, digest: str) -> None:
        """Nothing is held against the bundle any more: it was confirmed, or the fault was not its own."""
        with self._store.transaction():
            for name in ("failures", "waits", "moves"):
                kept = self._store.get(name, {})
                if kept.pop(digest, None) is not None:
                    self._store.put(name, kept)

    def was_said(self, update: Update) -> bool:
        """Whether saying it again is of no use."""
        refused = update.code if update.state in ("revert", "idle") else ""
        known = self._store.get("recorded", {}).get(update.digest)
        # A bundle that is refused again and again for the same reason is worth one line, not one per try. What counts towards a bar is
        # said each time: that ends, and a rollout goes by how often it was.
        again = refused == known and update.penalty not in ATTEMPTS
        return update.attempt > 3 and (update.state == "fetch" or again)

    def said(self, update: Update) -> None:
        """Remembers what it was refused for, once that was said to its end: of a word that stopped at the way home nobody would know the rest."""
        if update.state == "idle" and update.code:
            self._store.put("recorded", {update.digest: update.code})

    def of(self, digest: str) -> dict[str, int]:
        """Penalty -> how often the bundle failed so."""
        return dict(self._store.get("failures", {}).get(digest, {}))

    def spent(self) -> set[str]:
        """Digests that are not tried again before a person clears it."""
        moved = {digest for digest, moves in self._store.get("moves", {}).items() if moves > MOST_MOVES}
        return moved | {
            digest for digest, mine in self._store.get("failures", {}).items() if admission.exhausted(mine) is not None
        }

    def refused(self) -> tuple[set[str], set[str]]:
        """Digests not to try now: (in whose stead another is taken, until their wait is over)."""
        spent = self.spent()
        held: set[str] = set()
        waiting: set[str] = set()
        for digest, wait in self._store.get("waits", {}).items():
            if digest in spent or self._left_s(wait) <= 0:
                continue
            (held if wait["code"] in OF_THIS_DEVICE else waiting).add(digest)
        return spent | held, waiting

    def may_come(self) -> set[str]:
        """Bundles that failed and will be tried again: what is here of them is worth its room."""
        waits = self._store.get("waits", {})
        return {digest for digest, wait in waits.items() if self._left_s(wait) > 0} - self.spent()

    def next_try_s(self) -> float | None:
        """Seconds until the earliest wait of a bundle is over; None without any."""
        ahead = [left_s for wait in self._store.get("waits", {}).values() if (left_s := self._left_s(wait)) > 0]
        return min(ahead) if ahead else None

    def wait_s(self, digest: str) -> float:
        """Seconds until this bundle may be tried again; 0 when it need not wait."""
        wait = self._store.get("waits", {}).get(digest)
        return 0.0 if wait is None else max(0.0, self._left_s(wait))

    def _left_s(self, wait: dict[str, Any]) -> float:
        """What is left of a wait. A restart of the device does not end it: it begins anew, by a clock that nobody turns.

        But no longer than ``_AFTER_BOOT_S``: a device that is never on for as long as a long wait would not try again at all.
        """
        now_s = self._clock.boot_s()
        if wait["boot_id"] == self._clock.boot_id:
            return float(wait["until_s"]) - now_s
        return min(float(wait.get("delay_s", 0.0)), _AFTER_BOOT_S * self._scale) - now_s

    def rested(self, update: Update) -> None:
        """Keeps how often a bundle moved, for its next attempt; see ``lifecycle.MOST_MOVES``."""
        if update.state != "idle" or not update.digest or update.waits:
            return
        moves = self._store.get("moves", {})
        if moves.pop(update.digest, 0) != update.moves:
            newest = list(moves.items())[-_MOST_KEPT:]
            # Of what was pardoned since, nothing is kept.
            now = {update.digest: update.moves} if update.moves else {}
            self._store.put("moves", {**dict(newest), **now})

    def moves_of(self, digest: str) -> int:
        """How often it moved in all its attempts so far."""
        return int(self._store.get("moves", {}).get(digest, 0))

    def attempt_of(self, digest: str) -> int:
        """The number of the next try of a bundle, from 1."""
        return int(sum(self.of(digest).values())) + 1

    def hurry(self, code: str = "") -> None:
        """What waits for its next try (of those that failed for ``code``, where there is one) waits no more. How often it may be tried stays."""
        kept = {digest: wait for digest, wait in self._store.get("waits", {}).items() if code and wait["code"] != code}
        self._store.put("waits", kept)

    def pardon(self) -> int:
        """A person clears all failures. Returns how many bundles had some."""
        cleared = len({*self._store.get("failures", {}), *self._store.get("moves", {})})
        with self._store.transaction():
            for key in ("failures", "waits", "moves", "recorded"):
                self._store.delete(key)
        return cleared
