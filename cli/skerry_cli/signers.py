"""Private keys behind URIs: where a key lies decides how it is opened, and nothing that signs needs to know.

===================  ============================================================================================
``file2:PATH``       a PEM file (PKCS#8), encrypted or not; a relative path is one below the folder of the key record
``envvar:NAME``      the same PEM in an environment variable, for automation
``hsm:ID?label=T``   key number ID on the PKCS#11 token labelled T; the module's path is in ``PYKCS11LIB``
``awskms:`` ...      ``gcpkms:``, ``azurekms:``, ``hv:``: a cloud's key or Vault's, as securesystemslib writes them
===================  ============================================================================================

Owns opening, importing the public part of, and making keys on tokens. Rules: a URI holds no secret, and no secret comes from the
command line; the private part of a token's or a cloud's key never comes here; what a key signed is checked under the public key
that the record holds before anybody gets it, so that a wrong key or token is told at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib import parse

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import (
    SIGNER_FOR_URI_SCHEME,
    CryptoSigner,
    HSMSigner,
    Key,
    Signer,
    SSlibKey,
)
from skerry_runtime.checked_signing import CheckedSigner, ForeignKeyError, beside, token_key

from skerry_cli import key_files
from skerry_cli.errors import CliError, Failed, RefusedForSafety, Usage

SecretKind = Literal["password", "pin"]
SecretSource = Callable[[SecretKind, str], str]
"""(kind, whose key) -> the secret."""

FILE, VARIABLE, TOKEN = "file2", "envvar", "hsm"
EXTRAS = {
    "awskms": "securesystemslib[awskms]",
    "azurekms": "securesystemslib[azurekms]",
    "gcpkms": "securesystemslib[gcpkms]",
    "hv": "securesystemslib[vault]",
}
"""Schemes that pass through to securesystemslib, and the package that each needs."""
_TOKEN_PACKAGE = "skerry[pkcs11]"  # noqa: S105 - a package of tokens, no secret
_MODULE_VARIABLE = "PYKCS11LIB"
_KEY_TYPES = ("ed25519", "ecdsa")


def open_signer(
    uri: str, public_key: Key, *, whose: str, folder: Path, secret: SecretSource, environment: Mapping[str, str]
) -> Signer:
    """Opens the private key behind a URI.

    Args:
        public_key: the one on record; any other key behind the URI is refused.
        whose: the holder's name, for questions and errors.
        folder: of the key record; relative files lie below it.
        secret: asked for a password or PIN when the key needs one, and once only.

    Raises:
        Usage: an unknown scheme, a missing package, file, variable or token, or a wrong password.
        RefusedForSafety: another key than the one on record.
    """
    scheme = scheme_of(uri)
    if scheme in (FILE, VARIABLE):
        opened = _pem_signer(uri, whose=whose, folder=folder, secret=secret, environment=environment)
        if opened.public_key.keyval != public_key.keyval:
            raise RefusedForSafety(
                f"{uri}: this is not key {public_key.keyid[:16]}, which the record names for {whose}"
            )
        return CheckedSigner(opened, public_key, uri, fault=failed)
    if scheme == TOKEN:
        _require_module(uri, environment)
    known: dict[str, str] = {}

    def ask(_: str) -> str:
        if "pin" not in known:
            known["pin"] = secret("pin", whose)
        return known["pin"]

    try:
        inner = Signer.from_priv_key_uri(uri, public_key, ask)
    except Exception as error:
        raise failed(uri, error) from error
    if scheme == TOKEN:
        return CheckedSigner(inner, public_key, uri, fault=failed, first=lambda: ask("pin"))
    return CheckedSigner(inner, public_key, uri, fault=failed)


def import_key(
    uri: str, *, whose: str, folder: Path, secret: SecretSource, environment: Mapping[str, str]
) -> tuple[str, Key]:
    """Reads the public part of a key that exists: the URI to keep, with the token's label, and the key.

    Raises:
        Usage: as ``open_signer``, or a key of a type that this tool does not sign with.
    """
    scheme = scheme_of(uri)
    key: Key
    if scheme in (FILE, VARIABLE):
        key = _pem_signer(uri, whose=whose, folder=folder, secret=secret, environment=environment).public_key
    elif scheme == TOKEN:
        _require_module(uri, environment)
        uri, key = _import_token(uri, lambda: secret("pin", whose))
    elif scheme == "azurekms":
        raise Usage(f"{uri}: the public key of an Azure key is not fetched here", advice="give it with --public FILE")
    else:
        signer: Any = SIGNER_FOR_URI_SCHEME[scheme]
        try:
            uri, key = signer.import_(uri.partition(":")[2])
        except Exception as error:
            raise failed(uri, error) from error
    return uri, require_type(key, uri)


def make_on_token(uri: str, *, whose: str, secret: SecretSource, environment: Mapping[str, str]) -> tuple[str, Key]:
    """Has the token make a P-256 key that it never gives out; returns the URI to keep and the public key.

    Raises:
        Usage: no such token, or the number is taken. Failed: the token refuses.
    """
    if scheme_of(uri) != TOKEN:
        raise Usage(f"{uri}: only a token makes keys; wanted hsm:NUMBER?label=TOKEN")
    _require_module(uri, environment)
    number, label = _token_key(uri)
    import pkcs11
    from pkcs11.util.ec import encode_named_curve_parameters

    pin = secret("pin", whose)
    identity = number.to_bytes((number.bit_length() + 7) // 8 or 1, "big")
    template = {pkcs11.Attribute.SENSITIVE: True, pkcs11.Attribute.EXTRACTABLE: False, pkcs11.Attribute.DERIVE: False}
    curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}

    def generate() -> None:
        token = pkcs11.lib(environment[_MODULE_VARIABLE]).get_token(
            token_label=label, token_flags=pkcs11.TokenFlag.TOKEN_INITIALIZED
        )
        with token.open(rw=True, user_pin=pin) as session:
            if list(session.get_objects({pkcs11.Attribute.ID: identity})):
                raise Usage(
                    f"{uri}: the token holds a key {number} already; nothing is written over",
                    advice="name another number, or use that key: skerry keys use --uri",
                )
            parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
            parameters.generate_keypair(
                mechanism=pkcs11.Mechanism.EC_KEY_PAIR_GEN,
                store=True,
                id=identity,
                label=whose,
                private_template=template,
            )

    try:
        beside(generate)
    except CliError:
        raise
    except Exception as error:
        raise failed(uri, error) from error
    return import_key(uri, whose=whose, folder=Path(), secret=lambda *_: pin, environment=environment)


def scheme_of(uri: str) -> str:
    """The scheme of a signer URI. Raises ``Usage`` when there is none that this tool knows."""
    scheme, colon, _ = uri.partition(":")
    known = (FILE, VARIABLE, TOKEN, *EXTRAS)
    if not colon or scheme not in known:
        advice = "PKCS#11 tokens are hsm:NUMBER?label=TOKEN" if scheme == "pkcs11" else ""
        raise Usage(
            f"{uri}: wanted a key's URI that begins with {', '.join(f'{name}:' for name in known)}", advice=advice
        )
    return scheme


def require_type(key: Key, what: str) -> Key:
    """Checks that devices of every kind can verify with it. Raises ``Usage``."""
    if key.keytype not in _KEY_TYPES:
        raise Usage(f"{what}: wanted an Ed25519 or ECDSA key, got {key.keytype}")
    return key


def _pem_signer(
    uri: str, *, whose: str, folder: Path, secret: SecretSource, environment: Mapping[str, str]
) -> CryptoSigner:
    scheme, _, rest = uri.partition(":")
    if scheme == FILE:
        path = folder / parse.unquote(rest)
        password = secret("password", whose).encode() if key_files.is_encrypted(path) else None
        return key_files.load_signer(path, password)
    text = environment.get(rest)
    if not rest or not text:
        raise Usage(f"{uri}: the environment has no {rest or 'variable of no name'}; wanted a private key in PEM there")
    pem = text.encode()
    password = secret("password", whose).encode() if key_files.ENCRYPTED in pem else None
    return key_files.read_signer(pem, password, uri)


def _import_token(uri: str, ask: Callable[[], str]) -> tuple[str, Key]:
    number, label = _token_key(uri)
    try:
        try:
            return beside(lambda: HSMSigner.import_(number, label))
        except ValueError as error:
            if "unauthenticated" not in str(error):
                raise
        # Some tokens show public keys only to who has the PIN.
        pin = ask()
        return beside(lambda: HSMSigner.import_(number, label, lambda _: pin))
    except CliError:
        raise
    except Exception as error:
        raise failed(uri, error) from error


def _token_key(uri: str) -> tuple[int, str | None]:
    try:
        return token_key(uri)
    except ValueError as error:
        raise Usage(str(error)) from None


def _require_module(uri: str, environment: Mapping[str, str]) -> None:
    _token_key(uri)
    try:
        import pkcs11  # noqa: F401 - only whether it is there
    except ImportError:
        raise Usage(
            f"{uri}: PKCS#11 needs the package {_TOKEN_PACKAGE}", advice=f"pip install '{_TOKEN_PACKAGE}'"
        ) from None
    module = environment.get(_MODULE_VARIABLE, "")
    if not module:
        raise Usage(
            f"{uri}: the environment has no {_MODULE_VARIABLE}; wanted the path of the token's PKCS#11 module there",
            advice="e.g. /usr/lib/x86_64-linux-gnu/libykcs11.so or opensc-pkcs11.so",
        )
    if not os.access(module, os.R_OK):
        raise Usage(
            f"{uri}: {_MODULE_VARIABLE} names {module}, which cannot be read; wanted the token's PKCS#11 module"
        )


def failed(uri: str, error: Exception) -> CliError:
    """What another library raised, in this tool's words. Its messages may quote no secret: none is ever given to it by value."""
    scheme = uri.partition(":")[0]
    kind = type(error).__name__
    if isinstance(error, CliError):
        return error
    if isinstance(error, ForeignKeyError):
        return RefusedForSafety(f"{uri}: {error}", advice="is another token plugged in, or was the key replaced?")
    if isinstance(error, UnsupportedLibraryError):
        package = EXTRAS.get(scheme, _TOKEN_PACKAGE)
        return Usage(f"{uri}: keys of {scheme}: need the package {package}", advice=f"pip install '{package}'")
    if kind in ("PinIncorrect", "PinInvalid", "PinLenRange"):
        return Usage(f"{uri}: the PIN is wrong", advice="a token locks itself after a few wrong ones")
    if kind in ("NoSuchToken", "TokenNotPresent"):
        return Failed(f"{uri}: no such token is plugged in", advice="the URI's label is the token's, not the key's")
    if kind == "PinLocked":
        return Failed(f"{uri}: the token has locked itself after wrong PINs", advice="its administrator can unlock it")
    if isinstance(error, ValueError):
        return Usage(f"{uri}: {error}")
    return Failed(f"{uri}: {kind}: {error}".rstrip(": "))


def public_pem(key: Key) -> bytes:
    """The public key in PEM, as other tools read it. Raises ``Usage`` for a key that has no such form."""
    return key_files.crypto_public(key).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def read_public(path: Path) -> Key:
    """A public key from PEM.

    Raises:
        Usage: missing, or no such key.
    """
    try:
        found = serialization.load_pem_public_key(path.read_bytes())
        return require_type(SSlibKey.from_crypto(found), str(path))
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}; wanted a public key in PEM") from None
    except (ValueError, UnsupportedAlgorithm):
        raise Usage(f"{path}: wanted a public key in PEM (Ed25519 or ECDSA)") from None
