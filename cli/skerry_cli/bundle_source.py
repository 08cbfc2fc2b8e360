"""Where an approver gets a bundle from, and the check that it is what its digest says.

Owns fetching and comparing; nothing that a source returns is believed. What the catalog then says is ``catalog``'s.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import urllib3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import canonical, ids, layout, sealed
from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError

from skerry_cli import sealing
from skerry_cli.errors import Failed, RefusedForSafety, Usage

_CHUNK_BYTES = 1 << 18
_TIMEOUT_S = 30.0


class BundleSource(Protocol):
    """Where an approver gets a bundle from, to check it. Nothing it returns is believed."""

    def manifest(self, digest: str) -> bytes:
        """The bytes of the manifest with that digest."""

    def blob(self, file: manifests.File) -> Iterator[bytes]:
        """The bytes of a file as it is stored, in pieces."""

    def content_key(self, digest: str) -> bytes:
        """The content key of an encrypted bundle; asked for no other."""


class RepositorySource:
    """Bundles as devices will get them: files from the update repository, manifests from the server's register.

    Args:
        repository_url: the repository's root.
        fetch_manifest: digest -> bytes, e.g. ``GET /api/v1/bundles/{digest}/manifest`` (before approval the repository
            does not serve it).
        ca_file: PEM of the fleet's CA; None for the system's.
        fetch_key: digest -> content key.
    """

    def __init__(
        self,
        repository_url: str,
        fetch_manifest: Callable[[str], bytes],
        ca_file: Path | None,
        fetch_key: Callable[[str], bytes] | None = None,
    ) -> None:
        self._url = repository_url.rstrip("/")
        self._fetch_manifest = fetch_manifest
        self._pool = open_pool(ca_file)
        self._fetch_key = fetch_key

    def manifest(self, digest: str) -> bytes:
        """See ``BundleSource``."""
        return self._fetch_manifest(digest)

    def blob(self, file: manifests.File) -> Iterator[bytes]:
        """See ``BundleSource``. Raises ``Failed`` when the repository cannot give it."""
        url = f"{self._url}/{layout.blob(file.sha256)}"
        try:
            response = self._pool.request("GET", url, preload_content=False, headers={"Accept-Encoding": "identity"})
            try:
                if response.status != 200:
                    raise Failed(f"{url}: HTTP {response.status}", advice="push the bundle's files first")
                yield from response.stream(_CHUNK_BYTES)
            finally:
                response.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise Failed(f"{url}: {error}") from None

    def content_key(self, digest: str) -> bytes:
        """See ``BundleSource``."""
        return _key_of(self._fetch_key, digest)


class FolderSource:
    """A bundle in a local folder, e.g. the approver's own build: stronger evidence than what the server shows.

    The files of an encrypted one lie there in the clear; they are sealed with the content key beside it, else with the server's.
    """

    def __init__(self, folder: Path, fetch_key: Callable[[str], bytes] | None = None) -> None:
        self._folder = folder
        self._fetch_key = fetch_key
        self._key = b""

    def content_key(self, digest: str) -> bytes:
        """See ``BundleSource``."""
        own = sealing.key_file(self._folder)
        self._key = sealing.read_key(own) if own.is_file() else _key_of(self._fetch_key, digest)
        return self._key

    def manifest(self, digest: str) -> bytes:  # noqa: ARG002 - the folder holds one bundle; its caller compares the digest
        """See ``BundleSource``; the folder holds one bundle, whatever the digest."""
        try:
            return (self._folder / manifests.MANIFEST_FILE).read_bytes()
        except OSError as error:
            raise Usage(f"{self._folder}: wanted a bundle's folder: {error}") from None

    def blob(self, file: manifests.File) -> Iterator[bytes]:
        """See ``BundleSource``."""
        try:
            with (self._folder / file.path).open("rb") as stream:
                if file.plain is not None:
                    yield from sealed.seal(stream, self._key, file.plain.sha256, AESGCM)
                while piece := stream.read(_CHUNK_BYTES):
                    yield piece
        except OSError as error:
            raise Usage(f"{self._folder}: {error}") from None


def checked_bundle(model: str, version: str, digest: str, source: BundleSource) -> bytes:
    """Fetches the whole bundle; returns the manifest's bytes when everything is what the digest says.

    Raises:
        RefusedForSafety: the manifest or a file has other bytes, or it is the manifest of another bundle.
        Usage: the digest is none. Failed: the source cannot give it.
    """
    name = f"{model}@{version}"
    try:
        ids.bundle_digest(digest)
    except ContractError as error:
        raise Usage(f"add {name}: {error}") from None
    data = source.manifest(digest)
    got = canonical.sha256(data)
    if got != digest:
        raise RefusedForSafety(f"add {name}: the manifest has sha256 {got}, wanted {digest}")
    try:
        manifest = manifests.parse(data)
    except ContractError as error:
        raise RefusedForSafety(f"add {name}: {error}") from None
    if (manifest.model, manifest.version) != (model, version):
        raise RefusedForSafety(f"add {name}: the manifest is of {manifest.model}@{manifest.version}")
    key = b""
    if manifest.encryption is not None:
        key = source.content_key(digest)
        sealing.require_named(manifest, key, f"add {name}")
    for file in manifest.files():
        if file.plain is not None:
            if fault := sealing.fault_of_opened(source.blob(file), key, file):
                raise RefusedForSafety(f"add {name}: {file.path}: {fault}")
            continue
        found, size = hashlib.sha256(), 0
        for piece in source.blob(file):
            found.update(piece)
            size += len(piece)
            if size > file.size:
                break
        if size != file.size or found.hexdigest() != file.sha256:
            raise RefusedForSafety(
                f"add {name}: {file.path} has {size} bytes, sha256 {found.hexdigest()}, wanted {file.size}, {file.sha256}"
            )
    return data


def _key_of(fetch: Callable[[str], bytes] | None, digest: str) -> bytes:
    if fetch is None:
        raise Usage(f"bundle {digest[:12]}: it is encrypted, and there is no content key to look into it with")
    return fetch(digest)


def open_pool(ca_file: Path | None) -> urllib3.PoolManager:
    """HTTP with the fleet's CA (None: the system's), a gap timeout and two retries."""
    retries = urllib3.Retry(2, backoff_factor=0.2, raise_on_status=False)
    context = ssl.create_default_context(cafile=str(ca_file) if ca_file is not None else None)
    return urllib3.PoolManager(timeout=urllib3.Timeout(_TIMEOUT_S), retries=retries, ssl_context=context)
