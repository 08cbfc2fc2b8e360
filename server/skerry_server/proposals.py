"""Proposals: next catalogs that lack signatures, kept here for the approvers to find, and published with the last one.

Owns the table ``proposals``. A proposal may bring new targets (and a new root) with it, so that an approver's key goes in the same
snapshot as the catalog that the others signed. Nothing here is trusted by anybody: each approver's own tool rebuilds the document
from what it verified itself, and the repository checks everything again when it is complete. What is kept is bounded, and only
what an approver has signed is kept at all.

A proposal is ``open`` until it is ``published`` or ``withdrawn``, until another catalog appears (``void``: its signatures are of a
document that can follow no catalog any more) or until its time is over (``expired``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from skerry_contract import floors as floor_rules
from skerry_contract import layout
from skerry_contract.errors import ContractError
from skerry_contract.reading import ready
from sqlalchemy import Engine, delete, func, insert, select, update
from tuf.api.metadata import Metadata, Root, Targets

from skerry_server import audit, trust
from skerry_server.clock import utc
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from skerry_server.errors import Conflict, NotFound
from skerry_server.publication import Publication
from skerry_server.trust import RepositoryRefused

LIFE_MS = 14 * 86_400_000
MOST_OPEN = 50
KEPT = 500
"""Ended ones, newest first; the audit keeps what became of the others."""

_p = t.proposals.c


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """What is being served, which a proposal must follow."""

    root: Root
    targets: Targets
    catalog: Targets
    floors: bytes


class Proposals:
    """See the module. Safe to use from several threads: what publishes is the repository's lock."""

    def __init__(self, engine: Engine, publication: Publication, now_ms: Callable[[], int]) -> None:
        self._engine = engine
        self._publication = publication
        self._now_ms = now_ms

    def submit(
        self, metadata: bytes, floors: bytes, *, targets: bytes | None, root: bytes | None, actor: str
    ) -> dict[str, Any]:
        """Takes a proposal, or further signatures of one that is here; publishes it when they are enough.

        Returns:
            As ``one``.

        Raises:
            RepositoryRefused: it cannot follow what is served, or no signature of an approver holds.
            Conflict: ``too_many`` are open, or this one has ended.
        """
        ground = self._ground()
        new, delegator = self._checked(ground, metadata, floors, targets, root)
        found = trust.signatures(delegator, layout.CATALOG_ROLE, new)
        if not found.signed:
            raise RepositoryRefused("bad_signature", "proposal: no signature of an approver holds")
        wanted = _id(new, targets, root)
        now_ms = self._now_ms()
        with writing(self._engine) as conn:
            held = conn.execute(select(t.proposals).where(_p.id == wanted).with_for_update()).mappings().first()
            if held is not None and held["state"] != "open":
                raise Conflict("ended", f"proposal {wanted} is {held['state']}: {held['reason']}", state=held["state"])
            merged = _merged(new, None if held is None else dict(held), delegator)
            if held is None:
                n = conn.execute(
                    select(func.count()).where(
                        _p.state == "open", _p.version > ground.catalog.version, _p.expires_ms > now_ms
                    )
                ).scalar_one()
                if n >= MOST_OPEN:
                    raise Conflict("too_many", f"{n} proposals are open: withdraw some")
                values = {"version": new.signed.version, "floors": floors, "targets": targets, "root": root}
                values |= {"state": "open", "reason": "", "proposed_by": actor, "proposed_ms": now_ms}
                conn.execute(
                    insert(t.proposals).values(id=wanted, metadata=merged, expires_ms=now_ms + LIFE_MS, **values)
                )
                _prune(conn)
            else:
                conn.execute(update(t.proposals).where(_p.id == wanted).values(metadata=merged))
            audit.record(
                conn, at_ms=now_ms, actor=actor,
                action="proposal.open" if held is None else "proposal.sign", subject=f"proposal:{wanted}",
                after={"version": new.signed.version, "signed": list(_signed(merged, delegator).signed)},
            )  # fmt: skip
        if _signed(merged, delegator).complete:
            self._publish(wanted, actor)
        return self.one(wanted)

    def sign(self, wanted: str, metadata: bytes, *, actor: str) -> dict[str, Any]:
        """Takes signatures of a proposal that is here. Raises as ``submit``, and ``NotFound``."""
        row = self._row(wanted)
        if _id(trust.parse(metadata, Targets, "proposal"), row["targets"], row["root"]) != wanted:
            raise RepositoryRefused("bad_signature", f"these are signatures of another document than proposal {wanted}")
        state, reason = self._state(row, self._ground())
        if state != "open":
            raise Conflict("ended", f"proposal {wanted} is {state}: {reason}", state=state)
        return self.submit(metadata, row["floors"], targets=row["targets"], root=row["root"], actor=actor)

    def withdraw(self, wanted: str, *, reason: str, actor: str) -> dict[str, Any]:
        """Ends an open one. Raises ``NotFound``; ``Conflict`` when it was published."""
        now_ms = self._now_ms()
        with writing(self._engine) as conn:
            row = conn.execute(select(t.proposals).where(_p.id == wanted).with_for_update()).mappings().first()
            if row is None:
                raise NotFound("proposal", wanted)
            if row["state"] == "published":
                raise Conflict("ended", f"proposal {wanted} is published", state="published")
            if row["state"] == "open":
                values = {"state": "withdrawn", "reason": reason, "ended_ms": now_ms}
                conn.execute(update(t.proposals).where(_p.id == wanted).values(**values))
                audit.record(
                    conn, at_ms=now_ms, actor=actor, action="proposal.withdraw", subject=f"proposal:{wanted}",
                    before={"state": "open"}, after={"state": "withdrawn"}, reason=reason,
                )  # fmt: skip
        return self.one(wanted)

    def listed(self, *, ended: bool, limit: int) -> list[dict[str, Any]]:
        """Newest first, without the documents; those that ended only where asked."""
        with reading(self._engine) as conn:
            if conn.execute(select(_p.id).limit(1)).first() is None:
                return []
        ground = self._ground()
        query = select(_p.id).order_by(_p.proposed_ms.desc(), _p.id).limit(MOST_OPEN + KEPT)
        if not ended:
            query = query.where(_p.state == "open", _p.version > ground.catalog.version, _p.expires_ms > self._now_ms())
        with reading(self._engine) as conn:
            found = list(conn.execute(query).scalars())
        items: list[dict[str, Any]] = []
        # One after the other, and no more than are asked for: each holds a whole catalog.
        for wanted in found:
            if len(items) >= limit:
                break
            with reading(self._engine) as conn:
                row = conn.execute(select(t.proposals).where(_p.id == wanted)).mappings().first()
            if row is None:
                continue
            item = self._shown(dict(row), ground)
            if ended or item["state"] == "open":
                items.append(item)
        return items

    def one(self, wanted: str) -> dict[str, Any]:
        """One with its documents: ``metadata``, ``floors``, ``targets`` and ``root`` as text. Raises ``NotFound``."""
        row = self._row(wanted)
        documents = {name: None if row[name] is None else bytes(row[name]).decode() for name in _DOCUMENTS}
        return self._shown(row, self._ground()) | documents

    def _row(self, wanted: str) -> dict[str, Any]:
        with reading(self._engine) as conn:
            row = conn.execute(select(t.proposals).where(_p.id == wanted)).mappings().first()
        if row is None:
            raise NotFound("proposal", wanted)
        return dict(row)

    def _ground(self) -> Ground:
        served = self._publication.served()
        if served is None:
            raise RepositoryRefused("no_trust", "the repository has no trust yet: the ceremony's documents come first")
        root, targets, catalog, floors = served
        return Ground(
            root=trust.parse(root, Root, "root").signed,
            targets=trust.parse(targets, Targets, "targets").signed,
            catalog=trust.parse(catalog, Targets, "catalog").signed,
            floors=floors,
        )

    def _checked(
        self, ground: Ground, metadata: bytes, floors: bytes, targets: bytes | None, root: bytes | None
    ) -> tuple[Metadata[Targets], Targets]:
        """The proposal's catalog, and whoever names its signers."""
        now = utc(self._now_ms())
        new = trust.parse(metadata, Targets, "catalog")
        trust.sound_catalog(new.signed, ground.catalog, now)
        listed = new.signed.targets[layout.FLOORS_TARGET]
        if listed.length != len(floors) or listed.hashes["sha256"] != hashlib.sha256(floors).hexdigest():
            raise RepositoryRefused("hash_mismatch", "proposal: the floors are not those that its catalog lists")
        try:
            floor_rules.parse(floors)
        except ContractError as error:
            raise RepositoryRefused("bad_document", str(error)) from None
        above, delegator = ground.root, ground.targets
        keyids = self._publication.online_keyids
        if root is not None:
            above = trust.next_root(root, ground.root, keyids, now)
        if targets is not None:
            delegator = trust.next_targets(targets, above, ground.targets, keyids, now)
        return new, delegator

    def _publish(self, wanted: str, actor: str) -> None:
        row = self._row(wanted)
        if _signed_bytes(row["metadata"]) != _signed_bytes_of(self._ground().catalog):
            # Else another signature that was the last came a moment earlier, and the same document is out.
            self._publication.install_together(
                root=row["root"], targets=row["targets"], catalog=row["metadata"], floors=row["floors"], actor=actor
            )
        with writing(self._engine) as conn:
            values = {"state": "published", "reason": "enough approvers signed", "ended_ms": self._now_ms()}
            conn.execute(update(t.proposals).where(_p.id == wanted).values(**values))

    def _state(self, row: Mapping[str, Any], ground: Ground) -> tuple[str, str]:
        if row["state"] == "open" and ground.catalog.version >= row["version"]:
            # The row of one that was published may be late: a crash came between the files and the row.
            same = ground.catalog.version == row["version"]
            if same and _signed_bytes(row["metadata"]) == _signed_bytes_of(ground.catalog):
                return "published", "enough approvers signed"
            return "void", (
                f"catalog {ground.catalog.version} appeared since: the signatures are of a document that cannot follow it; "
                f"rebase it, and have it signed again"
            )
        if row["state"] == "open" and row["targets"] is not None:
            if trust.parse(row["targets"], Targets, "targets").signed.version <= ground.targets.version:
                return "void", f"targets {ground.targets.version} appeared since: propose it anew"
        if row["state"] == "open" and row["expires_ms"] <= self._now_ms():
            return "expired", "nobody completed it in time: rebase it, or propose it anew"
        return str(row["state"]), str(row["reason"])

    def _shown(self, row: Mapping[str, Any], ground: Ground) -> dict[str, Any]:
        state, reason = self._state(row, ground)
        delegator = ground.targets if row["targets"] is None else trust.parse(row["targets"], Targets, "targets").signed
        changed = None
        if state == "open":
            new = trust.parse(row["metadata"], Targets, "catalog")
            found = trust.signatures(delegator, layout.CATALOG_ROLE, new)
            changed = changes(ground, new.signed, row["floors"])
        else:
            # What became of one that ended cannot be told from the catalog that is served now.
            found = _kept_signatures(row["metadata"], delegator)
        names = ("id", "version", "proposed_by", "proposed_ms", "expires_ms", "ended_ms")
        return {name: row[name] for name in names} | {
            "state": state,
            "reason": reason,
            "signed": list(found.signed),
            "missing": list(found.missing),
            "threshold": found.threshold,
            "with_targets": row["targets"] is not None,
            "with_root": row["root"] is not None,
            "changes": changed,
        }


