"""What a power cut may leave on a disk, from the record of what a process did to its files (``disk_recorder.c``).

What was synchronised is there. Of each write since, nothing, all, or the first sectors may be, whatever became of the writes beside it.
Names are gone at once: the record does not tell apart which folder was synchronised.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SECTOR = 512
_HEAD = struct.Struct("<qqqq")


@dataclass(frozen=True, slots=True)
class Operation:
    """``what``: W(rite), T(runcate), S(ynchronise) or U(nlink); ``offset`` is -1 for a write at the end."""

    what: str
    name: str
    offset: int
    data: bytes


def recorder(folder: Path) -> Path:
    """The library, compiled."""
    library = folder / "disk_recorder.so"
    make = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(HERE / "disk_recorder.c"), "-ldl"]
    subprocess.run(make, check=True)
    return library


def record(library: Path, code: str, below: Path, log: Path, *arguments: str) -> list[Operation]:
    """Runs Python code and returns what it did to the files below a folder."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "SKERRY_BELOW": f"{below}/", "SKERRY_RECORD": str(log)}
    subprocess.run([sys.executable, "-c", code, str(below), *arguments], check=True, env=environment, timeout=300)
    return list(_read(log.read_bytes()))


def _read(data: bytes) -> Iterator[Operation]:
    at = 0
    while at < len(data):
        what, name_size, offset, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        name = data[at : at + name_size].decode()
        at += name_size
        held = size if chr(what) == "W" else 0
        yield Operation(chr(what), name, offset, data[at : at + held])
        at += held


def left_by_a_cut(operations: list[Operation], rng: random.Random) -> dict[str, bytes]:
    """The files after power failed behind the last of these operations."""
    safe: dict[str, bytearray] = {}
    since: dict[str, list[Operation]] = {}
    for operation in operations:
        since.setdefault(operation.name, []).append(operation)
        if operation.what == "U":
            safe.pop(operation.name, None)
            since.pop(operation.name, None)
        elif operation.what == "S":
            file = safe.setdefault(operation.name, bytearray())
            for done in since.pop(operation.name):
                _apply(file, done, len(done.data))
    for name, pending in since.items():
        file = safe.setdefault(name, bytearray())
        for operation in pending:
            size = len(operation.data)
            kept = rng.choice([0, size, size, min(size, SECTOR * rng.randrange(size // SECTOR + 1))])
            if operation.what == "W" and kept:
                _apply(file, operation, kept)
            elif operation.what == "T" and rng.random() < 0.5:
                _apply(file, operation, 0)
    return {name: bytes(file) for name, file in safe.items()}


def _apply(file: bytearray, operation: Operation, size: int) -> None:
    if operation.what == "T":
        del file[operation.offset :]
        file.extend(bytes(operation.offset - len(file)))
    elif operation.what == "W":
        start = len(file) if operation.offset < 0 else operation.offset
        file.extend(bytes(max(0, start - len(file))))
        file[start : start + size] = operation.data[:size]
