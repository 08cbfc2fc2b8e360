"""Statements that ingest, the API and the orchestrator share: named, typed, and paged by key.

Every function takes an open connection and commits nothing. Lists are paged by keyset: pass the last key of a page as
``after`` to get the next one; no page gets slower with its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, func, or_, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from skerry_server.db import tables as t

MAX_PAGE = 1000
_SESSION = "mqtt"


def upsert(connection: Connection, table: Any) -> Any:
    """``INSERT`` of the connection's dialect, which has ``on_conflict_do_update`` and ``on_conflict_do_nothing``."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


# --- bells and the server's session --------------------------------------------------------------------------------------


def next_server_birth(connection: Connection, now_ms: int) -> int:
    """Counts one more session of this server with its broker, which begins now, and returns its number."""
    insert = upsert(connection, t.server_sessions).values(name=_SESSION, birth=1, since_ms=now_ms)
    values = {"birth": t.server_sessions.c.birth + 1, "since_ms": now_ms}
    grown = insert.on_conflict_do_update(index_elements=["name"], set_=values)
    return int(connection.execute(grown.returning(t.server_sessions.c.birth)).scalar_one())


def server_session_since(connection: Connection) -> int:
    """When the server's last session with its broker began; 0 before the first."""
    return int(connection.execute(select(t.server_sessions.c.since_ms)).scalar() or 0)


def bump_bell(connection: Connection, target: str) -> int:
    """Raises the version of a bell (``d/<device>`` or ``g/<group>``) and returns it; publish it after the commit."""
    insert = upsert(connection, t.bells).values(target=target, version=1, rung_version=0)
    grown = insert.on_conflict_do_update(index_elements=["target"], set_={"version": t.bells.c.version + 1})
    return int(connection.execute(grown.returning(t.bells.c.version)).scalar_one())


def bells(connection: Connection, *, after: str = "", limit: int = MAX_PAGE) -> Sequence[Row[Any]]:
    """Bells by target: rows (target, version, rung_version)."""
    return connection.execute(
        select(t.bells).where(t.bells.c.target > after).order_by(t.bells.c.target).limit(limit)
    ).fetchall()


def mark_rung(connection: Connection, rung: Iterable[tuple[str, int]]) -> None:
    """Notes that the broker has these (target, version); an older version changes nothing."""
    for target, version in rung:
        connection.execute(
            update(t.bells)
            .where(t.bells.c.target == target, t.bells.c.rung_version < version)
            .values(rung_version=version)
        )


# --- devices -------------------------------------------------------------------------------------------------------------


def enrolled_keys(connection: Connection) -> list[tuple[str, str]]:
    """(id, sha256 of its public key) of every device that may connect to the broker, by id.

    The digest is empty while the device's certificate is one from before certificates named their key.
    """
    c = t.devices.c
    query = select(c.id, c.public_key_sha256, c.certificate_names_key).where(c.status == "enrolled").order_by(c.id)
    return [(row.id, row.public_key_sha256 if row.certificate_names_key else "") for row in connection.execute(query)]


def devices_page(
    connection: Connection,
    *,
    group: str | None = None,
    online: bool | None = None,
    after: str = "",
    limit: int = 100,
) -> Sequence[Row[Any]]:
    """Devices by id: all columns of the table."""
    query = select(t.devices).where(t.devices.c.id > after)
    if group is not None:
        query = query.where(t.devices.c.group == group)
    if online is not None:
        query = query.where(t.devices.c.online == online)
    return connection.execute(query.order_by(t.devices.c.id).limit(_page(limit))).fetchall()


def events_page(
    connection: Connection,
    *,
    device: str | None = None,
    name: str | None = None,
    after: int = 0,
    limit: int = 100,
) -> Sequence[Row[Any]]:
    """Events by id, oldest first: all columns of the table."""
    query = select(t.events).where(t.events.c.id > after)
    if device is not None:
        query = query.where(t.events.c.device == device)
    if name is not None:
        query = query.where(t.events.c.name == name)
    return connection.execute(query.order_by(t.events.c.id).limit(_page(limit))).fetchall()


# --- telemetry -----------------------------------------------------------------------------------------------------------

COUNT_KEY = ("device", "model", "bundle", "variant", "arm", "rollout", "stage")
_COUNTED = ("ok", "invalid", "failed", "shed", "rows", "windows", "labelled", "wrong")


