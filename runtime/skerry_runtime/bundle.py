"""A bundle's folder: opened, and every byte of it checked against the manifest and the manifest against its digest.

A bundle holds ``manifest.json``, the files it lists, and perhaps ``model.sig``; anything else is refused, and so is
everything that is not a regular file. Of an encrypted bundle this is the folder of its opened files. Links are never followed. Whether the bundle may run is decided elsewhere: a digest
says that the bytes are the ones meant, not that somebody approved them.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from skerry_contract import ids
from skerry_contract import manifest as mf
from skerry_contract.errors import ContractError

from skerry_runtime.errors import Rejected

_CHUNK = 1 << 20
_LARGE = 1 << 22
"""Bytes: 22 ms by Python's own sha256 on a server's CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened bundle: its folder, identity and manifest. ``raw`` is the manifest's bytes."""

    folder: Path
    digest: ids.BundleDigest
    manifest: mf.Manifest
    raw: bytes

    def path(self, relative: str) -> Path:
        """Where a listed file lies. Raises ``KeyError`` for a path that the manifest does not list."""
        if all(file.path != relative for file in self.manifest.files()):
            raise KeyError(relative)
        return self.folder / relative

    def read(self, relative: str, *, max_bytes: int) -> bytes:
        """Reads a listed file, checked against its digest. Raises ``Rejected``, ``KeyError``."""
        self.path(relative)
        listed = next(file for file in self.manifest.files() if file.path == relative).content
        if listed.size > max_bytes:
            raise Rejected("size_mismatch", f"{relative}: at most {max_bytes} bytes are read, it has {listed.size}")
        with _open_regular(self.folder, relative) as file:
            data = file.read(listed.size + 1)
        if hashlib.sha256(data).hexdigest() != listed.sha256:
            raise Rejected("hash_mismatch", f"{relative}: changed since the bundle was opened")
        return data


def open_bundle(
    folder: str | Path, *, digest: str | None = None, hashes: bool = True, variants: Collection[str] | None = None
) -> Bundle:
    """Opens a bundle and checks it.

    Args:
        folder: the bundle's folder.
        digest: the identity it must have; None takes what is there.
        hashes: read every file and compare its sha256. Without, presence, kind and size are still checked: enough for a
            folder that was verified when it was staged.
        variants: ids of the variants whose files must be there; None for all. A device stages one variant only.

    Raises:
        Rejected: ``file_missing``, ``malformed_manifest``, ``hash_mismatch``, ``size_mismatch``, ``not_a_file``,
            ``file_unlisted``, ``no_variant``.
    """
    folder = Path(folder)
    raw = _read_manifest(folder)
    found = mf.digest(raw)
    if digest is not None and found != digest:
        raise Rejected("hash_mismatch", f"{mf.MANIFEST_FILE}: wanted bundle {digest}, got {found}")
    try:
        manifest = mf.parse(raw)
    except ContractError as error:
        raise Rejected("malformed_manifest", str(error)) from None
    bundle = Bundle(folder=folder, digest=found, manifest=manifest, raw=raw)
    _check_files(bundle, hashes=hashes, variants=variants)
    return bundle


def fitting_variant(manifest: mf.Manifest, *, arch: str, runtimes: Collection[str]) -> mf.Variant | None:
    """The first variant, in the manifest's order, for this machine (``uname -m``) and one of these runtimes."""
    for variant in manifest.variants:
        if variant.runtime in runtimes and (not variant.arch or arch in variant.arch):
            return variant
    return None


def regular_files(folder: Path) -> Iterator[str]:
    """Paths of all regular files below ``folder``, relative, sorted within each folder.

    Raises:
        Rejected: ``not_a_file`` for a link or anything else that is neither a file nor a folder.
    """

    def walk(prefix: str) -> Iterator[str]:
        with os.scandir(folder / prefix) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                relative = f"{prefix}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    yield from walk(relative + "/")
                elif entry.is_file(follow_symlinks=False):
                    yield relative
                else:
                    raise Rejected("not_a_file", f"{relative}: wanted a regular file, got {_kind(entry)}")

    try:
        yield from walk("")
    except (FileNotFoundError, NotADirectoryError):
        raise Rejected("file_missing", f"{folder}: no such folder") from None


def _read_manifest(folder: Path) -> bytes:
    if not folder.is_dir():
        raise Rejected("file_missing", f"{folder}: no such folder")
    with _open_regular(folder, mf.MANIFEST_FILE) as file:
        return file.read(mf.MAX_BYTES + 1)


def _check_files(bundle: Bundle, *, hashes: bool, variants: Collection[str] | None) -> None:
    manifest = bundle.manifest
    known = {variant.id for variant in manifest.variants}
    for variant_id in variants or ():
        if variant_id not in known:
            raise Rejected("no_variant", f"wanted variant {variant_id!r}, the bundle has {', '.join(sorted(known))}")
    needed = {
        file.path
        for variant in manifest.variants
        if variants is None or variant.id in variants
        for file in variant.files
    }
    listed = {file.path: file for file in manifest.files()}
    present = set(regular_files(bundle.folder))
    for path in sorted(present - set(listed) - {mf.MANIFEST_FILE, mf.SIGNATURE_FILE}):
        raise Rejected("file_unlisted", f"{path}: not in the manifest")
    for path in sorted(needed - present):
        raise Rejected("file_missing", f"{path}: listed in the manifest, not in the folder")
    for path in sorted(present & set(listed)):
        _check_file(bundle.folder, path, listed[path].content, hashes=hashes)


def _check_file(folder: Path, path: str, listed: mf.Plain, *, hashes: bool) -> None:
    with _open_regular(folder, path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != listed.size:
            raise Rejected("size_mismatch", f"{path}: wanted {listed.size} bytes, got {size}")
        if not hashes:
            return
        sha256 = _hasher(size)
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
    if sha256.hexdigest() != listed.sha256:
        raise Rejected("hash_mismatch", f"{path}: wanted sha256 {listed.sha256}, got {sha256.hexdigest()}")


def _hasher(size: int) -> hashlib._Hash:
    """Of what the process has loaded; of a large file by OpenSSL, which is seven times as fast as Python's own and takes 4 MB."""
    if size >= _LARGE:
        try:
            from _hashlib import openssl_sha256
        except ImportError:
            pass
        else:
            return openssl_sha256()
    return hashlib.sha256()


def _open_regular(folder: Path, relative: str) -> io.BufferedReader:
    # O_NOFOLLOW guards the last part only; regular_files has refused links in the folders above it. O_NONBLOCK: opening
    # a FIFO must not wait for a writer.
    try:
        fd = os.open(folder / relative, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Rejected("file_missing", f"{relative}: not in the folder") from None
    except OSError as error:
        raise Rejected("not_a_file", f"{relative}: wanted a regular file: {error.strerror}") from None
    file = os.fdopen(fd, "rb")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise Rejected("not_a_file", f"{relative}: wanted a regular file")
    return file


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "a symbolic link"
    mode = entry.stat(follow_symlinks=False).st_mode
    return {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a device", stat.S_IFCHR: "a device"}.get(
        stat.S_IFMT(mode), "something else"
    )
