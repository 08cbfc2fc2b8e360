"""Room that the store holds so that it can give it up: files which go when the file system is full.

On a full file system a deletion needs room too (SQLite writes it to its log first), and a start needs names for the log and its index.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FILES, FILE_BYTES = 8, 128 * 1024
LEAST_BYTES, LEAST_FILES = 512 * 1024, 4
"""A file system with less than this is full."""


def room(folder: Path) -> tuple[int, int]:
    """(bytes, files) that the folder's file system has left for us; many files where it does not count them."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize, found.f_favail if found.f_files else 1 << 62


def full(folder: Path) -> bool:
    """Whether what waits would take the last room from what frees it."""
    free_bytes, files = room(folder)
    return free_bytes < LEAST_BYTES or files < LEAST_FILES


def spend(folder: Path) -> bool:
    """Gives the room up. Whether there was any."""
    found = False
    for number in range(FILES):
        with contextlib.suppress(FileNotFoundError):
            _path(folder, number).unlink()
            found = True
    return found


def restock(folder: Path, *, leave_bytes: int) -> None:
    """Takes the room again, when ``leave_bytes`` stay free beside it."""
    missing = [path for number in range(FILES) if not (path := _path(folder, number)).exists()]
    if not missing:
        return
    free_bytes, files = room(folder)
    if free_bytes < leave_bytes + LEAST_BYTES + FILES * FILE_BYTES or files < 2 * FILES + LEAST_FILES:
        return
    folder.joinpath("ballast").mkdir(exist_ok=True, mode=0o700)
    for path in missing:
        with contextlib.suppress(OSError), path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, FILE_BYTES)


def _path(folder: Path, number: int) -> Path:
    return folder / "ballast" / str(number)
