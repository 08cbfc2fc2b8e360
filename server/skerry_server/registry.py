"""The registry of bundles: pushed as a draft, validated in a child process, approved when the signed catalog lists them.

A bundle is immutable: its identity is the digest of its manifest, and a model's version names one digest for ever. Files are
kept once, by their own sha256, in the update repository. Only files that a draft's manifest lists are taken, and no byte
more than it says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from skerry_contract import ids
from skerry_contract import manifest as m
from skerry_runtime import signature as signatures
from sqlalchemy import Connection, insert, select, union, update

from skerry_server import audit
from skerry_server.core import bundles as core
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.errors import Conflict, Invalid, NotFound, TooLarge

MAX_SIGNATURE_BYTES = signatures.MAX_BYTES
_MAY_BE_SIGNED_ANEW = ("draft", "rejected")
"""In these states nobody has relied on the signature yet; a rejected bundle may have been rejected for it."""


def push(
    conn: Connection, *, manifest: bytes, signature: bytes | None, actor: str, submitter: str, now_ms: int
) -> dict[str, Any]:
    """Takes a manifest as a draft; the same one again changes nothing. Returns digest, state and the files not here yet.

    Raises:
        Malformed, UnsupportedVersion: the manifest cannot be read. Conflict: the version names another digest.
    """
    parsed = m.parse(manifest)
    digest = m.digest(manifest)
    if signature is not None and len(signature) > MAX_SIGNATURE_BYTES:
        raise TooLarge("signature", MAX_SIGNATURE_BYTES)
    c = t.bundles.c
    query = select(c.digest, c.state, c.signature).where(c.model == parsed.model, c.version == parsed.version)
    held = conn.execute(query).first()
    if held is not None and held.digest != digest:
        raise Conflict(
            "version_taken",
            f"{parsed.model} {parsed.version} is bundle {held.digest}; a version names one bundle for ever",
            digest=held.digest,
        )
    if held is None:
        conn.execute(
            insert(t.bundles).values(
                digest=digest,
                model=parsed.model,
                version=parsed.version,
                state="draft",
                manifest=manifest,
                signature=signature,
                submitter=submitter,
                pushed_ms=now_ms,
            )
        )
        after = {"model": parsed.model, "version": parsed.version, "signed": signature is not None}
        audit.record(conn, at_ms=now_ms, actor=actor, action="bundle.push", subject=f"bundle:{digest}", after=after)
    elif signature is not None and (
        held.signature is None or (held.state in _MAY_BE_SIGNED_ANEW and held.signature != signature)
    ):
        conn.execute(update(t.bundles).where(c.digest == digest).values(signature=signature))
        audit.record(conn, at_ms=now_ms, actor=actor, action="bundle.sign", subject=f"bundle:{digest}")
    return {"digest": str(digest), "state": held.state if held else "draft", "missing": missing(conn, parsed)}


def require_encryption(conn: Connection, manifest: bytes, *, every: bool, models: Collection[str], clear: bool) -> None:
    """Refuses a bundle in the clear where that is hardly meant, before its version is taken and a file of it can be sent.

    Args:
        every, models: bundles of which models must be encrypted.
        clear: whoever pushes it means it, though another version of the model is encrypted.

    Raises:
        Malformed, UnsupportedVersion: the manifest cannot be read.
        Invalid: ``must_be_encrypted``. Conflict: ``encrypted_before``.
    """
    parsed = m.parse(manifest)
    if parsed.encryption is not None:
        return
    c = t.bundles.c
    rows = conn.execute(select(c.digest, c.version, c.state, c.manifest).where(c.model == parsed.model)).all()
    own = next((row.state for row in rows if row.digest == m.digest(manifest)), None)
    if (every or parsed.model in models) and own in (None, *_MAY_BE_SIGNED_ANEW):
        raise Invalid(
            "must_be_encrypted",
            f"{parsed.model} {parsed.version} is in the clear, and this server's policy.encrypted_models asks for encryption: "
            "build it with --encrypt",
        )
    if clear or own is not None:
        return
    for row in rows:
        if b'"encryption"' in row.manifest and m.parse(row.manifest).encryption is not None:
            raise Conflict(
                "encrypted_before",
                f"{parsed.model} {parsed.version} is in the clear, and {parsed.model} {row.version} is encrypted: build it with --encrypt, "
                "or push it with --clear if it may be read by all who reach the repository",
                version=row.version,
            )


def missing(conn: Connection, manifest: m.Manifest) -> list[str]:
    """The sha256 of the bundle's files that are not here yet, sorted."""
    wanted = {file.sha256 for file in manifest.files()}
    found = conn.execute(select(t.blobs.c.sha256).where(t.blobs.c.sha256.in_(sorted(wanted)))).scalars()
    return sorted(wanted - set(found))


def expected_size(conn: Connection, sha256: str) -> int:
    """The size that a bundle lists for this file.

    Any bundle that may still run counts: what was lost from this server's disk can be sent again.

    Raises:
        NotFound: none lists it: the manifest comes first.
    """
    query = select(t.bundles.c.manifest).where(t.bundles.c.state != "retired")
    for manifest in conn.execute(query).scalars():
        if sha256.encode() in manifest:
            for file in m.parse(manifest).files():
                if file.sha256 == sha256:
                    return file.size
    raise NotFound("bundle that lists the file", sha256)


