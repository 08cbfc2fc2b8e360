"""Bringing the update repository into line with the database, and the database into line with the catalog.

The database says what to publish: the bytes in ``groups.published``. This module hands them to the repository, one writer at a
time, and remembers in memory what it handed over; after a start it hands over everything again, which changes nothing where
nothing was missing. Leaves signing and files to ``repository`` and ringing to the caller.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from skerry_contract import manifest as m
from sqlalchemy import Engine, select

from skerry_server import audit, groups, registry
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from skerry_server.errors import Invalid
from skerry_server.repository import Repository

log = logging.getLogger(__name__)

INSTALL = "repository.install"
"""Action of the audit rows about the operator's metadata."""
OFFLINE_ROLES = ("root", "targets", "catalog")
RING_AGAIN_MS = 3_000
"""How long the broker has to confirm a bell before it is rung again."""


class Bell(Protocol):
    """Whoever can ring: the server's MQTT session."""

    def ring(self, target: str, version: int) -> None:
        """Publishes a bell, retained."""


class Publication:
    """The only caller of the repository's writing methods. Safe to use from several threads."""

    def __init__(self, engine: Engine, repository: Repository, now_ms: Callable[[], int]) -> None:
        self._engine = engine
        self._repository = repository
        self._now_ms = now_ms
        self._lock = threading.RLock()
        self._published: dict[str, str] = {}
        self._rung: dict[tuple[str, int], int] = {}

    @property
    def trusted(self) -> bool:
        """Whether the operator's root, targets and catalog are installed, so that groups can be published."""
        return self._repository.has_trust()

    def status(self) -> dict[str, dict[str, Any]]:
        """Version and expiry per TUF role."""
        with self._lock:
            return self._repository.status()

    @property
    def clock_behind(self) -> bool:
        """Whether this server's clock was behind what it signed and the time since, when that was last looked at."""
        return self._repository.clock_behind

    def floors(self) -> dict[str, str]:
        """Model -> lowest version that a device may activate."""
        with self._lock:
            return self._repository.floors()

    def install(
        self, role: str, metadata: bytes, floors: bytes | None, *, actor: str, restoring: bool = False
    ) -> dict[str, Any]:
        """Takes signed metadata from the operator; returns the role's version, the bundles whose state changed, and what still
        names one that the catalog no longer lists: ``in_use``, digest -> users.

        The approvers' signature decides: a bad bundle must be taken out at once, whoever runs it.

        Raises:
            RepositoryRefused: the trust chain, the version or a target does not hold.
            Invalid: floors for a role that has none.
        """
        if floors is not None and role != "catalog":
            raise Invalid("bad_request", f"floors belong to the catalog, not to {role}")
        if role not in OFFLINE_ROLES:
            raise Invalid("bad_request", f"role: wanted root, targets or catalog, got {role!r}")
        result = self.install_together(
            root=metadata if role == "root" else None,
            targets=metadata if role == "targets" else None,
            catalog=metadata if role == "catalog" else None,
            floors=floors,
            actor=actor,
            restoring=restoring,
        )
        return {"role": role, "version": result["versions"].get(role), **{k: result[k] for k in ("bundles", "in_use")}}

    def install_together(
        self,
        *,
        root: bytes | None = None,
        targets: bytes | None = None,
        catalog: bytes | None = None,
        floors: bytes | None = None,
        actor: str,
        restoring: bool = False,
        earlier: Sequence[bytes] = (),
    ) -> dict[str, Any]:
        """Takes several signed roles in one snapshot. Returns ``versions`` of the roles that were given, and as ``install``.

        Raises:
            RepositoryRefused: the trust chain, a version or a target does not hold; then nothing has changed.
        """
        given = {"root": root, "targets": targets, "catalog": catalog}
        with self._lock:
            # A version whose row could not be written must not be hidden by the next one.
            self._record_found("found before the next one")
            self._repository.install(
                root=root,
                targets=targets,
                catalog=catalog,
                floors_data=floors,
                manifests=self._whole_bundle,
                restoring=restoring,
                earlier=earlier,
            )
            now_ms = self._now_ms()
            status = self.status()
            versions = {role: status.get(role, {}).get("version") for role, data in given.items() if data is not None}
            taken = [("root", json.loads(data)["signed"]["version"], data) for data in earlier]
            taken += [(role, versions[role], data) for role, data in given.items() if data is not None]
            with writing(self._engine) as conn:
                for role, version, data in taken:
                    audit.record(
                        conn,
                        at_ms=now_ms,
                        actor=actor,
                        action=INSTALL,
                        subject=f"metadata:{role}",
                        after={"version": version, "sha256": hashlib.sha256(data).hexdigest()},
                    )
            changed = self.align()
        return {"versions": versions, "bundles": changed, "in_use": self._retired_in_use(changed)}

    def served(self) -> tuple[bytes, bytes, bytes, bytes] | None:
        """Root, targets, catalog and floors that are being served, as they are; None before there is trust."""
        with self._lock:
            return self._repository.served()

    @property
    def online_keyids(self) -> frozenset[str]:
        """Of the keys that this server can sign with."""
        return self._repository.online_keyids

    def _retired_in_use(self, digests: list[str]) -> dict[str, list[str]]:
        c = t.bundles.c
        with reading(self._engine) as conn:
            retired = conn.execute(select(c.digest).where(c.digest.in_(digests), c.state == "retired")).scalars().all()
            found = {str(digest): registry.users(conn, digest) for digest in retired}
        return {digest: used for digest, used in found.items() if used}

    def align(self, *, starting: bool = False) -> list[str]:
        """Bundle states and the table of roles, as the repository holds them now. Does nothing where they agree.

        Args:
            starting: also adds the audit row of an installation that the server did not live to write: files come first, since
                they alone decide what devices see.
        """
        with self._lock:
            if starting:
                self._record_found("found at start")
            status = self.status()
            listed = [entry.digest for entry in self._repository.catalog_entries()] if "catalog" in status else []
            now_ms = self._now_ms()
            with reading(self._engine) as conn:
                held = {row.role: row.version for row in conn.execute(select(t.roles.c.role, t.roles.c.version))}
            if held == {role: found["version"] for role, found in status.items()} and not self._states_differ(listed):
                return []
            with writing(self._engine) as conn:
                for role, found in status.items():
                    if held.get(role) == found["version"]:
                        continue
                    values = {"version": found["version"], "expires_ms": found["expires_ms"]}
                    values["bytes"] = self._repository.metadata(role) or b""
                    added = queries.upsert(conn, t.roles).values(role=role, **values)
                    conn.execute(added.on_conflict_do_update(index_elements=["role"], set_=values))
                if "catalog" not in status:
                    return []
                changed = registry.sync_catalog(conn, listed, actor="system:catalog", now_ms=now_ms)
                groups.touch_who_run(conn, changed)
                return changed

    def _record_found(self, how: str) -> None:
        """Adds the audit rows that are missing for the operator's metadata which is being served."""
        status = self._repository.status()
        for role in OFFLINE_ROLES:
            data = self._repository.metadata(role)
            if data is None:
                continue
            version = status[role]["version"]
            after = {"version": version, "sha256": hashlib.sha256(data).hexdigest()}
            c = t.audit.c
            newest = (
                select(c.after)
                .where(c.action == INSTALL, c.subject == f"metadata:{role}")
                .order_by(c.id.desc())
                .limit(1)
            )
            with reading(self._engine) as conn:
                if conn.execute(newest).scalar() == after:
                    continue
            with writing(self._engine) as conn:
                audit.record(
                    conn,
                    at_ms=self._now_ms(),
                    actor="system:publication",
                    action=INSTALL,
                    subject=f"metadata:{role}",
                    after=after,
                    reason=f"{how}: installed, and the server ended or failed before it could record by whom",
                )
            log.warning("audit row added role=%s version=%d why=%r", role, version, how)

    def _states_differ(self, listed: list[str]) -> bool:
        c = t.bundles.c
        with reading(self._engine) as conn:
            rows = conn.execute(
                select(c.digest, c.state).where(c.state.in_(("validated", "approved", "deprecated")))
            ).all()
        wanted = set(listed)
        return any((row.state == "validated") == (row.digest in wanted) for row in rows)

    def _whole_bundle(self, digest: str) -> bytes | None:
        """The manifest of a bundle that is here with all its files, else None: a catalog must not list what nobody can fetch."""
        with reading(self._engine) as conn:
            manifest = conn.execute(select(t.bundles.c.manifest).where(t.bundles.c.digest == digest)).scalar()
            if manifest is None or registry.missing(conn, m.parse(manifest)):
                return None
            return bytes(manifest)

    def publish(self, bell: Bell) -> int:
        """Publishes the group documents that are not out yet, then rings every bell that has not rung; returns how many were due.

        Before the operator's trust is installed nothing is published or rung: devices could not follow it.
        """
        with reading(self._engine) as conn:
            c = t.groups.c
            rows = conn.execute(select(c.name, c.generation, c.published).where(c.published.is_not(None))).all()
        written = False
        with self._lock:
            due = {
                row.name: bytes(row.published)
                for row in rows
                if self._published.get(row.name) != hashlib.sha256(row.published).hexdigest()
            }
            if due:
                if not self.trusted:
                    return 0
                written = self._repository.publish_groups(due)
                self._published |= {name: hashlib.sha256(data).hexdigest() for name, data in due.items()}
                if written:
                    # What devices will report is what the table knows.
                    self.align()
        for row in rows:
            # At a start everything is handed over; what lay there already is no news to anybody.
            if row.name in due and written:
                self._ring_again_if_early(f"g/{row.name}")
                log.info("published group=%s generation=%d", row.name, row.generation)
        self.ring(bell)
        return len(due)

    def _ring_again_if_early(self, target: str) -> None:
        # A session that began between the commit and the publication rang with the old document still out.
        with reading(self._engine) as conn:
            row = conn.execute(select(t.bells).where(t.bells.c.target == target)).first()
        if row is not None and row.rung_version >= row.version:
            with writing(self._engine) as conn:
                queries.bump_bell(conn, target)

    def ring(self, bell: Bell) -> None:
        """Rings every bell whose version the broker has not confirmed; the same one again only after a while."""
        with reading(self._engine) as conn:
            b = t.bells.c
            due = conn.execute(select(b.target, b.version).where(b.rung_version < b.version)).all()
        now_ms = self._now_ms()
        with self._lock:
            recent = {rung: at for rung, at in self._rung.items() if 0 <= now_ms - at < RING_AGAIN_MS}
            wanted = [(row.target, row.version) for row in due if (row.target, row.version) not in recent]
            self._rung = recent | dict.fromkeys(wanted, now_ms)
        for target, version in wanted:
            bell.ring(target, version)

    def jump(self, above: dict[str, int], said_by: dict[str, str], *, actor: str) -> None:
        """Online roles go on above versions that devices hold: of a repository that a backup took back."""
        with self._lock:
            before = {role: self.status()[role]["version"] for role in above}
            self._repository.raise_versions(above)
            with writing(self._engine) as conn:
                audit.record(
                    conn,
                    at_ms=self._now_ms(),
                    actor=actor,
                    action="repository.jump",
                    subject="metadata:online",
                    before=before,
                    after={role: self.status()[role]["version"] for role in above},
                    reason="devices hold newer versions: "
                    + ", ".join(f"{r} {v} on {said_by[r]}" for r, v in above.items()),
                )
            self.align()
        log.warning("versions raised above=%s", above)

    def resign(self) -> None:
        """Signs anew what nears its expiry."""
        if self.trusted:
            with self._lock:
                self._repository.refresh_expiring()
            self.align()
