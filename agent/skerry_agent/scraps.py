"""Folders in memory that a courier works in: held by a lock while it lives, and gone with it, however it ends.

What lies in one is in the clear and takes memory. A courier that is killed tidies nothing; so whoever sees it end does (``errand``), and so
does the next courier that works beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from skerry_agent import memory_folder

_OURS = re.compile(r"\.(?:delta-[0-9a-f]{64}|[0-9a-f]{64}\.new)")
"""Names of such folders; what is called otherwise is left alone."""


@contextlib.contextmanager
def held(folder: Path, name: str) -> Iterator[Path]:
    """An empty folder of that name below ``folder``, until the block ends.

    What others left there that were killed goes first: it took the room that is wanted now.

    Raises:
        OSError: it cannot be made; ``BlockingIOError`` while another process works in it.
    """
    if _OURS.fullmatch(name) is None:
        raise ValueError(f"{name}: no name of a folder to work in")
    tidy(folder)
    place = folder / name
    place.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(place)):
            raise BlockingIOError(f"{place}: another process has just taken it away")
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(descriptor)


def tidy(folder: Path) -> None:
    """Removes every such folder that no living process holds. Raises nothing; a link, or a folder of another user's, is not followed."""
    if not memory_folder.is_ours(folder):
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if _OURS.fullmatch(name) is not None:
                _drop(folder / name)


def _drop(place: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place, ignore_errors=True)
        finally:
            os.close(descriptor)
