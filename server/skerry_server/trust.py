"""Whether new offline metadata may take the place of the old: bytes in, values or a refusal out.

Owns the checks on root, targets and catalog before the repository serves them: form, signatures by the chain of trust,
version, expiry, and that the delegations are the ones devices rely on. It opens no file and holds no key. It does not protect a
device, which checks all of it again from its own root; it protects the fleet from metadata that no device could follow.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.signer import Key, SSlibKey
from skerry_contract import canonical, ids, layout
from skerry_contract.errors import ContractError, Malformed
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Metadata, Role, Root, Snapshot, Targets, Timestamp

from skerry_server.errors import Refused

MAX_METADATA_BYTES = 32 << 20
_S = TypeVar("_S", Root, Targets, Snapshot, Timestamp)


class RepositoryRefused(Refused):
    """The repository did not take what it was given; nothing that it serves has changed.

    Codes: ``malformed_metadata``, ``bad_signature``, ``expired``, ``version_conflict``, ``no_trust``, ``bad_delegations``,
    ``online_key_not_trusted``, ``key_id_mismatch``, ``bad_target``, ``manifest_missing``, ``blob_missing``, ``hash_mismatch``,
    ``size_mismatch``, ``too_large``, ``bad_document``, ``offline_role``, ``repository_damaged``.
    """

    status = 422

    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(code, message, **details)
        self.status = {"version_conflict": 409, "no_trust": 409, "too_large": 413, "repository_damaged": 500}.get(
            code, 422
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogEntry:
    """A bundle that the catalog lists; ``custom`` is the signed {submitter, approvers}."""

    model: str
    version: str
    digest: str
    length: int
    custom: dict[str, Any]

    @property
    def target(self) -> str:
        """Its TUF target path."""
        return layout.manifest_target(ids.ModelName(self.model), self.version)


def parse(data: bytes, kind: type[_S], role: str) -> Metadata[_S]:
    """Reads metadata of one role, unverified.

    Raises:
        RepositoryRefused: ``malformed_metadata``.
    """
    if len(data) > MAX_METADATA_BYTES:
        raise RepositoryRefused("malformed_metadata", f"{role}: at most {MAX_METADATA_BYTES} bytes, got {len(data)}")
    try:
        metadata = Metadata[Any].from_bytes(data)
        canonical.refuse_repeated_keys(data, what=role)
    except Malformed as error:
        raise RepositoryRefused("malformed_metadata", str(error)) from None
    except (RepositoryError, RecursionError) as error:
        raise RepositoryRefused("malformed_metadata", f"{role}: wanted TUF metadata: {error}") from None
    if not isinstance(metadata.signed, kind):
        raise RepositoryRefused("malformed_metadata", f"{role}: this is metadata of type {metadata.signed.type}")
    return metadata


def verify(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> None:
    """Checks that enough of the keys that ``delegator`` names for ``role`` signed the metadata.

    Raises:
        RepositoryRefused: ``bad_signature``.
    """
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise RepositoryRefused("bad_signature", f"{role} version {metadata.signed.version}: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Signatures:
    """Whose signatures a role has. ``signed``, ``missing``: key ids; ``threshold``: how many must sign."""

    signed: tuple[str, ...]
    missing: tuple[str, ...]
    threshold: int

    @property
    def complete(self) -> bool:
        """Whether there are enough."""
        return len(self.signed) >= self.threshold


def signatures(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> Signatures:
    """Counts the signatures that hold. Raises ``RepositoryRefused`` (``bad_signature``) when the role is not named."""
    try:
        found = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    except ValueError as error:
        raise RepositoryRefused("bad_signature", f"{role}: {error}") from None
    return Signatures(
        signed=tuple(sorted(found.signed)), missing=tuple(sorted(found.unsigned)), threshold=found.threshold
    )


def require_own_ids(what: str, keys: Mapping[str, Key]) -> None:
    """Checks that each key id follows from its key, so that a fingerprint means one key and a key counts once.

    Raises:
        RepositoryRefused: ``key_id_mismatch``.
    """
    for keyid, key in keys.items():
        body = key.to_dict()
        try:
            public = str(body["keyval"]["public"])
            found = (
                Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
                if body["keytype"] == "ed25519"
                else load_pem_public_key(public.encode())
            )
            # Under its type's own scheme: another one would give the same key a second id, and a second vote.
            own = SSlibKey.from_crypto(found).keyid
        except (ValueError, KeyError, TypeError, UnsupportedAlgorithm) as error:
            raise RepositoryRefused("key_id_mismatch", f"{what}: key {keyid[:16]} is none: {error}") from None
        if own != keyid:
            raise RepositoryRefused(
                "key_id_mismatch", f"{what}: the id of key {keyid[:16]} does not follow from it, wanted {own[:16]}"
            )


def next_root(
    data: bytes, previous: Root | None, online_keyids: Collection[str], now: dt.datetime, *, passed: bool = False
) -> Root:
    """Checks a root: the first is believed as posted, every later one must be signed by the one before and by itself.

    Args:
        passed: a later root comes with it. Devices pass through it, and nothing is signed under it: it may have expired.

    Raises:
        RepositoryRefused: ``malformed_metadata``, ``bad_signature``, ``version_conflict``, ``expired``, ``key_id_mismatch``,
            ``online_key_not_trusted`` when this server's key could not sign snapshot and timestamp under it.
    """
    metadata = parse(data, Root, "root")
    root = metadata.signed
    if previous is not None:
        _require_version("root", root.version, previous.version)
        verify(previous, Root.type, metadata)
    verify(root, Root.type, metadata)
    require_own_ids("root", root.keys)
    if not passed:
        _require_unexpired("root", root, now)
    if not root.consistent_snapshot:
        raise RepositoryRefused("malformed_metadata", "root: wanted consistent_snapshot")
    for role in () if passed else (Snapshot.type, Timestamp.type):
        require_online_key(role, root.roles[role], online_keyids)
    return root


def next_targets(
    data: bytes,
    root: Root,
    previous: Targets | None,
    online_keyids: Collection[str],
    now: dt.datetime,
    *,
    restoring: bool = False,
) -> Targets:
    """Checks the top-level targets role and its two delegations.

    Raises:
        RepositoryRefused: ``malformed_metadata``, ``bad_signature``, ``version_conflict``, ``expired``, ``bad_delegations``,
            ``key_id_mismatch``, ``online_key_not_trusted``.
    """
    metadata = parse(data, Targets, "targets")
    targets = metadata.signed
    verify(root, Targets.type, metadata)
    if previous is not None:
        _require_version("targets", targets.version, previous.version, restoring=restoring)
    require_own_ids("targets", targets.delegations.keys if targets.delegations is not None else {})
    _require_unexpired("targets", targets, now)
    roles: dict[str, DelegatedRole] = (targets.delegations.roles or {}) if targets.delegations is not None else {}
    catalog, fleet = roles.get(layout.CATALOG_ROLE), roles.get(layout.FLEET_ROLE)
    sound = (
        list(roles) == [layout.CATALOG_ROLE, layout.FLEET_ROLE]
        and catalog is not None
        and fleet is not None
        and catalog.terminating
        and catalog.paths == list(layout.CATALOG_PATHS)
        and fleet.paths == list(layout.FLEET_PATHS)
        and not targets.targets
    )
    if not sound or catalog is None or fleet is None:
        raise RepositoryRefused(
            "bad_delegations",
            f"targets: wanted no targets of its own, then {layout.CATALOG_ROLE} (terminating, {layout.CATALOG_PATHS}) and "
            f"{layout.FLEET_ROLE} ({layout.FLEET_PATHS})",
        )
    if set(catalog.keyids) & set(fleet.keyids):
        raise RepositoryRefused("bad_delegations", "targets: a key for fleet may not approve bundles")
    require_online_key(layout.FLEET_ROLE, fleet, online_keyids)
    return targets


def next_catalog(
    data: bytes, targets: Targets, previous: Targets | None, now: dt.datetime, *, restoring: bool = False
) -> Targets:
    """Checks a catalog, and that its paths are ones that devices ask for.

    Raises:
        RepositoryRefused: ``malformed_metadata``, ``bad_signature``, ``version_conflict``, ``expired``, ``bad_target``.
    """
    metadata = parse(data, Targets, "catalog")
    verify(targets, layout.CATALOG_ROLE, metadata)
    return sound_catalog(metadata.signed, previous, now, restoring=restoring)


def sound_catalog(catalog: Targets, previous: Targets | None, now: dt.datetime, *, restoring: bool = False) -> Targets:
    """Checks what ``next_catalog`` does, but the signatures."""
    if previous is not None:
        _require_version("catalog", catalog.version, previous.version, restoring=restoring)
    _require_unexpired("catalog", catalog, now)
    if catalog.delegations is not None:
        raise RepositoryRefused("bad_delegations", "catalog: it may not delegate")
    catalog_entries(catalog)
    if layout.FLOORS_TARGET not in catalog.targets:
        raise RepositoryRefused("bad_target", f"catalog: wanted the target {layout.FLOORS_TARGET}")
    return catalog


def catalog_entries(catalog: Targets) -> tuple[CatalogEntry, ...]:
    """The bundles that a catalog lists, by path.

    Raises:
        RepositoryRefused: ``bad_target`` for a path that is no manifest's, or one without a sha256.
    """
    entries = []
    for path, target in sorted(catalog.targets.items()):
        parts = path.split("/")
        try:
            digest = ids.sha256_hex(target.hashes.get("sha256"))
            if list(target.hashes) != ["sha256"]:
                raise RepositoryRefused("bad_target", f"catalog: {path[:200]!r}: wanted sha256 and no other hash")
            if path == layout.FLOORS_TARGET:
                continue
            if len(parts) != 4 or path != layout.manifest_target(ids.model_name(parts[1]), parts[2]):
                raise RepositoryRefused("bad_target", f"catalog: {path[:200]!r} is no manifest's path")
        except ContractError as error:
            raise RepositoryRefused("bad_target", f"catalog: {path[:200]!r}: {error}") from None
        custom = target.custom if isinstance(target.custom, dict) else {}
        entries.append(
            CatalogEntry(model=parts[1], version=parts[2], digest=digest, length=target.length, custom=custom)
        )
    return tuple(entries)


def require_online_key(name: str, role: Role, online_keyids: Collection[str]) -> None:
    """Checks that this server alone can sign for a role. Raises ``RepositoryRefused`` (``online_key_not_trusted``)."""
    if role.threshold != 1 or not set(online_keyids) & set(role.keyids):
        wanted = " or ".join(sorted(online_keyids))
        raise RepositoryRefused(
            "online_key_not_trusted", f"{name}: wanted threshold 1 and this server's online key {wanted}"
        )


def _require_version(role: str, got: int, last: int, *, restoring: bool = False) -> None:
    if got != last + 1 and not (restoring and got > last):
        raise RepositoryRefused(
            "version_conflict", f"{role}: wanted version {last + 1}, got {got}", wanted=last + 1, got=got
        )


def _require_unexpired(role: str, signed: Root | Targets, now: dt.datetime) -> None:
    if signed.is_expired(now):
        raise RepositoryRefused("expired", f"{role} version {signed.version} expired {signed.expires.isoformat()}")
