"""What power that fails leaves of a folder, at every change that a process makes to it.

Python's own calls are watched while the code under test runs. What was not synced is gone or, for names, may be there all the
same: a cut leaves one of two folders, ``names`` with every change of a name so far and ``synced`` with those that a sync of
their folder brought to disk. In both a file has what it had at its last sync, and nothing when there was none.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

Kind = Literal["names", "synced"]
_Entry = tuple[str, Any]
_CHANGES = ("open", "fsync", "replace", "rename", "unlink", "remove", "symlink", "link", "mkdir", "rmdir")


class PowerDisk:
    """Of one folder, which is on disk as it is now.

    Args:
        cut: called before each change and at the end, with the number of changes so far.
    """

    def __init__(self, root: Path, cut: Callable[[int], None]) -> None:
        self.root = root
        self.changes = 0
        self._cut = cut
        self._watching = False
        self._ids = itertools.count()
        self._live: dict[int, int] = {}
        self._held: dict[int, bytes] = {}
        self._names: dict[Path, dict[str, _Entry]] = {}
        for folder in (root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())):
            self._names[folder] = self._listing(folder, synced=True)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The changes that are made meanwhile are cut before."""
        before = {name: getattr(os, name) for name in _CHANGES}
        for name, real in before.items():
            setattr(os, name, self._wrapped(name, real))
        self._watching = True
        try:
            yield
            self._watching = False
            self._cut(self.changes)
        finally:
            self._watching = False
            for name, real in before.items():
                setattr(os, name, real)

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            path = self._path_of(name, args)
            if not self._watching or path is None or (name == "open" and not args[1] & os.O_CREAT):
                return real(*args, **more)
            self._watching = False
            try:
                self._cut(self.changes)
                self.changes += 1
            finally:
                self._watching = True
            result = real(*args, **more)
            if name == "open" and args[1] & os.O_EXCL:
                self._live[os.fstat(result).st_ino] = next(self._ids)
            elif name == "fsync" and path.is_dir():
                self._names[path] = self._listing(path)
            elif name == "fsync":
                self._held[self._id(path)] = path.read_bytes()
            return result

        return call

    def _path_of(self, name: str, args: tuple[Any, ...]) -> Path | None:
        if name == "fsync":
            path = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
        else:
            path = Path(os.fsdecode(args[1 if name in ("symlink", "replace", "rename", "link") else 0]))
        return path if path == self.root or self.root in path.parents else None

    def _id(self, path: Path) -> int:
        return self._live.setdefault(path.lstat().st_ino, next(self._ids))

    def _listing(self, folder: Path, *, synced: bool = False) -> dict[str, _Entry]:
        found: dict[str, _Entry] = {}
        for path in folder.iterdir():
            if path.is_symlink():
                found[path.name] = ("link", os.readlink(path))
            elif path.is_dir():
                found[path.name] = ("folder", None)
            else:
                found[path.name] = ("file", self._id(path))
                if synced:
                    self._held[self._id(path)] = path.read_bytes()
        return found

    def left(self, kind: Kind, into: Path) -> None:
        """Makes the folder that a cut now would leave."""
        into.mkdir()
        self._lay(kind, self.root, into)

    def _lay(self, kind: Kind, folder: Path, into: Path) -> None:
        names = self._listing(folder) if kind == "names" else self._names.get(folder, {})
        for name, (what, value) in names.items():
            if what == "link":
                (into / name).symlink_to(value)
            elif what == "folder":
                (into / name).mkdir()
                self._lay(kind, folder / name, into / name)
            else:
                (into / name).write_bytes(self._held.get(value, b""))
