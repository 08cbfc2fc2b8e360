"""Giving a server that a backup took back what its offline roles have lost, from what this operator has seen.

The tool remembers the last root, targets and catalog that it verified, and the last that it completed and the server took. They are
signed; whoever holds them may hand them in, and the server, as every device, verifies them again. Nothing is signed here.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry_contract import layout
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata

from skerry_cli.client import Api
from skerry_cli.errors import Usage

_BASE = "/api/v1/repository"
_VERIFIED = "catalog"
_TAKEN = "taken.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Document:
    version: int
    text: str
    floors: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """Role -> version before and after; roles that were as new already are left out."""

    roles: dict[str, tuple[int, int]]


def restore(api: Api, cache_dir: Path) -> Restored:
    """Hands in what is newer here than on the server, in one snapshot.

    Args:
        cache_dir: what the approver's tool remembers of this fleet.

    Raises:
        Usage: this machine has seen nothing of this fleet.
        RefusedForSafety, Failed: the server does not take it.
    """
    served = {str(role): int(found["version"]) for role, found in dict(api.get(f"{_BASE}/status")).items()}
    held = _held(cache_dir)
    if not held:
        raise Usage(
            f"{cache_dir}: this machine has never seen the catalog of this fleet",
            advice="run this where somebody has approved before, or sign the next versions anew",
        )
    newer = {role: one for role, one in held.items() if one.version > served.get(role, 0)}
    moved = {role: (served.get(role, 0), one.version) for role, one in newer.items()}
    roots = range(served.get("root", 0) + 1, newer["root"].version) if "root" in newer else ()
    history = cache_dir / _VERIFIED / "root_history"
    try:
        # With the last one: targets that one of them named may not hold under the next.
        earlier = [(history / f"{version}.root.json").read_text() for version in roots]
    except OSError as error:
        raise Usage(
            f"{error.filename}: {error.strerror}: this machine has not seen every root on the way",
            advice="give the server the roots first, from who keeps the keys' folder: skerry keys publish",
        ) from None
    if newer:
        body: dict[str, Any] = {role: one.text for role, one in newer.items()}
        if earlier:
            body["roots"] = earlier
        if layout.CATALOG_ROLE in newer:
            body["floors"] = newer[layout.CATALOG_ROLE].floors
        api.post(f"{_BASE}/set", {**body, "restoring": True})
    return Restored(roles=moved)


def remember(cache_dir: Path, documents: Mapping[str, str]) -> None:
    """Keeps what the server has just taken: ``catalog`` and ``floors``, and with them ``targets`` and ``root`` where they came along."""
    scratch = cache_dir / f".{_TAKEN}.{os.getpid()}"
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(dict(documents), file)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(cache_dir / _TAKEN)


def _held(cache_dir: Path) -> dict[str, _Document]:
    """The newest of each role."""
    found: dict[str, _Document] = {}
    taken: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        taken = {str(name): str(text) for name, text in json.loads((cache_dir / _TAKEN).read_bytes()).items()}
    verified = cache_dir / _VERIFIED
    for role in ("root", "targets", layout.CATALOG_ROLE):
        texts = [(taken.get(role, ""), taken.get("floors", ""))]
        with contextlib.suppress(OSError):
            floors = (verified / "floors.json").read_text() if role == layout.CATALOG_ROLE else ""
            texts.append(((verified / f"{role}.json").read_text(), floors))
        for text, floors in texts:
            with contextlib.suppress(RepositoryError):
                one = _Document(
                    version=int(Metadata.from_bytes(text.encode()).signed.version), text=text, floors=floors
                )
                if role not in found or one.version > found[role].version:
                    found[role] = one
    return found
