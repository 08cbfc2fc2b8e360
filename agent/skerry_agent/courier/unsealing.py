"""The verb ``unseal``: an encrypted bundle's files, opened into a folder in memory, where workers load them from.

On the disk the slot stays as it came. What is opened here lies on a tmpfs, is gone with the power, and is made again by the same verb after a
start of the device. Every file must be the one that the manifest lists in the clear; a worker hashes it once more before it loads it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import ids, sealed
from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError

from skerry_agent import durable, memory_folder, scraps
from skerry_agent.courier import content_keys, locks, requests
from skerry_agent.errors import Degraded, Rejected

_LOCK_WAIT_S = 60.0
_SPARE_BYTES = 1 << 20


def unseal(request: requests.Unseal) -> dict[str, Any]:
    """Opens the files of one variant. Doing it twice is doing it once.

    Returns:
        ``bytes`` that were written.

    Raises:
        Rejected: ``malformed_manifest``, ``cannot_decrypt``, ``hash_mismatch``, ``size_mismatch``, ``bad_request``.
        Degraded: ``no_memory_folder``, ``not_enough_memory``, ``storage_failed``. And as ``content_keys.obtain``.
    """
    manifest, data = _manifest(request)
    try:
        variant = manifest.variant(request.variant)
    except KeyError:
        raise Rejected("bad_request", f"{request.variant}: the manifest has no such variant") from None
    if manifest.encryption is None:
        raise Rejected("bad_request", f"bundle {request.digest[:12]} is not encrypted")
    slot = Path(request.state_dir) / "slots" / request.digest
    folder = Path(request.folder)
    if not memory_folder.is_ours(folder):
        raise Degraded("no_memory_folder", f"{folder}: wanted a folder of ours with mode 0700, and no link to one")
    target = folder / request.digest
    try:
        with locks.alone(
            Path(request.state_dir) / "run" / f"unseal-{request.digest[:16]}.lock", _LOCK_WAIT_S, passing=True
        ):
            locks.tidy_locks(Path(request.state_dir) / "run", "unseal-*.lock")
            lacking = [file for file in variant.files if not _has(target / file.path, file.content.size)]
            with scraps.held(folder, f".{request.digest}.new") as scratch:
                _check_room(folder, sum(file.content.size for file in lacking))
                key = content_keys.obtain(request, manifest, request.digest)
                target.mkdir(mode=0o700, exist_ok=True)
                for file in lacking:
                    place = target / file.path
                    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    _open_file(slot / file.path, scratch / "file", key, file)
                    (scratch / "file").replace(place)
                # Last: with it the folder counts as open.
                (scratch / "manifest").write_bytes(data)
                (scratch / "manifest").replace(target / manifests.MANIFEST_FILE)
            return {"bytes": sum(file.content.size for file in lacking)}
    except OSError as error:
        raise durable.disk_error(error) from error


def _manifest(request: requests.Unseal) -> tuple[manifests.Manifest, bytes]:
    path = Path(request.state_dir) / "slots" / ids.bundle_digest(request.digest) / manifests.MANIFEST_FILE
    try:
        data = path.read_bytes()
        if manifests.digest(data) != request.digest:
            raise Rejected("hash_mismatch", f"{path}: wanted {request.digest}, got {manifests.digest(data)}")
        return manifests.parse(data), data
    except (OSError, ContractError) as error:
        raise Rejected("malformed_manifest", f"{path}: {error}") from None


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _check_room(folder: Path, wanted: int) -> None:
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if wanted + _SPARE_BYTES > free:
        raise Degraded(
            "not_enough_memory",
            f"{folder}: the opened model takes {wanted / 1e6:.1f} MB of memory, {free / 1e6:.1f} MB are free",
            advice="make the tmpfs larger, or free memory",
        )


def _open_file(source: Path, target: Path, key: bytes, file: manifests.File) -> None:
    assert file.plain is not None
    found, size = hashlib.sha256(), 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(source, "rb") as sealed_file, os.fdopen(descriptor, "wb") as plain_file:
            for piece in sealed.opened(sealed_file, key, file.plain.sha256, AESGCM):
                found.update(piece)
                size += len(piece)
                plain_file.write(piece)
    except FileNotFoundError:
        raise Rejected("size_mismatch", f"{file.path}: it is not in the slot") from None
    except sealed.CannotOpen as error:
        raise Rejected("cannot_decrypt", f"{file.path}: {error}") from None
    if (size, found.hexdigest()) != (file.plain.size, file.plain.sha256):
        raise Rejected("hash_mismatch", f"{file.path}: wanted in it {file.plain.sha256}, got {found.hexdigest()}")
