"""The files of one bundle: whether they are what the manifest says, and how they reach the disk to stay there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from skerry_contract import manifest as m

from skerry_agent.durable import sync_folder
from skerry_agent.errors import Rejected

_CHUNK = 1 << 20


def fault_of(path: Path, file: m.File) -> Rejected | None:
    """What is wrong with a file; None when it is the manifest's."""
    try:
        size = path.stat().st_size
        if size != file.size:
            return Rejected("size_mismatch", f"{file.path}: wanted {file.size} bytes, got {size}")
        got = sha256(path)
    except OSError as error:
        return Rejected("size_mismatch", f"{file.path}: {error.strerror}")
    if got != file.sha256:
        return Rejected("hash_mismatch", f"{file.path}: wanted sha256 {file.sha256}, got {got}")
    return None


def sha256(path: Path) -> str:
    """Of a file, read to its end."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def add(source: Path, target: Path) -> None:
    """What was staged moves into a slot that lacks a variant's files, or was damaged.

    File by file, since what another variant runs from stays at every moment. What rotted in it goes; its manifest comes last.
    """
    named = {file.path: file.sha256 for file in m.parse((source / m.MANIFEST_FILE).read_bytes()).files()}
    for held in [path for path in target.rglob("*") if path.is_file()]:
        name = str(held.relative_to(target))
        if name != m.MANIFEST_FILE and not (source / name).exists() and sha256(held) != named.get(name):
            held.unlink()
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path == source / m.MANIFEST_FILE):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    for folder in (*(path for path in target.rglob("*") if path.is_dir()), target):
        sync_folder(folder)