def changes(ground: Ground, new: Targets, floors: bytes) -> dict[str, Any]:
    """What a proposal changes, as this server sees it; approvers believe their own tool instead."""
    before = {(e.model, e.version): e for e in trust.catalog_entries(ground.catalog)}
    after = {(e.model, e.version): e for e in trust.catalog_entries(new)}

    def entry(e: trust.CatalogEntry) -> dict[str, Any]:
        return {"model": e.model, "version": e.version, "digest": e.digest}

    def moved(read: Callable[[bytes], dict[str, str]]) -> list[dict[str, Any]]:
        old, now = read(ground.floors), read(floors)
        return [
            {"model": model, "before": old.get(model), "after": now.get(model)}
            for model in sorted(old.keys() | now.keys())
            if old.get(model) != now.get(model)
        ]

    return {
        "added": [entry(e) for key, e in after.items() if before.get(key) != e],
        "removed": [entry(e) for key, e in before.items() if key not in after],
        "floors": moved(floor_rules.parse),
        "forced": moved(floor_rules.parse_forced),
    }


_DOCUMENTS = ("metadata", "floors", "targets", "root")


def _signed_bytes(metadata: bytes) -> bytes:
    return trust.parse(metadata, Targets, "catalog").signed_bytes


def _signed_bytes_of(catalog: Targets) -> bytes:
    return Metadata(catalog).signed_bytes


