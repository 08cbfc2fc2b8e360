"""The device's own key: P-256, made on the device, never leaving it.

Owns ``identity/device.key`` (0600), certificate requests, and the tokens that bind one HTTP request to the key.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from skerry_agent import durable
from skerry_agent.errors import Degraded

TOKEN_LIFE_S = 60
KEY_FILE = "device.key"
CERTIFICATE_FILE = "device.pem"


def make_key(identity: Path) -> ec.EllipticCurvePrivateKey:
    """The device's key; made at the first call, kept for ever after.

    A second enrolment uses the same key: its server may know it already, and an answer that was lost can be asked for again.
    """
    path = identity / KEY_FILE
    if path.exists():
        return load_key(identity)
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    durable.make_folder(identity)
    durable.write(path, pem, mode=0o600)
    return key


def load_key(identity: Path) -> ec.EllipticCurvePrivateKey:
    """The device's key. Raises ``Degraded``: ``not_enrolled`` without one, ``identity_damaged`` for an unusable file."""
    path = identity / KEY_FILE
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        raise Degraded("not_enrolled", f"{path} is not there", advice="enrol the device") from None
    except (ValueError, TypeError, OSError) as error:
        raise Degraded(
            "identity_damaged", f"{path}: wanted a P-256 key: {error}", advice="enrol the device again"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Degraded("identity_damaged", f"{path}: wanted a P-256 key", advice="enrol the device again")
    return key


def request_certificate(key: ec.EllipticCurvePrivateKey, subject: str) -> str:
    """A certificate request (PKCS#10) in PEM. The CA reads the public key and, for a prefix token, asks of the CN."""
    # Only enrol and renew come here: sync, which signs a token each time, does without this import.
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else [])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def key_id(key: ec.EllipticCurvePrivateKey) -> str:
    """Hex sha256 of the DER of the public key: the ``kid`` of its tokens."""
    der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def request_token(
    key: ec.EllipticCurvePrivateKey, *, device: str, method: str, path: str, body: bytes, nonce: str, now_s: float
) -> str:
    """A compact ES256 JWS that is good for one request: method, path, body and nonce are bound, 60 s of life."""
    issued = int(now_s)
    header = {"alg": "ES256", "kid": key_id(key), "typ": "JWT"}
    claims = {
        "sub": device,
        "htm": method,
        "htu": path,
        "body": hashlib.sha256(body).hexdigest(),
        "nonce": nonce,
        "iat": issued,
        "exp": issued + TOKEN_LIFE_S,
    }
    signed = f"{_part(header)}.{_part(claims)}"
    # JWS wants r and s side by side (RFC 7518, 3.4), not DER.
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{_base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _part(value: Mapping[str, object]) -> str:
    return _base64url(json.dumps(value, separators=(",", ":")).encode())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
