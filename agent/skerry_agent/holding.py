"""Update locks, and everything else that holds a staged update back; a person's order to go on.

Applications take locks through the control socket (``skerry-agent lock``) or their own (``sdk.lock_updates``); each has an owner, a reason and an end. A lock delays the
moment in which another bundle begins to answer, and nothing else: what is fetched is fetched, what must stop stops
(``core.holds`` says what is never held). Locks outlive the agent and a reboot of the device, with what is left of them. A person's order to
activate counts for what lies ready, and ends with it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import msgspec
from skerry_contract import ids, opening

from skerry_agent import localtime
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.control import Answer
from skerry_agent.core import holds
from skerry_agent.core.lifecycle import Update
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.slots import Slots
from skerry_agent.store import Store

log = logging.getLogger(__name__)

_LOCKS, _ORDERED = "locks", "activate"


class Holding:
    """See the module.

    Args:
        windows: of the group.
        opens_at: when an update of a model to a digest may begin, by the group's document; seconds since 1970.

    Attributes:
        begins: what takes over right now, which no lock holds any more; empty for nothing.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        slots: Slots,
        clock: Clock,
        *,
        windows: Callable[[], tuple[opening.Window, ...]],
        opens_at: Callable[[str, str], int],
    ) -> None:
        self._config = config
        self._store = store
        self._slots = slots
        self._clock = clock
        self._windows = windows
        self._opens_at = opens_at
        self._note_at_s = float("-inf")
        self.begins: Callable[[], str] = lambda: ""

    def configure(self, config: Config) -> None:
        """Goes on with another configuration."""
        self._config = config

    def why(self, update: Update) -> str:
        """What holds the update, in words; empty when nothing does."""
        ordered = self._store.get(_ORDERED, {})
        answering = self._slots.answering(update.model)
        local = localtime.now(self._config, self._clock)
        mine = ordered if ordered.get("digest") == update.digest else {}
        return holds.held(
            holds.Holders(
                answers=answering is not None,
                locks=self._live(),
                windows=self._windows(),
                local=local,
                opens_at=self._opens_at(update.model, update.digest),
                # What was signed is past, whatever this clock says.
                now_s=self._clock.lower_bound_s if local is None else self._clock.now_s(),
                lower=answering is not None and ids.version_key(update.version) < ids.version_key(answering.version),
                by_command=self._config.updates.activate == "command",
                ordered=bool(mine),
                despite_locks=bool(mine.get("despite_locks")),
            )
        )

    def order(self, update: Update, *, despite_locks: bool) -> str:
        """A person wants this update now. Returns what still holds it; empty when nothing does."""
        self._store.put(_ORDERED, {"digest": update.digest, "despite_locks": despite_locks})
        return self.why(update)

    def settled(self, update: Update) -> None:
        """In the transaction that stores an update: a person's order is over with the bundle that it was for, unless that only made way."""
        going_on = update.state not in ("trial", "revert") and not update.resting
        if going_on or (update.state in ("revert", "idle") and update.code == "yielded"):
            return
        if self._store.get(_ORDERED, {}).get("digest") == update.digest:
            self._store.delete(_ORDERED)

    def tick(self) -> None:
        """Locks that ended are struck out, and of the others it is noted what is left: neither comes back to life at a boot."""
        now = self._clock
        if now.boot_s() < self._note_at_s:
            return
        try:
            kept = {one.owner: one for one in self._live()}
            if kept or self._store.get(_LOCKS, {}):
                self._put(kept)
            else:
                self._note_at_s = math.inf
        except Degraded as error:
            self._note_at_s = now.boot_s() + holds.NOTE_S
            log.warning("locks not noted", extra=kv(code=error.code, detail=error.detail))

    def _live(self) -> tuple[holds.Lock, ...]:
        return holds.live(holds.stored(self._store.get(_LOCKS, {})), self._clock.boot_id, self._clock.boot_s())

    def status(self) -> list[dict[str, Any]]:
        """The live locks: owner, reason, for_s, left_s."""
        now = self._clock
        return [
            {"owner": one.owner, "reason": one.reason, "for_s": one.for_s, "left_s": one.left_s(now.boot_id, now.boot_s())}
            for one in self._live()
        ]  # fmt: skip

    async def lock(self, body: dict[str, Any]) -> Answer:
        """``POST /skerry/v1/lock`` with ``owner``, ``reason`` and ``for_s``. See ``take``."""
        return self.take(body.get("owner"), body.get("reason"), body.get("for_s"))

    def take(self, owner: Any, reason: Any, for_s: Any) -> Answer:
        """Takes a lock. A second one of an owner takes the first one's place."""
        fault = holds.lock_fault(owner, reason, for_s, self._config.updates.lock_s)
        if fault is not None:
            return Answer(400, {"error": fault, "code": "bad_lock"})
        kept = {one.owner: one for one in self._live()}
        user = holds.user_of(str(owner))
        of_user = sum(holds.user_of(one) == user for one in kept) if user else 0
        if owner not in kept and (len(kept) >= holds.MOST_LOCKS or of_user >= holds.MOST_OF_A_USER):
            error = f"{of_user or len(kept)} owners hold locks, which is the most: one of them unlocks, or ends"
            return Answer(409, {"error": error, "code": "too_many_locks"})
        begins = self.begins()
        if begins:
            # Who is told that it holds must be able to count on it.
            error = f"{begins} takes over right now: ask again in a moment"
            return Answer(409, {"error": error, "code": "update_begins"})
        wanted = float(for_s or 0.0)
        kept[str(owner)] = holds.Lock(
            owner=str(owner), reason=str(reason), for_s=wanted, boot_id=self._clock.boot_id,
            until_s=self._clock.boot_s() + wanted,
        )  # fmt: skip
        try:
            self._put(kept)
        except Degraded as error:
            return Answer(409, {"error": f"not locked: {error.detail}", "code": error.code})
        log.info("updates locked", extra=kv(owner=owner, reason=reason, for_s=for_s))
        return Answer(200, {"ok": True, "owner": owner, "locks": self.status()})

    async def unlock(self, body: dict[str, Any]) -> Answer:
        """``POST /skerry/v1/unlock`` with ``owner``. See ``give_back``."""
        return self.give_back(body.get("owner"))

    def give_back(self, owner: Any) -> Answer:
        """Ends a lock."""
        kept = {one.owner: one for one in self._live()}
        if owner not in kept:
            known = ", ".join(sorted(kept)) or "nobody"
            return Answer(409, {"error": f"{owner!r} holds no lock; {known} does", "code": "not_locked"})
        del kept[str(owner)]
        try:
            self._put(kept)
        except Degraded as error:
            return Answer(409, {"error": f"not unlocked: {error.detail}", "code": error.code})
        log.info("updates unlocked", extra=kv(owner=owner))
        return Answer(200, {"ok": True, "owner": owner, "locks": self.status()})

    async def list_locks(self, _body: dict[str, Any]) -> Answer:
        """``GET /skerry/v1/locks``."""
        return Answer(200, {"locks": self.status()})

    def _put(self, locks: dict[str, holds.Lock]) -> None:
        boot_id, boot_s = self._clock.boot_id, self._clock.boot_s()
        noted = {owner: lock.noted(boot_id, boot_s) for owner, lock in locks.items()}
        self._store.put(_LOCKS, {owner: msgspec.to_builtins(lock) for owner, lock in noted.items()})
        self._note_at_s = boot_s + holds.note_in_s(noted.values(), boot_id, boot_s)
