"""Who a device is over HTTP: a JWT of its own key that binds one request, and nonces that are taken once.

``Authorization: Skerry-JWT <jws>``: header {alg, kid: sha256 of the device's public key}, claims {sub: device id, htm: method, htu: path,
body: hex sha256 of the body, nonce, iat, exp: at most 60 s later}. The stored key decides the algorithm (ES256 for P-256,
EdDSA for Ed25519), never the header. Nonces live in memory: after a restart a device asks for a new one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
from collections import OrderedDict
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from skerry_contract import ids
from sqlalchemy import Connection, select

from skerry_server.db import tables as t
from skerry_server.errors import Unauthenticated

SCHEME = "Skerry-JWT"
MAX_LIFE_S = 60
MAX_TOKEN_CHARS = 4096
CLAIMS = ("sub", "htm", "htu", "body", "nonce", "iat", "exp")


class Nonces:
    """Nonces that were given out and not used yet. Safe to use from several threads."""

    def __init__(self, *, life_s: float, most: int) -> None:
        self._life_ms = int(life_s * 1000)
        self._most = most
        self._lock = threading.Lock()
        self._expires: OrderedDict[str, int] = OrderedDict()

    def give(self, now_ms: int) -> str:
        """A new nonce. When too many are unused the oldest ends: memory stays bounded whoever asks."""
        nonce = secrets.token_urlsafe(24)
        with self._lock:
            while self._expires and (len(self._expires) >= self._most or next(iter(self._expires.values())) <= now_ms):
                self._expires.popitem(last=False)
            self._expires[nonce] = now_ms + self._life_ms
        return nonce

    def take(self, nonce: str, now_ms: int) -> bool:
        """Whether the nonce was good; it is so once."""
        with self._lock:
            expires = self._expires.pop(nonce, None)
        return expires is not None and expires > now_ms


_KID = re.compile("[0-9a-f]{64}")
_MAX_TIME_S = 1 << 40


def verify(
    conn: Connection,
    nonces: Nonces,
    *,
    authorization: str | None,
    method: str,
    path: str,
    body: bytes,
    now_ms: int,
    skew_s: float,
) -> ids.DeviceId:
    """The device that made this request.

    The nonce is taken last, after the signature held: nobody else can use it up.

    Raises:
        Unauthenticated: code ``bad_device_token``, ``unknown_device`` or ``bad_nonce``.
    """
    scheme, _, token = (authorization or "").partition(" ")
    if scheme != SCHEME or not token or len(token) > MAX_TOKEN_CHARS:
        raise Unauthenticated("bad_device_token", f"wanted a header Authorization: {SCHEME} <token>")
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError as error:
        raise Unauthenticated("bad_device_token", f"the token cannot be read: {error}") from None
    kid = header.get("kid")
    row = None
    if isinstance(kid, str) and _KID.fullmatch(kid):
        query = select(t.devices).where(t.devices.c.public_key_sha256 == kid)
        row = conn.execute(query).mappings().first()
    if row is None or row["status"] != "enrolled":
        raise Unauthenticated("unknown_device", "no enrolled device has this key")
    claims = _claims(token, row["public_key_pem"])
    bound = {
        "sub": row["id"],
        "htm": method,
        "htu": path,
        "body": hashlib.sha256(body).hexdigest(),
    }
    for name, wanted in bound.items():
        if not isinstance(claims[name], str) or not hmac.compare_digest(
            claims[name].encode(errors="surrogatepass"), wanted.encode()
        ):
            raise Unauthenticated("bad_device_token", f"the token is for another request: {name} differs")
    _check_times(claims, now_ms / 1000, skew_s)
    if not isinstance(claims["nonce"], str) or not nonces.take(claims["nonce"], now_ms):
        raise Unauthenticated("bad_nonce", "the nonce is unknown, expired or used; ask /device/v1/nonce for another")
    return ids.DeviceId(row["id"])


def _claims(token: str, public_key_pem: str) -> dict[str, Any]:
    key = serialization.load_pem_public_key(public_key_pem.encode())
    algorithm = "ES256" if isinstance(key, ec.EllipticCurvePublicKey) else "EdDSA"
    # Times are checked below, against the clock that was passed in.
    options: Any = {"require": list(CLAIMS), "verify_exp": False, "verify_iat": False, "verify_sub": False}
    try:
        claims: dict[str, Any] = jwt.decode(token, public_key_pem, algorithms=[algorithm], options=options)
    except jwt.PyJWTError as error:
        raise Unauthenticated("bad_device_token", f"the token does not hold: {error}") from None
    return claims


def _check_times(claims: dict[str, Any], now_s: float, skew_s: float) -> None:
    issued, expires = claims["iat"], claims["exp"]
    for value in (issued, expires):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < _MAX_TIME_S:
            raise Unauthenticated("bad_device_token", "iat and exp: wanted seconds since 1970")
    if not 0 <= expires - issued <= MAX_LIFE_S:
        raise Unauthenticated("bad_device_token", f"the token must live at most {MAX_LIFE_S} s")
    if now_s >= expires + skew_s or issued - skew_s > now_s:
        raise Unauthenticated(
            "bad_device_token", "the token is expired or from the future; the nonce's answer holds the server's time"
        )
