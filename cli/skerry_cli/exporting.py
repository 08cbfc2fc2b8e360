"""Writes an update into a folder: a part of the repository, as devices read it without a network (``skerry-agent import``).

Owns what belongs to it and the order in which it is written: the timestamp last, so that a folder that was made before is the old one or
the new one. Hashes are checked here, so that a bad copy is found before it travels; signatures are the devices' to judge, from roots of their
own, as they do over the network. Nothing secret is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skerry_contract import canonical, group, ids, layout
from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp

from skerry_cli.client import Api
from skerry_cli.errors import Failed, RefusedForSafety, Usage

MARK = "skerry-update.json"
"""Says to people what is in the folder, and to the next export that the folder is its own. Devices do not read it."""
_PARTS = (layout.METADATA_DIR, layout.TARGETS_DIR, "blobs")
_PIECE_BYTES = 1 << 20


@dataclass(kw_only=True, slots=True)
class Exported:
    """What is in the folder now.

    Attributes:
        bundles: model, version, digest and bytes of each.
        missing: model, version and why, of those that a group's document names and that the catalog does not list.
        bytes: of all files; came: of those that had to be fetched.
        expires: of the timestamp, ISO 8601.
    """

    groups: list[str] = field(default_factory=list)
    bundles: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    came: int = 0
    expires: str = ""


def export(api: Api, folder: Path, *, groups: Iterable[str], say: Callable[[str], None]) -> Exported:
    """Brings the folder to the server's present state.

    Args:
        folder: made when missing; else empty, or of an earlier export.
        groups: whose documents and bundles; none for all.
        say: hears how far it is.

    Raises:
        Usage: the folder holds something else, or there is no such group.
        Failed: the server cannot give something, or the folder cannot be written.
        RefusedForSafety: what came is not what the metadata says.
    """
    try:
        _claim(folder)
        return _Export(api, folder, say).run(sorted(set(groups)))
    except OSError as error:
        raise Failed(f"{error.filename or folder}: {error.strerror or error}") from None
    except (tuf_errors.RepositoryError, ContractError) as error:
        raise RefusedForSafety(f"the server's repository: {error}") from None


class _Export:
    def __init__(self, api: Api, folder: Path, say: Callable[[str], None]) -> None:
        self._api = api
        self._folder = folder
        self._say = say
        self._kept: set[str] = set()
        self._done = Exported()

    def run(self, wanted: list[str]) -> Exported:
        timestamp_data = self._get(
            f"{layout.METADATA_DIR}/timestamp.json", "the repository waits for its first catalog"
        )
        timestamp = Metadata[Timestamp].from_bytes(timestamp_data).signed
        snapshot = Metadata[Snapshot].from_bytes(self._role(Snapshot.type, timestamp.snapshot_meta.version)).signed
        roles = {
            role: Metadata[Targets].from_bytes(self._role(role, snapshot.meta[f"{role}.json"].version)).signed
            for role in (Targets.type, layout.CATALOG_ROLE, layout.FLEET_ROLE)
            if f"{role}.json" in snapshot.meta
        }
        if layout.FLEET_ROLE not in roles or layout.CATALOG_ROLE not in roles:
            raise Failed("the repository lists no groups and no catalog yet")
        self._roots()
        catalog = roles[layout.CATALOG_ROLE].targets
        listed = roles[layout.FLEET_ROLE].targets
        names = {path.removeprefix("fleet/").removesuffix(".json"): path for path in listed}
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise Usage(f"no group {', '.join(unknown)} is published; there are {', '.join(sorted(names)) or 'none'}")
        if layout.FLOORS_TARGET in catalog:
            self._target(layout.FLOORS_TARGET, catalog[layout.FLOORS_TARGET].hashes["sha256"])
        found: dict[str, group.Target] = {}
        models: dict[str, str] = {}
        for name in wanted or sorted(names):
            data = self._target(names[name], listed[names[name]].hashes["sha256"])
            for model, target in _named(group.parse(data)):
                found[target.digest], models[target.digest] = target, model
            self._done.groups.append(name)
        blobs: dict[str, int] = {}
        for digest, target in sorted(found.items(), key=lambda one: (models[one[0]], ids.version_key(one[1].version))):
            blobs.update(self._bundle(models[digest], target, catalog))
        self._blobs(blobs)
        # The one that makes the rest count, and then what does not count any more.
        self._write(f"{layout.METADATA_DIR}/timestamp.json", timestamp_data)
        self._done.expires = timestamp.expires.isoformat()
        self._tidy()
        self._write(MARK, _mark(self._done))
        return self._done

    def _roots(self) -> None:
        version = 1
        while (data := self._api.fetch(f"/repository/{layout.METADATA_DIR}/{version}.root.json")) is not None:
            self._write(f"{layout.METADATA_DIR}/{version}.root.json", data)
            version += 1

    def _role(self, role: str, version: int) -> bytes:
        path = f"{layout.METADATA_DIR}/{version}.{role}.json"
        data = self._get(path, "it changed meanwhile: try again")
        self._write(path, data)
        return data

    def _target(self, target: str, sha256: str) -> bytes:
        path = layout.target_file(target, sha256)
        data = self._get(path, "it changed meanwhile: try again")
        if canonical.sha256(data) != sha256:
            raise RefusedForSafety(f"{path}: it has sha256 {canonical.sha256(data)}")
        self._write(path, data)
        return data

    def _bundle(self, model: str, target: group.Target, catalog: dict[str, Any]) -> dict[str, int]:
        """Sha256 -> bytes of the bundle's files."""
        path = layout.manifest_target(ids.model_name(model), target.version)
        if path not in catalog or catalog[path].hashes["sha256"] != target.digest:
            why = "the catalog does not list it: devices would refuse it"
            self._done.missing.append({"model": model, "version": target.version, "why": why})
            return {}
        manifest = manifests.parse(self._target(path, target.digest))
        found = {file.sha256: file.size for file in manifest.files()}
        self._done.bundles.append(
            {"model": model, "version": target.version, "digest": target.digest, "bytes": sum(found.values())}
        )
        return found

    def _blobs(self, blobs: dict[str, int]) -> None:
        total, here = sum(blobs.values()), 0
        for number, (sha256, size) in enumerate(sorted(blobs.items()), 1):
            path = layout.blob(sha256)
            self._kept.add(path)
            if not _is(self._folder / path, sha256, size):
                self._fetch(path, sha256, size)
                self._done.came += size
            here += size
            self._count(size)
            self._say(f"{number} of {len(blobs)} files, {here / 1e6:.1f} of {total / 1e6:.1f} MB")

    def _fetch(self, path: str, sha256: str, size: int) -> None:
        found, done = hashlib.sha256(), 0

        def pieces() -> Iterator[bytes]:
            nonlocal done
            for piece in self._api.stream(f"/repository/{path}"):
                done += len(piece)
                if done > size:
                    break
                found.update(piece)
                yield piece

        _put(self._folder / path, pieces(), lambda: done == size and found.hexdigest() == sha256)

    def _get(self, path: str, why: str) -> bytes:
        data = self._api.fetch(f"/repository/{path}")
        if data is None:
            raise Failed(f"{path} is not in the server's repository: {why}")
        return data

    def _write(self, path: str, data: bytes) -> None:
        self._kept.add(path)
        place = self._folder / path
        if path != MARK:
            self._count(len(data))
        if not _is(place, canonical.sha256(data), len(data)):
            _put(place, [data], lambda: True)
            self._done.came += len(data)

    def _count(self, size: int) -> None:
        self._done.files += 1
        self._done.bytes += size

    def _tidy(self) -> None:
        """Removes what an earlier export wrote and this one does not name."""
        for part in _PARTS:
            for place, folders, files in os.walk(self._folder / part, topdown=False):
                for name in files:
                    if str((Path(place) / name).relative_to(self._folder)) not in self._kept:
                        (Path(place) / name).unlink()
                for name in folders:
                    with contextlib.suppress(OSError):
                        (Path(place) / name).rmdir()


