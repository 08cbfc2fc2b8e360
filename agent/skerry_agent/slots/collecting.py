"""Makes room: removes bundles that nothing names any more, and what belongs to none that is here.

What stays is told by the caller. Nothing waits for a removal: what cannot be removed stays until the next time.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Collection

from skerry_agent import memory_folder
from skerry_agent.logs import kv
from skerry_agent.slots.bundles import KEYS, Bundles
from skerry_agent.slots.pointers import Slot

log = logging.getLogger(__name__)


class Collecting:
    """See the module.

    Args:
        bundles: the folders that are collected in.
        pointed: what the pointers name, those on disk too.
    """

    def __init__(self, bundles: Bundles, *, pointed: Callable[[], list[Slot]]) -> None:
        self._bundles = bundles
        self._pointed = pointed
        self._stay = ""

    def collect(self, named: Collection[str]) -> tuple[str, ...]:
        """Removes bundles that are not ``named``. Returns their digests."""
        gone: list[str] = []
        stay = ""
        for digest in self._bundles.digests():
            if digest in named:
                continue
            # Renamed first: a folder half removed must not look like a slot.
            doomed = self._bundles.staging / f"{digest}.old"
            shutil.rmtree(doomed, ignore_errors=True)
            try:
                self._bundles.path(digest).rename(doomed)
            except OSError as error:
                # A card that can only be read any more, say. Nothing waits for this.
                stay = str(error)
                continue
            shutil.rmtree(doomed, ignore_errors=True)
            gone.append(digest)
        for entry in self._bundles.staging.iterdir():
            if entry.name.removesuffix(".old") not in named or entry.name.endswith(".old"):
                shutil.rmtree(entry, ignore_errors=True)
        stay = self._drop_other_variants() or stay
        self._drop_secrets(named)
        if stay and stay != self._stay:
            log.error("bundle not removed", extra=kv(detail=stay))
        self._stay = stay
        return tuple(gone)

    def spare(self, named: Collection[str]) -> tuple[int, int]:
        """What ``collect`` would make room for on the disk: bytes, and files."""
        doomed = [self._bundles.path(digest) for digest in self._bundles.digests() if digest not in named]
        doomed += [entry for entry in self._bundles.staging.iterdir() if entry.name not in named]
        total, files = 0, 0
        for folder in doomed:
            for path in folder.rglob("*"):
                with contextlib.suppress(OSError):
                    found = path.stat()
                    # A file with another name elsewhere frees nothing.
                    total += found.st_blocks * 512 if found.st_nlink == 1 or path.is_dir() else 0
                    files += found.st_nlink == 1 or path.is_dir()
        return total, files

    def drop_scraps(self) -> None:
        """What couriers of an earlier life left half opened; none runs yet."""
        if self._bundles.opened is not None:
            memory_folder.drop(self._bundles.opened, lambda name: name.startswith("."))

    def _drop_secrets(self, named: Collection[str]) -> None:
        """Wrapped keys, and bundles in the clear, that belong to nothing here any more."""
        with contextlib.suppress(OSError):
            for path in (self._bundles.root / KEYS).iterdir():
                if path.stem not in named:
                    path.unlink(missing_ok=True)
        if self._bundles.opened is not None:
            memory_folder.drop(self._bundles.opened, lambda name: name not in named and not name.startswith("."))

    def _drop_other_variants(self) -> str:
        """Files of variants that no pointer names any more: a worker reads every file that is there, and one that rots stops it.

        Returns:
            Why one stays; empty where none does.
        """
        needed: dict[str, set[str]] = {}
        stay = ""
        for slot in self._pointed():
            if (variant := self._bundles.variant(slot)) is not None:
                needed.setdefault(slot.digest, set()).update(file.path for file in variant.files)
        for digest, paths in needed.items():
            manifest = self._bundles.manifest(digest)
            for file in manifest.files() if manifest is not None else ():
                if file.path not in paths:
                    try:
                        (self._bundles.path(digest) / file.path).unlink(missing_ok=True)
                    except OSError as error:
                        stay = str(error)
        return stay
