"""Writing files so that a power cut leaves the old one or the new one, and a reader never sees half.

Owns the order of write, fsync, rename and folder fsync, and the lock file between processes. What the files mean is left to
the callers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

SCRATCH_PREFIX = ".new-"
"""Files that begin so are unfinished; any of them may be deleted while the lock is held."""


def write(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Replaces ``path`` by ``data``; on return both the file and its name are on disk.

    Args:
        mode: of the file from its first byte on, less what the umask takes.

    Raises:
        OSError: and then ``path`` is what it was.
    """
    make_folder(path.parent)
    scratch = path.with_name(f"{SCRATCH_PREFIX}{secrets.token_hex(8)}")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Makes the folder and its parents; each new name is on disk on return."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_unfinished(folder: Path, *, older_than_s: float = 0.0) -> None:
    """Deletes what a crash left half written directly in ``folder``, unless it was written to within ``older_than_s``."""
    for scratch in folder.glob(f"{SCRATCH_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if not older_than_s or time.time() - scratch.stat().st_mtime > older_than_s:
                scratch.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock between processes; waits for it. The kernel frees it when its holder dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class CheckedWriter:
    """A file that appears under its name only when all its bytes have arrived and match.

    Use as a context: ``write`` pieces, then ``commit``; leaving without ``commit`` leaves nothing behind.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        make_folder(path.parent)
        self._scratch = path.with_name(f"{SCRATCH_PREFIX}{secrets.token_hex(8)}")
        self._file = self._scratch.open("xb")
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> None:
        """Adds bytes. Raises ``OSError``, e.g. for a full disk."""
        self._file.write(piece)
        self._digest.update(piece)
        self.size += len(piece)

    def sha256(self) -> str:
        """Hex digest of the bytes so far."""
        return self._digest.hexdigest()

    def commit(self) -> None:
        """Gives the file its name; it is on disk on return."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._scratch.replace(self._path)
        sync_folder(self._path.parent)

    def __enter__(self) -> CheckedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._scratch.unlink(missing_ok=True)