def _named(document: group.GroupDocument) -> Iterator[tuple[str, group.Target]]:
    """Every bundle that a device of the group may be given, with its model."""
    for model, plan in document.models.items():
        candidate = plan.rollout.candidate if plan.rollout is not None else None
        for target in (plan.stable, plan.fallback, plan.shadow, candidate, *plan.via):
            if target is not None:
                yield model, target
    for pins in document.pins.values():
        yield from pins.items()


def _claim(folder: Path) -> None:
    """Makes the folder ours. Raises ``Usage`` when it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise Usage(f"{folder}: wanted a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).is_file():
        if any(folder.iterdir()):
            raise Usage(f"{folder}: wanted a folder that is empty, or of an earlier export (with {MARK})")
        _put(folder / MARK, [_mark(Exported())], lambda: True)


def _mark(done: Exported) -> bytes:
    told = {"schema": 1, "groups": done.groups, "bundles": done.bundles, "expires": done.expires, "files": done.files}
    return json.dumps(told, indent=2, sort_keys=True).encode() + b"\n"


def _is(place: Path, sha256: str, size: int) -> bool:
    if not place.is_file() or place.stat().st_size != size:
        return False
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _put(place: Path, pieces: Iterable[bytes], good: Callable[[], bool]) -> None:
    """Writes a file under another name first: what is cut off or wrong never has its own. Raises ``RefusedForSafety``."""
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = place.with_name(f"{place.name}.new")
    with scratch.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if not good():
        scratch.unlink()
        raise RefusedForSafety(f"{place.name}: what the server sent is not what its name says")
    scratch.replace(place)
    # A stick may be pulled at once. Not every file system on one lets a folder be synced.
    with contextlib.suppress(OSError):
        descriptor = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
