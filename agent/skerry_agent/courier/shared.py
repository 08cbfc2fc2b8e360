"""Files that another bundle of this device has already, or is getting: fetched once, however many bundles hold them.

What a file's content is, its bundle's manifest says; that it still is so, its hash. The new bundle's file is a link to the same
bytes where the disk has links, else a copy. A file of a slot is never written to, so sharing it is safe: a bundle that is
removed or replaced takes only its own names away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError

from skerry_agent import durable
from skerry_agent.courier.acquiring import Wanted, is_whole
from skerry_agent.courier.meter import Meter

STAGED_MANIFEST = ".manifest.json"
"""The manifest of a bundle that is not whole yet: what its files will be."""


class SameBundle:
    """As ``acquiring.Source``: a content that stands in the bundle twice comes once.

    Args:
        staging: where its files come to; wanted: all of them, by path.
    """

    def __init__(self, staging: Path, wanted: Mapping[str, Wanted], meter: Meter) -> None:
        self._meter = meter
        self._places: dict[str, list[Path]] = {}
        for path, one in wanted.items():
            self._places.setdefault(one.key, []).append(staging / path)

    def bring(self, wanted: Wanted, path: Path) -> bool:
        """As ``Source``."""
        for place in self._places.get(wanted.key, ()):
            with self._meter.own_work(), contextlib.suppress(FileNotFoundError):
                if place != path and is_whole(place, wanted) and _take(place, path, wanted):
                    return True
        return False


class OtherBundles:
    """As ``acquiring.Source``.

    Args:
        slots: the folder of slots.
        unless: the digest of the bundle that is fetched.
    """

    def __init__(self, slots: Path, unless: str, meter: Meter) -> None:
        self._slots = slots
        self._unless = unless
        self._meter = meter
        self._asked: set[str] = set()
        self._places = _places(slots, unless)

    def has(self, wanted: Wanted) -> bool:
        """Whether a file of that name and size is there; what is in it is not looked at."""
        return any(_size(path) == wanted.size for path in self._named(wanted))

    def bring(self, wanted: Wanted, path: Path) -> bool:
        """As ``Source``."""
        if wanted.key in self._asked:
            # Asked again: another courier was fetching it, and its bundle may be newer than what was seen here.
            self._places = _places(self._slots, self._unless)
        self._asked.add(wanted.key)
        for place in self._named(wanted):
            with self._meter.own_work(), contextlib.suppress(FileNotFoundError):
                if is_whole(place, wanted) and _take(place, path, wanted):
                    return True
        return False

    def _named(self, wanted: Wanted) -> list[Path]:
        return self._places.get((wanted.hashes.get("sha256", ""), wanted.size), [])


def _take(place: Path, path: Path, wanted: Wanted) -> bool:
    scratch = path.with_name(f".{path.name}.new")
    scratch.unlink(missing_ok=True)
    try:
        os.link(place, scratch, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        # A disk without links, or another one, or a file with as many as there may be.
        shutil.copyfile(place, scratch, follow_symlinks=False)
        if not is_whole(scratch, wanted):
            scratch.unlink()
            return False
    # Fetched or copied: its bytes may not be on disk yet.
    durable.sync_file(scratch)
    scratch.replace(path)
    # rename(2) does nothing between two links of one file.
    scratch.unlink(missing_ok=True)
    durable.sync_folder(path.parent)
    return True


def _places(slots: Path, unless: str) -> dict[tuple[str, int], list[Path]]:
    """Content (sha256, bytes) -> where it should be."""
    found: dict[tuple[str, int], list[Path]] = {}
    for folder, file in _files(slots, unless):
        found.setdefault((file.sha256, file.size), []).append(folder / file.path)
    return found


def _files(slots: Path, unless: str) -> Iterator[tuple[Path, manifests.File]]:
    """Folder and file of every bundle whose manifest is its digest's."""
    staging = slots / ".staging"
    whole = manifests.MANIFEST_FILE
    for root, name in ((slots, whole), (staging, whole), (staging, STAGED_MANIFEST)):
        try:
            folders = sorted(
                entry for entry in root.iterdir() if entry.name != unless and not entry.name.startswith(".")
            )
        except FileNotFoundError:
            continue
        for folder in folders:
            try:
                data = (folder / name).read_bytes()
                if manifests.digest(data) == folder.name:
                    yield from ((folder, file) for file in manifests.parse(data).files())
            except (OSError, ContractError):
                continue


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return -1
