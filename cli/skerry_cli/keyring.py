"""The keys that one person can sign with on one machine: ``keys.json`` in their folder, name -> URI and public key.

Owns that file and the public part that is handed to others (``<name>.pub.json``). It holds no secret: a private key lies in a file
beside it, on a token or in a cloud, and ``signers`` opens it. Nothing here is ever written over. A folder of an older
``skerry keys init`` has no such file; there the ceremony's record names the private files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesystemslib.signer import Key, Signer

from skerry_cli import key_files, signers
from skerry_cli.errors import Usage
from skerry_cli.offline_roles import spoken

KEYRING_FILE = "keys.json"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicPart:
    """What a holder hands over: no secret, and worth something only when its fingerprint was compared."""

    name: str
    key: Key

    @property
    def fingerprint(self) -> str:
        """To be read aloud."""
        return spoken(self.key.keyid)

    def to_json(self) -> dict[str, Any]:
        """Builtins, as the file holds them."""
        return {"schema": 1, "name": self.name, "keyid": self.key.keyid, "key": self.key.to_dict()}


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnKey:
    """A key that this machine can sign with."""

    name: str
    uri: str
    key: Key

    @property
    def public(self) -> PublicPart:
        """What others get."""
        return PublicPart(name=self.name, key=self.key)

    def to_json(self) -> dict[str, Any]:
        """Builtins, for ``--json`` and the file."""
        return {"name": self.name, "keyid": self.key.keyid, "uri": self.uri, "key": self.key.to_dict()}


def read_keyring(folder: Path) -> dict[str, OwnKey]:
    """The keys of a folder by name; none when it has no ``keys.json``.

    Raises:
        Usage: the file is damaged, or a key id does not follow from its key.
    """
    path = folder / KEYRING_FILE
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Usage(f"{path}: wanted a key record: {error}") from None
    try:
        if document["schema"] != 1:
            raise Usage(f"{path}: schema {document['schema']}: wanted 1")
        found = [
            OwnKey(name=check_name(entry["name"]), uri=str(entry["uri"]), key=_key(entry, f"{path}: {entry['name']}"))
            for entry in document["keys"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise Usage(f"{path}: wanted a key record: {error!r}") from None
    return {own.name: own for own in found}


def add_key(folder: Path, own: OwnKey) -> Path:
    """Puts a key into the folder's record and writes its public part beside it; returns that part's path.

    Raises:
        Usage: the name is taken.
    """
    held = read_keyring(folder)
    if own.name in held and held[own.name].key.keyid != own.key.keyid:
        raise Usage(f"{folder / KEYRING_FILE} has a key {own.name!r} already; nothing is written over")
    held[own.name] = own
    document = {"schema": 1, "keys": [one.to_json() for one in held.values()]}
    key_files.replace(folder / KEYRING_FILE, json.dumps(document, indent=2).encode() + b"\n")
    public = folder / f"{own.name}.pub.json"
    key_files.replace(public, json.dumps(own.public.to_json(), indent=2).encode() + b"\n")
    return public


def make_file_key(folder: Path, name: str, *, key_type: str, password: bytes | None) -> OwnKey:
    """Makes a key in a new file of the folder, encrypted unless ``password`` is None, and records it.

    Raises:
        Usage: the name is taken or cannot be, or the key type is none.
    """
    check_name(name)
    if password == b"":
        raise Usage("the password is empty; say that there is none instead")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if name in read_keyring(folder) or (folder / f"{name}.pem").exists():
        raise Usage(f"{folder} holds a key {name!r} already; nothing is written over")
    signer = key_files.generate(key_type)
    key_files.write_new(folder / f"{name}.pem", key_files.private_pem(signer, password), mode=0o600)
    own = OwnKey(name=name, uri=f"{signers.FILE}:{name}.pem", key=signer.public_key)
    add_key(folder, own)
    return own


def open_key(folder: Path, name: str, *, secret: signers.SecretSource, environment: Mapping[str, str]) -> Signer:
    """Opens one's own key by name.

    Raises:
        Usage: there is no such key here. Also as ``signers.open_signer``.
    """
    own = read_keyring(folder)
    if name not in own:
        known = ", ".join(own) or "none"
        raise Usage(
            f"{folder / KEYRING_FILE}: no key {name!r}, only {known}",
            advice="make one with 'skerry keys make', or name one that exists with 'skerry keys use'",
        )
    held = own[name]
    return signers.open_signer(held.uri, held.key, whose=name, folder=folder, secret=secret, environment=environment)


def read_public_part(path: Path) -> PublicPart:
    """A colleague's ``<name>.pub.json``.

    Raises:
        Usage: missing, or not such a file, or its key id does not follow from its key.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Usage(f"{path}: {reason}; wanted the public part of a key, NAME.pub.json") from None
    try:
        return public_part(document, str(path))
    except (KeyError, TypeError, AttributeError):
        raise Usage(f"{path}: wanted the public part of a key, NAME.pub.json") from None


def public_part(document: Mapping[str, Any], what: str) -> PublicPart:
    """A public part from builtins. Raises ``KeyError`` or ``TypeError`` for another form, ``Usage`` for what does not fit together."""
    if document["schema"] != 1:
        raise Usage(f"{what}: schema {document['schema']}: wanted 1")
    return PublicPart(name=check_name(str(document["name"])), key=_key(document, what))


def check_name(name: str) -> str:
    """A holder's name. Raises ``Usage`` when it cannot be one."""
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise Usage(f"a holder's name must match {NAME.pattern}, got {repr(name)[:60]}")
    return name


def checked_names(named: Mapping[str, Any], what: str) -> dict[str, str]:
    """Key id -> holder, as somebody else wrote it: shown beside fingerprints, so no text that could be taken for more than a name.

    Raises:
        Usage: a name that cannot be one. ``AttributeError`` for no mapping.
    """
    try:
        return {str(keyid): check_name(name) for keyid, name in named.items()}
    except Usage as error:
        raise Usage(f"{what}: {error.message}") from None


def _key(entry: Mapping[str, Any], what: str) -> Key:
    (key,) = key_files.read_online_keys(json.dumps({"keyid": entry["keyid"], **entry["key"]}), what=what).values()
    return key
