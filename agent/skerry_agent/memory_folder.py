"""Folders of ours in memory: how one is made beside those of others, and how it is known again.

The place (``/dev/shm``, say) belongs to everybody. So a folder's name is drawn by chance and kept in the state folder, and whoever reads, writes or
deletes below it looks first whether what stands there is ours. Somebody who takes the name while it is free, or puts a link there, gains nothing:
another name is drawn.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

IN_MEMORY = ("tmpfs", "ramfs")


def unfit(place: Path) -> str:
    """Why a place is none to make folders in; empty when it lies in memory."""
    kind = file_system(place)
    return "" if kind in IN_MEMORY else f"{place}: wanted a tmpfs, it is {kind or 'not there'}"


def draw(place: Path, kind: str, state_dir: Path) -> Path:
    """A name for a folder that nobody can have taken. It is noted first and made then: no crash leaves a folder that nobody knows."""
    return place / f"{_prefix(kind, state_dir)}{secrets.token_hex(16)}"


def is_drawn(folder: Path, kind: str, state_dir: Path) -> bool:
    """Whether a noted name was drawn for this state folder: a note may be cut short, or have come with a copy of another's state."""
    return folder.is_absolute() and re.fullmatch(_prefix(kind, state_dir) + r"[0-9a-f]{32}", folder.name) is not None


def is_ours(folder: Path) -> bool:
    """Whether a folder stands there, not a link to one, that nobody but us has rights to."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return _owned(found) and not found.st_mode & 0o077


def stranger(folder: Path) -> str:
    """What stands there instead of a folder of ours; empty when nothing does."""
    try:
        found = os.lstat(folder)
    except OSError:
        return ""
    return "" if is_ours(folder) else f"{folder}: {stat.filemode(found.st_mode)} of user {found.st_uid}"


def drop(folder: Path, doomed: Callable[[str], bool]) -> None:
    """Removes the folders of those names from a folder of ours. Behind a link, or in what is another's, nothing is touched."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if _owned(os.fstat(descriptor)):
            for name in os.listdir(descriptor):
                if doomed(name):
                    shutil.rmtree(name, ignore_errors=True, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Removes a folder of ours, whatever others may do in it by now. A link, or what is another's, stays."""
    with contextlib.suppress(OSError):
        if _owned(os.lstat(folder)):
            shutil.rmtree(folder, ignore_errors=True)


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of file system that a folder lies on; empty when it is not there."""
    if not path.is_dir():
        return ""
    real = path.resolve()
    best, kind = -1, ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        parts = line.split()
        if len(parts) < 3:
            continue
        point = Path(parts[1].replace("\\040", " "))
        # Of two mounts on one folder the later one is seen.
        if (real == point or point in real.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), parts[2]
    return kind


def _prefix(kind: str, state_dir: Path) -> str:
    return f"skerry-{kind}-{hashlib.sha256(str(state_dir).encode()).hexdigest()[:16]}-"


def _owned(found: os.stat_result) -> bool:
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
