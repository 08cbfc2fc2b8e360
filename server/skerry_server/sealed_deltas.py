"""Deltas between encrypted files: made of what is in them, and encrypted before anyone gets one.

Opens a pair's files in the maker's scratch folder, which is ours alone and emptied after each delta, and seals what was made. With either of its
files a delta gives the other away; so it is sealed under the content keys of both.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import sealed
from skerry_runtime import patching

from skerry_server.core.deltas import Pair, Sealed

ContentKey = Callable[[str], bytes | None]
"""Bundle digest -> content key, None when it is not here."""


class CannotRead(Exception):
    """A content key is not here, or a file does not open. The words hold nothing secret."""


def lack(pair: Pair, content_key: ContentKey) -> str:
    """Which content key the delta lacks; empty when none."""
    found = pair.sealed
    named = [] if found is None else [digest for digest in (found.base_bundle, found.target_bundle) if digest]
    lacking = [digest for digest in named if content_key(digest) is None]
    return f"the content key of bundle {lacking[0]} is not on this server" if lacking else ""


def clear(
    about: Sealed, pair: Pair, blob: Callable[[str], Path], scratch: Path, content_key: ContentKey
) -> tuple[Path, Path]:
    """Base and target in the clear. Raises ``CannotRead``."""
    base, target = blob(pair.base), scratch / "target"
    if about.base_bundle:
        base = scratch / "base"
        _open(blob(pair.base), base, _key(content_key, about.base_bundle), about.base_plain)
    _open(blob(pair.target), target, _key(content_key, about.target_bundle), about.target_plain)
    return base, target


def seal(
    about: Sealed, pair: Pair, patch: Path, outcome: patching.Outcome, content_key: ContentKey
) -> patching.Outcome:
    """Puts the encrypted delta in the place of the one that was made; what the child said, with its new size."""
    made = patch.with_name("sealed")
    key = _key(content_key, about.target_bundle)
    base_key = _key(content_key, about.base_bundle) if about.base_bundle else b""
    salt = secrets.token_bytes(sealed.KEY_BYTES)
    with patch.open("rb") as source, made.open("wb") as out:
        out.writelines(
            sealed.seal_delta(
                source, key, base_key=base_key, base=pair.base, target=pair.target, salt=salt, new_cipher=AESGCM
            )
        )
    made.replace(patch)
    return msgspec.structs.replace(outcome, size=patch.stat().st_size)


def _key(content_key: ContentKey, digest: str) -> bytes:
    found = content_key(digest)
    if found is None:
        raise CannotRead(f"the content key of bundle {digest} is not on this server")
    return found


def _open(source: Path, target: Path, key: bytes, plain_sha256: str) -> None:
    found = hashlib.sha256()
    try:
        with source.open("rb") as file, target.open("wb") as out:
            for piece in sealed.opened(file, key, plain_sha256, AESGCM):
                found.update(piece)
                out.write(piece)
    except sealed.CannotOpen as error:
        raise CannotRead(f"{source.name}: {error}") from None
    if found.hexdigest() != plain_sha256:
        raise CannotRead(f"{source.name}: in it is {found.hexdigest()}, wanted {plain_sha256}")
