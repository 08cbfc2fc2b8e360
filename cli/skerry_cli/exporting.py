"""Writes an update into a folder: a part of the repository, as devices read it without a network (``skerry-agent import``).

Owns what belongs to it and the order in which it is written: the timestamp last, so that a folder that was made before is the old one or
the new one. Nothing is written before the metadata was verified from the operator's own root, and no document before it was found to be what is
listed; devices verify all of it again, from roots of their own. Nothing in it is secret but for models in the clear: content keys of
encrypted ones are wrapped, each for a device that was named.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skerry_contract import canonical, group, ids, layout, sealed
from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError

from skerry_cli.client import Api
from skerry_cli.errors import Failed, RefusedForSafety, Usage
from skerry_cli.update_folder import MARK, UpdateFolder
from skerry_cli.verified_repository import VerifiedRepository, read_repository, read_target

_TIMESTAMP = f"{layout.METADATA_DIR}/timestamp.json"


@dataclass(kw_only=True, slots=True)
class Exported:
    """What is in the folder now.

    Attributes:
        bundles: model, version, digest and bytes of each; of an encrypted one ``devices``: whom it brings the content key.
        locked: model, version, device and why, of content keys that a named device is not given.
        missing: model, version and why, of those that a group's document names and that the catalog does not list.
        bytes: of all files; came: of those that had to be fetched.
        expires: of the timestamp, ISO 8601.
    """

    groups: list[str] = field(default_factory=list)
    bundles: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    locked: list[dict[str, str]] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    came: int = 0
    expires: str = ""

    @property
    def encrypted(self) -> list[dict[str, Any]]:
        """Of the bundles."""
        return [one for one in self.bundles if "devices" in one]

    def keyless(self, devices: Iterable[str]) -> list[str]:
        """Of these devices, who opens no encrypted bundle with it; empty where there is none to open."""
        able = {device for one in self.encrypted for device in one["devices"]}
        return [device for device in devices if device not in able] if self.encrypted else []


def export(
    api: Api,
    folder: Path,
    *,
    root: bytes,
    cache_dir: Path,
    now: dt.datetime,
    groups: Iterable[str],
    devices: Iterable[str] = (),
    say: Callable[[str], None],
) -> Exported:
    """Brings the folder to the server's present state.

    Args:
        folder: made when missing; else empty, or of an earlier export.
        root, cache_dir, now: as ``verified_repository.read_repository``.
        groups: whose documents and bundles; none for all.
        devices: who gets the content keys of encrypted bundles along, wrapped for each alone.
        say: hears how far it is.

    Raises:
        Usage: the folder holds something else, a link say, or there is no such group.
        Failed: the server cannot give something, or the folder cannot be written.
        RefusedForSafety: a signature, version, name, digest or expiry does not hold.
    """
    try:
        with UpdateFolder(folder) as place:
            verified = read_repository(api, root=root, cache_dir=cache_dir, now=now)
            return _Export(api, place, sorted({ids.device_id(one) for one in devices}), say).run(
                verified, sorted(set(groups))
            )
    except OSError as error:
        raise Failed(f"{error.filename or folder}: {error.strerror or error}") from None
    except ContractError as error:
        raise RefusedForSafety(f"the server's repository: {error}") from None


class _Export:
    def __init__(self, api: Api, folder: UpdateFolder, devices: list[ids.DeviceId], say: Callable[[str], None]) -> None:
        self._api = api
        self._devices = devices
        self._folder = folder
        self._say = say
        self._kept: set[str] = set()
        self._done = Exported()

    def run(self, verified: VerifiedRepository, wanted: list[str]) -> Exported:
        names = {str(name) for name in verified.groups}
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise Usage(f"no group {', '.join(unknown)} is published; there are {', '.join(sorted(names)) or 'none'}")
        if verified.expired:
            self._say(f"the catalog expired {verified.catalog.expires.isoformat()}: devices begin nothing of it")
        documents = {
            ids.group_name(name): self._group(verified, ids.group_name(name)) for name in wanted or sorted(names)
        }
        # From here on it is ours, and what is cut off goes on.
        if self._folder.is_new:
            self._folder.put(MARK, [_mark(Exported())], lambda: True)
        for path, data in verified.files.items():
            self._write(path, data)
        found: dict[str, group.Target] = {}
        models: dict[str, str] = {}
        for name, (path, data, document) in documents.items():
            self._write(path, data)
            for model, target in _named(document):
                found[target.digest], models[target.digest] = target, model
            self._done.groups.append(name)
        blobs: dict[str, int] = {}
        for digest, target in sorted(found.items(), key=lambda one: (models[one[0]], ids.version_key(one[1].version))):
            blobs.update(self._bundle(models[digest], target, verified))
        self._blobs(blobs)
        # The one that makes the rest count, and then what does not count any more.
        self._write(_TIMESTAMP, verified.timestamp)
        self._done.expires = verified.expires.isoformat()
        for path in self._folder.tidy(self._kept):
            self._say(f"{path!r} is of no export, and stays")
        self._folder.put(MARK, [_mark(self._done)], lambda: True)
        return self._done

    def _group(self, verified: VerifiedRepository, name: ids.GroupName) -> tuple[str, bytes, group.GroupDocument]:
        """Where it lies, its bytes, and what they say."""
        target = layout.group_target(name)
        path, data = read_target(self._api, target, verified.groups[name], max_bytes=group.MAX_BYTES)
        document = group.parse(data)
        if document.group != name:
            raise RefusedForSafety(f"{path}: the document is of group {document.group}")
        return path, data, document

    def _bundle(self, model: str, target: group.Target, verified: VerifiedRepository) -> dict[str, int]:
        """Sha256 -> bytes of the bundle's files."""
        path = layout.manifest_target(ids.model_name(model), target.version)
        listed = verified.catalog.targets.get(path)
        if listed is None or listed.hashes.get("sha256") != target.digest:
            why = "the catalog does not list it: devices would refuse it"
            self._done.missing.append({"model": model, "version": target.version, "why": why})
            return {}
        place, data = read_target(self._api, path, listed, max_bytes=manifests.MAX_BYTES)
        manifest = manifests.parse(data)
        if (manifest.model, manifest.version) != (model, target.version):
            raise RefusedForSafety(f"{place}: the manifest is of {manifest.model}@{manifest.version}")
        self._write(place, data)
        found = {file.sha256: file.size for file in manifest.files()}
        told: dict[str, Any] = {
            "model": model,
            "version": target.version,
            "digest": target.digest,
            "bytes": sum(found.values()),
        }
        if manifest.encryption is not None:
            told["devices"] = [one for one in self._devices if self._key(one, model, target)]
        self._done.bundles.append(told)
        return found

    def _key(self, device: ids.DeviceId, model: str, target: group.Target) -> bool:
        """Writes the content key, wrapped for the device; False when it may not have it."""
        try:
            answer = self._api.post(f"/api/v1/bundles/{target.digest}/key/{device}")
            wrapped = sealed.decode_wrapped(answer.get("wrapped"))
        except (RefusedForSafety, Usage) as error:
            why = {"model": model, "version": target.version, "device": device, "why": str(error)}
            self._done.locked.append(why)
            return False
        self._write(
            layout.carried_key(target.digest, device), json.dumps(sealed.encode_wrapped(wrapped)).encode() + b"\n"
        )
        return True

    def _blobs(self, blobs: dict[str, int]) -> None:
        total, here = sum(blobs.values()), 0
        for number, (sha256, size) in enumerate(sorted(blobs.items()), 1):
            path = layout.blob(sha256)
            self._kept.add(path)
            if not self._folder.holds(path, sha256, size):
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

        self._folder.put(path, pieces(), lambda: done == size and found.hexdigest() == sha256)

    def _write(self, path: str, data: bytes) -> None:
        self._kept.add(path)
        self._count(len(data))
        if not self._folder.holds(path, canonical.sha256(data), len(data)):
            self._folder.put(path, [data], lambda: True)
            self._done.came += len(data)

    def _count(self, size: int) -> None:
        self._done.files += 1
        self._done.bytes += size


def _named(document: group.GroupDocument) -> Iterator[tuple[str, group.Target]]:
    """Every bundle that a device of the group may be given, with its model."""
    for model, plan in document.models.items():
        candidate = plan.rollout.candidate if plan.rollout is not None else None
        for target in (plan.stable, plan.fallback, plan.shadow, candidate, *plan.via):
            if target is not None:
                yield model, target
    for pins in document.pins.values():
        yield from pins.items()


def _mark(done: Exported) -> bytes:
    told = {"schema": 1, "groups": done.groups, "bundles": done.bundles, "expires": done.expires, "files": done.files}
    return json.dumps(told, indent=2, sort_keys=True).encode() + b"\n"
