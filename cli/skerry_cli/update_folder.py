"""The folder that an update is written into: a stick that was in other hands.

Owns every file that is touched there. Nothing in it is believed: each step of a path is opened without following links, links and pipes are
refused before anything is written, and removed is only what bears a name that an export gives.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType

from skerry_contract import layout

from skerry_cli.errors import RefusedForSafety, Usage

MARK = "skerry-update.json"
"""Says to people what is in the folder, and to the next export that the folder is its own. Devices do not read it."""
_PARTS = (layout.METADATA_DIR, layout.TARGETS_DIR, "blobs", "keys")
_OURS = re.compile(
    r"(?:metadata/(?:timestamp|[0-9]+\.(?:root|snapshot|targets|catalog|fleet))\.json"
    r"|targets/(?:fleet|catalog(?:/[a-z0-9-]+/[0-9A-Za-z.-]+)?)/[0-9a-f]{64}\.[a-z0-9-]+\.json"
    r"|blobs/sha256/[0-9a-f]{2}/[0-9a-f]{64}"
    r"|keys/[0-9a-f]{64}/[0-9a-f]{64}\.json)(?:\.new)?"
)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE_BYTES = 1 << 20


class UpdateFolder:
    """Opens the folder, and makes it where there is none.

    Attributes:
        is_new: there was nothing in it.

    Raises:
        Usage: it holds something else, it is a link, or ``folder_unsafe``: there is a link or a pipe in it.
        OSError: it cannot be read or made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        try:
            self._top = os.open(path, _FOLDER)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Usage(f"{path}: wanted a folder, and no link to one") from None
            raise
        try:
            self._look()
        except BaseException:
            os.close(self._top)
            raise

    def __enter__(self) -> UpdateFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._top)

    def holds(self, path: str, sha256: str, size: int) -> bool:
        """Whether there is such a file with these bytes."""
        try:
            with self._parent(path) as (parent, name):
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except FileNotFoundError:
            return False
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256

    def put(self, path: str, pieces: Iterable[bytes], good: Callable[[], bool]) -> None:
        """Writes a file under another name first: what is cut off or wrong never has its own. Raises ``RefusedForSafety``."""
        with self._parent(path, make=True) as (parent, name):
            scratch = f"{name}.new"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(scratch, dir_fd=parent)
            new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(scratch, new, 0o644, dir_fd=parent), "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if not good():
                os.unlink(scratch, dir_fd=parent)
                raise RefusedForSafety(f"{name}: what the server sent is not what its name says")
            os.replace(scratch, name, src_dir_fd=parent, dst_dir_fd=parent)
            # A stick may be pulled at once. Not every file system on one lets a folder be synced.
            with contextlib.suppress(OSError):
                os.fsync(parent)

    def tidy(self, kept: set[str]) -> list[str]:
        """Removes what an earlier export wrote and this one does not name. Returns what is nobody's of ours, and stays."""
        foreign = []
        for path, is_folder in [*self._walk()]:
            if path in kept:
                continue
            with self._parent(path) as (parent, name):
                if is_folder:
                    with contextlib.suppress(OSError):
                        os.rmdir(name, dir_fd=parent)
                elif _OURS.fullmatch(path):
                    os.unlink(name, dir_fd=parent)
                else:
                    foreign.append(path)
        return foreign

    def _look(self) -> None:
        names = os.listdir(self._top)
        self.is_new = not names
        if names and MARK not in names:
            raise Usage(f"{self.path}: wanted a folder that is empty, or of an earlier export (with {MARK})")
        if MARK in names and not stat.S_ISREG(os.stat(MARK, dir_fd=self._top, follow_symlinks=False).st_mode):
            raise self._unsafe(MARK)
        for _ in self._walk():
            pass

    def _walk(self) -> Iterator[tuple[str, bool]]:
        """Files, and each folder behind what is in it, with whether it is one. Raises ``Usage`` for anything else."""
        for part in _PARTS:
            try:
                found = os.stat(part, dir_fd=self._top, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(found.st_mode):
                raise self._unsafe(part)
            yield from self._below(part, self._top, part)

    def _below(self, path: str, parent: int, name: str) -> Iterator[tuple[str, bool]]:
        held = self._open(name, parent, path)
        try:
            for inner in sorted(os.listdir(held)):
                deeper = f"{path}/{inner}"
                mode = os.stat(inner, dir_fd=held, follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    yield from self._below(deeper, held, inner)
                    yield deeper, True
                elif stat.S_ISREG(mode):
                    yield deeper, False
                else:
                    raise self._unsafe(deeper)
        finally:
            os.close(held)

    @contextlib.contextmanager
    def _parent(self, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The folder of a file, opened, and the file's name in it."""
        *steps, name = path.split("/")
        if any(step in ("", ".", "..") or "\0" in step for step in (*steps, name)):
            raise RefusedForSafety(f"{path[:200]!r} leads out of {self.path}")
        held = os.dup(self._top)
        try:
            for step in steps:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(step, dir_fd=held)
                deeper = self._open(step, held, path)
                os.close(held)
                held = deeper
            yield held, name
        finally:
            os.close(held)

    def _open(self, name: str, parent: int, shown: str) -> int:
        try:
            return os.open(name, _FOLDER, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise self._unsafe(shown) from None
            raise

    def _unsafe(self, path: str) -> Usage:
        return Usage(
            f"{self.path}: folder_unsafe: {path} is a link, or neither file nor folder",
            advice="somebody changed this folder: export into an empty one",
        )
