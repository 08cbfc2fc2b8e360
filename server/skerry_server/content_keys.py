"""Content keys of encrypted bundles: kept sealed, given to people who may look into a bundle, and released to devices that may run it.

In the database a content key is sealed with the server's **release key**, a file beside the online keys (``release.key``, 0600) and never in
the database: a copy of the database, like a copy of the repository, opens no model. Whoever has the whole server has both.

A device gets a content key wrapped for its **encryption key**, a P-256 key of its own beside the one it signs with. The first one that it names
stays: a thief of its signing key cannot put another in its place. An operator's ``forget``, or a new enrolment with a fresh token, makes room for another.

To a device without a network a person may carry it, wrapped all the same.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import group as g
from skerry_contract import ids, sealed
from skerry_contract import manifest as m
from sqlalchemy import Connection, delete, insert, select

from skerry_server import audit, durable
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.errors import Conflict, Forbidden, Invalid, NotFound, Unavailable

FILE = "release.key"
MAX_PEM_CHARS = 1000
_NONCE_BYTES = 12
_RUNNABLE = ("approved", "deprecated")


class ReleaseKey:
    """The server's key over content keys.

    Args:
        folder: the server's folder of keys; the key is made there when there is none.

    Raises:
        ValueError: the file holds no key.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        if not path.exists():
            durable.write(path, secrets.token_bytes(sealed.KEY_BYTES), mode=0o600)
        key = path.read_bytes()
        if len(key) != sealed.KEY_BYTES:
            raise ValueError(f"{path}: wanted {sealed.KEY_BYTES} bytes, got {len(key)}")
        self._cipher = AESGCM(key)

    def seal(self, content_key: bytes, digest: str) -> bytes:
        """As it lies in the database; bound to its bundle."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, content_key, _about(digest))

    def open(self, box: bytes, digest: str) -> bytes:
        """Raises ``Unavailable`` (``content_key_unreadable``): the database is of a server with another release key."""
        try:
            return self._cipher.decrypt(box[:_NONCE_BYTES], box[_NONCE_BYTES:], _about(digest))
        except (InvalidTag, ValueError):
            raise Unavailable(
                "content_key_unreadable",
                f"the content key of bundle {digest} was sealed with another release key; restore keys/{FILE}, or push the bundle again",
            ) from None


def _about(digest: str) -> bytes:
    return b"skerry content key of " + digest.encode()


# --- content keys ----------------------------------------------------------------------------------------------------


def put(
    conn: Connection, release: ReleaseKey, *, digest: str, manifest: bytes, key: bytes, actor: str, now_ms: int
) -> bool:
    """Keeps a bundle's content key; returns whether it is new. The same again repairs what this server can no longer read.

    Raises:
        Invalid: ``not_encrypted``, or ``wrong_content_key``: the manifest names another.
    """
    encryption = m.parse(manifest).encryption
    if encryption is None:
        raise Invalid("not_encrypted", f"bundle {digest} is not encrypted, and has no content key")
    if len(key) != sealed.KEY_BYTES or sealed.key_id(key) != encryption.key_id:
        raise Invalid("wrong_content_key", f"that is not the content key which the manifest of bundle {digest} names")
    had = has(conn, digest)
    values = {"box": release.seal(key, digest), "set_by": actor, "set_ms": now_ms}
    row = queries.upsert(conn, t.content_keys).values(digest=digest, **values)
    conn.execute(row.on_conflict_do_update(index_elements=["digest"], set_=values))
    audit.record(conn, at_ms=now_ms, actor=actor, action="content_key.put", subject=f"bundle:{digest}")
    return not had


def has(conn: Connection, digest: str) -> bool:
    """Whether the bundle's content key is here."""
    return conn.execute(select(t.content_keys.c.digest).where(t.content_keys.c.digest == digest)).first() is not None


def find(conn: Connection, release: ReleaseKey, digest: str) -> bytes:
    """The content key. Raises ``NotFound``, ``Unavailable``."""
    box = conn.execute(select(t.content_keys.c.box).where(t.content_keys.c.digest == digest)).scalar()
    if box is None:
        raise NotFound("content key of bundle", digest)
    return release.open(box, digest)


