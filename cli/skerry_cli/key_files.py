"""How a key stands in a file: private keys in PEM, the server's public keys as TUF writes them.

Reads and writes single keys and says clearly what is wrong with one. What a key may sign, and who holds it, is in ``keys``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from skerry_cli.errors import RefusedForSafety, Usage

ENCRYPTED = b"BEGIN ENCRYPTED PRIVATE KEY"
"""What an encrypted key in PEM (PKCS#8) begins with."""


def read_online_keys(text: str | bytes, what: str = "online keys") -> dict[str, Key]:
    """Reads the server's public keys: ``online.pub.json``, or the answer of ``/api/v1/repository/online-keys``.

    Accepts one TUF key dict, a map of key id to key dict, or that map under ``keys``. A key id that is stated must be
    the one that follows from the key, so that two tools never mean different keys by one id. Where the document says which
    key is ``newest``, that one alone comes back: a server lists every key that it ever had, also stolen ones.

    Raises:
        Usage: not such a document, no key in it, an id that belongs to another key, or a newest one that it does not list.
    """
    try:
        value = json.loads(text)
        newest = value.get("newest") if "keys" in value else None
        if "keyval" in value:
            value = {str(value.pop("keyid", "")): value}
        elif "keys" in value:
            value = value["keys"]
        keys: dict[str, Key] = {}
        for stated, body in value.items():
            key = SSlibKey.from_crypto(_crypto_public(body), scheme=str(body["scheme"]))
            if stated not in ("", key.keyid):
                raise ValueError(f"key id {stated} does not follow from its key, wanted {key.keyid}")
            keys[key.keyid] = key
    except (ValueError, KeyError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
        raise Usage(f"{what}: wanted a TUF key or a map of them: {error}") from None
    if not keys:
        raise Usage(f"{what}: the document names no key")
    if newest is not None:
        if newest not in keys:
            raise Usage(f"{what}: it calls {str(newest)[:16]!r} its newest key and does not list it")
        return {newest: keys[newest]}
    return keys


def load_signer(path: Path, password: bytes | None) -> CryptoSigner:
    """Opens a private key in PEM (PKCS#8).

    Raises:
        Usage: missing, readable by others, encrypted without a password or with another one, or no such key.
    """
    return read_signer(_private_bytes(path), password, str(path))


def read_signer(data: bytes, password: bytes | None, what: str) -> CryptoSigner:
    """As ``load_signer``, of bytes that came from ``what``."""
    try:
        key = serialization.load_pem_private_key(data, password)
    except TypeError:
        wanted = "is encrypted: give its password" if password is None else "is not encrypted, but a password was given"
        raise Usage(f"{what} {wanted}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise Usage(f"{what}: the password is wrong, or this is no private key in PEM") from None
    if not isinstance(key, (ed25519.Ed25519PrivateKey, ec.EllipticCurvePrivateKey)):
        raise Usage(f"{what}: wanted an Ed25519 or P-256 key, got {type(key).__name__}")
    return CryptoSigner(key)


def is_encrypted(path: Path) -> bool:
    """Whether a private key's file wants a password. Raises ``Usage`` as ``load_signer`` does."""
    data = _private_bytes(path)
    return ENCRYPTED in data or b"Proc-Type: 4,ENCRYPTED" in data


def generate(key_type: str) -> CryptoSigner:
    """A new key: ``ed25519``, or ``ecdsa`` for P-256. Raises ``Usage`` for another type."""
    if key_type == "ed25519":
        return CryptoSigner.generate_ed25519()
    if key_type == "ecdsa":
        return CryptoSigner.generate_ecdsa()
    raise Usage(f"key type {key_type!r}: wanted ed25519 or ecdsa")


def private_pem(signer: CryptoSigner, password: bytes | None) -> bytes:
    """The private key in PEM (PKCS#8), encrypted unless ``password`` is None."""
    key = serialization.load_pem_private_key(signer.private_bytes, None)
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def write_new(path: Path, data: bytes, *, mode: int) -> None:
    """Writes a file that must not be there yet; file and name are on disk on return. Raises ``FileExistsError``."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def replace(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Writes a file whole or not at all; whoever reads sees the old one or the new one. On disk on return."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    scratch.unlink(missing_ok=True)
    write_new(scratch, data, mode=mode)
    scratch.replace(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def crypto_public(key: Key) -> ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey:
    """The public key as ``cryptography`` has it. Raises ``Usage`` for a type that this tool does not sign with."""
    try:
        return _crypto_public(key.to_dict())
    except (ValueError, KeyError, UnsupportedAlgorithm) as error:
        raise Usage(f"key {key.keyid[:16]}: {error}") from None


def require_own_id(keyid: str, key: Key) -> None:
    """Checks that a key id is the one that follows from its key: what people compare is the id, what verifies is the key.

    Raises:
        RefusedForSafety: it is another key's, or the key is none that this tool knows.
    """
    try:
        # Under its type's own scheme: another one would give the same key a second id, and a second vote.
        own = SSlibKey.from_crypto(_crypto_public(key.to_dict())).keyid
    except (ValueError, KeyError, TypeError, UnsupportedAlgorithm) as error:
        raise RefusedForSafety(f"key {keyid[:16]}: wanted an ed25519 or ecdsa key: {error}") from None
    if own != keyid:
        raise RefusedForSafety(
            f"key {keyid[:16]} does not follow from its key, whose fingerprint is {own[:16]}",
            advice="the document was changed on its way: a stranger's key stands under somebody's fingerprint",
        )


def _private_bytes(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as error:
        raise Usage(f"{path}: wanted a private key in PEM: {error.strerror}") from None
    if mode & 0o077:
        raise Usage(f"{path}: others may read this private key (mode {mode & 0o777:04o})", advice=f"chmod 600 {path}")
    return data


def _crypto_public(body: Mapping[str, Any]) -> ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey:
    public = str(body["keyval"]["public"])
    if body["keytype"] == "ed25519":
        return ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    key = serialization.load_pem_public_key(public.encode())
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError(f"wanted an ed25519 or ecdsa key, got {body['keytype']!r}")
    return key
