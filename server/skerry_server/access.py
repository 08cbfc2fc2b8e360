"""API tokens and roles: who an operator is and what the role allows.

A token is a random secret; the database holds its sha256. Roles: ``viewer`` reads; ``engineer``, ``approver``, ``operator`` and
``auditor`` each add their own commands and also read; ``admin`` may do all.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Any

from skerry_contract import ids
from sqlalchemy import Connection, insert, select, update

from skerry_server import audit
from skerry_server.db import tables as t
from skerry_server.errors import Conflict, Invalid, NotFound, Unauthenticated

ROLES = ("viewer", "engineer", "approver", "operator", "auditor", "admin")
TOKEN_PREFIX = "skt_"  # noqa: S105 - a mark that secret scanners find, no secret
USED_EVERY_MS = 60_000
"""``used_ms`` is written at most this often: reading must not write with every request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks."""

    name: str
    role: str

    @property
    def actor(self) -> str:
        """As the audit record names them."""
        return f"token:{self.name}"

    def may(self, role: str) -> bool:
        """Whether the caller's role includes ``role``."""
        return self.role in ("admin", role) or (role == "viewer" and self.role in ROLES)


def hash_secret(secret: str) -> str:
    """Hex sha256. Secrets here are random and long, so a slow hash would add nothing."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create_token(
    conn: Connection, *, name: str, role: str, now_ms: int, actor: str, expires_s: float | None = None
) -> str:
    """Makes a token and returns its secret, which is shown this once.

    Raises:
        Malformed: for a name outside the id grammar.
        Invalid: for an unknown role. Conflict: when the name was ever used.
    """
    ids.device_id(name)
    if role not in ROLES:
        raise Invalid("bad_role", f"role: wanted one of {', '.join(ROLES)}, got {role!r}")
    if conn.execute(select(t.api_tokens.c.id).where(t.api_tokens.c.name == name)).first() is not None:
        raise Conflict(
            "name_taken", f"a token {name!r} is or was there; names are never used twice, for the audit's sake"
        )
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    expires_ms = None if expires_s is None else now_ms + int(expires_s * 1000)
    conn.execute(
        insert(t.api_tokens).values(
            name=name, sha256=hash_secret(secret), role=role, created_ms=now_ms, expires_ms=expires_ms
        )
    )
    after = {"role": role, "expires_ms": expires_ms}
    audit.record(conn, at_ms=now_ms, actor=actor, action="token.create", subject=f"token:{name}", after=after)
    return secret


def revoke_token(conn: Connection, *, name: str, now_ms: int, actor: str) -> None:
    """Ends a token. Raises ``NotFound`` when there is none alive of that name."""
    query = (
        update(t.api_tokens)
        .where(t.api_tokens.c.name == name, t.api_tokens.c.revoked_ms.is_(None))
        .values(revoked_ms=now_ms)
    )
    if conn.execute(query).rowcount != 1:
        raise NotFound("token", name)
    audit.record(conn, at_ms=now_ms, actor=actor, action="token.revoke", subject=f"token:{name}")


def list_tokens(conn: Connection) -> list[dict[str, Any]]:
    """Every token without its secret or hash, by name."""
    c = t.api_tokens.c
    query = select(c.name, c.role, c.created_ms, c.expires_ms, c.revoked_ms, c.used_ms).order_by(c.name)
    return [dict(row) for row in conn.execute(query).mappings()]


def find_caller(conn: Connection, secret: str, now_ms: int) -> tuple[Caller, bool]:
    """Who holds this secret, and whether ``used_ms`` is due to be written.

    Raises:
        Unauthenticated: unknown, expired or revoked; the answer does not say which.
    """
    wanted = hash_secret(secret)
    row = conn.execute(select(t.api_tokens).where(t.api_tokens.c.sha256 == wanted)).mappings().first()
    known = row is not None and hmac.compare_digest(row["sha256"], wanted)
    if row is None or not known or row["revoked_ms"] is not None or (row["expires_ms"] or now_ms + 1) <= now_ms:
        raise Unauthenticated("bad_token", "the bearer token is unknown, expired or revoked")
    due = now_ms - (row["used_ms"] or 0) > USED_EVERY_MS
    return Caller(name=row["name"], role=row["role"]), due


def knows(conn: Connection, secret: str) -> bool:
    """Whether the secret was ever made here; it may be revoked or expired by now."""
    query = select(t.api_tokens.c.name).where(t.api_tokens.c.sha256 == hash_secret(secret))
    return conn.execute(query).first() is not None


def caller_named(conn: Connection, name: str, now_ms: int) -> Caller | None:
    """Who the token of that name is, while it is neither revoked nor expired."""
    c = t.api_tokens.c
    row = conn.execute(select(c.name, c.role, c.expires_ms).where(c.name == name, c.revoked_ms.is_(None))).first()
    if row is None or (row.expires_ms or now_ms + 1) <= now_ms:
        return None
    return Caller(name=row.name, role=row.role)


def note_use(conn: Connection, name: str, now_ms: int) -> None:
    """Remembers when the token was last used."""
    conn.execute(update(t.api_tokens).where(t.api_tokens.c.name == name).values(used_ms=now_ms))
