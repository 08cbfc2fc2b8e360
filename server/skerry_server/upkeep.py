"""The repository's upkeep beside its re-signing: versions that devices hold beyond this server's, and alerts for people.

A server that was restored from a backup signs versions that devices have seen; they refuse them as a rollback. Devices report what
they hold; where that is ahead, the online roles jump above it. What the offline roles lack only their holders can bring back
(``skerry restore``), and that, as every role that will expire, is an alert: in the API, the metrics, on the page, in the log, and
in the audit when it opens and when it closes.

A device can lie. A jump costs nothing but numbers, so it is bounded per step and in time, and what is beyond the bound is shown with
the device's name instead: of each role one report is remembered, and one within the bound goes before any beyond it, so that
a liar hides nobody. What a device said that is not enrolled any more is forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Engine, delete, select

from skerry_server import audit
from skerry_server.core import expiry
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from skerry_server.publication import OFFLINE_ROLES, Publication

log = logging.getLogger(__name__)

MOST_JUMP = 1_000_000
"""Versions that this server may be behind by: hundreds of years of re-signing, or months of a publication every ten seconds."""
JUMP_EVERY_MS = 60_000
_SUBJECT = "repository:alert"
ACTOR = "system:upkeep"
_a = t.ahead.c


def note_held(conn: Connection, held: Mapping[str, Mapping[str, Any]], now_ms: int) -> None:
    """Remembers what devices say they hold (device -> role -> version) where it is ahead of what is served."""
    heard = [
        (role, version, device)
        for device, versions in held.items()
        for role, version in versions.items()
        if role in expiry.LIVES_MS and isinstance(version, int) and 0 < version < 1 << 62
    ]
    if not heard:
        return
    served = {row.role: row.version for row in conn.execute(select(t.roles.c.role, t.roles.c.version))}

    def weight(role: str, version: int) -> tuple[bool, int]:
        return version <= served.get(role, 0) + MOST_JUMP, version

    best: dict[str, tuple[int, str]] = {}
    for role, version, device in heard:
        if role not in best or weight(role, version) > weight(role, best[role][0]):
            best[role] = version, device
    known = {row.role: row for row in conn.execute(select(t.ahead))}
    for role, (version, device) in best.items():
        there = known.get(role)
        if there is not None and there.device in held and held[there.device].get(role, 0) < there.version:
            # It does not say so any more: a lie, or a state folder that was made anew.
            conn.execute(delete(t.ahead).where(_a.role == role, _a.device == there.device))
            there = None
        if role not in served or version <= served[role]:
            continue
        if there is None or there.version <= served[role] or weight(role, version) > weight(role, there.version):
            values = {"version": version, "device": device, "at_ms": now_ms}
            added = queries.upsert(conn, t.ahead).values(role=role, **values)
            conn.execute(added.on_conflict_do_update(index_elements=["role"], set_=values))


def alerts(conn: Connection, now_ms: int, *, clock_behind: bool = False) -> tuple[expiry.Alert, ...]:
    """What a person must see to now. Nothing before the repository has trust. ``clock_behind``: see ``Publication``."""
    roles = {row.role: (row.version, row.expires_ms) for row in conn.execute(select(t.roles))}
    ahead = {row.role: (row.version, row.device) for row in conn.execute(select(t.ahead))}
    return expiry.alerts(roles, ahead, now_ms, clock_behind=clock_behind) if "timestamp" in roles else ()


class Upkeep:
    """See the module; called by one thread."""

    def __init__(self, engine: Engine, publication: Publication) -> None:
        self._engine = engine
        self._publication = publication
        self._jumped_ms = 0
        self._open: dict[str, str] | None = None

    def look(self, now_ms: int) -> None:
        """One look: catches up where devices are ahead, then says what opened and closed."""
        self._forget_gone()
        self._catch_up(now_ms)
        with reading(self._engine) as conn:
            due = alerts(conn, now_ms, clock_behind=self._publication.clock_behind)
            found = {f"{alert.role} {alert.code}": alert for alert in due}
            if self._open is None:
                self._open = _last_said(conn)
        opened = [alert for key, alert in found.items() if key not in self._open]
        closed = [key for key in self._open if key not in found]
        if not opened and not closed:
            return
        with writing(self._engine) as conn:
            for alert in opened:
                log.warning("alert role=%s code=%s text=%r do=%r", alert.role, alert.code, alert.text, alert.do)
                audit.record(
                    conn, at_ms=now_ms, actor=ACTOR, action="alert.open", subject=f"{_SUBJECT}:{alert.role}:{alert.code}",
                    after=alert.to_builtins(), reason=alert.text,
                )  # fmt: skip
            for key in closed:
                role, _, code = key.partition(" ")
                log.info("alert closed role=%s code=%s", role, code)
                audit.record(
                    conn, at_ms=now_ms, actor=ACTOR, action="alert.close", subject=f"{_SUBJECT}:{role}:{code}",
                    reason="it is as it should be",
                )  # fmt: skip
        self._open = {key: alert.text for key, alert in found.items()}

    def _forget_gone(self) -> None:
        enrolled = select(t.devices.c.id).where(t.devices.c.status == "enrolled")
        gone = _a.device.not_in(enrolled)
        with reading(self._engine) as conn:
            found = conn.execute(select(_a.role).where(gone)).first()
        if found is not None:
            with writing(self._engine) as conn:
                conn.execute(delete(t.ahead).where(gone))

    def _catch_up(self, now_ms: int) -> None:
        with reading(self._engine) as conn:
            rows = list(conn.execute(select(t.ahead)))
        if not rows:
            return
        status = self._publication.status()
        served = {role: int(found["version"]) for role, found in status.items()}
        done = {row.role: row.version for row in rows if row.version <= served.get(row.role, 0)}
        above = {
            row.role: int(row.version)
            for row in rows
            if row.role not in OFFLINE_ROLES
            and served.get(row.role, 0) < row.version <= served.get(row.role, 0) + MOST_JUMP
        }
        if above and now_ms - self._jumped_ms >= JUMP_EVERY_MS:
            self._jumped_ms = now_ms
            self._publication.jump(above, {row.role: str(row.device) for row in rows}, actor=ACTOR)
            done |= above
        if done:
            with writing(self._engine) as conn:
                for role, version in done.items():
                    conn.execute(delete(t.ahead).where(_a.role == role, _a.version <= version))


def _last_said(conn: Connection) -> dict[str, str]:
    """The alerts that are open as the audit has it, so that a restart opens none again."""
    c = t.audit.c
    query = select(c.subject, c.action, c.reason).where(c.subject.like(f"{_SUBJECT}:%")).order_by(c.id)
    found: dict[str, str] = {}
    for row in conn.execute(query):
        _, _, role, code = row.subject.split(":")
        if row.action == "alert.open":
            found[f"{role} {code}"] = row.reason
        else:
            found.pop(f"{role} {code}", None)
    return found
