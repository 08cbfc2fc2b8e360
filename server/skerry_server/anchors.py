"""When it was, on the server's clock: a device's instants by what is known of the boot that they are of.

A device without a battery, a network or both has a wall clock that may be wrong by years; time since boot is right within its boot. So an
instant is taken

* by its own wall clock, when the device called it synchronised (``device``);
* else by a synchronised instant of the same boot, before or after it (``boot``);
* else by when the server heard the device speak in that boot (``heard``): the least of what lay between time of receipt and time since
  boot, which is off by the network's delay at most;
* else by the time of receipt (``received``): of an earlier boot nothing is known but that it is over.

A wall clock more than 400 days back or a minute ahead is not believed, whatever the device calls it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from skerry_contract import window as w
from sqlalchemy import Connection, delete, select

from skerry_server.db import queries
from skerry_server.db import tables as t

AHEAD_MS = 60_000
OLDEST_MS = 400 * 86_400_000
MOST_BOOTS = 64
"""Of one device; those that were heard of last are kept."""
_MOVED_MS = 1000
"""An anchor that moved by less is not written again."""
_BOOT = re.compile("[0-9a-f]{32}")
How = Literal["device", "boot", "heard", "received"]


@dataclass(slots=True)
class _Anchor:
    """What to add to milliseconds since boot."""

    synced_ms: int | None = None
    heard_ms: int | None = None
    last_ms: int = 0
    touched: bool = False


class Anchors:
    """The boots of some devices, within one transaction. ``now_ms``: when its messages were received."""

    def __init__(self, connection: Connection, now_ms: int) -> None:
        self._connection = connection
        self._now_ms = now_ms
        self._boots: dict[tuple[str, str], _Anchor] = {}

    def load(self, devices: Iterable[str]) -> None:
        """Reads what is known of them."""
        b = t.boots.c
        query = select(b.device, b.boot_id, b.synced_ms, b.heard_ms, b.last_ms).where(b.device.in_(sorted(devices)))
        for device, boot_id, synced_ms, heard_ms, last_ms in self._connection.execute(query):
            self._boots[device, boot_id] = _Anchor(synced_ms, heard_ms, last_ms)

    def heard(self, device: str, at: w.Instant) -> None:
        """A device says what time it is for it, now."""
        anchor = self._of(device, at)
        if anchor is None:
            return
        heard_ms = self._now_ms - at.boot_ns // 1_000_000
        if anchor.heard_ms is None or heard_ms < anchor.heard_ms:
            anchor.heard_ms, anchor.touched = heard_ms, True
        self.saw(device, at)

    def saw(self, device: str, at: w.Instant) -> None:
        """An instant that a device wrote down at some time."""
        if not at.synced or not _believed(at.wall_ms, self._now_ms):
            return
        anchor = self._of(device, at)
        if anchor is None:
            return
        synced_ms = at.wall_ms - at.boot_ns // 1_000_000
        if anchor.synced_ms is None or abs(anchor.synced_ms - synced_ms) > _MOVED_MS:
            anchor.synced_ms, anchor.touched = synced_ms, True

    def place(self, device: str, at: w.Instant, *, received_ms: int | None = None) -> tuple[int, How]:
        """(milliseconds since 1970, how it is known); never after the time of receipt, which is now unless it is said."""
        now_ms = self._now_ms if received_ms is None else received_ms
        if at.synced and _believed(at.wall_ms, now_ms):
            return min(at.wall_ms, now_ms), "device"
        anchor = self._boots.get((device, at.boot_id))
        if anchor is not None:
            found: tuple[tuple[int | None, How], ...] = ((anchor.synced_ms, "boot"), (anchor.heard_ms, "heard"))
            for offset_ms, how in found:
                if offset_ms is not None and _believed(ms := offset_ms + at.boot_ns // 1_000_000, now_ms):
                    return min(ms, now_ms), how
        return now_ms, "received"

    def _of(self, device: str, at: w.Instant) -> _Anchor | None:
        if not _BOOT.fullmatch(at.boot_id) or not 0 <= at.boot_ns < 1 << 63:
            return None
        return self._boots.setdefault((device, at.boot_id), _Anchor())

    def store(self) -> None:
        """Writes what is new."""
        rows = []
        for (device, boot_id), anchor in self._boots.items():
            if anchor.touched:
                anchor.last_ms = self._now_ms
                known = {"synced_ms": anchor.synced_ms, "heard_ms": anchor.heard_ms, "last_ms": self._now_ms}
                rows.append({"device": device, "boot_id": boot_id, **known})
        if not rows:
            return
        fresh = queries.upsert(self._connection, t.boots)
        moved = {name: fresh.excluded[name] for name in ("synced_ms", "heard_ms", "last_ms")}
        self._connection.execute(fresh.on_conflict_do_update(index_elements=["device", "boot_id"], set_=moved), rows)
        for device in {str(row["device"]) for row in rows}:
            self._forget_old(device)

    def _forget_old(self, device: str) -> None:
        boots = sorted((anchor.last_ms, boot) for (other, boot), anchor in self._boots.items() if other == device)
        if len(boots) > MOST_BOOTS:
            gone = [boot for _, boot in boots[: len(boots) - MOST_BOOTS]]
            b = t.boots.c
            self._connection.execute(delete(t.boots).where(b.device == device, b.boot_id.in_(gone)))


def _believed(ms: int, now_ms: int) -> bool:
    return now_ms - OLDEST_MS <= ms <= now_ms + AHEAD_MS
