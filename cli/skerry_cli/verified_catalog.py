"""The last catalog, verified from the operator's own root: what every approval begins with.

Owns the TUF client of the operator's tool and what it remembers against rollback. It believes the root it is given and
nothing that a server says; changing the catalog is ``catalog``'s.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import urllib3
from securesystemslib.signer import Key
from skerry_contract import floors as floor_rules
from skerry_contract import ids, layout
from skerry_contract.errors import ContractError
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import DelegatedRole, Metadata, Root, Snapshot, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from skerry_cli import offline_roles
from skerry_cli.bundle_source import open_pool
from skerry_cli.errors import CliError, Failed, RefusedForSafety, Usage

CONFIG = UpdaterConfig(targets_max_length=32 << 20, app_user_agent="skerry")
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A listed bundle, as ``entries`` reads it from a catalog."""

    model: str
    version: str
    digest: str
    submitter: str
    approvers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedCatalog:
    """The last catalog, verified from the operator's root.

    Attributes:
        catalog: the signed part; ``expired`` says whether its time was over (then a change renews it).
        floors, forced: model -> lowest version that may be activated, that may go on serving.
        keys, threshold: whose signatures the next catalog needs, and how many.
        root, targets: the last ones, which vouch for it.
        brings: what new ones that appear with the next catalog change, in lines.
    """

    catalog: Targets
    expired: bool
    floors: dict[str, str]
    forced: dict[str, str]
    keys: dict[str, Key]
    role: DelegatedRole
    root: Root
    targets: Targets
    brings: tuple[str, ...] = ()

    @property
    def threshold(self) -> int:
        """How many approvers must sign."""
        return self.role.threshold


def read_catalog(
    repository_url: str, *, root: bytes, cache_dir: Path, ca_file: Path | None, now: dt.datetime
) -> VerifiedCatalog:
    """Fetches the last catalog and verifies it from the operator's own root.

    Args:
        repository_url: the repository's root, https (http for a repository that needs no privacy: TUF verifies either).
        root: bytes of the operator's ``root.json``, any version of it.
        cache_dir: remembers what this operator has seen, against rollback; made when missing, one per fleet.
        ca_file: PEM of the fleet's CA; None for the system's.
        now: aware, UTC. The catalog itself may have expired; the roles that vouch for its being the last may not.

    Raises:
        RefusedForSafety: signature, version, digest or expiry do not hold.
        Failed: the repository cannot be reached.
    """
    cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    base = repository_url.rstrip("/")
    with explained():
        updater = CatalogUpdater(
            str(cache_dir),
            f"{base}/{layout.METADATA_DIR}/",
            target_base_url=f"{base}/{layout.TARGETS_DIR}/",
            fetcher=_Fetcher(ca_file),
            config=CONFIG,
            bootstrap=root,
        )
        catalog, role, keys = updater.verified_catalog(now)
        floors_data = updater.floors(catalog, cache_dir)
        floors, forced = floor_rules.parse(floors_data), floor_rules.parse_forced(floors_data)
    remember_version(cache_dir, catalog.version)
    return VerifiedCatalog(
        catalog=catalog,
        expired=catalog.is_expired(now),
        floors=floors,
        forced=forced,
        keys=keys,
        role=role,
        root=updater.root,
        targets=updater.targets,
    )


def under_targets(
    verified: VerifiedCatalog, data: bytes, *, root: bytes | None = None, names: Mapping[str, str] | None = None
) -> VerifiedCatalog:
    """The same catalog, as the ground of one that is to appear together with new targets: its signers are those that they name.

    Args:
        data: the next version of targets, signed by enough of its holders.
        root: the next version of root where it comes with them, else the one being served counts.
        names: key id -> who holds it, for what a person is shown.

    Raises:
        RefusedForSafety: no next version, not signed as root says, or it delegates no catalog.
        Usage: no such metadata.
    """
    trusted = verified.root
    try:
        if root is not None:
            next_root = Metadata[Root].from_bytes(root)
            if not isinstance(next_root.signed, Root) or next_root.signed.version != trusted.version + 1:
                raise RefusedForSafety(f"root: wanted version {trusted.version + 1}")
            for delegator in (trusted, next_root.signed):
                delegator.verify_delegate(Root.type, next_root.signed_bytes, next_root.signatures)
            trusted = next_root.signed
        metadata = Metadata[Targets].from_bytes(data)
    except tuf_errors.UnsignedMetadataError as error:
        raise RefusedForSafety(f"root: {error}") from None
    except tuf_errors.RepositoryError as error:
        raise Usage(f"wanted TUF metadata: {error}") from None
    new = metadata.signed
    if not isinstance(new, Targets) or new.version != verified.targets.version + 1:
        raise RefusedForSafety(f"targets: wanted version {verified.targets.version + 1}, got {new.version}")
    try:
        trusted.verify_delegate(Targets.type, metadata.signed_bytes, metadata.signatures)
    except tuf_errors.RepositoryError as error:
        raise RefusedForSafety(f"targets: {error}") from None
    delegations = new.delegations
    role = (delegations.roles or {}).get(layout.CATALOG_ROLE) if delegations else None
    if delegations is None or role is None:
        raise RefusedForSafety("targets: it delegates no catalog")
    named = {keyid: delegations.keys[keyid] for keyid in role.keyids}
    brings = offline_roles.difference(verified.targets, new, names or {})
    if root is not None:
        brings = (*offline_roles.difference(verified.root, trusted, names or {}), *brings)
    return replace(verified, keys=named, role=role, root=trusted, targets=new, brings=brings)


