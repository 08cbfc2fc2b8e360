"""Files that came in part: kept by their content, so that any bundle and any later version goes on with them.

``slots/.parts/<sha256>`` grows; ``<sha256>.etag`` is the validator that it came under; ``<sha256>.lost`` counts bytes of it that
were fetched and thrown away. A part is not trusted: it is hashed before it gets a name. So nothing needs to be synced while
it grows, and a part that a power cut left with a hole is found by its hash.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from skerry_agent import durable
from skerry_agent.courier.acquiring import Wanted, mismatch
from skerry_agent.errors import Transient

KEPT = 8
"""So many parts of files that nobody asks for now are kept; the longest untouched go first."""
_LOCK_WAIT_S = 20.0
_SIDES = (".etag", ".lost")
_KEY = re.compile(r"[0-9a-f]+")


class Part:
    """One of them, held by this process alone. Made by ``held``.

    Attributes:
        waited: another courier had it first.
    """

    def __init__(self, path: Path, wanted: Wanted, *, waited: bool) -> None:
        self.waited = waited
        self._path = path
        self._wanted = wanted
        self._tag, self._lost = (path.with_name(path.name + side) for side in _SIDES)

    @property
    def size(self) -> int:
        """Bytes that are here."""
        return self._path.stat().st_size

    @property
    def tag(self) -> str:
        """The validator, empty without one."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self._tag.read_text()
        return ""

    def came_under(self, etag: str) -> None:
        """Keeps a strong validator, so that what follows is of the same file. A weak one may not be used (RFC 9110, 13.1.5)."""
        if etag.startswith('"') and len(etag) <= 256 and etag.isascii() and etag.isprintable():
            self._tag.write_text(etag)
        else:
            self._tag.unlink(missing_ok=True)

    @contextlib.contextmanager
    def growing(self) -> Iterator[int]:
        """A descriptor whose writes go to the end."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def drop(self) -> int:
        """Throws what is here away. Returns how many bytes of this file were lost so, in all."""
        lost = self.size + self._lost_before()
        # Counted first: a process that ends between the two has rather counted too much.
        self.count_lost(lost)
        os.truncate(self._path, 0)
        self._tag.unlink(missing_ok=True)
        return lost

    def clear(self) -> None:
        """Throws what is here away, uncounted: it came at no cost, or may have."""
        os.truncate(self._path, 0)
        self._tag.unlink(missing_ok=True)

    def _lost_before(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return max(0, int(self._lost.read_text()[:20]))
        return 0

    def count_lost(self, lost: int) -> None:
        """So many bytes were lost; 0: it begins anew."""
        if lost:
            self._lost.write_text(str(lost))
        else:
            self._lost.unlink(missing_ok=True)

    def fault(self) -> str:
        """What is wrong with what is here as the whole file; empty when nothing is, and then it is synced."""
        with open(self._path, "rb") as stream:
            wrong = mismatch(stream, self._wanted)
            if not wrong:
                os.fsync(stream.fileno())
        return wrong

    def become(self, path: Path) -> None:
        """Gets its name: it is whole. On return the name is on disk."""
        for side in (self._tag, self._lost):
            side.unlink(missing_ok=True)
        self._path.replace(path)
        durable.sync_folder(path.parent)


@contextlib.contextmanager
def held(folder: Path, wanted: Wanted) -> Iterator[Part]:
    """The part of a file, made when there is none; an empty one does not stay.

    Raises:
        Transient: ``busy`` when another courier fetches the same content and is not done soon.
    """
    durable.make_folder(folder)
    path = folder / wanted.key
    descriptor, waited = _locked(path, wanted)
    try:
        yield Part(path, wanted, waited=waited)
    finally:
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.with_name(path.name + ".etag").unlink(missing_ok=True)
                if not path.with_name(path.name + ".lost").exists():
                    path.unlink()
        os.close(descriptor)


def _locked(path: Path, wanted: Wanted) -> tuple[int, bool]:
    """Opens and locks the file of that name, and not one that another has just renamed. Returns whether it had to wait."""
    waited = False
    deadline = time.monotonic() + _LOCK_WAIT_S
    # No part is a link: what is written to one would go wherever it leads.
    for place in (path, *(path.with_name(path.name + side) for side in _SIDES)):
        if place.is_symlink():
            place.unlink(missing_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor, waited
        except BlockingIOError:
            waited = True
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise Transient("busy", f"{wanted.name}: another courier fetches it") from None
            time.sleep(0.05)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def sizes(folder: Path) -> dict[str, int]:
    """Content (as ``Wanted.key``) -> bytes of it that are here."""
    found: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for entry in folder.iterdir():
            if _KEY.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    found[entry.name] = entry.stat().st_size
    return found


def is_held(folder: Path, key: str) -> bool:
    """Whether a courier works with the part of that name now."""
    try:
        descriptor = os.open(folder / key, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def tidy(folder: Path, wanted: Collection[str], keep: int = KEPT) -> None:
    """Removes parts that nobody wants, but the ``keep`` that grew last. One that another courier fetches stays."""
    idle: list[tuple[float, str]] = []
    for name in sizes(folder):
        if name not in wanted:
            with contextlib.suppress(OSError):
                idle.append(((folder / name).stat().st_mtime, name))
    for _, name in sorted(idle, reverse=True)[keep:]:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for side in ("", *_SIDES):
                    (folder / (name + side)).unlink(missing_ok=True)
            finally:
                os.close(descriptor)
