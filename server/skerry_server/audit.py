"""The record of every change: who, what, before, after, why; hash-chained, so that a removed or altered row shows.

Each row's ``chain`` is the sha256 of the previous row's chain and the row's own canonical content. Rows are written in the
transaction of the change they describe: there is no change without its row, and no row without its change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from skerry_contract import canonical
from sqlalchemy import Connection, insert, select, text

from skerry_server.db import tables as t

GENESIS = "0" * 64
_LOCK_KEY = 0x736B6572727941


def link(previous: str, row: Mapping[str, Any]) -> str:
    """The chain value of a row: sha256 over the previous chain and the row's content, both in canonical JSON."""
    content = {name: row[name] for name in ("at_ms", "actor", "action", "subject", "before", "after", "reason")}
    return hashlib.sha256(previous.encode() + b"\0" + canonical.encode(content)).hexdigest()


def record(
    conn: Connection,
    *,
    at_ms: int,
    actor: str,
    action: str,
    subject: str,
    before: Any = None,
    after: Any = None,
    reason: str = "",
) -> None:
    """Adds a row in the caller's transaction, which must be a writing one: two at once would take the same place.

    Args:
        actor: ``token:<name>``, ``device:<id>`` or ``system:<part>``.
        action: e.g. ``rollout.start``; subject: e.g. ``rollout:r-12``.
        before, after: JSON builtins without secrets.
    """
    if conn.dialect.name == "postgresql":
        # Two writers at once would both follow the same row. On SQLite there is one writer.
        conn.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    last = conn.execute(select(t.audit.c.chain).order_by(t.audit.c.id.desc()).limit(1)).scalar()
    row = {
        "at_ms": at_ms,
        "actor": actor[:100],
        "action": action,
        "subject": subject[:200],
        "before": before,
        "after": after,
        "reason": reason,
    }
    conn.execute(insert(t.audit).values(**row, chain=link(last or GENESIS, row)))


def rows(conn: Connection, *, after: int, limit: int) -> list[dict[str, Any]]:
    """Rows with an id above ``after``, oldest first."""
    query = select(t.audit).where(t.audit.c.id > after).order_by(t.audit.c.id).limit(limit)
    return [dict(row) for row in conn.execute(query).mappings()]


def last(conn: Connection, subject: str) -> dict[str, Any] | None:
    """Who changed a thing last, what and when; None when no row is about it."""
    c = t.audit.c
    query = select(c.at_ms, c.actor, c.action).where(c.subject == subject[:200]).order_by(c.id.desc()).limit(1)
    row = conn.execute(query).mappings().first()
    return None if row is None else dict(row)


def about(conn: Connection, subject: str, *, action: str = "", limit: int) -> list[dict[str, Any]]:
    """The newest rows about a thing, newest first; only of one action when it is named."""
    c = t.audit.c
    query = select(t.audit).where(c.subject == subject[:200]).order_by(c.id.desc()).limit(limit)
    if action:
        query = query.where(c.action == action)
    return [dict(row) for row in conn.execute(query).mappings()]


def first_break(all_rows: Iterable[Mapping[str, Any]]) -> int | None:
    """The id of the first row whose chain does not follow from the row before; None when all do.

    A cut at the end does not show in the rows alone: keep the newest chain value elsewhere to tell.
    """
    previous = GENESIS
    for row in all_rows:
        if link(previous, row) != row["chain"]:
            return int(row["id"])
        previous = row["chain"]
    return None
