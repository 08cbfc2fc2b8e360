"""What deltas of one file cost in vain: one budget for it, whatever base they lead from, over attempts and over the bundles in between.

It lies in ``slots/.parts/<sha256 of the file>.spent`` until the file is here.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from skerry_agent import durable

_MOST = 64
"""Of so many files that nobody wants now it is remembered."""


class Spent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``size_bytes``: of deltas, or parts of them, that were thrown away; ``tries``: so often applying one was begun; ``ended``: and ended in order."""

    size_bytes: int = 0
    tries: int = 0
    ended: int = 0


class Spending:
    """Kept in the folder of parts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, target: str) -> Spent:
        """Of a file, by its sha256."""
        try:
            return msgspec.json.decode(self._path(target).read_bytes(), type=Spent)
        except (OSError, msgspec.MsgspecError):
            return Spent()

    def charge(self, target: str, *, size_bytes: int = 0, tries: int = 0, ended: int = 0) -> None:
        """So much more. On return it is on disk. Raises ``OSError``."""
        if size_bytes or tries or ended:
            before = self.of(target)
            after = Spent(
                size_bytes=before.size_bytes + size_bytes, tries=before.tries + tries, ended=before.ended + ended
            )
            durable.write(self._path(target), msgspec.json.encode(after))

    def forget(self, target: str) -> None:
        """The file is here."""
        self._path(target).unlink(missing_ok=True)

    def tidy(self, wanted: Collection[str]) -> None:
        """Forgets what is longest ago of files that nobody wants now."""
        idle = [path for path in self._folder.glob("*.spent") if path.stem not in wanted]
        for path in sorted(idle, key=lambda one: one.stat().st_mtime, reverse=True)[_MOST:]:
            path.unlink(missing_ok=True)

    def _path(self, target: str) -> Path:
        return self._folder / f"{target}.spent"
