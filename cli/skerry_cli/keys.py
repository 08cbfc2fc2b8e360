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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from securesystemslib.signer import CryptoSigner, Key, Signer
from skerry_contract import canonical
from tuf.api.metadata import Metadata, Root, Targets

from skerry_cli import cosigning, key_files, keyring, offline_roles, signers
from skerry_cli import record as records
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_cli.offline_roles import CATALOG_LIFE, EMPTY_FLOORS, ROOT_LIFE, TARGETS_LIFE, Holders, RootWish, TargetsWish

ROOT_FILE = "root.json"
TARGETS_FILE = "targets.json"
CATALOG_FILE = "catalog.json"
FLOORS_FILE = "floors.json"
RECORD_FILE = records.RECORD_FILE

KeyType = Literal["ed25519", "ecdsa"]


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
            if entry["name"] == name and entry.get("file"):
                return self.directory / str(entry["file"])
        known = ", ".join(str(entry["name"]) for entry in self.record["keys"])
        raise Usage(f"{self.directory / RECORD_FILE} names no key {name!r}, only {known}")

    def open_key(self, name: str, *, secret: signers.SecretSource, environment: Mapping[str, str]) -> Signer:
        """Opens a key of this folder, wherever its private part lies: in a file, on a token, in the environment, in a cloud.

        Raises:
            Usage: this machine has no such key. Also as ``signers.open_signer``.
        """
        if name in keyring.read_keyring(self.directory):
            return keyring.open_key(self.directory, name, secret=secret, environment=environment)
        entry = next((e for e in self.record["keys"] if e["name"] == name and e.get("file")), None)
        if entry is None:
            here = [*keyring.read_keyring(self.directory)] or [
                str(e["name"]) for e in self.record["keys"] if "file" in e
            ]
            raise Usage(
                f"{self.directory}: no key {name!r} to sign with, only {', '.join(here) or 'none'}",
                advice="name one that lies elsewhere with 'skerry keys use'",
            )
        path = self.key_path(name)
        password = secret("password", name).encode() if key_files.is_encrypted(path) else None
        return key_files.load_signer(path, password)

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

    made: dict[str, dict[str, CryptoSigner]] = {role: {} for role in holders}
    for role, names in holders.items():
        for name in names:
            signer = key_files.generate(key_type)
            file = f"{name}.pem"
            key_files.write_new(directory / file, key_files.private_pem(signer, password), mode=0o600)
            made[role][name] = signer
            keyring.add_key(directory, keyring.OwnKey(name=name, uri=f"{signers.FILE}:{file}", key=signer.public_key))

    held = {role: {s.public_key.keyid: s.public_key for s in by.values()} for role, by in made.items()}
    root = RootWish(
        root=Holders(keys=held["root"], threshold=root_threshold),
        targets=Holders(keys=held["targets"], threshold=targets_threshold),
        online=online_keys,
    ).build(1, offline_roles.after(now, ROOT_LIFE))
    approving = Holders(keys=held["approver"], threshold=threshold)
    targets = TargetsWish(catalog=approving, online=online_keys).build(1, offline_roles.after(now, TARGETS_LIFE))
    catalog = offline_roles.first_catalog(offline_roles.after(now, CATALOG_LIFE))
    root_bytes = _signed(root, made["root"].values())
    targets_bytes = _signed(targets, made["targets"].values())
    catalog_bytes = _signed(catalog, made["approver"].values())
    documents = {
        ROOT_FILE: root_bytes,
        TARGETS_FILE: targets_bytes,
        CATALOG_FILE: catalog_bytes,
        FLOORS_FILE: EMPTY_FLOORS,
    }
    kept = "an encrypted file" if password is not None else "a file that is not encrypted"
    at = records.instant(now)
    written = records.make(
        documents=documents,
        holders=[
            records.Holder(name=name, role=role, key=by[name].public_key, kept=kept, file=f"{name}.pem")
            for role, by in made.items()
            for name in by
        ],
        thresholds=thresholds,
        online_keys=list(online_keys),
        encrypted=password is not None,
        organiser="",
        steps=[
            records.Step(at=at, who="skerry keys init", what="made every key and signed every document in one place")
        ],
        now=now,
    )
    for name, data in (*documents.items(), (records.TEXT_FILE, records.text(written).encode())):
        key_files.write_new(directory / name, data, mode=0o644)
    # Last: a folder without the record is a ceremony that was cut short, and read_ceremony says so.
    key_files.write_new(directory / RECORD_FILE, records.encode(written), mode=0o644)
    return read_ceremony(directory)


