"""Couriers out of each other's way: locks that end with who holds them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from skerry_agent.durable import make_folder
from skerry_agent.errors import Transient


@contextlib.contextmanager
def alone(path: Path, wait_s: float, *, passing: bool = False) -> Iterator[None]:
    """Holds a lock file: a courier that outlived its supervisor must not write beside a new one.

    Args:
        passing: the file goes at the end, as one of many names must; what a courier left that was killed goes with ``tidy_locks``. One
            that stays can be taken where a full disk has no name left.

    Raises:
        Transient: ``busy`` when the other is not done within ``wait_s``.
    """
    make_folder(path.parent)
    deadline = time.monotonic() + wait_s
    while (descriptor := _locked(path)) is None:
        if time.monotonic() > deadline:
            raise Transient("busy", f"another courier holds {path.name}")
        time.sleep(0.05)
    try:
        yield
    finally:
        if passing:
            path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def alone_in(folder: Path, wait_s: float) -> Iterator[None]:
    """As ``alone``, by the folder itself, which is made: no file of a lock is left, whatever ends the courier. An empty folder does not stay."""
    deadline = time.monotonic() + wait_s
    descriptor = None
    while descriptor is None:
        make_folder(folder)
        with contextlib.suppress(FileNotFoundError):
            descriptor = _locked(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if descriptor is None:
            if time.monotonic() > deadline:
                raise Transient("busy", f"another courier works in {folder.name}")
            time.sleep(0.05)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(descriptor)


def tidy_locks(folder: Path, pattern: str) -> None:
    """Removes lock files of that pattern that nobody holds."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            descriptor = _locked(path, os.O_RDWR | os.O_CLOEXEC)
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)


def _locked(path: Path, flags: int = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC) -> int | None:
    """A descriptor that holds the lock of the file of that name, and not of one that another has just removed; None while it is held."""
    descriptor = os.open(path, flags, 0o600)
    held = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        pass
    finally:
        if not held:
            os.close(descriptor)
    return descriptor if held else None
