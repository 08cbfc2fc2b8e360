"""The online key behind a URI: on a PKCS#11 token, in an encrypted file, in the environment, or in a cloud.

``file2:PATH`` (PEM, below the keys' folder when relative), ``envvar:NAME`` (the same PEM), ``hsm:NUMBER?label=TOKEN`` (PKCS#11, module in
``PYKCS11LIB``), and ``awskms:``, ``gcpkms:``, ``azurekms:``, ``hv:`` as securesystemslib writes them. A token's PIN is in ``SKERRY_PIN`` or in the
file that ``SKERRY_PIN_FILE`` names, a password likewise in ``SKERRY_KEY_PASSWORD``: nobody is there to be asked. What a key
signed is checked under the public key on record before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import (
    SIGNER_FOR_URI_SCHEME,
    CryptoSigner,
    HSMSigner,
    Key,
    Signer,
)
from skerry_runtime.checked_signing import CheckedSigner, beside, token_key

PACKAGES = {
    "hsm": "skerry-server[pkcs11]",
    "awskms": "securesystemslib[awskms]",
    "azurekms": "securesystemslib[azurekms]",
    "gcpkms": "securesystemslib[gcpkms]",
    "hv": "securesystemslib[vault]",
}
_KNOWN = ("file2", "envvar", *PACKAGES)
_MAX_SECRET_BYTES = 4096


def open_signer(uri: str, public_key: Key, folder: Path, environment: Mapping[str, str] = os.environ) -> Signer:
    """Opens the key behind a URI, and has it sign once, so that a wrong one is told at the start.

    Raises:
        ValueError: an unknown scheme, a package, file, variable, token or secret that is missing, or another key.
    """
    if scheme_of(uri) in ("file2", "envvar"):
        opened: Signer = _pem_signer(uri, folder, environment)
    else:
        _require_token(uri, environment)
        try:
            opened = Signer.from_priv_key_uri(uri, public_key, lambda _: secret("SKERRY_PIN", environment))
        except Exception as error:
            raise _named(uri, error) from error
    signer = CheckedSigner(opened, public_key, uri, fault=_named)
    signer.sign(b"skerry-server")
    return signer


def import_key(uri: str, folder: Path, environment: Mapping[str, str] = os.environ) -> tuple[str, Key]:
    """Reads the public part of a key that exists: the URI to keep, and the key.

    Raises:
        ValueError: as ``open_signer``.
    """
    scheme = scheme_of(uri)
    if scheme in ("file2", "envvar"):
        return uri, _pem_signer(uri, folder, environment).public_key
    _require_token(uri, environment)
    try:
        found: tuple[str, Key]
        if scheme == "hsm":
            number, label = token_key(uri)
            found = beside(lambda: HSMSigner.import_(number, label, lambda _: secret("SKERRY_PIN", environment)))
        elif scheme == "azurekms":
            place = urlparse(uri.partition(":")[2])
            signer: Any = SIGNER_FOR_URI_SCHEME[scheme]
            found = signer.import_(place.netloc.partition(".")[0], place.path.split("/")[2])
        else:
            signer = SIGNER_FOR_URI_SCHEME[scheme]
            found = signer.import_(uri.partition(":")[2])
    except Exception as error:
        raise _named(uri, error) from error
    if found[1].keytype not in ("ed25519", "ecdsa"):
        raise ValueError(f"{uri}: wanted an Ed25519 or ECDSA key, got {found[1].keytype}")
    return found


def scheme_of(uri: str) -> str:
    """The scheme of a key's URI. Raises ``ValueError`` when there is none that is known."""
    scheme, colon, _ = uri.partition(":")
    if not colon or scheme not in _KNOWN:
        raise ValueError(f"{uri}: wanted a key's URI that begins with {', '.join(f'{name}:' for name in _KNOWN)}")
    return scheme


def secret(variable: str, environment: Mapping[str, str]) -> str:
    """A secret from the environment, or from the file that ``<variable>_FILE`` names. Raises ``ValueError`` when there is none."""
    if environment.get(variable):
        return environment[variable]
    file = environment.get(f"{variable}_FILE")
    if not file:
        raise ValueError(f"the online key wants its secret in {variable}, or in a file that {variable}_FILE names")
    with Path(file).open("rb") as stream:
        text = stream.read(_MAX_SECRET_BYTES).decode().rstrip("\r\n")
    if not text:
        raise ValueError(f"{file}: wanted the secret of the online key there, it is empty")
    return text


def _pem_signer(uri: str, folder: Path, environment: Mapping[str, str]) -> CryptoSigner:
    scheme, _, rest = uri.partition(":")
    if scheme == "file2":
        data = (folder / unquote(rest)).read_bytes()
    else:
        data = environment.get(rest, "").encode()
    if b"PRIVATE KEY" not in data:
        raise ValueError(f"{uri}: wanted a private key in PEM there")
    encrypted = b"ENCRYPTED" in data
    password = secret("SKERRY_KEY_PASSWORD", environment).encode() if encrypted else None
    try:
        return CryptoSigner(serialization.load_pem_private_key(data, password))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError(f"{uri}: the password is wrong, or this is no private key in PEM") from None


def _require_token(uri: str, environment: Mapping[str, str]) -> None:
    if scheme_of(uri) != "hsm":
        return
    token_key(uri)
    module = environment.get("PYKCS11LIB", "")
    if not os.access(module or "/nonexistent", os.R_OK):
        raise ValueError(
            f"{uri}: wanted the path of the token's PKCS#11 module in PYKCS11LIB, got {module or 'nothing'}"
        )


def _named(uri: str, error: Exception) -> ValueError:
    scheme = uri.partition(":")[0]
    if isinstance(error, UnsupportedLibraryError):
        return ValueError(f"{uri}: keys of {scheme}: need the package {PACKAGES.get(scheme, scheme)}")
    return ValueError(f"{uri}: {type(error).__name__}: {error}".rstrip(": "))
