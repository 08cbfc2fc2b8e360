"""Where the operator's tool remembers what it has seen of a fleet: against rollback, and for ``skerry restore``.

It is filed under the fleet's first root, which every device trusts and nobody replaces. A CA is no name for it: after a theft the fleet
gets another one, just when the server is to be believed the least.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from skerry_contract import canonical

_SEEN = ".seen"
_PREFIX = "root-"


def folder(keys: Path, root_sha256: str) -> Path:
    """The place of one fleet, below the folder of its keys; it need not be there yet.

    What lies there under a CA, as the tool once filed it, is moved here: of several the one that saw the newest catalog.
    """
    place = keys / _SEEN / f"{_PREFIX}{root_sha256[:16]}"
    if not place.exists():
        old = [one for one in _under_a_ca(keys / _SEEN) if _root_sha256(one) == root_sha256]
        if old:
            # Another run may be doing the same: then it is there already.
            with contextlib.suppress(OSError):
                max(old, key=lambda one: (_version(one), one.name)).rename(place)
    return place


def _under_a_ca(parent: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [one for one in parent.iterdir() if one.is_dir() and not one.name.startswith(_PREFIX)]
    return []


def _root_sha256(place: Path) -> str:
    with contextlib.suppress(OSError):
        return canonical.sha256((place / "catalog" / "root_history" / "1.root.json").read_bytes())
    return ""


def _version(place: Path) -> int:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((place / "catalog" / "seen.json").read_bytes())["catalog"])
    return 0