def _id(metadata: Metadata[Targets], targets: bytes | None, root: bytes | None) -> str:
    """Of what is signed: the same document with other signatures is the same proposal."""
    digest = hashlib.sha256(metadata.signed_bytes)
    for part in (targets, root):
        digest.update(hashlib.sha256(part or b"").digest())
    return digest.hexdigest()[:16]


def _signed(metadata: bytes, delegator: Targets) -> trust.Signatures:
    return trust.signatures(delegator, layout.CATALOG_ROLE, trust.parse(metadata, Targets, "catalog"))


class _Kept(msgspec.Struct, frozen=True):
    keyid: str


class _Envelope(msgspec.Struct, frozen=True):
    """Of metadata as it is kept; what is signed is passed over, a megabyte that nobody asks for."""

    signatures: tuple[_Kept, ...]


ready(_Envelope)


def _kept_signatures(metadata: bytes, delegator: Targets) -> trust.Signatures:
    """As ``trust.signatures`` of a document of which only signatures that held were kept, without counting them again."""
    kept = {found.keyid for found in msgspec.json.decode(metadata, type=_Envelope).signatures}
    roles = (delegator.delegations.roles if delegator.delegations is not None else None) or {}
    role = roles.get(layout.CATALOG_ROLE)
    named = set(role.keyids) if role is not None else set()
    return trust.Signatures(
        signed=tuple(sorted(named & kept)),
        missing=tuple(sorted(named - kept)),
        threshold=role.threshold if role is not None else 0,
    )


