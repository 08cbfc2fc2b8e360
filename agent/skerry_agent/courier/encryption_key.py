"""The device's other key, which content keys are wrapped for: P-256, apart from the one that it signs with.

Where it lies decides what a thief of the card gets. In a file (``identity/encryption.key``, 0600) it lies beside what it opens, and so protects
copies of the repository, of a backup, of the network's traffic, and not the card. Behind a ``pkcs11:`` URI the key never leaves its token, and the card alone
opens nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from skerry_agent import durable
from skerry_agent.errors import Degraded

KEY_FILE = "encryption.key"
IN_FILE = "file"


class Holder(Protocol):
    """Whoever can use the key."""

    def point(self) -> bytes:
        """The public key, uncompressed."""

    def secret(self, sender: bytes) -> bytes:
        """ECDH with another's point: the x coordinate, 32 bytes. Raises ``ValueError`` for what is no point of P-256."""


def holder(identity: Path, where: str) -> Holder:
    """The key; one in a file is made at the first call, and kept for ever after.

    Args:
        where: ``file``, or a PKCS#11 URI.

    Raises:
        Degraded: ``encryption_key_unusable``.
    """
    if where == IN_FILE:
        return _InFile(identity)
    from skerry_agent.courier import encryption_token

    return encryption_token.OnToken(where)


def public_pem(holder: Holder) -> str:
    """What the server is told."""
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), holder.point())
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


class _InFile:
    def __init__(self, identity: Path) -> None:
        path = identity / KEY_FILE
        if not path.exists():
            made = ec.generate_private_key(ec.SECP256R1())
            pem = made.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            durable.make_folder(identity)
            durable.write(path, pem, mode=0o600)
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (ValueError, TypeError, OSError) as error:
            raise _unusable(f"{path}: wanted a P-256 key: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise _unusable(f"{path}: wanted a P-256 key")
        self._key = key

    def point(self) -> bytes:
        return self._key.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )

    def secret(self, sender: bytes) -> bytes:
        return self._key.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), sender))


def _unusable(detail: str) -> Degraded:
    return Degraded(
        "encryption_key_unusable",
        detail,
        advice="give the agent its key back; else remove it and have an operator say: skerry device forget-key",
    )
