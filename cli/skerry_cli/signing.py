"""``model.sig`` beside a bundle: the operator's side of ``skerry_runtime.signature``, which says what the file is.

Reads key files and turns what the runtime package finds into the tool's errors. What a device may run is decided by the update
repository and never by this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from securesystemslib.signer import Signer
from skerry_contract import manifest as m
from skerry_runtime import signature
from skerry_runtime.errors import BundleFault

from skerry_cli import keyring, signers
from skerry_cli.bundle import Bundle, check_files
from skerry_cli.errors import RefusedForSafety, Usage


def sign(bundle: Bundle, key: Path, password: bytes | None = None) -> Path:
    """Signs a bundle whose files hold and writes ``model.sig``; returns its path.

    Raises:
        RefusedForSafety: a file does not match the manifest.
        Usage: the key is missing, encrypted without a password, or no P-256 private key.
    """
    return _write(bundle, str(key), lambda: signature.sign_bundle(bundle.folder, _read(key), password))


def sign_with(bundle: Bundle, signer: Signer, what: str) -> Path:
    """As ``sign``, with a key that lies wherever its record says: a file, a token, a cloud.

    Raises:
        RefusedForSafety: a file does not match the manifest.
        Usage: the key is not one on P-256, which ``model_signing`` wants. Also as the signer.
    """
    public = signers.public_pem(signer.public_key)
    return _write(
        bundle,
        what,
        lambda: signature.sign_bundle_with(
            bundle.folder, public, lambda data: bytes.fromhex(signer.sign(data).signature)
        ),
    )


def _write(bundle: Bundle, what: str, make: Callable[[], bytes]) -> Path:
    check_files(bundle)
    try:
        signed = make()
    except BundleFault as error:
        raise RefusedForSafety(f"{bundle.folder}: {error}") from None
    except ValueError as error:
        raise Usage(f"{what}: {error}") from None
    path = bundle.folder / m.SIGNATURE_FILE
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_bytes(signed)
    staging.replace(path)
    return path


def verify(bundle: Bundle, key: Path) -> None:
    """Checks the bundle's files and its ``model.sig`` against one key.

    Raises:
        RefusedForSafety: no signature, not by this key, or it speaks of other files than those in the folder.
        Usage: the key is missing, or no P-256 public key.
    """
    check_files(bundle)
    if bundle.signature is None:
        raise RefusedForSafety(f"{bundle.folder / m.SIGNATURE_FILE}: missing; wanted a signature")
    try:
        signature.verify_signature(bundle.folder, bundle.signature, public_key(key))
    except BundleFault as error:
        raise RefusedForSafety(f"{bundle.folder / m.SIGNATURE_FILE}: {error}") from None
    except ValueError as error:
        raise Usage(f"{key}: {error}") from None


def public_key(path: Path) -> bytes:
    """A public key in PEM, from PEM or from a holder's ``NAME.pub.json``. Raises ``Usage`` when there is none."""
    data = _read(path)
    if data.lstrip()[:1] == b"{":
        return signers.public_pem(keyring.read_public_part(path).key)
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}; wanted a key in PEM") from None