def _merged(new: Metadata[Targets], held: Mapping[str, Any] | None, delegator: Targets) -> bytes:
    """The document with all signatures that hold."""
    known = dict(new.signatures)
    if held is not None:
        known = trust.parse(held["metadata"], Targets, "catalog").signatures | known
    both = Metadata(new.signed, known)
    good = trust.signatures(delegator, layout.CATALOG_ROLE, both).signed
    if held is not None:
        # A signature that does not hold must not push out one of the same key that does.
        old = trust.parse(held["metadata"], Targets, "catalog")
        for keyid in trust.signatures(delegator, layout.CATALOG_ROLE, old).signed:
            if keyid not in good:
                known[keyid], good = old.signatures[keyid], (*good, keyid)
    return Metadata(new.signed, {keyid: known[keyid] for keyid in good}).to_bytes()


def _prune(conn: Any) -> None:
    ended = select(_p.id).where(_p.state != "open").order_by(_p.ended_ms.desc()).offset(KEPT).limit(1000)
    gone = list(conn.execute(ended).scalars())
    stale = select(_p.id).where(_p.state == "open").order_by(_p.proposed_ms.desc()).offset(KEPT).limit(1000)
    gone += list(conn.execute(stale).scalars())
    if gone:
        conn.execute(delete(t.proposals).where(_p.id.in_(gone)))
