"""The OpenSSF Model Signing signature of a bundle: made, and verified, with ``cryptography`` alone.

``model.sig`` is a Sigstore bundle (v0.3) around a DSSE envelope around an in-toto statement that lists every file by sha256
(predicate ``https://model_signing/signature/v1.0``), signed with ECDSA P-256 and SHA-256; the public tool's
``model_signing verify key`` accepts it. It says who made the files. It has no version, no expiry and no threshold: what may
run on a fleet is decided by TUF, and this complements it.

``verify_statement`` takes bytes and opens no file. The signature is checked before a single field of what it covers is used.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from skerry_contract import manifest as mf
from skerry_contract.reading import ready

from skerry_runtime.bundle import open_bundle
from skerry_runtime.errors import Rejected

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

MAX_BYTES = 4 << 20
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"


class _Hint(msgspec.Struct, frozen=True):
    hint: str = ""


class _Material(msgspec.Struct, frozen=True, rename="camel"):
    public_key: _Hint


class _Signature(msgspec.Struct, frozen=True):
    sig: str
    keyid: str = ""


class _Envelope(msgspec.Struct, frozen=True, rename="camel"):
    payload: str
    payload_type: str
    signatures: tuple[_Signature, ...]


class _SigstoreBundle(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope


class _Digest(msgspec.Struct, frozen=True):
    sha256: str


class _Subject(msgspec.Struct, frozen=True):
    digest: _Digest
    name: str = ""


class _Resource(msgspec.Struct, frozen=True):
    name: str
    algorithm: str
    digest: str


class _Serialization(msgspec.Struct, frozen=True):
    method: str
    hash_type: str
    allow_symlinks: bool = False


class _Predicate(msgspec.Struct, frozen=True):
    resources: tuple[_Resource, ...]
    serialization: _Serialization


class _Statement(msgspec.Struct, frozen=True, rename={"type_": "_type", "predicate_type": "predicateType"}):
    type_: str
    subject: tuple[_Subject, ...]
    predicate_type: str
    predicate: _Predicate


ready(_SigstoreBundle, _Statement)


def sign_bundle(folder: str | Path, private_key_pem: bytes, password: bytes | None = None) -> bytes:
    """Signs a bundle; the caller writes the result beside the manifest as ``model.sig``.

    Args:
        folder: the bundle's; checked in full before anything is signed.
        private_key_pem: ECDSA P-256, PEM.
        password: of the key, None when it has none.

    Raises:
        Rejected: the bundle is not whole; see ``open_bundle``.
        ValueError: the key is no P-256 private key, or the password is wrong.
    """
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = _private_key(private_key_pem, password)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return sign_bundle_with(folder, public, lambda data: key.sign(data, ec.ECDSA(hashes.SHA256())))


def sign_bundle_with(folder: str | Path, public_key_pem: bytes, sign: Callable[[bytes], bytes]) -> bytes:
    """Signs a bundle with a key that lies elsewhere, on a token say; see ``sign_bundle``.

    Args:
        public_key_pem: ECDSA P-256, PEM; what ``sign`` made is checked under it.
        sign: makes an ECDSA signature (DER) with SHA-256 over the bytes.

    Raises:
        Rejected: as ``sign_bundle``.
        ValueError: the key is no P-256 key, or what signed is another one.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = _public_key(public_key_pem)
    bundle = open_bundle(folder)
    files = {file.path: file.content.sha256 for file in bundle.manifest.files()} | {
        mf.MANIFEST_FILE: str(bundle.digest)
    }
    resources = [{"name": name, "algorithm": "sha256", "digest": files[name]} for name in sorted(files)]
    statement = {
        "_type": _STATEMENT_TYPE,
        "subject": [
            {
                "name": f"{bundle.manifest.model}-{bundle.manifest.version}",
                "digest": {"sha256": _root([files[name] for name in sorted(files)])},
            }
        ],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "resources": resources,
            "serialization": {
                "method": "files",
                "allow_symlinks": False,
                "ignore_paths": [mf.SIGNATURE_FILE],
                "hash_type": "sha256",
            },
        },
    }
    payload = msgspec.json.encode(statement)
    signature = sign(_pae(_PAYLOAD_TYPE, payload))
    try:
        key.verify(signature, _pae(_PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise ValueError("signing key: what signed is not the key that was named") from None
    return msgspec.json.encode(
        {
            "mediaType": _MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": _hint(key)}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": _PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
    )


def verify_signature(folder: str | Path, sig_bytes: bytes, public_key_pem: bytes) -> None:
    """Checks that the key signed exactly the files of this bundle: none changed, missing or added.

    Raises:
        Rejected: ``bad_signature``, or what is wrong with the bundle itself.
        ValueError: the key is no P-256 public key.
    """
    signed = verify_statement(sig_bytes, public_key_pem)
    bundle = open_bundle(folder)
    files = {file.path: file.content.sha256 for file in bundle.manifest.files()} | {
        mf.MANIFEST_FILE: str(bundle.digest)
    }
    _require_same(signed, files)


def covers_manifest(sig_bytes: bytes, public_key_pem: bytes, manifest: bytes) -> None:
    """Checks that the key signed exactly the files that a manifest lists, and the manifest, without having the files.

    Raises:
        Rejected: ``bad_signature``.
        ValueError: the key is no P-256 public key. ``ContractError``: the manifest cannot be read.
    """
    signed = verify_statement(sig_bytes, public_key_pem)
    listed = {file.path: file.content.sha256 for file in mf.parse(manifest).files()}
    _require_same(signed, listed | {mf.MANIFEST_FILE: str(mf.digest(manifest))})


def verify_statement(sig_bytes: bytes, public_key_pem: bytes) -> dict[str, str]:
    """Checks the signature itself and gives what it covers: path -> sha256.

    Raises:
        Rejected: ``bad_signature``: malformed, of another key, or inconsistent in itself.
        ValueError: the key is no P-256 public key.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = _public_key(public_key_pem)
    if len(sig_bytes) > MAX_BYTES:
        raise _bad(f"at most {MAX_BYTES} bytes, got {len(sig_bytes)}")
    outer = _decode(sig_bytes, _SigstoreBundle, "signature")
    envelope = outer.dsse_envelope
    if outer.media_type != _MEDIA_TYPE or envelope.payload_type != _PAYLOAD_TYPE or len(envelope.signatures) != 1:
        raise _bad(f"wanted {_MEDIA_TYPE} with one signature over {_PAYLOAD_TYPE}")
    payload = _unbase64(envelope.payload)
    try:
        key.verify(_unbase64(envelope.signatures[0].sig), _pae(_PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        named = outer.verification_material.public_key.hint
        other = named != _hint(key)
        raise _bad(f"made with another key, {named[:64]}" if other else "does not fit what it covers") from None
    return _covered(_decode(payload, _Statement, "statement"))


def _require_same(signed: dict[str, str], files: dict[str, str]) -> None:
    for name in sorted(files.keys() | signed.keys()):
        if name not in signed:
            raise _bad(f"{name}: in the bundle, not in the signature")
        if name not in files:
            raise _bad(f"{name}: signed, not in the bundle")
        if signed[name] != files[name]:
            raise _bad(f"{name}: signed with sha256 {signed[name]}, it has {files[name]}")


def _covered(statement: _Statement) -> dict[str, str]:
    form = statement.predicate.serialization
    if statement.type_ != _STATEMENT_TYPE or statement.predicate_type != _PREDICATE_TYPE:
        raise _bad(f"wanted a statement of {_PREDICATE_TYPE}, got {statement.predicate_type[:80]}")
    if form.method != "files" or form.hash_type != "sha256" or form.allow_symlinks:
        raise _bad("wanted whole files by sha256, without links")
    resources = statement.predicate.resources
    covered = {resource.name: resource.digest for resource in resources}
    if len(covered) != len(resources) or any(resource.algorithm != "sha256" for resource in resources):
        raise _bad("wanted each file once, by sha256")
    try:
        root = _root([resource.digest for resource in resources])
    except ValueError:
        raise _bad("wanted digests in hex") from None
    if len(statement.subject) != 1 or statement.subject[0].digest.sha256 != root:
        raise _bad("the subject's digest is not that of the files")
    return covered


def require_public_key(pem: bytes) -> None:
    """Checks that signatures can be verified with it. Raises ``ValueError`` when it is no P-256 public key in PEM."""
    _public_key(pem)


def _root(digests: list[str]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def _pae(payload_type: str, payload: bytes) -> bytes:
    # DSSE v1, pre-authentication encoding.
    return b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(payload), payload)


def _hint(key: ec.EllipticCurvePublicKey) -> str:
    from cryptography.hazmat.primitives import serialization

    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _private_key(pem: bytes, password: bytes | None) -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(pem, password)
    except (TypeError, ValueError) as error:
        raise ValueError(f"signing key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("signing key: wanted an ECDSA key on P-256")
    return key


def _public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError as error:
        raise ValueError(f"verification key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("verification key: wanted an ECDSA key on P-256")
    return key


def _decode(data: bytes, kind: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(f"{what}: {error}") from None


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _bad("wanted base64") from None


def _bad(detail: str) -> Rejected:
    return Rejected("bad_signature", detail)
