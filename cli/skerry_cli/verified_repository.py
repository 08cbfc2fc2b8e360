"""The whole present state of a repository, verified from the operator's own root: what may be carried elsewhere.

Owns which signed files belong to it and that none of them counts before it was verified. Names are made here, of identifiers; what the server
calls a thing is only compared with them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from skerry_contract import canonical, ids, layout
from skerry_contract.errors import ContractError
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets
from tuf.ngclient import FetcherInterface

from skerry_cli.client import Api
from skerry_cli.errors import Failed, RefusedForSafety
from skerry_cli.verified_catalog import CONFIG, CatalogUpdater, entries, explained, remember_version


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedRepository:
    """Verified from the operator's root.

    Attributes:
        files: by path below the repository, all but the timestamp: the chain of roots, snapshot, targets, catalog, fleet, floors.
        timestamp: bytes of ``timestamp.json``; expires: when it does.
        catalog: the signed part; expired: whether its own time is over.
        groups: the listed documents by the name of the group.
    """

    files: dict[str, bytes]
    timestamp: bytes
    expires: dt.datetime
    catalog: Targets
    expired: bool
    groups: dict[ids.GroupName, TargetFile]


def read_repository(api: Api, *, root: bytes, cache_dir: Path, now: dt.datetime) -> VerifiedRepository:
    """Fetches the present metadata and verifies it. Writes nothing but the cache.

    Args:
        root: bytes of the operator's ``root.json``, any version of it.
        cache_dir: as ``verified_catalog.read_catalog`` has it, and the same one.
        now: aware, UTC. The catalog itself may have expired.

    Raises:
        RefusedForSafety: a signature, version, name or expiry does not hold.
        Failed: the server cannot give something.
    """
    cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with explained():
        updater = CatalogUpdater(
            str(cache_dir),
            layout.METADATA_DIR,
            target_base_url=layout.TARGETS_DIR,
            fetcher=_Fetcher(api),
            config=CONFIG,
            bootstrap=root,
        )
        first = updater.root.version
        catalog, _, _ = updater.verified_catalog(now)
        if f"{layout.FLEET_ROLE}.json" not in updater.snapshot.meta:
            raise Failed("the repository lists no groups yet")
        fleet = updater.verified_fleet(now)
        # Every name in it, before one of them is used.
        entries(catalog)
        groups = {_group(path): target for path, target in fleet.targets.items()}
        files = {_root(version): _older_root(api, version) for version in range(1, first)}
        for version in range(first, updater.root.version + 1):
            files[_root(version)] = (cache_dir / "root_history" / f"{version}.root.json").read_bytes()
        versions = {
            Snapshot.type: updater.snapshot.version,
            Targets.type: updater.targets.version,
            layout.CATALOG_ROLE: catalog.version,
            layout.FLEET_ROLE: fleet.version,
        }
        for role, version in versions.items():
            files[f"{layout.METADATA_DIR}/{version}.{role}.json"] = (cache_dir / f"{role}.json").read_bytes()
        floors = updater.floors(catalog, cache_dir)
        files[layout.target_file(layout.FLOORS_TARGET, canonical.sha256(floors))] = floors
    remember_version(cache_dir, catalog.version)
    return VerifiedRepository(
        files=files,
        timestamp=(cache_dir / "timestamp.json").read_bytes(),
        expires=updater.timestamp.expires,
        catalog=catalog,
        expired=catalog.is_expired(now),
        groups=groups,
    )


def read_target(api: Api, path: str, target: TargetFile, *, max_bytes: int) -> tuple[str, bytes]:
    """Where the repository keeps a listed document, and its bytes, verified.

    Args:
        path: of the target, made by ``layout``.

    Raises:
        RefusedForSafety: it is not what is listed, or longer than ``max_bytes``. Failed: the server does not have it.
    """
    sha256 = ids.sha256_hex(target.hashes.get("sha256"))
    if target.length > max_bytes:
        raise RefusedForSafety(f"{path}: {target.length} bytes are listed, wanted at most {max_bytes}")
    place = layout.target_file(path, sha256)
    data = api.fetch(f"/repository/{place}", max_bytes=max_bytes)
    if data is None:
        raise Failed(f"{place} is not in the server's repository: it changed meanwhile: try again")
    if (len(data), canonical.sha256(data)) != (target.length, sha256):
        raise RefusedForSafety(f"{place}: it has {len(data)} bytes and sha256 {canonical.sha256(data)}")
    return place, data


def _group(path: str) -> ids.GroupName:
    """The group of a listed document. Raises ``RefusedForSafety`` for a name that leads elsewhere: the online key signs this list."""
    try:
        name = ids.group_name(path.removeprefix("fleet/").removesuffix(".json"))
    except ContractError:
        name = None
    if name is None or path != layout.group_target(name):
        raise RefusedForSafety(
            f"fleet: {path[:200]!r} is no group document's path",
            advice="no server of ours lists it: look at who holds it",
        )
    return name


def _root(version: int) -> str:
    return f"{layout.METADATA_DIR}/{version}.root.json"


def _older_root(api: Api, version: int) -> bytes:
    """A root before the operator's own, for devices that were enrolled under it. They judge it by theirs; here it must be one at all."""
    data = api.fetch(f"/repository/{_root(version)}", max_bytes=CONFIG.root_max_length)
    if data is None:
        raise Failed(f"{_root(version)} is not in the server's repository: devices that were enrolled under it need it")
    if Metadata[Root].from_bytes(data).signed.version != version:
        raise RefusedForSafety(f"{_root(version)}: it is of another version")
    return data


class _Fetcher(FetcherInterface):
    """Through the operator's client; tuf's base class bounds the length."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def _fetch(self, url: str) -> Iterator[bytes]:
        data = self._api.fetch(f"/repository/{url}")
        if data is None:
            raise tuf_errors.DownloadHTTPError(f"{url}: HTTP 404", 404)
        yield data
