"""A TUF repository in memory that can be made wrong in any way, and a device's updater on it. No network: the fetcher is tested elsewhere."""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from securesystemslib.signer import CryptoSigner
from skerry_agent.courier.safe_updater import SafeUpdater
from tuf.api import exceptions
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Root, Signed, Snapshot, Targets, Timestamp
from tuf.ngclient import FetcherInterface, UpdaterConfig

LATER = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(days=30)
TOP = ("timestamp", "snapshot", "targets")
KEYS = [CryptoSigner.generate_ed25519() for _ in range(12)]
"""Enough for every test; none is a secret."""


class Shelf(FetcherInterface):
    """What the repository serves, by the path below ``metadata/`` or ``targets/``; the rest is 404.

    Attributes:
        asked: what was asked for, in order.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = url.removeprefix("https://here/")
        self.asked.append(path)
        if path not in self.files:
            raise exceptions.DownloadHTTPError(f"{path}: HTTP 404", 404)
        yield self.files[path]


class Repo:
    """Signs and publishes. ``signers`` by role may be changed at will; ``hashes``: name digests of metadata as well."""

    def __init__(self) -> None:
        self.shelf = Shelf()
        self.hashes = False
        self.signers: dict[str, list[CryptoSigner]] = {}
        self.signed: dict[str, Signed] = {
            "root": Root(expires=LATER),
            "timestamp": Timestamp(expires=LATER),
            "snapshot": Snapshot(expires=LATER),
            "targets": Targets(expires=LATER),
        }
        self._published: set[str] = set()
        for role, key in zip(("root", *TOP), KEYS, strict=False):
            self.name(role, key)
        self.publish("root", "targets", "snapshot", "timestamp")
        self.first = self.file("1.root.json")

    def __getattr__(self, role: str) -> Any:
        return self.signed[role]

    def name(self, role: str, *keys: CryptoSigner, threshold: int = 1) -> None:
        """These keys, and no others, are the role's."""
        self.root.roles[role].keyids.clear()
        for key in keys:
            self.root.add_key(key.public_key, role)
        self.root.roles[role].threshold = threshold
        self.signers[role] = list(keys)

    def delegate(
        self,
        role: str,
        *,
        by: str = "targets",
        paths: tuple[str, ...] = ("*",),
        key: int = 8,
        terminating: bool = False,
    ) -> Targets:
        """``by`` lets ``role`` speak for ``paths``."""
        delegator = self.signed[by]
        assert isinstance(delegator, Targets)
        if delegator.delegations is None:
            delegator.delegations = Delegations({}, {})
        assert delegator.delegations.roles is not None
        delegator.delegations.roles[role] = DelegatedRole(role, [], 1, terminating, list(paths))
        delegator.add_key(KEYS[key].public_key, role)
        self.signers.setdefault(role, []).append(KEYS[key])
        found = self.signed.setdefault(role, Targets(expires=LATER))
        assert isinstance(found, Targets)
        return found

    def publish(self, *roles: str) -> None:
        """Signs the next version of each; the first is 1."""
        for role in roles:
            signed = self.signed[role]
            if role in self._published:
                signed.version += 1
            self._published.add(role)
            self.put(role, self.sign(role))

    def sign(self, role: str) -> bytes:
        """The bytes of a role as it is now."""
        metadata: Metadata[Any] = Metadata(self.signed[role])
        for key in {one.public_key.keyid: one for one in self.signers[role]}.values():
            metadata.sign(key, append=True)
        return metadata.to_bytes()

    def put(self, role: str, data: bytes, version: int | None = None) -> None:
        """Serves bytes as a role, and lists them where the role is listed."""
        version = self.signed[role].version if version is None else version
        meta = MetaFile(version)
        if self.hashes:
            meta = MetaFile.from_data(version, data, ["sha256"])
        if role == "snapshot":
            self.timestamp.snapshot_meta = meta
        elif role not in ("root", "timestamp"):
            self.snapshot.meta[f"{role}.json"] = meta
        self.shelf.files[self.path(role, version)] = data

    @staticmethod
    def path(role: str, version: int) -> str:
        """Where a role's metadata lies."""
        return "metadata/timestamp.json" if role == "timestamp" else f"metadata/{version}.{role}.json"

    def file(self, name: str) -> bytes:
        """The bytes of a metadata file."""
        return self.shelf.files[f"metadata/{name}"]

    def edit(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Changes a served metadata file, signatures and all, below what the library would write."""
        value = json.loads(self.file(name))
        change(value)
        self.shelf.files[f"metadata/{name}"] = json.dumps(value).encode()


class Client:
    """A device's cache and its root."""

    def __init__(self, repo: Repo, folder: Path, kind: type[SafeUpdater] = SafeUpdater) -> None:
        self.repo = repo
        self.folder = folder
        self.kind = kind
        self.root = repo.first

    def updater(self, *, days: float = 0, **config: Any) -> SafeUpdater:
        """One that has not refreshed."""
        return self.kind(
            self.folder,
            "https://here/metadata/",
            "https://here/targets/",
            fetcher=self.repo.shelf,
            bootstrap=self.root,
            now_s=time.time() + days * 86400,
            config=UpdaterConfig(**config),
        )

    def refresh(self, *, days: float = 0, **config: Any) -> SafeUpdater:
        """Raises what the updater does."""
        updater = self.updater(days=days, **config)
        updater.refresh()
        return updater

    def trusted(self) -> dict[str, int]:
        """Role -> version that is kept."""
        return {
            unquote(path.name.removesuffix(".json")): json.loads(path.read_bytes())["signed"]["version"]
            for path in self.folder.glob("*.json")
        }