def read_ceremony(directory: Path) -> Ceremony:
    """Reads a ceremony's folder. Needs no password: private keys stay closed.

    Raises:
        Usage: a file is missing or unreadable, or the record names a holder by what is no name.
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
        _ = keyring.checked_names(
            {entry["keyid"]: entry["name"] for entry in record["keys"]}, str(directory / RECORD_FILE)
        )
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
    """The next version of root, with a new expiry, where one place has enough keys: renewal, another online key, other holders.

    What is served must hold under it: to replace the targets key (or the online key), name old and new together, sign
    targets with the new one, then name the new one alone.

    Args:
        previous: the operator's own copy of the last root.
        signers: enough of the old holders and enough of the new ones.
        online_keys, root_keys, root_threshold, targets_keys, targets_threshold: the new ones; None keeps what is.

    Raises:
        RefusedForSafety: the signers do not meet the old or the new threshold, so no client would follow.
    """
    old = offline_roles.parse(previous, Root, "root").signed
    kept = RootWish.read(old)
    wish = RootWish(
        root=Holders(keys=root_keys or kept.root.keys, threshold=root_threshold or kept.root.threshold),
        targets=Holders(keys=targets_keys or kept.targets.keys, threshold=targets_threshold or kept.targets.threshold),
        online=online_keys or kept.online,
    )
    new = wish.build(old.version + 1, offline_roles.after(now, ROOT_LIFE))
    return _signed_enough(new, signers, cosigning.authorities_of_root(old, new))


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
    old = offline_roles.parse(previous, Targets, "targets").signed
    kept = TargetsWish.read(old)
    wish = TargetsWish(
        catalog=Holders(keys=approver_keys or kept.catalog.keys, threshold=threshold or kept.catalog.threshold),
        online=online_keys or kept.online,
    )
    new = wish.build(old.version + 1, offline_roles.after(now, TARGETS_LIFE))
    trusted = offline_roles.parse(root, Root, "root").signed
    return _signed_enough(new, signers, (cosigning.Authority.of(trusted, Targets.type),))


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
        keyring.check_name(name)
    if len(set(names)) != len(names):
        raise Usage(f"ceremony: each holder needs a name of their own, got {names}")
    for role, group in holders.items():
        if not 1 <= thresholds[role] <= len(group):
            raise Usage(f"ceremony: threshold of {role}: wanted 1 to {len(group)}, got {thresholds[role]}")
    if directory.exists() and any(directory.iterdir()):
        raise Usage(f"{directory} is not empty: a ceremony never writes over keys", advice="name a new folder")


def _signed(signed: Root | Targets, signers: Iterable[Signer]) -> bytes:
    metadata: Metadata[Any] = Metadata(signed)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def _signed_enough(
    signed: Root | Targets, signers: Iterable[Signer], authorities: Sequence[cosigning.Authority]
) -> bytes:
    metadata: Metadata[Any] = Metadata(signed)
    for signer in signers:
        metadata = cosigning.add_signature(metadata, signer, authorities)
    found = cosigning.standing(metadata, authorities)
    if not found.complete:
        raise RefusedForSafety(f"{signed.type} does not meet every threshold: {found.text({})}")
    return metadata.to_bytes()
