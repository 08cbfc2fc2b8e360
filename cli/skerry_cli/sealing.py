"""Encrypted bundles on the operator's side: content keys in files, files sealed on their way up, blobs opened to be checked.

The bundle's folder itself stays in the clear, for whoever builds a model has it anyway: it is validated, signed and inspected like any
other. What leaves this machine is sealed, and the content key goes to the server once, apart from the files. The formats are ``skerry_contract.sealed``.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import manifest as m
from skerry_contract import sealed
from skerry_contract.errors import ContractError

from skerry_cli.errors import Failed, RefusedForSafety, Usage

_CHUNK = 1 << 20


def key_file(folder: Path) -> Path:
    """Where the content key of a bundle lies that was built here: beside its folder, never in it."""
    return folder.with_name(f"{folder.name}.content-key.json")


def make_key(path: Path) -> bytes:
    """A new content key in a new file, mode 0600.

    Raises:
        Usage: a file is there; what was encrypted under its key could not be opened any more.
    """
    key = secrets.token_bytes(sealed.KEY_BYTES)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(sealed.encode_key_file(key))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise Usage(f"{path}: a content key is there; name it with --content-key to use it again") from None
    except OSError as error:
        raise Failed(f"{path}: {error.strerror or error}") from None
    return key


def read_key(path: Path) -> bytes:
    """A content key of a file. Raises ``Usage``, without the key in its words."""
    try:
        return sealed.decode_key_file(path.read_bytes())
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}; wanted the bundle's content key") from None
    except ContractError as error:
        raise Usage(f"{path}: {error}") from None


def key_for(manifest: m.Manifest, folder: Path, chosen: Path | None = None) -> bytes:
    """The content key of an encrypted bundle: of ``chosen``, else of the file beside its folder.

    Raises:
        Usage: no file. RefusedForSafety: it is another bundle's key.
    """
    assert manifest.encryption is not None
    path = chosen or key_file(folder)
    key = read_key(path)
    require_named(manifest, key, str(path))
    return key


def require_named(manifest: m.Manifest, key: bytes, what: str) -> None:
    """Raises ``RefusedForSafety`` unless the manifest names this content key."""
    wanted = manifest.encryption.key_id if manifest.encryption is not None else ""
    if len(key) != sealed.KEY_BYTES or sealed.key_id(key) != wanted:
        raise RefusedForSafety(f"{what}: it is not the content key that {manifest.model}@{manifest.version} names")


def stored(path: Path, key: bytes, plain_sha256: str) -> tuple[str, int]:
    """sha256 and size of a file once it is sealed."""
    found, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            for piece in sealed.seal(file, key, plain_sha256, AESGCM):
                found.update(piece)
                size += len(piece)
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}") from None
    return found.hexdigest(), size


def sealed_copy(path: Path, key: bytes, file: m.File) -> BinaryIO:
    """The sealed file, at its beginning, in a temporary file without a name.

    Raises:
        RefusedForSafety: it is not what the manifest lists: another key, or a file that has changed since it was checked.
    """
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - handed to the caller, who closes it
    found = hashlib.sha256()
    with path.open("rb") as source:
        for piece in sealed.seal(source, key, file.content.sha256, AESGCM):
            found.update(piece)
            copy.write(piece)
    if found.hexdigest() != file.sha256 or copy.tell() != file.size:
        copy.close()
        raise RefusedForSafety(f"{path}: sealed with this key it is not what the manifest lists")
    copy.seek(0)
    return cast(BinaryIO, copy)


class Pieces:
    """An iterator of bytes as what is read from, counted and hashed on the way.

    Attributes:
        size, sha256: of what was given so far.
    """

    def __init__(self, pieces: Iterator[bytes], most: int) -> None:
        self._pieces = pieces
        self._rest = b""
        self._most = most
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        """Of what was read."""
        return self._hash.hexdigest()

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes; none at the end, or when more came than there may be."""
        while not self._rest and self.size <= self._most:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._hash.update(piece)
            self.size += len(piece)
            self._rest = piece
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


def fault_of_opened(pieces: Iterator[bytes], key: bytes, file: m.File) -> str:
    """What is wrong with a sealed file that comes in pieces: with its own bytes, or with what is in it; empty when nothing is."""
    assert file.plain is not None
    source, inside, size = Pieces(pieces, file.size), hashlib.sha256(), 0
    try:
        for plain in sealed.opened(cast(BinaryIO, source), key, file.plain.sha256, AESGCM):
            inside.update(plain)
            size += len(plain)
    except sealed.CannotOpen as error:
        return str(error)
    if (source.size, source.sha256) != (file.size, file.sha256):
        return f"{source.size} bytes, sha256 {source.sha256}, wanted {file.size}, {file.sha256}"
    if (size, inside.hexdigest()) != (file.plain.size, file.plain.sha256):
        return f"in it {size} bytes, sha256 {inside.hexdigest()}, wanted {file.plain.size}, {file.plain.sha256}"
    return ""