def entries(catalog: Targets) -> dict[tuple[str, str], Entry]:
    """The bundles that a catalog lists, by (model, version).

    Raises:
        RefusedForSafety: a path or a digest that no tool of ours would write.
    """
    found: dict[tuple[str, str], Entry] = {}
    for path, target in catalog.targets.items():
        if path == layout.FLOORS_TARGET:
            continue
        parts = path.split("/")
        try:
            if len(parts) != 4 or path != layout.manifest_target(ids.model_name(parts[1]), parts[2]):
                raise RefusedForSafety(f"catalog: {path[:200]!r} is no manifest's path")
            digest = ids.bundle_digest(target.hashes.get("sha256"))
        except ContractError as error:
            raise RefusedForSafety(f"catalog: {path[:200]!r}: {error}") from None
        custom = target.custom if isinstance(target.custom, dict) else {}
        approvers = custom.get("approvers")
        found[parts[1], parts[2]] = Entry(
            model=parts[1],
            version=parts[2],
            digest=digest,
            submitter=str(custom.get("submitter", "")),
            approvers=tuple(str(name) for name in approvers) if isinstance(approvers, list) else (),
        )
    return found


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """What the updater stops with, in the tool's own errors."""
    try:
        yield
    except tuf_errors.DownloadHTTPError as error:
        raise Failed(f"repository: {error}", advice="did the server take root, targets and a first catalog?") from None
    except tuf_errors.DownloadError as error:
        if isinstance(error.__cause__, CliError):
            raise error.__cause__ from None
        raise Failed(f"repository: {error}: {error.__cause__ or ''}".rstrip(": ")) from None
    except tuf_errors.RepositoryError as error:
        raise RefusedForSafety(f"repository: {type(error).__name__}: {error}") from None
    except ContractError as error:
        raise RefusedForSafety(str(error)) from None


class CatalogUpdater(Updater):
    """python-tuf's updater, for a reader that renews what has expired. One reading per instance."""

    @property
    def root(self) -> Root:
        """The last one that follows from the operator's."""
        return self._trusted_set.root

    @property
    def targets(self) -> Targets:
        """The last ones."""
        return self._trusted_set.targets

    @property
    def snapshot(self) -> Snapshot:
        """The last one."""
        return self._trusted_set.snapshot

    @property
    def timestamp(self) -> Timestamp:
        """The last one."""
        return self._trusted_set.timestamp

    def verified_fleet(self, now: dt.datetime) -> Targets:
        """The list of groups of the same snapshot; after ``verified_catalog``."""
        self._trusted_set.reference_time = now.astimezone(dt.UTC)
        return self._load_targets(layout.FLEET_ROLE, Targets.type)

    def floors(self, catalog: Targets, cache_dir: Path) -> bytes:
        """What the catalog lists as its floors; kept beside it. Raises ``RefusedForSafety`` for none."""
        info = catalog.targets.get(layout.FLOORS_TARGET)
        if info is None or info.length > floor_rules.MAX_BYTES:
            raise RefusedForSafety("catalog: it lists no floors of a sensible size")
        return Path(self.download_target(info, str(cache_dir / "floors.json"))).read_bytes()

    def verified_catalog(self, now: dt.datetime) -> tuple[Targets, DelegatedRole, dict[str, Key]]:
        """The catalog of the snapshot that is current at ``now``; the catalog's own expiry is left to the caller."""
        self._trusted_set.reference_time = now.astimezone(dt.UTC)
        self.refresh()
        delegations = self._trusted_set.targets.delegations
        role = (delegations.roles or {}).get(layout.CATALOG_ROLE) if delegations else None
        if delegations is None or role is None:
            raise RefusedForSafety("targets: it delegates no catalog")
        # The expiry of what vouches for the catalog was judged above. The catalog's own must not stop its renewal.
        self._trusted_set.reference_time = dt.datetime.fromtimestamp(0, dt.UTC)
        catalog = self._load_targets(layout.CATALOG_ROLE, Targets.type)
        return catalog, role, {keyid: delegations.keys[keyid] for keyid in role.keyids}


class _Fetcher(FetcherInterface):
    """Fetches with the fleet's CA and a gap timeout; tuf's base class bounds the length."""

    def __init__(self, ca_file: Path | None) -> None:
        self._pool = open_pool(ca_file)

    def _fetch(self, url: str) -> Iterator[bytes]:
        response = self._pool.request("GET", url, preload_content=False, headers={"Accept-Encoding": "identity"})
        if response.status != 200:
            response.close()
            raise tuf_errors.DownloadHTTPError(f"{url}: HTTP {response.status}", response.status)
        return self._pieces(response)

    def _pieces(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        try:
            yield from response.stream(_CHUNK_BYTES)
        except urllib3.exceptions.HTTPError as error:
            raise tuf_errors.DownloadError(str(error)) from error
        finally:
            response.release_conn()


def _seen_version(cache_dir: Path) -> int:
    try:
        return int(json.loads((cache_dir / "seen.json").read_bytes())["catalog"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def remember_version(cache_dir: Path, version: int) -> None:
    """Keeps which catalog this operator has seen. Raises ``RefusedForSafety`` for an older one than that."""
    seen = _seen_version(cache_dir)
    if version < seen:
        raise RefusedForSafety(
            f"catalog: the repository shows version {version}, this operator has seen {seen}",
            advice="if the server was restored from a backup, give it the newer one: skerry restore",
        )
    scratch = cache_dir / f".seen.{os.getpid()}"
    scratch.write_text(json.dumps({"catalog": version}))
    scratch.replace(cache_dir / "seen.json")
