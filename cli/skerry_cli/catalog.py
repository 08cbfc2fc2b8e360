"""Approval: the next version of the catalog, made from the last one that the operator's own root vouches for.

Owns reading the last catalog, applying a named change to it, checking every added bundle byte for byte, showing the
difference, and signing. Rules:

- Nothing that the server made is ever signed. ``read_catalog`` verifies the last catalog from the operator's root;
  ``propose`` builds a new document from it and the named change; ``cosign`` rebuilds a colleague's proposal from the
  difference and signs its own copy, only when the two are the same document.
- A bundle enters the catalog only after its manifest and all its files were fetched and matched their digests.
- A catalog older than one this operator has seen is refused, whoever signed it.

Left to others: sending the bytes (the command posts them) and who may (the server asks for the role of an approver; devices
ask for the keys).
"""

from __future__ import annotations

import copy
import datetime as dt
import hashlib
import json
import os
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import urllib3
from securesystemslib.signer import Key, Signer
from skerry_contract import canonical, ids, layout
from skerry_contract import floors as floor_rules
from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import DelegatedRole, Metadata, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from skerry_cli.errors import Failed, RefusedForSafety, Usage
from skerry_cli.keys import CATALOG_LIFE

_CHUNK_BYTES = 1 << 18
_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Addition:
    """A bundle to approve. ``submitter``: who pushed it, as the server's register says; it is signed with the entry."""

    model: str
    version: str
    digest: str
    submitter: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What an approval changes; an empty one renews the catalog's expiry.

    Attributes:
        add: bundles that come in.
        remove: (model, version) pairs that go out.
        floors: model -> lowest version that may be activated; None takes the floor away.
        lower_floors: must be True for a floor to go down or away.
    """

    add: tuple[Addition, ...] = ()
    remove: tuple[tuple[str, str], ...] = ()
    floors: Mapping[str, str | None] = field(default_factory=dict)
    lower_floors: bool = False


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
        floors: model -> version.
        keys, threshold: whose signatures the next catalog needs, and how many.
    """

    catalog: Targets
    expired: bool
    floors: dict[str, str]
    keys: dict[str, Key]
    role: DelegatedRole

    @property
    def threshold(self) -> int:
        """How many approvers must sign."""
        return self.role.threshold


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What a proposal changes, for a person (``text``) and for programs (``to_json``)."""

    from_version: int
    to_version: int
    was_expired: bool
    expires_before: str
    expires_after: str
    added: tuple[Entry, ...]
    removed: tuple[Entry, ...]
    floors: tuple[tuple[str, str | None, str | None], ...]

    def text(self) -> str:
        """Lines for a terminal; ``+`` in, ``-`` out, ``!`` a floor that goes down or away."""
        late = " (it had expired)" if self.was_expired else ""
        lines = [
            f"catalog version {self.from_version} -> {self.to_version}",
            f"  expires {self.expires_before}{late} -> {self.expires_after}",
        ]
        for entry in self.added:
            lines.append(f"+ {entry.model}@{entry.version}  {entry.digest}")
            lines.append(f"    submitted by {entry.submitter}, approved by {', '.join(entry.approvers)}")
        lines += [f"- {entry.model}@{entry.version}  {entry.digest}" for entry in self.removed]
        for model, before, after in self.floors:
            mark = "!" if _goes_down(before, after) else "~"
            lines.append(f"{mark} floor of {model}: {before or 'none'} -> {after or 'none'}")
        if not (self.added or self.removed or self.floors):
            lines.append("  no bundle and no floor changes: this renews the expiry")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Builtins, for ``--json``."""

        def entry(e: Entry) -> dict[str, Any]:
            return {
                "model": e.model,
                "version": e.version,
                "digest": e.digest,
                "submitter": e.submitter,
                "approvers": list(e.approvers),
            }

        return {
            "from_version": self.from_version,
            "to_version": self.to_version,
            "was_expired": self.was_expired,
            "expires_before": self.expires_before,
            "expires_after": self.expires_after,
            "added": [entry(e) for e in self.added],
            "removed": [entry(e) for e in self.removed],
            "floors": [{"model": model, "before": before, "after": after} for model, before, after in self.floors],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A signed next catalog.

    Attributes:
        metadata: to post as ``metadata`` with the role ``catalog``; a colleague co-signs the same bytes first while
            ``complete`` is False.
        floors: the text of ``floors.json`` that belongs to it, to post beside.
        signed: key ids whose signatures hold; threshold: how many are needed.
    """

    metadata: bytes
    floors: bytes
    difference: Difference
    signed: tuple[str, ...]
    threshold: int

    @property
    def complete(self) -> bool:
        """Whether devices will accept it."""
        return len(self.signed) >= self.threshold


class BundleSource(Protocol):
    """Where an approver gets a bundle from, to check it. Nothing it returns is believed."""

    def manifest(self, digest: str) -> bytes:
        """The bytes of the manifest with that digest."""

    def blob(self, file: manifests.File) -> Iterator[bytes]:
        """The bytes of a file, in pieces."""


class RepositorySource:
    """Bundles as devices will get them: files from the update repository, manifests from the server's register.

    Args:
        repository_url: the repository's root.
        fetch_manifest: digest -> bytes, e.g. ``GET /api/v1/bundles/{digest}/manifest`` (before approval the repository
            does not serve it).
        ca_file: PEM of the fleet's CA; None for the system's.
    """

    def __init__(self, repository_url: str, fetch_manifest: Callable[[str], bytes], ca_file: Path | None) -> None:
        self._url = repository_url.rstrip("/")
        self._fetch_manifest = fetch_manifest
        self._pool = _pool(ca_file)

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


class FolderSource:
    """A bundle in a local folder, e.g. the approver's own build: stronger evidence than what the server shows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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
                while piece := stream.read(_CHUNK_BYTES):
                    yield piece
        except OSError as error:
            raise Usage(f"{self._folder}: {error}") from None


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
    seen = _seen_version(cache_dir)
    base = repository_url.rstrip("/")
    try:
        updater = _Updater(
            str(cache_dir),
            f"{base}/{layout.METADATA_DIR}/",
            target_base_url=f"{base}/{layout.TARGETS_DIR}/",
            fetcher=_Fetcher(ca_file),
            config=UpdaterConfig(targets_max_length=32 << 20, app_user_agent="skerry"),
            bootstrap=root,
        )
        catalog, role, keys = updater.verified_catalog(now)
        info = catalog.targets.get(layout.FLOORS_TARGET)
        if info is None or info.length > floor_rules.MAX_BYTES:
            raise RefusedForSafety("catalog: it lists no floors of a sensible size")
        floors_path = updater.download_target(info, str(cache_dir / "floors.json"))
        floors = floor_rules.parse(Path(floors_path).read_bytes())
    except tuf_errors.DownloadHTTPError as error:
        raise Failed(f"repository: {error}", advice="did the server take root, targets and a first catalog?") from None
    except tuf_errors.DownloadError as error:
        raise Failed(f"repository: {error}: {error.__cause__ or ''}".rstrip(": ")) from None
    except tuf_errors.RepositoryError as error:
        raise RefusedForSafety(f"repository: {type(error).__name__}: {error}") from None
    except ContractError as error:
        raise RefusedForSafety(str(error)) from None
    if catalog.version < seen:
        raise RefusedForSafety(
            f"catalog: the repository shows version {catalog.version}, this operator has seen {seen}"
        )
    _remember_version(cache_dir, catalog.version)
    return VerifiedCatalog(catalog=catalog, expired=catalog.is_expired(now), floors=floors, keys=keys, role=role)


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


def propose(
    verified: VerifiedCatalog,
    change: Change,
    *,
    source: BundleSource,
    signer: Signer,
    approvers: Sequence[str],
    now: dt.datetime,
    confirm: Callable[[Difference], bool] = lambda _: True,
) -> Proposal:
    """Makes and signs the next version of the catalog.

    Args:
        verified: from ``read_catalog``.
        change: what to change.
        source: where the added bundles are fetched from, to be checked.
        signer: the approver's key.
        approvers: names of all who will sign this version; they stand in each added entry.
        now: aware, UTC; the new catalog expires 180 days later.
        confirm: shown the difference after every check and before the signature; False ends with ``RefusedForSafety``.

    Raises:
        RefusedForSafety: a bundle that is not what its digest says, a second digest for a version, a bundle below its
            floor, a floor that goes down without ``lower_floors``, a key that is no approver's, or no confirmation.
        Usage: the change names what is not there or is there already.
        Failed: a bundle cannot be fetched.
    """
    if len(approvers) < verified.threshold or len(set(approvers)) != len(approvers):
        raise Usage(f"approvers: wanted {verified.threshold} different names at least, got {list(approvers)}")
    expires = (now.astimezone(dt.UTC) + CATALOG_LIFE).replace(microsecond=0)
    new, floors = _apply(verified, change, tuple(approvers), expires, source)
    difference = _difference(verified, new, floors)
    return _sign(verified, new, floors, difference, signer, {}, confirm)


def cosign(
    verified: VerifiedCatalog,
    metadata: bytes,
    floors: bytes,
    *,
    source: BundleSource,
    signer: Signer,
    approver: str,
    now: dt.datetime,
    lower_floors: bool = False,
    confirm: Callable[[Difference], bool] = lambda _: True,
) -> Proposal:
    """Adds a further approver's signature to a colleague's proposal, after the same checks.

    Args:
        metadata, floors: the colleague's ``Proposal``.
        approver: the name under which this approver stands in the added entries.

    Raises:
        RefusedForSafety: the proposal is not the next version of the verified catalog with nothing but a change in it, or
            any reason of ``propose``.
        Usage, Failed: as ``propose``.
    """
    try:
        theirs = Metadata[Targets].from_bytes(metadata)
        new_floors = floor_rules.parse(floors)
    except (tuf_errors.RepositoryError, ContractError) as error:
        raise Usage(f"proposal: {error}") from None
    if not isinstance(theirs.signed, Targets) or theirs.signed.version != verified.catalog.version + 1:
        raise RefusedForSafety(f"proposal: wanted version {verified.catalog.version + 1} of the catalog")
    if not now < theirs.signed.expires <= now + CATALOG_LIFE:
        raise RefusedForSafety(f"proposal: it expires {theirs.signed.expires}, wanted within {CATALOG_LIFE.days} days")
    before, after = entries(verified.catalog), entries(theirs.signed)
    added = {key: entry for key, entry in after.items() if before.get(key) != entry}
    names = {entry.approvers for entry in added.values()}
    if len(names) > 1 or any(approver not in group for group in names):
        raise RefusedForSafety(f"proposal: its new entries do not all name {approver!r} among their approvers")
    change = Change(
        add=tuple(
            Addition(model=e.model, version=e.version, digest=e.digest, submitter=e.submitter) for e in added.values()
        ),
        remove=tuple(key for key in before if key not in after),
        floors={
            model: new_floors.get(model)
            for model in verified.floors.keys() | new_floors.keys()
            if verified.floors.get(model) != new_floors.get(model)
        },
        lower_floors=lower_floors,
    )
    new, own_floors = _apply(verified, change, next(iter(names), ()), theirs.signed.expires, source)
    if own_floors != floors or new.to_dict() != theirs.signed.to_dict():
        raise RefusedForSafety("proposal: it holds more than a change of bundles and floors")
    return _sign(verified, new, own_floors, _difference(verified, new, own_floors), signer, theirs.signatures, confirm)


class _Updater(Updater):
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
        self._pool = _pool(ca_file)

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


def _pool(ca_file: Path | None) -> urllib3.PoolManager:
    retries = urllib3.Retry(2, backoff_factor=0.2, raise_on_status=False)
    context = ssl.create_default_context(cafile=str(ca_file) if ca_file is not None else None)
    return urllib3.PoolManager(timeout=urllib3.Timeout(_TIMEOUT_S), retries=retries, ssl_context=context)


def _apply(
    verified: VerifiedCatalog, change: Change, approvers: tuple[str, ...], expires: dt.datetime, source: BundleSource
) -> tuple[Targets, bytes]:
    targets = copy.deepcopy(verified.catalog.targets)
    listed = entries(verified.catalog)
    floors = _new_floors(verified.floors, change)
    for model, version in change.remove:
        if (model, version) not in listed:
            raise Usage(f"remove {model}@{version}: the catalog does not list it")
        del targets[layout.manifest_target(ids.ModelName(model), version)]
    for addition in change.add:
        name = f"{addition.model}@{addition.version}"
        there = listed.get((addition.model, addition.version))
        if there is not None and there.digest != addition.digest:
            raise RefusedForSafety(f"add {name}: the catalog lists it as {there.digest}; a version never changes")
        if there is not None:
            raise Usage(f"add {name}: the catalog lists it already")
        data = _checked_bundle(addition, source)
        if not floor_rules.allows(floors, addition.model, addition.version):
            floor = floors[addition.model]
            raise RefusedForSafety(f"add {name}: it is below the floor {floor}, so no device could activate it")
        path = layout.manifest_target(ids.ModelName(addition.model), addition.version)
        custom = {"submitter": addition.submitter, "approvers": list(approvers)}
        targets[path] = TargetFile(len(data), {"sha256": addition.digest}, path, {"custom": custom})
    floors_data = floor_rules.encode(floors)
    targets[layout.FLOORS_TARGET] = TargetFile.from_data(layout.FLOORS_TARGET, floors_data, ["sha256"])
    return Targets(version=verified.catalog.version + 1, expires=expires, targets=targets), floors_data


def _new_floors(old: Mapping[str, str], change: Change) -> dict[str, str]:
    floors = dict(old)
    for model, version in change.floors.items():
        try:
            ids.model_name(model)
            if version is not None:
                ids.version_key(version)
        except ContractError as error:
            raise Usage(f"floor of {model!r}: {error}") from None
        if _goes_down(old.get(model), version) and not change.lower_floors:
            raise RefusedForSafety(
                f"floor of {model}: {old.get(model)} -> {version or 'none'} lowers it; say so to allow it"
            )
        if version is None:
            floors.pop(model, None)
        else:
            floors[model] = version
    return floors


def _goes_down(before: str | None, after: str | None) -> bool:
    if before is None:
        return False
    return after is None or ids.version_key(after) < ids.version_key(before)


def _checked_bundle(addition: Addition, source: BundleSource) -> bytes:
    """Fetches the whole bundle; returns the manifest's bytes when everything is what the digest says."""
    name = f"{addition.model}@{addition.version}"
    try:
        ids.bundle_digest(addition.digest)
    except ContractError as error:
        raise Usage(f"add {name}: {error}") from None
    data = source.manifest(addition.digest)
    got = canonical.sha256(data)
    if got != addition.digest:
        raise RefusedForSafety(f"add {name}: the manifest has sha256 {got}, wanted {addition.digest}")
    try:
        manifest = manifests.parse(data)
    except ContractError as error:
        raise RefusedForSafety(f"add {name}: {error}") from None
    if (manifest.model, manifest.version) != (addition.model, addition.version):
        raise RefusedForSafety(f"add {name}: the manifest is of {manifest.model}@{manifest.version}")
    for file in manifest.files():
        digest, size = hashlib.sha256(), 0
        for piece in source.blob(file):
            digest.update(piece)
            size += len(piece)
            if size > file.size:
                break
        if size != file.size or digest.hexdigest() != file.sha256:
            raise RefusedForSafety(
                f"add {name}: {file.path} has {size} bytes, sha256 {digest.hexdigest()}, wanted {file.size}, {file.sha256}"
            )
    return data


def _difference(verified: VerifiedCatalog, new: Targets, floors: bytes) -> Difference:
    before, after = entries(verified.catalog), entries(new)
    new_floors = floor_rules.parse(floors)
    models = sorted(verified.floors.keys() | new_floors.keys())
    return Difference(
        from_version=verified.catalog.version,
        to_version=new.version,
        was_expired=verified.expired,
        expires_before=verified.catalog.expires.isoformat(),
        expires_after=new.expires.isoformat(),
        added=tuple(after[key] for key in sorted(after) if key not in before),
        removed=tuple(before[key] for key in sorted(before) if key not in after),
        floors=tuple(
            (model, verified.floors.get(model), new_floors.get(model))
            for model in models
            if verified.floors.get(model) != new_floors.get(model)
        ),
    )


def _sign(
    verified: VerifiedCatalog,
    new: Targets,
    floors: bytes,
    difference: Difference,
    signer: Signer,
    signatures: Mapping[str, Any],
    confirm: Callable[[Difference], bool],
) -> Proposal:
    if signer.public_key.keyid not in verified.role.keyids:
        raise RefusedForSafety(f"key {signer.public_key.keyid[:16]} is not one of the approvers that targets names")
    if not confirm(difference):
        raise RefusedForSafety("approval: not confirmed, nothing was signed")
    signed = Metadata(new, dict(signatures))
    signed.sign(signer, append=True)
    holding = []
    for keyid in list(signed.signatures):
        try:
            verified.keys[keyid].verify_signature(signed.signatures[keyid], signed.signed_bytes)
            holding.append(keyid)
        except Exception:  # an unknown key or a signature over something else counts for nothing and is not passed on
            del signed.signatures[keyid]
    return Proposal(
        metadata=signed.to_bytes(),
        floors=floors,
        difference=difference,
        signed=tuple(holding),
        threshold=verified.threshold,
    )


def _seen_version(cache_dir: Path) -> int:
    try:
        return int(json.loads((cache_dir / "seen.json").read_bytes())["catalog"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _remember_version(cache_dir: Path, version: int) -> None:
    scratch = cache_dir / f".seen.{os.getpid()}"
    scratch.write_text(json.dumps({"catalog": version}))
    scratch.replace(cache_dir / "seen.json")
