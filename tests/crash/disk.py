"""What a power cut may leave on a disk: a model of a journaling file system, fed by what ``recorder.c`` wrote down.

A call that changes data (write, truncate, allocate) is safe once its file was synchronised after it; a call that changes names
(create, rename, link, remove, make a folder) once a folder that it touched was. Of what is not safe, each ``Way`` of failing leaves
something else. ``Disk`` turns the record into operations on nodes, so that a state is made without asking where names pointed to.

Modelled as the file systems do it: a rename is one operation, also over two folders; names become safe in the order in which they were
changed where the journal is said to keep it; a synchronised file without a synchronised name is lost in the strict way. Not modelled: a
disk that lies about flushes, and sectors that are torn inside.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

SECTOR = 512
_HEAD = struct.Struct("<8q")
_DATA, _NAMES, _SYNC = frozenset("WTA"), frozenset("CDLHREUX"), "S"

Way = Literal["killed", "strict", "names", "zeros", "late", "torn"]
WAYS: tuple[Way, ...] = ("killed", "strict", "names", "zeros", "late", "torn")
"""What is there of what was not synchronised.

``killed``: all of it; the kernel lived. ``strict``: none of it. ``names``: the names, and of the data nothing, so that files are empty or
short. ``zeros``: names and lengths, and zeros where the data should be. ``late``: the data, and no names. ``torn``: names up to some
moment, and of each write all, nothing, or its first sectors; drawn.
"""


WORDS = {
    "C": "create", "D": "make folder", "L": "link to", "H": "link", "R": "rename", "E": "exchange", "U": "remove", "X": "remove folder",
    "W": "write", "T": "truncate", "A": "allocate", "S": "synchronise",
}  # fmt: skip


@dataclass(slots=True)
class Entry:
    """One line of the record."""

    what: str
    name: str
    other: str
    inode: int
    offset: int
    size: int
    data: bytes
    pid: int


def entries(record: bytes) -> Iterator[tuple[int, Entry]]:
    """The lines of a record with their places in it, oldest first."""
    at = 0
    while at < len(record):
        place = at
        what, name, other, inode, offset, size, held, pid = _HEAD.unpack_from(record, at)
        at += _HEAD.size
        first, second = record[at : at + name], record[at + name : at + name + other]
        at += name + other
        yield place, Entry(chr(what), first.decode(), second.decode(), inode, offset, size, record[at : at + held], pid)
        at += held


@dataclass(slots=True)
class Node:
    """A file, folder or link. What a file holds through mapped memory is not known: ``mapped``."""

    kind: Literal["file", "folder", "link"]
    mapped: bool = False
    target: str = ""


@dataclass(slots=True)
class Operation:
    """``changes``: of names, (folder, name, node or None for none). Others are of the data of ``node``."""

    what: str
    node: int
    offset: int = 0
    size: int = 0
    data: bytes = b""
    changes: tuple[tuple[int, str, int | None], ...] = ()
    told: str = ""
    safe_at: float = float("inf")
    pid: int = 0

    @property
    def of_names(self) -> bool:
        """Whether it changes names rather than data."""
        return bool(self.changes)


@dataclass(slots=True)
class Tree:
    """Names and contents, by node."""

    folders: dict[int, dict[str, int]] = field(default_factory=dict)
    files: dict[int, bytearray] = field(default_factory=dict)


class Disk:
    """A folder, and what was done to it: ready to be cut.

    Args:
        start: the folder before the first call; all of it is safe. It is read now, and ``take`` is called when the record is whole.

    Attributes:
        operations: in their order; a point is the place before one of them, ``len(operations)`` the end.
        places: of each in the record.
    """

    def __init__(self, start: Path) -> None:
        self.nodes: list[Node] = [Node("folder")]
        self._start = Tree(folders={0: {}})
        self._inodes: dict[int, int] = {start.stat().st_ino: 0}
        self._read(start, 0)
        self.operations: list[Operation] = []
        self.places: list[int] = []
        self._live = {node: dict(names) for node, names in self._start.folders.items()}
        self._names: dict[int, str] = {0: "."}

    def take(self, record: bytes) -> None:
        """Reads what was written down."""
        for place, entry in entries(record):
            self._take(entry, place)
        self._find_safe()
        self.syncs = [at for at, done in enumerate(self.operations) if done.what == _SYNC]
        self._last_safe_name = self._names_safe_by()

    # --- from the record -------------------------------------------------------------------------------------------------

    def _read(self, folder: Path, node: int) -> None:
        for found in sorted(os.scandir(folder), key=lambda one: one.name):
            child = len(self.nodes)
            if found.is_symlink():
                self.nodes.append(Node("link", target=os.readlink(found.path)))
            elif found.is_dir():
                self.nodes.append(Node("folder"))
                self._start.folders[child] = {}
                self._read(Path(found.path), child)
            elif found.is_file():
                self.nodes.append(Node("file"))
                self._start.files[child] = bytearray(Path(found.path).read_bytes())
            else:
                continue
            self._start.folders[node][found.name] = child
            self._inodes[found.inode()] = child

    def _new(self, entry: Entry, kind: Literal["file", "folder", "link"]) -> int:
        self.nodes.append(Node(kind, target=entry.other if kind == "link" else ""))
        self._inodes[entry.inode] = len(self.nodes) - 1
        if kind == "folder":
            self._live[len(self.nodes) - 1] = {}
        return len(self.nodes) - 1

    def _place(self, path: str) -> tuple[int, str]:
        *above, name = path.split("/")
        node = 0
        for part in above:
            node = self._live[node][part]
        return node, name

    def _at(self, path: str) -> int:
        if not path:
            return 0
        node, name = self._place(path)
        return self._live[node][name]

    def _take(self, entry: Entry, place: int) -> None:
        if entry.name.endswith(".sock"):
            # A socket means nothing after its process.
            return
        changes: tuple[tuple[int, str, int | None], ...] = ()
        node = 0
        match entry.what:
            case "C" | "D" | "L":
                node = self._new(entry, {"C": "file", "D": "folder", "L": "link"}[entry.what])  # type: ignore[arg-type]
                changes = ((*self._place(entry.name), node),)
            case "H":
                changes = ((*self._place(entry.other), self._at(entry.name)),)
            case "R":
                node = self._at(entry.name)
                changes = ((*self._place(entry.name), None), (*self._place(entry.other), node))
            case "E":
                changes = (
                    (*self._place(entry.name), self._at(entry.other)), (*self._place(entry.other), self._at(entry.name)),
                )  # fmt: skip
            case "U" | "X":
                node = self._at(entry.name)
                changes = ((*self._place(entry.name), None),)
            case "M":
                self.nodes[self._inodes[entry.inode]].mapped = True
                return
            case _:
                node = self._inodes[entry.inode]
        for folder, name, child in changes:
            if child is None:
                self._live[folder].pop(name)
            else:
                self._live[folder][name] = child
        if entry.what in "CDR":
            self._names[node] = entry.other or entry.name
        self.places.append(place)
        told = f"{WORDS[entry.what]} {entry.name or self._names.get(node, '')}{' -> ' + entry.other if entry.other else ''}"
        self.operations.append(
            Operation(entry.what, node, entry.offset, entry.size, entry.data, changes, told, pid=entry.pid)
        )

    def _find_safe(self) -> None:
        """When each operation is safe: the place of the first synchronisation after it that covers it."""
        synced: dict[int, int] = {}
        for at in range(len(self.operations) - 1, -1, -1):
            done = self.operations[at]
            if done.what == _SYNC:
                synced[done.node] = at
                done.safe_at = -1
            elif done.of_names:
                done.safe_at = min(synced.get(folder, float("inf")) for folder, _, _ in done.changes)
            else:
                done.safe_at = synced.get(done.node, float("inf"))

    def _names_safe_by(self) -> list[int]:
        """For each point: behind the last change of names that must be there by then."""
        last = [0] * (len(self.operations) + 1)
        for at, done in enumerate(self.operations):
            if done.of_names and done.safe_at < float("inf"):
                place = int(done.safe_at) + 1
                last[place] = max(last[place], at + 1)
        for at in range(1, len(last)):
            last[at] = max(last[at], last[at - 1])
        return last

    def without_syncs(self, of: Callable[[str], bool]) -> Disk:
        """The same life by a program that forgot to synchronise some files or folders: ``of`` says which, by their names then."""
        other = copy.copy(self)
        other.operations = [
            replace(done, what="-", safe_at=-1.0)
            if done.what == _SYNC and of(done.told.partition(" ")[2])
            else replace(done)
            for done in self.operations
        ]
        other._find_safe()
        other._last_safe_name = other._names_safe_by()
        return other

    # --- points ----------------------------------------------------------------------------------------------------------

    def point_at(self, place: int) -> int:
        """The point of a place in the record: behind everything that was written down before it."""
        return bisect.bisect_left(self.places, place)

    def left(self, point: int, way: Way, seed: int = 0) -> Tree:
        """What is there after a cut before the operation at ``point``."""
        tree = Tree(
            {node: dict(names) for node, names in self._start.folders.items()},
            {node: bytearray(data) for node, data in self._start.files.items()},
        )
        rng = random.Random(f"{point} {way} {seed}")
        until = point
        if way == "torn":
            until = rng.randint(self._last_safe_name[point], point)
        for at in range(point):
            done = self.operations[at]
            safe = done.safe_at < point
            if done.what in (_SYNC, "-"):
                continue
            if done.of_names:
                there = way in ("killed", "names", "zeros") or safe or (way == "torn" and at < until)
                if there:
                    self._rename(tree, done)
            elif safe or way in ("killed", "late"):
                _write(tree.files.setdefault(done.node, bytearray()), done, len(done.data))
            elif way == "zeros":
                _write(tree.files.setdefault(done.node, bytearray()), done, 0)
            elif way == "torn":
                size = len(done.data)
                kept = rng.choice((0, size, size, min(size, SECTOR * rng.randrange(size // SECTOR + 1))))
                if done.what == "W" and kept:
                    _write(tree.files.setdefault(done.node, bytearray()), done, kept, cut=True)
                elif done.what != "W" and rng.random() < 0.5:
                    _write(tree.files.setdefault(done.node, bytearray()), done, 0)
        return tree

    def _rename(self, tree: Tree, done: Operation) -> None:
        for folder, name, child in done.changes:
            names = tree.folders.setdefault(folder, {})
            if child is None:
                names.pop(name, None)
            else:
                names[name] = child

    def _walk(self, tree: Tree, node: int, path: str) -> Iterator[tuple[str, int]]:
        for name, child in sorted(tree.folders.get(node, {}).items()):
            yield f"{path}{name}", child
            if self.nodes[child].kind == "folder":
                yield from self._walk(tree, child, f"{path}{name}/")

    def files(self, tree: Tree) -> dict[str, bytes | str | None]:
        """Everything by path: bytes of files, ``str`` for links, None for folders. SQLite's index of its log is made anew at every start."""
        found: dict[str, bytes | str | None] = {}
        for path, node in self._walk(tree, 0, ""):
            kind = self.nodes[node].kind
            if path.endswith("-shm"):
                continue
            found[path] = (
                None
                if kind == "folder"
                else self.nodes[node].target
                if kind == "link"
                else bytes(tree.files.get(node, b""))
            )
        return found

    def mapped(self, point: int) -> set[str]:
        """Paths of files whose content went through memory."""
        return {path for path, node in self._walk(self.left(point, "killed"), 0, "") if self.nodes[node].mapped}

    def last_sync_before(self, point: int) -> int:
        """The point behind the last synchronisation before a point; 0 for none."""
        at = bisect.bisect_left(self.syncs, point)
        return self.syncs[at - 1] + 1 if at else 0


