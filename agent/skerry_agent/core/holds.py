"""What holds an update back that is here, checked and staged: decided from values. Pure.

Held is only what would take the place of something that answers. A model of which nothing may answer (a first bundle, a forced floor
that stopped what served) is never held, and no way back is: the trial's, a person's, that of a crash loop.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from skerry_contract import opening

MOST_LOCKS = 64
MOST_CHARS = 200
NOTE_S = 60.0
"""What is left of a lock is stored so often: a reboot gives it back no more than this."""
_NAMED = 3
MOST_OF_A_USER = 16
"""So many locks of applications of one user: who may lock cannot keep all others from it."""


class Lock(msgspec.Struct, frozen=True, kw_only=True):
    """An application's word that this is no moment for another bundle. It is stored as it is.

    Attributes:
        owner: who took it; each has one. reason: in the words of its owner.
        for_s: how long it was taken for; until_s: its end in seconds since the boot with the id ``boot_id``.
        noted_s: when in that boot this was stored; None: when it was taken.
    """

    owner: str
    reason: str
    for_s: float
    boot_id: str
    until_s: float
    noted_s: float | None = None

    def left_s(self, boot_id: str, boot_s: float) -> float:
        """Seconds until it ends; 0 and below: it has. A reboot of the device leaves it what it had left when it was noted last."""
        if boot_id == self.boot_id:
            return self.until_s - boot_s
        return (self.for_s if self.noted_s is None else self.until_s - self.noted_s) - boot_s

    def noted(self, boot_id: str, boot_s: float) -> Lock:
        """The same lock, as it is to be stored now."""
        until_s = boot_s + self.left_s(boot_id, boot_s)
        return msgspec.structs.replace(self, boot_id=boot_id, until_s=until_s, noted_s=boot_s)


def live(locks: Iterable[Lock], boot_id: str, boot_s: float) -> tuple[Lock, ...]:
    """Those that have not ended, by owner: renewing one changes no word of what holds an update."""
    found = [lock for lock in locks if lock.left_s(boot_id, boot_s) > 0]
    return tuple(sorted(found, key=lambda lock: lock.owner))


def note_in_s(locks: Iterable[Lock], boot_id: str, boot_s: float) -> float:
    """In how many seconds live locks are to be noted again: when the first ends, or would be worth more after a reboot than it may be."""
    steps = (min(lock.left_s(boot_id, boot_s), max(1.0, min(NOTE_S, lock.for_s / 10))) for lock in locks)
    return min(steps, default=math.inf)


def of_user(uid: int) -> str:
    """How the owner of an application's lock ends, so that it says whose it is."""
    return f" (user {uid})"


def user_of(owner: str) -> str:
    """That end; empty where a person or program at the control socket took it."""
    name, opening_, rest = owner.rpartition(" (user ")
    return f"{opening_}{rest}" if name and rest[:-1].isdigit() and rest.endswith(")") else ""


def lock_fault(owner: Any, reason: Any, for_s: Any, most_s: float) -> str | None:
    """What is wrong with a lock that somebody wants; None where nothing is."""
    for name, text in (("owner", owner), ("reason", reason)):
        if not isinstance(text, str) or not text.strip() or len(text) > MOST_CHARS or not text.isprintable():
            return f"{name}: wanted 1 to {MOST_CHARS} printable characters, got {text!r}"
    if isinstance(for_s, bool) or not isinstance(for_s, (int, float)) or not math.isfinite(for_s) or not for_s > 0:
        return f"for_s: wanted seconds, more than 0, got {for_s!r}"
    if for_s > most_s:
        return f"for_s: wanted at most {most_s:g} (updates.lock_s of the configuration), got {for_s:g}"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Holders:
    """What may hold an update.

    Attributes:
        answers: whether something of the model may answer without it.
        locks: live ones.
        windows: of the group; empty for none. local: weekday (0: Monday) and minute of the day, None where that is not to be trusted.
        opens_at: before which nothing begins, seconds since 1970; 0 for at once. now_s: what time it is at least.
        lower: what would begin is of a lower version than what answers: whoever orders a way back means now.
        by_command: this device activates by a person's command only.
        ordered: a person ordered this bundle to be activated; despite_locks: locks or not.
    """

    answers: bool
    locks: tuple[Lock, ...] = ()
    windows: tuple[opening.Window, ...] = ()
    local: tuple[int, int] | None = None
    opens_at: int = 0
    now_s: float = 0.0
    lower: bool = False
    by_command: bool = False
    ordered: bool = False
    despite_locks: bool = False


def held(holders: Holders) -> str:
    """What holds it, in words without a time that runs; empty when nothing does."""
    if not holders.answers:
        return ""
    if holders.locks and not (holders.ordered and holders.despite_locks):
        named = [f"the lock of {lock.owner} to end ({lock.reason})" for lock in holders.locks[:_NAMED]]
        more = len(holders.locks) - len(named)
        return "; ".join([*named, f"{more} more locks"] if more > 0 else named)
    if holders.ordered:
        return ""
    if holders.by_command:
        return "a person's `skerry-agent activate` (updates.activate of the configuration)"
    if holders.now_s < holders.opens_at and not holders.lower:
        opens = dt.datetime.fromtimestamp(holders.opens_at, dt.UTC)
        unsure = ", by a clock that is set or a signed time" if holders.local is None else ""
        return f"its time, {opens:%Y-%m-%d %H:%M} UTC{unsure}"
    if holders.windows and not holders.lower:
        hours = opening.words(holders.windows)
        if holders.local is None:
            return f"a clock that is set: this device does not know the time, and its group updates {hours}"
        if not opening.is_open(holders.windows, *holders.local):
            return f"its group's hours by local time: {hours}"
    return ""


def stored(found: Mapping[str, Any]) -> tuple[Lock, ...]:
    """The locks of a stored table, owner -> fields."""
    return tuple(msgspec.convert(fields, Lock) for fields in found.values())
