"""The server's online keys on disk: the one it was made with, and those made later to replace it.

A new key lies beside the old one until the operator's root and targets name it; from then on it signs, and without a moment in
which nothing signs. A key lies in a file of its own (``online.pem``, ``online-2.pem`` ...), or behind a URI that ``online.key.json``,
``online-2.key.json`` ... hold with its public part (``signers``). A key that nobody names any more signs nothing and may be deleted. What it looks like in one file is
``metadata``'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner, Key, Signer

from skerry_server import durable, signers
from skerry_server.metadata import load_online_signer, make_online_key

_FIRST, _PUBLIC = "online.pem", "online.pub.json"


def open_all(folder: Path) -> tuple[Signer, ...]:
    """The keys in the order in which they were made; the first is made when there is none.

    Raises:
        ValueError: a file holds no usable key, or the key behind a URI cannot be used.
    """
    record = folder / _record("online")
    first = _open(record, folder) if record.exists() else make_online_key(folder / _FIRST, folder / _PUBLIC)
    return (first, *(_open(path, folder) for path in _later(folder)))


def begin_with(folder: Path, uri: str) -> None:
    """Has a new server's first online key lie behind a URI; the same again is fine.

    Raises:
        ValueError: the server has another first key already, or the URI cannot be used.
    """
    record = folder / _record("online")
    if record.exists() and json.loads(record.read_bytes())["uri"] == uri:
        return
    if record.exists() or (folder / _FIRST).exists():
        raise ValueError(f"{folder} has its first online key already; make another one with new-online-key")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _keep(record, uri, folder)
    _write_public(folder)


def add(folder: Path, uri: str | None = None) -> Signer:
    """Makes one more key, or names one behind a URI; the running server knows it from its next start on.

    Raises:
        ValueError: the URI cannot be used.
    """
    open_all(folder)
    number = max((_number(path) for path in _later(folder)), default=1) + 1
    if uri is not None:
        signer = _keep(folder / _record(f"online-{number}"), uri, folder)
    else:
        made = CryptoSigner.generate_ed25519()
        durable.write(folder / f"online-{number}.pem", made.private_bytes, mode=0o600)
        signer = made
    _write_public(folder)
    return signer


def public(folder: Path) -> dict[str, Any]:
    """The document for a ceremony: ``keys``, all of them by key id; ``newest``, the key id that new roles should name."""
    record = folder / _record("online")
    first = _read(record)[1] if record.exists() else make_online_key(folder / _FIRST, folder / _PUBLIC).public_key
    keys = [first]
    for path in _later(folder):
        keys.append(load_online_signer(path).public_key if path.suffix == ".pem" else _read(path)[1])
    return {"keys": {key.keyid: key.to_dict() for key in keys}, "newest": keys[-1].keyid}


def _write_public(folder: Path) -> None:
    durable.write(folder / _PUBLIC, json.dumps(public(folder), indent=2).encode() + b"\n")


def _keep(record: Path, uri: str, folder: Path) -> Signer:
    uri, key = signers.import_key(uri, folder)
    signer = signers.open_signer(uri, key, folder)
    value = {"schema": 1, "uri": uri, "keyid": key.keyid, "key": key.to_dict()}
    durable.write(record, json.dumps(value, indent=2).encode() + b"\n", mode=0o600)
    return signer


def _open(path: Path, folder: Path) -> Signer:
    if path.suffix == ".pem":
        return load_online_signer(path)
    uri, key = _read(path)
    return signers.open_signer(uri, key, folder)


def _read(path: Path) -> tuple[str, Key]:
    try:
        value = json.loads(path.read_bytes())
        return str(value["uri"]), Key.from_dict(str(value["keyid"]), dict(value["key"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: wanted the record of an online key: {error!r}") from None


def _record(stem: str) -> str:
    return f"{stem}.key.json"


def _later(folder: Path) -> list[Path]:
    found = [*folder.glob("online-*.pem"), *folder.glob("online-*.key.json")]
    return sorted((path for path in found if _number(path)), key=_number)


def _number(path: Path) -> int:
    text = path.name.removeprefix("online-").partition(".")[0]
    return int(text) if text.isdigit() else 0
