"""A signed folder in place of the network: a stick that a person carried here. Its layout is the repository's.

Nothing in it is believed for lying here: metadata and documents are verified by the same updater as those that came over the network,
files by their hash. Nor is its form: every step of a path is opened without following links, and only plain files are read.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from skerry_contract import layout

from skerry_agent.courier import parts
from skerry_agent.courier.acquiring import Wanted
from skerry_agent.courier.meter import Meter
from skerry_agent.courier.watch import Overdue
from skerry_agent.errors import Rejected

PIECE_BYTES = 1 << 20
_PIECE_S = 60.0
"""A piece that takes longer than this is given up: the stick is worn out or was pulled."""


class Absent(Rejected):
    """The folder does not have it."""


class UpdateFolder:
    """Opens what lies in it. Raises nothing before something is asked for."""

    def __init__(self, path: str) -> None:
        self.path = path

    def open(self, name: str) -> BinaryIO:
        """A plain file by its path below the folder, to be read.

        Raises:
            Absent: ``folder_incomplete``.
            Rejected: ``folder_unsafe`` for a link, a device, a way out of the folder; ``folder_unreadable``.
        """
        steps = name.split("/")
        if any(step in ("", ".", "..") or "\0" in step for step in steps):
            raise Rejected("folder_unsafe", f"{self.path}: {name[:200]!r} leads elsewhere")
        shown = f"{self.path}/{name}"
        held = self._step(self.path, None, os.O_DIRECTORY, self.path)
        try:
            for number, step in enumerate(steps, 1):
                kind = os.O_DIRECTORY if number < len(steps) else os.O_NONBLOCK
                deeper = self._step(step, held, kind | os.O_NOFOLLOW, shown)
                os.close(held)
                held = deeper
            if not stat.S_ISREG(os.fstat(held).st_mode):
                raise Rejected("folder_unsafe", f"{shown}: wanted a plain file")
            found, held = held, -1
            return os.fdopen(found, "rb")
        finally:
            if held >= 0:
                os.close(held)

    def _step(self, name: str, parent: int | None, flags: int, shown: str) -> int:
        try:
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=parent)
        except FileNotFoundError:
            raise Absent("folder_incomplete", f"{shown} is not there: export the update anew") from None
        except PermissionError:
            raise Rejected("folder_unreadable", f"{shown}: the agent's user may not read it") from None
        except OSError as error:
            # ELOOP and ENOTDIR: a link, or something else where a folder should be.
            if parent is not None and error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Rejected("folder_unsafe", f"{shown}: a link, or no folder, on the way") from None
            raise Rejected("folder_unreadable", f"{shown}: {error.strerror}") from None


class Folder:
    """As ``acquiring.Source``: the files of bundles. What came in part, from here or over the network, goes on.

    Args:
        parts_folder: of parts, on the file system that the files go to.

    Attributes:
        complaint: what is wrong with the folder, the last thing; empty for nothing.
    """

    def __init__(self, folder: UpdateFolder, parts_folder: Path, meter: Meter) -> None:
        self._folder = folder
        self._parts = parts_folder
        self._meter = meter
        self.complaint = ""

    def bring(self, wanted: Wanted, path: Path) -> bool:
        """As ``Source``. Whatever is wrong here, another source may have it."""
        try:
            with self._folder.open(layout.blob(wanted.hashes.get("sha256", ""))) as stream:
                return self._take(stream, wanted, path)
        except (Rejected, Overdue) as error:
            self.complaint = error.detail
            return False

    def _take(self, stream: BinaryIO, wanted: Wanted, path: Path) -> bool:
        size = os.fstat(stream.fileno()).st_size
        if size != wanted.size:
            raise Rejected(
                "size_mismatch", f"{self._folder.path}: {wanted.name} has {size} bytes, wanted {wanted.size}"
            )
        with parts.held(self._parts, wanted) as part:
            if part.waited and part.size == 0:
                return False
            # What was here before may be torn: then once more, from the folder alone.
            for _ in range(2 if part.size else 1):
                self._copy(stream, wanted, part)
                with self._meter.own_work():
                    wrong = part.fault()
                    if not wrong:
                        part.become(path)
                        return True
                    part.clear()
        raise Rejected("hash_mismatch", f"{self._folder.path}: {wanted.name} is damaged: {wrong}")

    def _copy(self, stream: BinaryIO, wanted: Wanted, part: parts.Part) -> None:
        if part.size > wanted.size:
            part.clear()
        done = part.size
        with part.growing() as descriptor:
            while done < wanted.size:
                with self._meter.own_work(_PIECE_S):
                    try:
                        stream.seek(done)
                        piece = stream.read(min(PIECE_BYTES, wanted.size - done))
                    except OSError as error:
                        raise unreadable(self._folder, error) from None
                if not piece:
                    raise Rejected("folder_unreadable", f"{self._folder.path}: {wanted.name} ended at {done} bytes")
                with self._meter.own_work():
                    left = memoryview(piece)
                    while left:
                        left = left[os.write(descriptor, left) :]
                done += len(piece)
                self._meter.show(wanted, done)


def unreadable(folder: UpdateFolder, error: OSError) -> Rejected:
    """What a failing read means."""
    return Rejected("folder_unreadable", f"{folder.path}: {error.strerror}: was it pulled?")
