"""Writing files so that a power cut leaves the old one or the new one, and what the disk's errors mean."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from skerry_agent.errors import AgentError, Degraded

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replaces ``path`` by ``data``; on return both the file and its name are on disk. Raises ``OSError``."""
    scratch = path.with_name(f".{path.name}.new")
    # A leftover of a crash is overwritten, so scratch files never pile up. It may have another mode: begin afresh.
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Makes the folder and its parents, each 0700; every new name is on disk on return. Raises ``OSError``."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(mode=0o700, exist_ok=True)
        sync_folder(new.parent)


def sync_folder(folder: Path) -> None:
    """What was made, renamed or removed in a folder is on disk on return. Raises ``OSError``."""
    _sync(folder, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """What was written to a file is on disk on return. Raises ``OSError``."""
    _sync(path, 0)


def _sync(path: Path, kind: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | kind)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError) -> AgentError:
    """What an ``OSError`` of the local disk means to the supervisor."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _FULL:
        return Degraded("not_enough_disk", f"{error.strerror}{where}", advice="make room on the disk")
    return Degraded("storage_failed", f"{error.strerror or error}{where}", advice="check the disk and its rights")