def show(conn: Connection, release: ReleaseKey, *, digest: str, actor: str, now_ms: int) -> bytes:
    """The content key for a person; the audit says who had it. Raises as ``find``."""
    key = find(conn, release, digest)
    audit.record(conn, at_ms=now_ms, actor=actor, action="content_key.read", subject=f"bundle:{digest}")
    return key


# --- devices' encryption keys ----------------------------------------------------------------------------------------


def note_device_key(conn: Connection, device: str, pem: str, *, now_ms: int, replace: bool = False) -> str:
    """The device's encryption key is this one; returns its sha256.

    Args:
        replace: it comes with a fresh enrolment token; else the one that is known stays.

    Raises:
        Invalid: no P-256 public key. Forbidden: ``encryption_key_differs``.
    """
    point = _point(pem)
    sha256 = hashlib.sha256(point).hexdigest()
    c = t.encryption_keys.c
    held = conn.execute(select(c.sha256).where(c.device == device)).scalar()
    if held == sha256:
        return sha256
    if held is not None and not replace:
        raise Forbidden(
            "encryption_key_differs",
            f"device {device!r} has another encryption key; content keys go to that one alone until its state is erased and it is "
            f"enrolled anew, or an operator says so: skerry device forget-key {device} --reason WHY",
        )
    conn.execute(delete(t.encryption_keys).where(c.device == device))
    conn.execute(insert(t.encryption_keys).values(device=device, point=point, sha256=sha256, set_ms=now_ms))
    audit.record(
        conn,
        at_ms=now_ms,
        actor=f"device:{device}",
        action="device.encryption_key",
        subject=f"device:{device}",
        before=None if held is None else {"sha256": held},
        after={"sha256": sha256},
    )
    return sha256


def forget_device_key(conn: Connection, device: str, *, reason: str, actor: str, now_ms: int) -> None:
    """The next encryption key that the device names is taken. Raises ``NotFound`` when none is known."""
    c = t.encryption_keys.c
    if conn.execute(select(t.devices.c.id).where(t.devices.c.id == ids.device_id(device))).first() is None:
        raise NotFound("device", device)
    held = conn.execute(select(c.sha256).where(c.device == device)).scalar()
    if held is None:
        raise NotFound("encryption key of device", device)
    conn.execute(delete(t.encryption_keys).where(c.device == device))
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action="device.encryption_key.forget",
        subject=f"device:{device}",
        before={"sha256": held},
        reason=reason,
    )


def _point(pem: str) -> bytes:
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnicodeEncodeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Invalid("bad_encryption_key", "encryption_key: wanted the PEM of a P-256 public key")
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


# --- release ---------------------------------------------------------------------------------------------------------


def release_to(
    conn: Connection, release: ReleaseKey, *, device: ids.DeviceId, digest: str, pem: str, now_ms: int
) -> dict[str, str]:
    """The content key, wrapped for this device, and a record that it was given.

    Raises:
        Forbidden: ``key_not_allowed``: nothing gives the device this bundle; ``encryption_key_differs``.
        NotFound, Unavailable: the key is not here, or cannot be read.
    """
    note_device_key(conn, device, pem, now_ms=now_ms)
    return _wrapped(conn, release, device=device, digest=digest, now_ms=now_ms)


def release_by_hand(
    conn: Connection, release: ReleaseKey, *, device: str, digest: str, actor: str, now_ms: int
) -> dict[str, str]:
    """As ``release_to``, asked for by a person who carries it to a device that has no network; the audit says who.

    Nobody but the device can open it: it is wrapped for the encryption key that the device itself has named.

    Raises:
        NotFound: no such device, or it has named no encryption key; the content key is not here. Conflict: the device is revoked.
        Forbidden: ``key_not_allowed``. Unavailable: the key cannot be read.
    """
    row = conn.execute(select(t.devices.c.status).where(t.devices.c.id == ids.device_id(device))).first()
    if row is None:
        raise NotFound("device", device)
    if row.status == "revoked":
        raise Conflict("revoked", f"device {device!r} is revoked: it is given no content key any more")
    wrapped = _wrapped(conn, release, device=ids.device_id(device), digest=ids.bundle_digest(digest), now_ms=now_ms)
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action="content_key.carry",
        subject=f"bundle:{digest}",
        after={"device": device},
    )
    return wrapped


