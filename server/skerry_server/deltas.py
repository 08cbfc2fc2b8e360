"""Deltas: which are wanted, what is known of each, and the files of those that are served.

Owns the table ``deltas`` and the folder ``deltas/`` of the repository. A file appears there whole and synced or not at all, and is
there before its row says ``ready``; a row that says so without a file is corrected. Which pairs are wanted is ``core.deltas``'
word; making them is ``delta_maker``'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from skerry_contract import ids, layout, sealed
from skerry_contract import manifest as m
from sqlalchemy import Connection, Text, cast, delete, func, select, tuple_, update

from skerry_server import audit, durable
from skerry_server.core import deltas as core
from skerry_server.core.deltas import Held, Pair, Runs
from skerry_server.db import queries
from skerry_server.db import tables as t

_PIECE_BYTES = 1 << 20
_RUNNABLE = ("approved", "deprecated")
_MOST_EVENTS = 10_000
"""So many events are looked through for what devices say of deltas, the newest."""
_ENDED = ("completed", "rolled_back", "aborted")
_c = t.deltas.c

Key = tuple[str, str]


# --- what is wanted --------------------------------------------------------------------------------------------------


def runs(conn: Connection) -> list[Runs]:
    """What enrolled devices report to run, with what their groups, rollouts and pins give them or soon may.

    That a newer bundle was approved is enough: its deltas are then there before the first device is told of it.
    """
    goals = _goals(conn)
    d, p = t.devices.c, t.pins.c
    found = []
    text = cast(d.running, Text)
    for group, said, devices in conn.execute(
        select(d.group, text, func.count()).where(d.status == "enrolled").group_by(d.group, text)
    ):
        for model, digest, variant in _running(said):
            found.append(
                Runs(digest=digest, variant=variant, goals=goals.get((group, model), ()), devices=int(devices))
            )
    pinned = select(p.model, p.digest, text).join(t.devices, d.id == p.device).where(d.status == "enrolled")
    for model, goal, said in conn.execute(pinned):
        for name, digest, variant in _running(said):
            if name == model:
                found.append(Runs(digest=digest, variant=variant, goals=(goal,), devices=1))
    return found


def _running(said: str) -> Iterable[tuple[str, str, str]]:
    value = json.loads(said) if said else {}
    return [(str(model), str(one.get("digest", "")), str(one.get("variant", ""))) for model, one in value.items()]


def _goals(conn: Connection) -> dict[tuple[str, str], tuple[str, ...]]:
    gm, r, b = t.group_models.c, t.rollouts.c, t.bundles.c
    newest: dict[str, tuple[str, str]] = {}
    for model, version, digest in conn.execute(select(b.model, b.version, b.digest).where(b.state == "approved")):
        if model not in newest or ids.version_key(version) > ids.version_key(newest[model][0]):
            newest[model] = (version, digest)
    found: dict[tuple[str, str], list[str]] = {}
    for row in conn.execute(select(gm.group, gm.model, gm.stable, gm.fallback, gm.shadow)):
        named = [row.stable, row.fallback, row.shadow, newest.get(row.model, ("", None))[1]]
        found[row.group, row.model] = [digest for digest in named if digest]
    rollouts = select(r.group, r.model, r.stable, r.candidate).where(r.state.not_in(_ENDED))
    for group, model, stable, candidate in conn.execute(rollouts):
        found.setdefault((group, model), []).extend((stable, candidate))
    return {key: tuple(dict.fromkeys(digests)) for key, digests in found.items()}


def manifests(conn: Connection, digests: Iterable[str], known: Mapping[str, m.Manifest]) -> dict[str, m.Manifest]:
    """The manifests of these bundles, as far as they are here; those in ``known`` are not read again."""
    b = t.bundles.c
    wanted = set(digests)
    found = {digest: known[digest] for digest in wanted & known.keys()}
    rest = sorted(wanted - known.keys())
    for row in conn.execute(select(b.digest, b.manifest).where(b.digest.in_(rest))):
        found[row.digest] = m.parse(row.manifest)
    return found


def runnable(conn: Connection) -> frozenset[str]:
    """Digests of the bundles that may be given to devices. What they run already need not be among them: it is only a base."""
    rows = conn.execute(select(t.bundles.c.digest).where(t.bundles.c.state.in_(_RUNNABLE)))
    return frozenset(rows.scalars())


# --- what is known ---------------------------------------------------------------------------------------------------


def note_wanted(conn: Connection, pairs: Iterable[Pair], *, now_ms: int) -> None:
    """Remembers that these are wanted now; what is new waits."""
    for pair in pairs:
        told = {
            "model": pair.model,
            "path": pair.path,
            "base_version": pair.base_version,
            "target_version": pair.target_version,
            "devices": pair.devices,
            "wanted_ms": now_ms,
        }
        row = queries.upsert(conn, t.deltas).values(
            base=pair.base,
            target=pair.target,
            base_size=pair.base_size,
            target_size=pair.target_size,
            state="waiting",
            detail="",
            attempts=0,
            maker="",
            changed_ms=now_ms,
            **told,
        )
        conn.execute(row.on_conflict_do_update(index_elements=["base", "target"], set_=told))


def held(conn: Connection) -> dict[Key, Held]:
    """What is known, by (base, target)."""
    query = select(_c.base, _c.target, _c.state, _c.attempts, _c.changed_ms, _c.wanted_ms, _c.maker)
    return {
        (row.base, row.target): Held(
            state=row.state,
            attempts=row.attempts,
            changed_ms=row.changed_ms,
            wanted_ms=row.wanted_ms,
            maker=row.maker,
        )
        for row in conn.execute(query)
    }


def note(conn: Connection, key: Key, state: core.State, *, now_ms: int, **values: Any) -> None:
    """Writes what became of one: ``size``, ``took_s``, ``detail``, ``attempts``, ``maker``."""
    conn.execute(
        update(t.deltas)
        .where(_c.base == key[0], _c.target == key[1])
        .values(state=state, changed_ms=now_ms, **{"detail": "", **values})
    )


def forget(conn: Connection, keys: Iterable[Key]) -> None:
    """Removes rows."""
    for base, target in keys:
        conn.execute(delete(t.deltas).where(_c.base == base, _c.target == target))


def ready_sizes(conn: Connection) -> dict[Key, tuple[int, int]]:
    """(base, target) -> bytes and when it was last wanted, of what is served."""
    query = select(_c.base, _c.target, _c.size, _c.wanted_ms).where(_c.state == "ready")
    return {(row.base, row.target): (int(row.size or 0), row.wanted_ms) for row in conn.execute(query)}


def promised(conn: Connection) -> dict[Key, tuple[int, str | None]]:
    """(base, target) -> bytes and sha256 of what is served, as it was made; no digest of those that an older release made."""
    query = select(_c.base, _c.target, _c.size, _c.sha256).where(_c.state == "ready")
    return {(row.base, row.target): (int(row.size or 0), row.sha256) for row in conn.execute(query)}


def complaints(conn: Connection, *, after: int) -> tuple[int, set[str]]:
    """Bundles of which devices said, in events above ``after``, that a delta gave another file; and the newest event."""
    e = t.events.c
    newest = int(conn.execute(select(func.max(e.id))).scalar() or 0)
    text = cast(e.data, Text)
    query = select(e.data).where(
        e.id > max(after, newest - _MOST_EVENTS), e.name == "update", text.like("%delta_wrong%")
    )
    found = set()
    for data in conn.execute(query).scalars():
        fetched = (data or {}).get("fetched")
        refused = fetched.get("refused") if isinstance(fetched, dict) else None
        if isinstance(refused, dict) and refused.get("delta_wrong"):
            found.add(str(data.get("digest", "")))
    return newest, found


def retry(conn: Connection, *, model: str | None, actor: str, now_ms: int) -> int:
    """A person wants what failed or was not worth it tried again; returns how many wait now."""
    change = update(t.deltas).where(_c.state.in_(("failed", "useless")))
    if model is not None:
        change = change.where(_c.model == model)
    n = int(conn.execute(change.values(state="waiting", attempts=0, detail="", changed_ms=now_ms)).rowcount)
    if n:
        subject = f"model:{model}" if model is not None else "deltas"
        audit.record(conn, at_ms=now_ms, actor=actor, action="delta.retry", subject=subject, after={"deltas": n})
    return n


def page(
    conn: Connection, *, model: str | None, state: str | None, after: Key | None, limit: int
) -> list[dict[str, Any]]:
    """Deltas by (base, target), with the share of the whole file that each is."""
    query = select(t.deltas).order_by(_c.base, _c.target).limit(limit)
    if model is not None:
        query = query.where(_c.model == model)
    if state is not None:
        query = query.where(_c.state == state)
    if after is not None:
        query = query.where(tuple_(_c.base, _c.target) > tuple_(*after))
    return [_shape(dict(row)) for row in conn.execute(query).mappings()]


def _shape(row: dict[str, Any]) -> dict[str, Any]:
    size = row["size"]
    share = None if size is None or not row["target_size"] else round(size / row["target_size"], 4)
    return {
        "from": row["base"],
        "to": row["target"],
        "state": row["state"],
        "model": row["model"],
        "path": row["path"],
        "from_version": row["base_version"],
        "to_version": row["target_version"],
        "bytes": size,
        "whole_bytes": row["target_size"],
        "share": share,
        "took_s": row["took_s"],
        "devices": row["devices"],
        "attempts": row["attempts"],
        "detail": row["detail"],
        "changed_ms": row["changed_ms"],
        "wanted_ms": row["wanted_ms"],
    }


# --- files -----------------------------------------------------------------------------------------------------------


class Files:
    """The folder ``deltas/`` of the repository, which HTTP servers read.

    Args:
        repository: the repository's folder.
    """

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._folder = repository / "deltas"
        durable.make_folder(self._folder)

    def blob(self, sha256: str) -> Path:
        """Where a bundle's file lies."""
        return self._repository / layout.blob(sha256)

    def take(self, key: Key, made: Path) -> str:
        """Serves what was made: under its name it appears whole and synced, or not at all. Returns its sha256."""
        with durable.CheckedWriter(self._repository / layout.delta(*key)) as writer, made.open("rb") as source:
            while piece := source.read(_PIECE_BYTES):
                writer.write(piece)
            writer.commit()
        return writer.sha256()

    def sha256(self, key: Key) -> str:
        """Of what is served now. Raises ``OSError`` where it cannot be read."""
        with (self._repository / layout.delta(*key)).open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()

    def present(self) -> dict[Key, int]:
        """(base, target) -> bytes of what is served."""
        found = {}
        for path in self._folder.glob("*/*"):
            if path.is_file() and not path.name.startswith("."):
                found[path.parent.name, path.name] = path.stat().st_size
        return found

    def drop_leaky(self) -> None:
        """Serves no longer what an older program encrypted under the target's content key alone."""
        for key in self.present():
            with (self._repository / layout.delta(*key)).open("rb") as source:
                leaky = source.read(len(sealed.LEAKY_DELTA_MAGIC)) == sealed.LEAKY_DELTA_MAGIC
            if leaky:
                self.drop([key])

    def drop(self, keys: Iterable[Key]) -> None:
        """Serves these no longer."""
        for base, target in keys:
            path = self._folder / base / target
            path.unlink(missing_ok=True)
            if path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()
            durable.sync_folder(self._folder)
