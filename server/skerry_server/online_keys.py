"""The server's online keys on disk: the one it was made with, and those made later to replace it.

A new key lies beside the old one until the operator's root and targets name it; from then on it signs, and without a moment in
which nothing signs. A key that nobody names any more signs nothing and may be deleted. What it looks like in one file is
``metadata``'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner

from skerry_server import durable
from skerry_server.metadata import load_online_signer, make_online_key

_FIRST, _PUBLIC = "online.pem", "online.pub.json"


def open_all(folder: Path) -> tuple[CryptoSigner, ...]:
    """The keys in the order in which they were made; the first is made when there is none.

    Raises:
        ValueError: a file holds no usable key.
    """
    first = make_online_key(folder / _FIRST, folder / _PUBLIC)
    return (first, *(load_online_signer(folder / f"online-{n}.pem") for n in _numbers(folder)))


def add(folder: Path) -> CryptoSigner:
    """Makes one more key; the running server knows it from its next start on."""
    open_all(folder)
    number = max(_numbers(folder), default=1) + 1
    signer = CryptoSigner.generate_ed25519()
    durable.write(folder / f"online-{number}.pem", signer.private_bytes, mode=0o600)
    _write_public(folder)
    return signer


def public(folder: Path) -> dict[str, Any]:
    """The document for a ceremony: ``keys``, all of them by key id; ``newest``, the key id that new roles should name."""
    signers = open_all(folder)
    return {
        "keys": {signer.public_key.keyid: signer.public_key.to_dict() for signer in signers},
        "newest": signers[-1].public_key.keyid,
    }


def _write_public(folder: Path) -> None:
    durable.write(folder / _PUBLIC, json.dumps(public(folder), indent=2).encode() + b"\n")


def _numbers(folder: Path) -> list[int]:
    found = (path.stem.removeprefix("online-") for path in folder.glob("online-*.pem"))
    return sorted(int(text) for text in found if text.isdigit())
