"""OpenSSF Model Signing beside a bundle: ``model.sig``, made and checked with a bare EC key.

The file is a Sigstore bundle v0.3 that holds a DSSE envelope around an in-toto statement; the public tool
``model_signing verify key`` accepts it. It says who vouches for the bytes; it has no expiry, no version and no threshold, so
what a device may run is decided by the update repository and never by this file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from skerry_contract import manifest as m

from skerry_cli.bundle import Bundle, check_files, sha256_of
from skerry_cli.errors import RefusedForSafety, Usage

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_CURVE = ec.SECP256R1
_MAX_BYTES = 4 << 20


def load_private_key(path: Path, password: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Reads a PEM private key.

    Raises:
        Usage: missing, encrypted without a password, or no P-256 key.
    """
    try:
        key = serialization.load_pem_private_key(_read(path), password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Usage(f"{path}: wanted a P-256 private key in PEM: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, _CURVE):
        raise Usage(f"{path}: wanted a P-256 private key, got another kind")
    return key


def load_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Reads a PEM public key.

    Raises:
        Usage: missing, or no P-256 key.
    """
    try:
        key = serialization.load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Usage(f"{path}: wanted a P-256 public key in PEM: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVE):
        raise Usage(f"{path}: wanted a P-256 public key, got another kind")
    return key


def sign(bundle: Bundle, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The bytes of ``model.sig`` for a bundle whose files hold.

    Raises:
        RefusedForSafety: a file does not match the manifest.
    """
    check_files(bundle)
    payload = json.dumps(_statement(bundle)).encode()
    signature = key.sign(_pae(payload), ec.ECDSA(hashes.SHA256()))
    document = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": _hint(key.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(document).encode()


def verify(bundle: Bundle, key: ec.EllipticCurvePublicKey) -> None:
    """Checks the bundle's files and its ``model.sig`` against one key.

    Raises:
        RefusedForSafety: no signature, not by this key, or it speaks of other files than those in the folder.
    """
    check_files(bundle)
    where = bundle.folder / m.SIGNATURE_FILE
    if bundle.signature is None:
        raise RefusedForSafety(f"{where}: missing; wanted a signature")
    payload, signature = _open(bundle.signature, where)
    try:
        key.verify(signature, _pae(payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise RefusedForSafety(f"{where}: not signed by the given key") from None
    try:
        signed = json.loads(payload)
        kept = {name: signed[name] for name in ("_type", "predicateType", "subject")}
        resources = signed["predicate"]["resources"]
    except (ValueError, KeyError, TypeError):
        raise RefusedForSafety(f"{where}: holds no model-signing statement") from None
    wanted = _statement(bundle)
    subject = [{"name": part.get("name"), "digest": part.get("digest")} for part in kept["subject"]]
    same = (
        kept["_type"] == STATEMENT_TYPE
        and kept["predicateType"] == PREDICATE_TYPE
        and [part["digest"] for part in subject] == [part["digest"] for part in wanted["subject"]]
        and resources == wanted["predicate"]["resources"]
    )
    if not same:
        raise RefusedForSafety(f"{where}: signed for other files than those in {bundle.folder}")


def _statement(bundle: Bundle) -> dict[str, Any]:
    names = sorted([m.MANIFEST_FILE, *(file.path for file in bundle.manifest.files())])
    resources = [
        {"algorithm": "sha256", "digest": sha256_of(bundle.folder / name), "name": name} for name in names
    ]
    whole = hashlib.sha256(b"".join(bytes.fromhex(part["digest"]) for part in resources)).hexdigest()
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": bundle.folder.resolve().name, "digest": {"sha256": whole}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "resources": resources,
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [m.SIGNATURE_FILE],
            },
        },
    }


def _open(data: bytes, where: Path) -> tuple[bytes, bytes]:
    if len(data) > _MAX_BYTES:
        raise RefusedForSafety(f"{where}: wanted at most {_MAX_BYTES} bytes")
    try:
        envelope = json.loads(data)["dsseEnvelope"]
        if envelope["payloadType"] != PAYLOAD_TYPE or len(envelope["signatures"]) != 1:
            raise RefusedForSafety(f"{where}: wanted one signature over {PAYLOAD_TYPE}")
        payload = base64.b64decode(envelope["payload"], validate=True)
        return payload, base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise RefusedForSafety(f"{where}: wanted a Sigstore bundle with a DSSE envelope") from None


def _pae(payload: bytes) -> bytes:
    # DSSE pre-authentication encoding: lengths in decimal, so that no two (type, payload) pairs give the same bytes.
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _hint(key: ec.EllipticCurvePublicKey) -> str:
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}") from None
