"""The operator's keys: the ceremony that makes them, and the two roles that name all others.

Owns a ceremony's folder: encrypted private keys (0600), ``root.json``, ``targets.json``, ``catalog.json`` and ``floors.json``
of version 1, and ``ceremony.json``, the written record. ``next_root`` and ``next_targets`` renew the two roles before they
expire and change who may sign. How one key stands in a file is in ``key_files``, what the catalog lists in ``catalog``.

The folder belongs offline. Of it the server gets the four signed documents; the private keys never leave it. The server's
own *online* key comes in as a public key, is named for snapshot, timestamp and ``fleet``, and may sign nothing else.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from securesystemslib.signer import CryptoSigner, Key, Signer
from skerry_contract import canonical, floors, layout
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Role, Root, Snapshot, TargetFile, Targets, Timestamp

from skerry_cli import key_files
from skerry_cli.errors import RefusedForSafety, Usage

ROOT_LIFE = dt.timedelta(days=365)
TARGETS_LIFE = dt.timedelta(days=365)
CATALOG_LIFE = dt.timedelta(days=180)
EMPTY_FLOORS = floors.encode({})

ROOT_FILE = "root.json"
TARGETS_FILE = "targets.json"
CATALOG_FILE = "catalog.json"
FLOORS_FILE = "floors.json"
RECORD_FILE = "ceremony.json"

KeyType = Literal["ed25519", "ecdsa"]
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceremony:
    """What a ceremony made, as bytes to post, in this order: root, targets, catalog with floors.

    Attributes:
        directory: where the files are.
        root_sha256: hex; completes enrolment tokens.
        record: the written record: who holds which key for what, thresholds, expiries.
    """

    directory: Path
    root: bytes
    targets: bytes
    catalog: bytes
    floors: bytes
    root_sha256: str
    record: dict[str, Any]

    def key_path(self, name: str) -> Path:
        """The private key file of a holder, e.g. ``root`` or the approver ``ada``. Raises ``Usage`` when there is none."""
        for entry in self.record["keys"]:
            if entry["name"] == name:
                return self.directory / str(entry["file"])
        known = ", ".join(str(entry["name"]) for entry in self.record["keys"])
        raise Usage(f"{self.directory / RECORD_FILE} names no key {name!r}, only {known}")

    def holder(self, keyid: str) -> str | None:
        """The name under which the record holds a key id, or None."""
        return next((str(entry["name"]) for entry in self.record["keys"] if entry["keyid"] == keyid), None)


def hold_ceremony(
    directory: Path,
    *,
    online_keys: Mapping[str, Key],
    password: bytes | None,
    now: dt.datetime,
    approvers: Sequence[str] = ("approver",),
    threshold: int = 1,
    root_holders: Sequence[str] = ("root",),
    root_threshold: int = 1,
    targets_holders: Sequence[str] = ("targets",),
    targets_threshold: int = 1,
    key_type: KeyType = "ed25519",
) -> Ceremony:
    """Makes the operator's keys and the first version of every offline role, and writes them to a new folder.

    Args:
        directory: made when missing; refused when it holds anything.
        online_keys: the server's public keys by key id, from ``read_online_keys``.
        password: encrypts every private key; None writes them unencrypted, for automation that guards them otherwise.
        now: aware, UTC.
        approvers: names of those who approve bundles, one key each; ``threshold`` of them must sign a catalog.
        root_holders: names of those who hold a root key; ``root_threshold`` of them must sign. ``targets_*`` likewise.
        key_type: ``ed25519``, or ``ecdsa`` for P-256.

    Raises:
        Usage: a name, threshold or password that cannot be, no online key, or a folder that is in use.
    """
    holders = {"root": root_holders, "targets": targets_holders, "approver": approvers}
    thresholds = {"root": root_threshold, "targets": targets_threshold, "approver": threshold}
    _check_wishes(directory, online_keys, password, holders, thresholds)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    signers: dict[str, dict[str, CryptoSigner]] = {role: {} for role in holders}
    entries: list[dict[str, str]] = []
    for role, names in holders.items():
        for name in names:
            signer = CryptoSigner.generate_ed25519() if key_type == "ed25519" else CryptoSigner.generate_ecdsa()
            file = f"{name}.pem"
            key_files.write_new(directory / file, key_files.private_pem(signer, password), mode=0o600)
            signers[role][name] = signer
            entries.append({"name": name, "role": role, "keyid": signer.public_key.keyid, "file": file})

    roots = {s.public_key.keyid: s.public_key for s in signers["root"].values()}
    targets_keys = {s.public_key.keyid: s.public_key for s in signers["targets"].values()}
    approver_keys = {s.public_key.keyid: s.public_key for s in signers["approver"].values()}
    root = _root(1, now, roots, root_threshold, targets_keys, targets_threshold, online_keys)
    targets = Targets(
        version=1, expires=_after(now, TARGETS_LIFE), delegations=_delegations(approver_keys, threshold, online_keys)
    )
    catalog = Targets(
        version=1,
        expires=_after(now, CATALOG_LIFE),
        targets={layout.FLOORS_TARGET: TargetFile.from_data(layout.FLOORS_TARGET, EMPTY_FLOORS, ["sha256"])},
    )
    root_bytes = _signed(Metadata(root), signers["root"].values())
    targets_bytes = _signed(Metadata(targets), signers["targets"].values())
    catalog_bytes = _signed(Metadata(catalog), signers["approver"].values())
    record: dict[str, Any] = {
        "schema": 1,
        "made": now.astimezone(dt.UTC).replace(microsecond=0).isoformat(),
        "root_sha256": canonical.sha256(root_bytes),
        "encrypted": password is not None,
        "keys": entries,
        "thresholds": thresholds,
        "online_keys": sorted(online_keys),
        "expires": {
            "root": root.expires.isoformat(),
            "targets": targets.expires.isoformat(),
            "catalog": catalog.expires.isoformat(),
        },
    }
    for file, data in (
        (ROOT_FILE, root_bytes),
        (TARGETS_FILE, targets_bytes),
        (CATALOG_FILE, catalog_bytes),
        (FLOORS_FILE, EMPTY_FLOORS),
        # Last: a folder without the record is a ceremony that was cut short, and read_ceremony says so.
        (RECORD_FILE, json.dumps(record, indent=2).encode() + b"\n"),
    ):
        key_files.write_new(directory / file, data, mode=0o644)
    return read_ceremony(directory)


def read_ceremony(directory: Path) -> Ceremony:
    """Reads a ceremony's folder. Needs no password: private keys stay closed.

    Raises:
        Usage: a file is missing or unreadable.
        RefusedForSafety: ``root.json`` is not the one that the record names.
    """
    try:
        root, targets, catalog, floors_text, record_text = (
            (directory / name).read_bytes()
            for name in (ROOT_FILE, TARGETS_FILE, CATALOG_FILE, FLOORS_FILE, RECORD_FILE)
        )
    except OSError as error:
        raise Usage(f"{directory} does not hold a finished ceremony: {error}") from None
    try:
        record = json.loads(record_text)
        recorded = record["root_sha256"]
        _ = [(entry["name"], entry["file"], entry["keyid"]) for entry in record["keys"]]
    except (ValueError, KeyError, TypeError) as error:
        raise Usage(f"{directory / RECORD_FILE} is not a ceremony's record: {error!r}") from None
    root_sha256 = canonical.sha256(root)
    if recorded != root_sha256:
        raise RefusedForSafety(
            f"{directory / ROOT_FILE} has sha256 {root_sha256}, the record says {recorded}",
            advice="someone changed one of the two: compare with another copy of the ceremony",
        )
    return Ceremony(
        directory=directory,
        root=root,
        targets=targets,
        catalog=catalog,
        floors=floors_text,
        root_sha256=root_sha256,
        record=record,
    )


def next_root(
    previous: bytes,
    *,
    signers: Sequence[Signer],
    now: dt.datetime,
    online_keys: Mapping[str, Key] | None = None,
    root_keys: Mapping[str, Key] | None = None,
    root_threshold: int | None = None,
    targets_keys: Mapping[str, Key] | None = None,
    targets_threshold: int | None = None,
) -> bytes:
    """The next version of root, with a new expiry: renewal, another online key, other holders.

    What is served must hold under it: to replace the targets key (or the online key), name old and new together, sign
    targets with the new one, then name the new one alone.

    Args:
        previous: the operator's own copy of the last root.
        signers: enough of the old holders and enough of the new ones.
        online_keys, root_keys, root_threshold, targets_keys, targets_threshold: the new ones; None keeps what is.

    Raises:
        RefusedForSafety: the signers do not meet the old or the new threshold, so no client would follow.
    """
    old = _parsed(previous, Root, "root")
    keep_root = {keyid: old.keys[keyid] for keyid in old.roles[Root.type].keyids}
    keep_online = {keyid: old.keys[keyid] for keyid in old.roles[Timestamp.type].keyids}
    keep_targets = {keyid: old.keys[keyid] for keyid in old.roles[Targets.type].keyids}
    new = _root(
        old.version + 1,
        now,
        root_keys or keep_root,
        root_threshold or old.roles[Root.type].threshold,
        targets_keys or keep_targets,
        targets_threshold or old.roles[Targets.type].threshold,
        online_keys or keep_online,
    )
    metadata = Metadata(new)
    data = _signed(metadata, signers)
    for delegator, whose in ((old, f"version {old.version}"), (new, f"version {new.version}")):
        _require_delegate(delegator, Root.type, metadata, whose)
    return data


def next_targets(
    previous: bytes,
    *,
    root: bytes,
    signers: Sequence[Signer],
    now: dt.datetime,
    approver_keys: Mapping[str, Key] | None = None,
    threshold: int | None = None,
    online_keys: Mapping[str, Key] | None = None,
) -> bytes:
    """The next version of targets, with a new expiry: renewal, other approvers, another online key for ``fleet``.

    The catalog must stay valid under it: to replace approvers, name old and new ones together, have the new ones sign a
    catalog, then name the new ones alone.

    Raises:
        RefusedForSafety: the signers are not those that ``root`` names for targets.
    """
    old = _parsed(previous, Targets, "targets")
    if old.delegations is None or old.delegations.roles is None:
        raise RefusedForSafety("targets: it delegates nothing, so it is not from a ceremony of this tool")
    roles, keys = old.delegations.roles, old.delegations.keys
    new = Targets(
        version=old.version + 1,
        expires=_after(now, TARGETS_LIFE),
        delegations=_delegations(
            approver_keys or {keyid: keys[keyid] for keyid in roles[layout.CATALOG_ROLE].keyids},
            threshold or roles[layout.CATALOG_ROLE].threshold,
            online_keys or {keyid: keys[keyid] for keyid in roles[layout.FLEET_ROLE].keyids},
        ),
    )
    metadata = Metadata(new)
    data = _signed(metadata, signers)
    trusted = _parsed(root, Root, "root")
    _require_delegate(trusted, Targets.type, metadata, f"root version {trusted.version}")
    return data


def _check_wishes(
    directory: Path,
    online_keys: Mapping[str, Key],
    password: bytes | None,
    holders: Mapping[str, Sequence[str]],
    thresholds: Mapping[str, int],
) -> None:
    if not online_keys:
        raise Usage("ceremony: wanted at least one online key of the server")
    if password == b"":
        raise Usage("ceremony: the password is empty; say that there is none instead")
    names = [name for group in holders.values() for name in group]
    for name in names:
        if _NAME.fullmatch(name) is None:
            raise Usage(f"ceremony: a holder's name must match {_NAME.pattern}, got {name!r}")
    if len(set(names)) != len(names):
        raise Usage(f"ceremony: each holder needs a name of their own, got {names}")
    for role, group in holders.items():
        if not 1 <= thresholds[role] <= len(group):
            raise Usage(f"ceremony: threshold of {role}: wanted 1 to {len(group)}, got {thresholds[role]}")
    if directory.exists() and any(directory.iterdir()):
        raise Usage(f"{directory} is not empty: a ceremony never writes over keys", advice="name a new folder")


def _root(
    version: int,
    now: dt.datetime,
    root_keys: Mapping[str, Key],
    root_threshold: int,
    targets_keys: Mapping[str, Key],
    targets_threshold: int,
    online_keys: Mapping[str, Key],
) -> Root:
    online = list(online_keys)
    return Root(
        version=version,
        expires=_after(now, ROOT_LIFE),
        keys={**root_keys, **targets_keys, **online_keys},
        roles={
            Root.type: Role(list(root_keys), root_threshold),
            Targets.type: Role(list(targets_keys), targets_threshold),
            Snapshot.type: Role(online, 1),
            Timestamp.type: Role(online, 1),
        },
        consistent_snapshot=True,
    )


def _delegations(approvers: Mapping[str, Key], threshold: int, online_keys: Mapping[str, Key]) -> Delegations:
    return Delegations(
        keys={**approvers, **online_keys},
        roles={
            # First and terminating: nothing later may ever answer for a path of the catalog.
            layout.CATALOG_ROLE: DelegatedRole(
                layout.CATALOG_ROLE, list(approvers), threshold, True, list(layout.CATALOG_PATHS)
            ),
            layout.FLEET_ROLE: DelegatedRole(layout.FLEET_ROLE, list(online_keys), 1, False, list(layout.FLEET_PATHS)),
        },
    )


def _after(now: dt.datetime, life: dt.timedelta) -> dt.datetime:
    return now.astimezone(dt.UTC) + life


def _signed(metadata: Metadata[Any], signers: Iterable[Signer]) -> bytes:
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def _parsed(data: bytes, kind: type[Any], what: str) -> Any:
    try:
        signed = Metadata.from_bytes(data).signed
    except RepositoryError as error:
        raise Usage(f"{what}: wanted TUF metadata: {error}") from None
    if not isinstance(signed, kind):
        raise Usage(f"{what}: wanted TUF metadata of that role, got {signed.type}")
    return signed


def _require_delegate(delegator: Root, role: str, metadata: Metadata[Any], whose: str) -> None:
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except RepositoryError as error:
        raise RefusedForSafety(f"{role} does not meet the threshold of {whose}: {error}") from None