def _wrapped(
    conn: Connection, release: ReleaseKey, *, device: ids.DeviceId, digest: str, now_ms: int
) -> dict[str, str]:
    """Wrapped for the encryption key that is known of the device, with a record that it was given."""
    known = conn.execute(
        select(t.encryption_keys.c.point, t.encryption_keys.c.sha256).where(t.encryption_keys.c.device == device)
    ).first()
    if known is None:
        raise NotFound("encryption key of device", device)
    point, sha256 = known
    if not may_have(conn, device, digest):
        raise Forbidden("key_not_allowed", f"neither the group of device {device!r} nor a pin gives it bundle {digest}")
    key = find(conn, release, digest)
    once = ec.generate_private_key(ec.SECP256R1())
    sender = once.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    receiver = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    wrapping, about = sealed.wrapping_key(
        once.exchange(ec.ECDH(), receiver), sender=sender, receiver=point, device=device, digest=digest
    )
    c = t.key_releases.c
    row = queries.upsert(conn, t.key_releases).values(
        digest=digest, device=device, encryption_key=sha256, times=1, first_ms=now_ms, last_ms=now_ms
    )
    again = {"encryption_key": sha256, "times": c.times + 1, "last_ms": now_ms}
    conn.execute(row.on_conflict_do_update(index_elements=["digest", "device"], set_=again))
    box = sealed.wrap(key, wrapping, about, AESGCM)
    return sealed.encode_wrapped(sealed.Wrapped(point=sender, box=box))


def may_have(conn: Connection, device: ids.DeviceId, digest: str) -> bool:
    """Whether the device may run the bundle: by its group's document or a pin of its own, or because it was given its key before.

    The last is for the way back: a device that lost its copy of a key may be on its way to what it ran before.
    """
    state = conn.execute(select(t.bundles.c.state).where(t.bundles.c.digest == digest)).scalar()
    if state not in _RUNNABLE:
        return False
    c = t.key_releases.c
    if conn.execute(select(c.times).where(c.digest == digest, c.device == device)).first() is not None:
        return True
    query = (
        select(t.groups.c.name, t.groups.c.published)
        .join(t.devices, t.devices.c.group == t.groups.c.name)
        .where(t.devices.c.id == device)
    )
    row = conn.execute(query).first()
    return row is not None and row.published is not None and digest in set(given(g.parse(row.published), device))


def given(document: g.GroupDocument, device: ids.DeviceId) -> Iterator[str]:
    """Digests that a group's document gives a device, or may give it in any stratum: a device may have told of another by now."""
    for pin in document.pins.get(g.pin_key(document.group, device), {}).values():
        yield pin.digest
    for plan in document.models.values():
        for target in (plan.stable, plan.fallback, plan.shadow, *plan.via):
            if target is not None:
                yield target.digest
        rollout = plan.rollout
        if rollout is not None and any(g.is_candidate(rollout, device, stratum) for stratum in rollout.cuts):
            yield rollout.candidate.digest


def releases(conn: Connection, digest: str, *, after: str, limit: int) -> list[dict[str, Any]]:
    """Which devices were given a bundle's content key, by device."""
    c = t.key_releases.c
    query = select(c.device, c.encryption_key, c.times, c.first_ms, c.last_ms)
    query = query.where(c.digest == digest, c.device > after).order_by(c.device).limit(limit)
    return [dict(row) for row in conn.execute(query).mappings()]


def require_encrypted(conn: Connection, digest: str) -> None:
    """Raises ``NotFound`` without such a bundle, ``Conflict`` for one in the clear."""
    manifest = conn.execute(select(t.bundles.c.manifest).where(t.bundles.c.digest == digest)).scalar()
    if manifest is None:
        raise NotFound("bundle", digest)
    if m.parse(manifest).encryption is None:
        raise Conflict("not_encrypted", f"bundle {digest} is not encrypted, and has no content key")
