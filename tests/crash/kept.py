"""What a device must still know after a cut: why bundles failed and how often, what was ordered, who holds updates back, floors.

Compared is what the store had on disk before the cut (``Kept`` of a point behind a synchronisation) with what it has once the device is up
again. A bundle whose attempts were used up, by what stood on disk, must not be taken up again; one whose end is told must be counted.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skerry_agent.core.admission import exhausted
from skerry_agent.core.lifecycle import ATTEMPTS
from skerry_agent.slots import read_pointers
from skerry_contract import ids, wire

_UNDER_WAY = frozenset({"fetch", "verify", "stage", "ready", "prove", "trial"})


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Values of the durable state.

    Attributes:
        update: as stored; empty before the first.
        failures: digest -> penalty -> how often; waits: digest -> the reason of its wait.
        locks: owners that hold updates back.
        obeyed: kind of order -> the number obeyed last, or all that is noted of it.
        floors, forced: model -> version.
        activates: the digest that a person wants to begin in spite of what holds it; empty for none.
        way_back: the digest that a person gave up, or a crash loop, while another update was under way; empty for none.
        confirmed: digests that the pointer file calls confirmed; empty where it was not looked at.
    """

    update: Mapping[str, Any] = field(default_factory=dict)
    failures: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    waits: Mapping[str, str] = field(default_factory=dict)
    locks: frozenset[str] = frozenset()
    obeyed: Mapping[str, Any] = field(default_factory=dict)
    floors: Mapping[str, str] = field(default_factory=dict)
    forced: Mapping[str, str] = field(default_factory=dict)
    activates: str = ""
    way_back: str = ""
    confirmed: frozenset[str] = frozenset()

    @property
    def penalty(self) -> str:
        """What the update's end counts under; empty where it does not count."""
        update = self.update
        if update.get("state") not in ("idle", "revert"):
            return ""
        name = f"{update['code']}@boot" if update["at_boot"] else str(update["code"])
        return name if name in ATTEMPTS else ""

    def spent(self, *, told: bool) -> set[str]:
        """Digests that must not be tried again before a person's word; ``told``: by the stored end of the update as well."""
        counts = {digest: dict(mine) for digest, mine in self.failures.items()}
        if told and self.penalty:
            mine = counts.setdefault(self.update["digest"], {})
            mine.setdefault(self.penalty, 1)
        return {digest for digest, mine in counts.items() if exhausted(mine) is not None}


def kept(path: Path) -> Kept:
    """What a store holds; nothing of one that is not there or has no tables yet."""
    if not path.exists():
        return Kept()
    database = sqlite3.connect(path, timeout=20)
    try:
        rows = database.execute("SELECT key, value FROM state").fetchall()
    except sqlite3.OperationalError:
        return Kept()
    finally:
        database.close()
    state = {key: json.loads(value) for key, value in rows}
    slots = path.parent / "slots"
    pointers = read_pointers(slots) if slots.is_dir() else {}
    return Kept(
        update=state.get("update", {}),
        failures=state.get("failures", {}),
        waits={digest: wait["code"] for digest, wait in state.get("waits", {}).items()},
        locks=frozenset(state.get("locks", {})),
        obeyed=state.get("obeyed", {}),
        floors=state.get("floors", {}),
        forced=state.get("forced", {}),
        activates=state.get("activate", {}).get("digest", ""),
        way_back=state.get("way_back", {}).get("digest", ""),
        confirmed=frozenset(mine.confirmed.digest for mine in pointers.values() if mine.confirmed is not None),
    )


def faults(
    before: Kept, now: Kept, told: Collection[wire.Event], *, pardoned: bool, released: Collection[str]
) -> list[str]:
    """What was forgotten, or made up.

    Args:
        before: on disk before the cut; ``now``: of the device that is up again.
        told: its events since.
        pardoned: a person may have cleared all failures meanwhile.
        released: owners whose locks may have ended meanwhile.
    """
    found = [] if pardoned else _of_failures(before, now, told)
    if gone := before.locks - now.locks - set(released):
        found.append(f"locks are gone: {sorted(gone)}")
    if gone := set(before.obeyed) - set(now.obeyed):
        found.append(f"orders that were obeyed are forgotten: {sorted(gone)}")
    for name in ("floors", "forced"):
        after = getattr(now, name)
        lower = {
            model: (version, after.get(model, ""))
            for model, version in getattr(before, name).items()
            if model not in after or ids.version_key(after[model]) < ids.version_key(version)
        }
        if lower:
            found.append(f"{name} fell: {lower}")
    return found + _of_orders(before, now, told)


def _of_orders(before: Kept, now: Kept, told: Collection[wire.Event]) -> list[str]:
    """Of what a person ordered and the device could not do at once."""
    found = []
    if before.way_back and now.way_back != before.way_back and before.way_back in now.confirmed:
        found.append(f"a way back from {before.way_back[:12]} is forgotten, and it is confirmed")
    states = {
        event.data["state"] for event in told if event.name == "update" and event.data.get("digest") == before.activates
    }
    lies = now.update.get("state") == "ready" and now.update["digest"] == before.activates
    if before.activates and lies and states <= {"ready"} and now.activates != before.activates:
        found.append(f"the order to begin {before.activates[:12]} is forgotten")
    return found


def _of_failures(before: Kept, now: Kept, told: Collection[wire.Event]) -> list[str]:
    found = []
    confirmed = {
        event.data["digest"] for event in told if event.name == "update" and "confirmed" in event.data["state"]
    }
    if "confirmed" in now.update.get("state", ""):
        confirmed.add(now.update["digest"])
    for digest, mine in before.failures.items():
        counts = now.failures.get(digest, {})
        less = {penalty: (n, counts.get(penalty, 0)) for penalty, n in mine.items() if counts.get(penalty, 0) < n}
        if less and digest not in confirmed:
            found.append(f"failures of {digest[:12]} are forgotten: {less}")
    ended = now.update.get("digest", "")
    if now.penalty and not now.failures.get(ended, {}).get(now.penalty):
        found.append(f"{now.update['version']} ended by {now.penalty}, and that does not count: {dict(now.failures)}")
    if now.penalty and ended not in now.waits:
        found.append(f"{now.update['version']} ended by {now.penalty}, and does not wait")
    spent = before.spent(told=True)
    again = {
        (event.data["version"], event.data["state"])
        for event in told
        if event.name == "update" and event.data.get("digest") in spent and event.data["state"] in _UNDER_WAY
    }
    if now.update.get("digest") in spent and now.update["state"] in _UNDER_WAY:
        again.add((now.update["version"], now.update["state"]))
    if again:
        found.append(f"taken up again without a person's word: {sorted(again)}")
    for digest, mine in now.failures.items():
        most = {penalty: ATTEMPTS[penalty] for penalty in mine if penalty in ATTEMPTS}
        if over := {penalty: mine[penalty] for penalty, limit in most.items() if mine[penalty] > limit}:
            found.append(f"more attempts of {digest[:12]} than it has: {over}")
    return found