def _write(file: bytearray, done: Operation, kept: int, *, cut: bool = False) -> None:
    """Applies a change of data. Of a write ``kept`` bytes, and zeros behind them, unless the write is ``cut`` there."""
    if done.what == "T":
        del file[done.size :]
        file.extend(bytes(done.size - len(file)))
    elif done.what == "A":
        file.extend(bytes(max(0, done.offset + done.size - len(file))))
    else:
        end = done.offset + (kept if cut else len(done.data))
        file.extend(bytes(max(0, end - len(file))))
        file[done.offset : done.offset + kept] = done.data[:kept]


def lay_out(files: dict[str, bytes | str | None], folder: Path) -> None:
    """Makes a folder of what was left."""
    folder.mkdir(parents=True, mode=0o700)
    for path, held in files.items():
        place = folder / path
        if held is None:
            place.mkdir(mode=0o700)
        elif isinstance(held, str):
            place.symlink_to(held)
        else:
            place.write_bytes(held)
            place.chmod(0o600)


def fingerprint(files: dict[str, bytes | str | None]) -> str:
    """Equal for equal states."""
    digest = hashlib.sha256()
    for path, held in sorted(files.items()):
        data = b"" if held is None else held.encode() if isinstance(held, str) else held
        digest.update(f"{path}\0{type(held).__name__}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