def counts_page(
    connection: Connection,
    *,
    model: str | None = None,
    bundle: str | None = None,
    device: str | None = None,
    after: tuple[Any, ...] | None = None,
    limit: int = MAX_PAGE,
) -> Sequence[Row[Any]]:
    """What devices counted, by key: the columns ``COUNT_KEY``, then ok invalid failed shed rows windows labelled wrong,
    and ``version``, the bundle's (None when the server does not hold the bundle).

    Args:
        after: the ``COUNT_KEY`` columns of the last row of the page before.
    """
    e = t.evidence.c
    key = [e[name] for name in COUNT_KEY]
    query: Select[Any] = select(*key, *(e[name] for name in _COUNTED), t.bundles.c.version).select_from(
        t.evidence.outerjoin(t.bundles, t.bundles.c.digest == e.bundle)
    )
    for column, wanted in ((e.model, model), (e.bundle, bundle), (e.device, device)):
        if wanted is not None:
            query = query.where(column == wanted)
    if after is not None:
        query = query.where(tuple_(*key) > tuple_(*after))
    return connection.execute(query.order_by(*key).limit(_page(limit))).fetchall()


def streams_page(
    connection: Connection,
    *,
    device: str | None = None,
    after: tuple[str, str] | None = None,
    limit: int = MAX_PAGE,
) -> Sequence[Row[Any]]:
    """Outbox lives by (device, epoch): all columns of the table."""
    s = t.streams.c
    query = select(t.streams)
    if device is not None:
        query = query.where(s.device == device)
    if after is not None:
        query = query.where(or_(s.device > after[0], and_(s.device == after[0], s.epoch > after[1])))
    return connection.execute(query.order_by(s.device, s.epoch).limit(_page(limit))).fetchall()


def samples_page(
    connection: Connection,
    *,
    model: str | None = None,
    bundle: str | None = None,
    device: str | None = None,
    after: int | None = None,
    limit: int = MAX_PAGE,
) -> Sequence[Row[Any]]:
    """Samples, oldest first: all columns of the table. ``after``: the last id of the page before."""
    s = t.samples.c
    query = select(t.samples)
    for column, wanted in ((s.model, model), (s.bundle, bundle), (s.device, device)):
        if wanted is not None:
            query = query.where(column == wanted)
    if after is not None:
        query = query.where(s.id > after)
    return connection.execute(query.order_by(s.id).limit(_page(limit))).fetchall()


def quarantine_page(
    connection: Connection, *, device: str | None = None, after: int = 0, limit: int = 100
) -> Sequence[Row[Any]]:
    """Messages and records that were set aside, by id: all columns of the table."""
    query = select(t.quarantine).where(t.quarantine.c.id > after)
    if device is not None:
        query = query.where(t.quarantine.c.device == device)
    return connection.execute(query.order_by(t.quarantine.c.id).limit(_page(limit))).fetchall()


def ingest_counts(connection: Connection, *, device: str | None = None) -> dict[str, int]:
    """What ingest refused, left out of what it took, or met again, by cause, of one device or of all."""
    c = t.ingest_counters.c
    query = select(c.name, func.sum(c.n)).group_by(c.name).order_by(c.name)
    if device is not None:
        query = query.where(c.device == device)
    return {name: int(n) for name, n in connection.execute(query)}


def telemetry_totals(connection: Connection) -> dict[str, int]:
    """Sums over the fleet for ``/metrics``: requests by outcome, records, duplicates, conflicts, tombstoned seqs."""
    e, s = t.evidence.c, t.streams.c
    requests = connection.execute(select(*(func.coalesce(func.sum(e[n]), 0).label(n) for n in _COUNTED))).one()
    stream_names = ("records", "duplicates", "conflicts", "tombstoned")
    streams = connection.execute(select(*(func.coalesce(func.sum(s[n]), 0).label(n) for n in stream_names))).one()
    return {name: int(n) for row in (requests, streams) for name, n in row._mapping.items()}


def _page(limit: int) -> int:
    return max(1, min(limit, MAX_PAGE))


# --- deltas --------------------------------------------------------------------------------------------------------------


def delta_totals(connection: Connection) -> dict[str, tuple[int, int]]:
    """State -> how many deltas, and their bytes; of those that were not kept too."""
    c = t.deltas.c
    rows = connection.execute(select(c.state, func.count(), func.coalesce(func.sum(c.size), 0)).group_by(c.state))
    return {state: (int(n), int(size)) for state, n, size in rows}