def note_blob(conn: Connection, *, sha256: str, size: int, actor: str, now_ms: int) -> None:
    """Remembers that a file is on disk; call it once it is."""
    added = queries.upsert(conn, t.blobs).values(sha256=sha256, size=size, stored_ms=now_ms)
    if conn.execute(added.on_conflict_do_nothing()).rowcount:
        audit.record(
            conn, at_ms=now_ms, actor=actor, action="blob.store", subject=f"blob:{sha256}", after={"size": size}
        )


def require(conn: Connection, digest: str) -> dict[str, Any]:
    """The bundle's row. Raises ``NotFound``."""
    row = conn.execute(select(t.bundles).where(t.bundles.c.digest == digest)).mappings().first()
    if row is None:
        raise NotFound("bundle", digest)
    return dict(row)


def require_model(conn: Connection, model: str) -> None:
    """Raises ``NotFound`` when no bundle is of this model, ``Malformed`` when none can be."""
    ids.model_name(model)
    if conn.execute(select(t.bundles.c.digest).where(t.bundles.c.model == model).limit(1)).first() is None:
        raise NotFound("model", model)


def move(
    conn: Connection,
    *,
    digest: str,
    action: core.Action,
    reason: str,
    actor: str,
    now_ms: int,
    validation: Mapping[str, Any] | None = None,
) -> str:
    """Takes a bundle one step through its life; returns the new state.

    Raises:
        NotFound: no such bundle. Conflict: the state has no such step, or something still runs it.
    """
    row = require(conn, digest)
    state = core.TRANSITIONS.get((row["state"], action))
    if state is None:
        can = ", ".join(core.allowed(row["state"])) or "nothing more"
        raise Conflict(
            "not_allowed", f"a bundle that is {row['state']} cannot {action}; it can {can}", state=row["state"]
        )
    if action == "retire":
        used = users(conn, digest)
        if used:
            raise Conflict("in_use", f"the bundle is in use by {', '.join(used)}", used_by=used)
    values: dict[str, Any] = {"state": state, "reason": reason, "lock_version": row["lock_version"] + 1}
    if validation is not None:
        values["validation"] = dict(validation)
    conn.execute(update(t.bundles).where(t.bundles.c.digest == digest).values(**values))
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action=f"bundle.{action}",
        subject=f"bundle:{digest}",
        before={"state": row["state"]},
        after={"state": state, "model": row["model"], "version": row["version"]},
        reason=reason,
    )
    return state


def users(conn: Connection, digest: str) -> list[str]:
    """What still names the bundle: groups, rollouts not ended, pins."""
    gm, r, p = t.group_models.c, t.rollouts.c, t.pins.c
    ended = ("completed", "rolled_back", "aborted")
    named_by = (gm.stable == digest) | (gm.fallback == digest) | (gm.shadow == digest)
    groups = conn.execute(select(gm.group).where(named_by)).scalars()
    rollouts = conn.execute(
        select(r.id).where((r.candidate == digest) | (r.stable == digest), r.state.not_in(ended))
    ).scalars()
    pinned = conn.execute(select(p.device).where(p.digest == digest)).scalars()
    named = [f"group:{name}" for name in groups] + [f"rollout:{name}" for name in rollouts]
    return sorted(named + [f"pin:{name}" for name in pinned])


def served(conn: Connection) -> frozenset[str]:
    """Every bundle that ``users`` would find something for."""
    gm, r, p = t.group_models.c, t.rollouts.c, t.pins.c
    ended = ("completed", "rolled_back", "aborted")
    rows = conn.execute(
        union(
            select(gm.stable),
            select(gm.fallback),
            select(gm.shadow),
            select(r.candidate).where(r.state.not_in(ended)),
            select(r.stable).where(r.state.not_in(ended)),
            select(p.digest),
        )
    ).scalars()
    return frozenset(digest for digest in rows if digest)


def sync_catalog(conn: Connection, listed: Iterable[str], *, actor: str, now_ms: int) -> list[str]:
    """Brings states into line with an installed catalog; returns the digests that changed.

    A draft that is listed stays a draft until it is validated: the signature is needed, not enough.
    """
    wanted = set(listed)
    c = t.bundles.c
    query = select(c.digest, c.state).where(c.state.in_(("validated", "approved", "deprecated")))
    changed = []
    for row in conn.execute(query).all():
        if row.state == "validated" and row.digest in wanted:
            reason, action = "the signed catalog lists it", "list"
        elif row.state != "validated" and row.digest not in wanted:
            used = users(conn, row.digest)
            in_use = f"; in use by {', '.join(used)}" if used else ""
            reason, action = f"the signed catalog no longer lists it{in_use}", "delist"
        else:
            continue
        step: core.Action = "list" if action == "list" else "delist"
        move(conn, digest=row.digest, action=step, reason=reason, actor=actor, now_ms=now_ms)
        changed.append(str(row.digest))
    return changed
