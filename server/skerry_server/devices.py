"""Devices: enrolment, certificates, revocation, membership and pins.

A device enters with a token that an operator made for one id or for ids with a prefix. The server takes its public key and
names it. Whoever must be told afterwards (the broker about its users, a device by its bell) is told by the caller, after
the transaction: these functions change the database only.

A revoked id never comes back: the broker knows names and not certificates, so an old certificate would be let in again.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skerry_contract import ids
from sqlalchemy import Connection, delete, insert, select, update

from skerry_server import access, audit, ca, clock, device_orders, groups, versions
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.errors import Conflict, Forbidden, Invalid, NotFound, Unauthenticated

TOKEN_PREFIX = "ske_"  # noqa: S105 - a mark that secret scanners find, no secret
MAX_TOKEN_LIFE_S = 90 * 86_400
MAX_TAGS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Enrolled:
    """What the device is told."""

    device: ids.DeviceId
    group: str
    issued: ca.Issued
    renewed: bool


def create_enrolment_token(
    conn: Connection,
    *,
    device: str | None,
    serial_prefix: str | None,
    group: str,
    expires_s: float,
    uses: int,
    tags: Mapping[str, str],
    actor: str,
    now_ms: int,
) -> str:
    """Makes a token and returns its secret, which is shown this once.

    Raises:
        Malformed: an id outside the grammar. Invalid: both or none of device and prefix, a life or number out of range.
        NotFound: no such group. Conflict: the device is revoked.
    """
    if (device is None) == (serial_prefix is None):
        raise Invalid("bad_request", "wanted exactly one of device_id and serial_prefix")
    if not 0 < expires_s <= MAX_TOKEN_LIFE_S:
        raise Invalid("bad_request", f"expires_s: wanted above 0 and at most {MAX_TOKEN_LIFE_S}, got {expires_s:g}")
    if device is not None:
        ids.device_id(device)
        if uses != 1:
            raise Invalid("bad_request", "uses: a token for one device is used once")
        row = conn.execute(select(t.devices.c.status).where(t.devices.c.id == device)).first()
        if row is not None and row.status == "revoked":
            raise Conflict("revoked", f"device {device!r} was revoked; a revoked id never comes back")
    else:
        ids.device_id(serial_prefix)
    groups.require(conn, group)
    check_tags(tags)
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    hashed = access.hash_secret(secret)
    conn.execute(
        insert(t.enrolment_tokens).values(
            sha256=hashed,
            device=device,
            serial_prefix=serial_prefix,
            group=group,
            tags=dict(tags),
            uses_left=uses,
            created_by=actor,
            created_ms=now_ms,
            expires_ms=now_ms + int(expires_s * 1000),
        )
    )
    after = {"device": device, "serial_prefix": serial_prefix, "group": group, "uses": uses, "expires_s": expires_s}
    subject = f"enrolment-token:{hashed[:12]}"
    audit.record(conn, at_ms=now_ms, actor=actor, action="enrolment_token.create", subject=subject, after=after)
    return secret


def enrol(
    conn: Connection, authority: ca.FleetCA, *, token: str, csr_pem: str, asked_id: str | None, now_ms: int
) -> Enrolled:
    """Takes a device in.

    The id is the token's own, or for a token with a prefix what the device asks for (``asked_id``, else the request's CN). A device
    that lost the answer may ask again with the same key while the token lives, even when it is used up.

    Raises:
        Invalid: a request that cannot be read. Unauthenticated: token unknown, expired or used up.
        Forbidden: the token is for another device. Conflict: the id is taken or revoked.
    """
    request, public_key = ca.read_request(csr_pem)
    hashed = access.hash_secret(token)
    row = conn.execute(select(t.enrolment_tokens).where(t.enrolment_tokens.c.sha256 == hashed)).mappings().first()
    if row is None or row["expires_ms"] <= now_ms:
        raise Unauthenticated("bad_enrolment_token", "the enrolment token is unknown, expired or used up")
    device = _bound_id(dict(row), asked_id or ca.common_name(request))
    issued = authority.issue_device(device, public_key, clock.utc(now_ms))
    held = conn.execute(select(t.devices).where(t.devices.c.id == device)).mappings().first()
    same_key = held is not None and held["public_key_sha256"] == issued.public_key_sha256
    if held is not None and held["status"] == "revoked":
        raise Conflict("revoked", f"device {device!r} was revoked; a revoked id never comes back")
    if held is not None and same_key:
        # The answer was lost on the way: the same key shows that it is the same device.
        _store_certificate(conn, device, issued, now_ms, revoke_old=False)
        audit.record(
            conn,
            at_ms=now_ms,
            actor=f"device:{device}",
            action="device.enrol.repeat",
            subject=f"device:{device}",
            after={"certificate": issued.serial, "token": hashed[:12]},
        )
        return Enrolled(device=device, group=held["group"], issued=issued, renewed=True)
    if row["uses_left"] < 1:
        raise Unauthenticated("bad_enrolment_token", "the enrolment token is unknown, expired or used up")
    if held is not None and row["device"] is None:
        raise Conflict(
            "id_taken", f"device {device!r} is enrolled with another key; a token for that id alone replaces it"
        )
    if conn.execute(select(t.devices.c.id).where(t.devices.c.public_key_sha256 == issued.public_key_sha256)).first():
        raise Conflict("key_taken", "another device is enrolled with this key; make a new one")
    left = t.enrolment_tokens.c.uses_left
    used = update(t.enrolment_tokens).where(t.enrolment_tokens.c.sha256 == hashed, left > 0).values(uses_left=left - 1)
    if conn.execute(used).rowcount != 1:
        # Another device took the last use since it was read: PostgreSQL lets both go so far.
        raise Unauthenticated("bad_enrolment_token", "the enrolment token is unknown, expired or used up")
    identity = {"public_key_sha256": issued.public_key_sha256, "public_key_pem": issued.public_key_pem}
    place = {"group": row["group"], "tags": row["tags"], "status": "enrolled", "enrolled_ms": now_ms}
    dates = {"certificate_serial": issued.serial, "certificate_expires_ms": issued.expires_ms}
    if held is None:
        conn.execute(insert(t.devices).values(id=device, **identity, **place, **dates))
    else:
        version = held["membership_version"] + 1
        change = update(t.devices).where(t.devices.c.id == device)
        conn.execute(change.values(membership_version=version, **identity, **place, **dates))
    _store_certificate(conn, device, issued, now_ms, revoke_old=True)
    audit.record(
        conn,
        at_ms=now_ms,
        actor=f"device:{device}",
        action="device.enrol",
        subject=f"device:{device}",
        before=None if held is None else {"public_key_sha256": held["public_key_sha256"]},
        after={"group": row["group"], "certificate": issued.serial, "token": hashed[:12]},
    )
    return Enrolled(device=device, group=row["group"], issued=issued, renewed=False)


def _bound_id(token: Mapping[str, Any], asked: str | None) -> ids.DeviceId:
    if token["device"] is not None:
        if asked is not None and asked != token["device"]:
            raise Forbidden("wrong_device", "the enrolment token is for another device")
        return ids.device_id(token["device"])
    if asked is None:
        raise Invalid("bad_request", "a token for a prefix needs the device's id: device_id, or the CN of the request")
    device = ids.device_id(asked)
    if not device.startswith(token["serial_prefix"]):
        raise Forbidden("wrong_device", f"the enrolment token is for ids that begin with {token['serial_prefix']!r}")
    return device


def renew(
    conn: Connection, authority: ca.FleetCA, *, device: ids.DeviceId, csr_pem: str, now_ms: int, grace_s: float
) -> ca.Issued:
    """A new certificate for a device whose request was signed with its old key. The new key replaces the old one.

    Args:
        grace_s: how long after the end of the old certificate; an operator's standing order ``renew`` opens it beyond that.

    Raises:
        Invalid: a request that cannot be read. Conflict: another device has the key. NotFound: no such device.
        Forbidden: ``certificate_expired``: too long ago, and no operator said otherwise.
    """
    _, public_key = ca.read_request(csr_pem)
    held = require(conn, device)
    ended_ms = max(0, now_ms - int(held["certificate_expires_ms"]))
    by_order = ended_ms > grace_s * 1000
    if by_order and not device_orders.may_renew(conn, device, now_ms):
        raise Forbidden(
            "certificate_expired",
            f"the certificate ended {ended_ms / 86_400_000:.1f} days ago, and is renewed for {grace_s / 86_400:g} days after its end; "
            f"an operator may allow it: skerry device renew {device} --reason WHY",
        )
    issued = authority.issue_device(device, public_key, clock.utc(now_ms))
    query = select(t.devices.c.id).where(
        t.devices.c.public_key_sha256 == issued.public_key_sha256, t.devices.c.id != device
    )
    if conn.execute(query).first():
        raise Conflict("key_taken", "another device is enrolled with this key; make a new one")
    _store_certificate(conn, device, issued, now_ms, revoke_old=False)
    conn.execute(
        update(t.devices)
        .where(t.devices.c.id == device)
        .values(public_key_sha256=issued.public_key_sha256, public_key_pem=issued.public_key_pem)
    )
    audit.record(
        conn,
        at_ms=now_ms,
        actor=f"device:{device}",
        action="device.renew",
        subject=f"device:{device}",
        before={"certificate": held["certificate_serial"]},
        after={"certificate": issued.serial, **({"ended_ms_ago": ended_ms, "by_order": by_order} if ended_ms else {})},
    )
    return issued


def _store_certificate(
    conn: Connection, device: ids.DeviceId, issued: ca.Issued, now_ms: int, *, revoke_old: bool
) -> None:
    c = t.certificates.c
    if revoke_old:
        conn.execute(update(t.certificates).where(c.device == device, c.revoked_ms.is_(None)).values(revoked_ms=now_ms))
    conn.execute(
        insert(t.certificates).values(
            serial=issued.serial, device=device, issued_ms=now_ms, expires_ms=issued.expires_ms
        )
    )
    conn.execute(
        update(t.devices)
        .where(t.devices.c.id == device)
        .values(certificate_serial=issued.serial, certificate_expires_ms=issued.expires_ms, certificate_names_key=True)
    )


def revoke(conn: Connection, *, device: str, reason: str, actor: str, now_ms: int) -> None:
    """Ends a device's rights for good. The caller then takes its broker user away.

    Raises:
        NotFound: no such device. Conflict: it is revoked already.
    """
    held = require(conn, device)
    if held["status"] == "revoked":
        raise Conflict("revoked", f"device {device!r} is revoked already")
    conn.execute(update(t.devices).where(t.devices.c.id == device).values(status="revoked", online=False))
    c = t.certificates.c
    conn.execute(update(t.certificates).where(c.device == device, c.revoked_ms.is_(None)).values(revoked_ms=now_ms))
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action="device.revoke",
        subject=f"device:{device}",
        before={"status": "enrolled"},
        after={"status": "revoked"},
        reason=reason,
    )


def set_membership(
    conn: Connection,
    *,
    device: str,
    group: str | None,
    tags: Mapping[str, str] | None,
    actor: str,
    now_ms: int,
    version: int | None = None,
) -> int:
    """Moves a device to another group or gives it other tags; returns the new membership version. The device's bell is rung.

    Args:
        version: the membership version that the caller read; None to change whatever is there.

    Raises:
        NotFound: no such device or group. Invalid: tags that cannot be. Conflict: group, tags or pins changed since.
    """
    held = _expect_membership(conn, device, version)
    new_group = held["group"] if group is None else group
    groups.require(conn, new_group)
    new_tags = held["tags"] if tags is None else check_tags(tags)
    if (new_group, new_tags) == (held["group"], held["tags"]):
        return int(held["membership_version"])
    changed = int(held["membership_version"]) + 1
    conn.execute(
        update(t.devices)
        .where(t.devices.c.id == device)
        .values(group=new_group, tags=new_tags, membership_version=changed)
    )
    queries.bump_bell(conn, f"d/{device}")
    if new_group != held["group"]:
        # Pins are part of the group documents.
        groups.touch(conn, held["group"])
        groups.touch(conn, new_group)
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action="device.membership",
        subject=f"device:{device}",
        before={"group": held["group"], "tags": held["tags"]},
        after={"group": new_group, "tags": new_tags, "version": changed},
    )
    return changed


def _expect_membership(conn: Connection, device: str, version: int | None) -> dict[str, Any]:
    query = select(t.devices).where(t.devices.c.id == ids.device_id(device)).with_for_update()
    row = conn.execute(query).mappings().first()
    if row is None:
        raise NotFound("device", device)
    pins = select(t.pins.c.model, t.pins.c.digest).where(t.pins.c.device == device)
    now = {"group": row["group"], "tags": row["tags"], "pins": {p.model: p.digest for p in conn.execute(pins)}}
    versions.expect(conn, f"device:{device}", wanted=version, present=row["membership_version"], now=now)
    return dict(row)


def _count_membership(conn: Connection, held: Mapping[str, Any]) -> int:
    version = int(held["membership_version"]) + 1
    conn.execute(update(t.devices).where(t.devices.c.id == held["id"]).values(membership_version=version))
    return version


def set_pin(
    conn: Connection,
    *,
    device: str,
    model: str,
    digest: str,
    reason: str,
    actor: str,
    now_ms: int,
    version: int | None = None,
) -> int:
    """Makes a device run one bundle of a model whatever its group runs; returns the new membership version.

    Args:
        version: the membership version that the caller read; None to change whatever is there.

    Raises:
        NotFound: no such device or bundle. Conflict: the bundle is not approved, or is of another model, the device is revoked, or
            its group, tags or pins changed since.
    """
    held = _expect_membership(conn, device, version)
    if held["status"] == "revoked":
        raise Conflict("revoked", f"device {device!r} is revoked: it is told nothing any more")
    ids.model_name(model)
    groups.runnable(conn, digest, model=model)
    c = t.pins.c
    before = conn.execute(select(c.digest).where(c.device == device, c.model == model)).scalar()
    conn.execute(delete(t.pins).where(c.device == device, c.model == model))
    conn.execute(insert(t.pins).values(device=device, model=model, digest=digest, set_by=actor, set_ms=now_ms))
    counted = _count_membership(conn, held)
    groups.touch(conn, held["group"])
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action="device.pin",
        subject=f"device:{device}",
        before={"model": model, "digest": before},
        after={"model": model, "digest": digest},
        reason=reason,
    )
    return counted


def clear_pin(
    conn: Connection, *, device: str, model: str, actor: str, now_ms: int, version: int | None = None
) -> None:
    """Takes a pin away; ``version`` as for ``set_pin``. Raises ``NotFound`` when there is none, ``Conflict`` as ``set_pin``."""
    held = _expect_membership(conn, device, version)
    c = t.pins.c
    before = conn.execute(select(c.digest).where(c.device == device, c.model == model)).scalar()
    if before is None:
        raise NotFound("pin", f"{device}/{model}")
    conn.execute(delete(t.pins).where(c.device == device, c.model == model))
    _count_membership(conn, held)
    groups.touch(conn, held["group"])
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action="device.unpin",
        subject=f"device:{device}",
        before={"model": model, "digest": before},
    )


def is_alone(conn: Connection) -> bool:
    """Whether the fleet has one enrolled device at most."""
    query = select(t.devices.c.id).where(t.devices.c.status == "enrolled").limit(2)
    return len(conn.execute(query).all()) < 2


def require(conn: Connection, device: str) -> dict[str, Any]:
    """The device's row. Raises ``Malformed`` for an id that cannot be, ``NotFound`` when there is none."""
    row = conn.execute(select(t.devices).where(t.devices.c.id == ids.device_id(device))).mappings().first()
    if row is None:
        raise NotFound("device", device)
    return dict(row)


def check_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Refuses tags that are too many or too long. Raises ``Invalid``."""
    fits = all(0 < len(name) <= 63 and len(value) <= 200 for name, value in tags.items())
    # A lone surrogate can be stored and never be shown again: one device's tag would break every list it is in.
    fits = fits and not any("\ud800" <= c <= "\udfff" for item in tags.items() for text in item for c in text)
    if len(tags) > MAX_TAGS or not fits:
        raise Invalid(
            "bad_tags", f"tags: wanted at most {MAX_TAGS} names of 1 to 63 characters with values of at most 200"
        )
    return dict(tags)
