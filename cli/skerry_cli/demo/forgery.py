"""What the hostile mirror serves: one flipped byte, and metadata as a thief of the server could sign it.

The thief holds the server's online key and so can sign snapshot, timestamp and the fleet's documents; the approvers' keys were
never on the server, so the catalog is signed with a key of the thief's own.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from securesystemslib.signer import CryptoSigner
from skerry_contract import canonical, ids, layout
from skerry_contract import group as g
from skerry_contract import manifest as m
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from skerry_cli.bundle import Bundle
from skerry_cli.errors import Failed


def flip_byte(repository: Path, overlay: Path, file: m.File, *, bases: Iterable[m.File]) -> int:
    """Puts a copy of a blob with one byte changed into the overlay; returns the place of the byte.

    No delta leads around it: in place of each from one of ``bases``, made already or made later, the same wrong bytes are served.
    """
    data = bytearray((repository / layout.blob(file.sha256)).read_bytes())
    place = len(data) // 2
    data[place] ^= 0x01
    for relative in (layout.blob(file.sha256), *(layout.delta(base.sha256, file.sha256) for base in bases)):
        target = overlay / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(bytes(data))
    return place


class Thief:
    """Whoever took the server's online key. Every forgery has higher versions than the one before and than the repository.

    Args:
        repository: the real server's repository folder, as it is at each forgery.
        overlay: where the forged files go.
        online_key: the server's private key file.
    """

    def __init__(self, repository: Path, overlay: Path, online_key: Path) -> None:
        self._repository = repository
        self._overlay = overlay
        self._online = _online_signer(online_key)
        self._forged: dict[str, int] = {}
        self._generation = 0

    def approve_and_pin(self, bundle: Bundle, *, group: str, device: str, now: dt.datetime) -> str:
        """Forges a whole update that nobody approved: the bundle's files, a catalog that lists it signed by an unknown key,
        and a group document that pins the device to it; returns the unknown key's id.
        """
        unknown = CryptoSigner.generate_ed25519()
        catalog = self._targets(layout.CATALOG_ROLE)
        path = layout.manifest_target(ids.model_name(bundle.manifest.model), bundle.manifest.version)
        self._put(layout.target_file(path, bundle.digest), bundle.data)
        for file in bundle.manifest.files():
            self._put(layout.blob(file.sha256), (bundle.folder / file.path).read_bytes())
        custom = {"submitter": "thief", "approvers": ["approver"]}
        catalog.targets[path] = TargetFile(len(bundle.data), {"sha256": str(bundle.digest)}, path, {"custom": custom})
        catalog.version += 1
        self._sign(Metadata(catalog), layout.CATALOG_ROLE, unknown)
        self._publish(bundle, group, device, now, {layout.CATALOG_ROLE: catalog.version})
        return str(unknown.public_key.keyid)

    def pin(self, bundle: Bundle, *, group: str, device: str, now: dt.datetime) -> None:
        """Forges only what the online key may sign: a group document that pins the device to a bundle of the real catalog."""
        self._publish(bundle, group, device, now, {})

    def real_version(self) -> int:
        """The timestamp's version in the real repository now."""
        return self._timestamp().signed.version

    def is_ahead(self) -> bool:
        """Whether the repository's versions still lie below what was forged, so that a device would call them a rollback."""
        timestamp = self._timestamp()
        snapshot = self._snapshot(timestamp)
        real = {
            "timestamp": timestamp.signed.version,
            "snapshot": snapshot.signed.version,
            **{name.removesuffix(".json"): meta.version for name, meta in snapshot.signed.meta.items()},
        }
        # Timestamp and snapshot must be higher: at an equal version a device keeps the one it has. The forged catalog
        # never verified anywhere, but the snapshot that named its version did: the real one must have reached it.
        higher = ("timestamp", "snapshot", layout.FLEET_ROLE)
        return any(real.get(role, 0) < version + (role in higher) for role, version in self._forged.items())

    def _publish(self, bundle: Bundle, group: str, device: str, now: dt.datetime, versions: dict[str, int]) -> None:
        fleet = self._targets(layout.FLEET_ROLE)
        target = layout.group_target(ids.group_name(group))
        old = fleet.targets[target].hashes["sha256"]
        document = (self._repository / layout.target_file(target, old)).read_bytes()
        forged = self._pinned(document, group, device, bundle)
        fleet.targets[target] = TargetFile.from_data(target, forged, ["sha256"])
        self._put(layout.target_file(target, fleet.targets[target].hashes["sha256"]), forged)
        fleet.version = self._next(layout.FLEET_ROLE, fleet.version)
        self._sign(Metadata(fleet), layout.FLEET_ROLE, self._online)

        timestamp = self._timestamp()
        snapshot = self._snapshot(timestamp)
        for role, version in {**versions, layout.FLEET_ROLE: fleet.version}.items():
            snapshot.signed.meta[f"{role}.json"] = MetaFile(version=version)
            self._forged[role] = max(self._forged.get(role, 0), version)
        snapshot.signed.version = self._next("snapshot", snapshot.signed.version)
        self._sign(snapshot, "snapshot", self._online)
        timestamp.signed.snapshot_meta = MetaFile(version=snapshot.signed.version)
        timestamp.signed.version = self._next("timestamp", timestamp.signed.version)
        timestamp.signed.unrecognized_fields[layout.SIGNED_AT_FIELD] = int(now.timestamp())
        self._sign(timestamp, "timestamp", self._online)

    def _pinned(self, data: bytes, group: str, device: str, bundle: Bundle) -> bytes:
        document: dict[str, Any] = json.loads(data)
        self._generation = max(self._generation, int(document["generation"])) + 1
        document["generation"] = self._generation
        key = g.pin_key(ids.group_name(group), ids.device_id(device))
        target = {"digest": str(bundle.digest), "version": bundle.manifest.version}
        document.setdefault("pins", {}).setdefault(key, {})[bundle.manifest.model] = target
        document["requires"] = sorted({*document.get("requires", ()), "pins"})
        forged = canonical.encode(document)
        g.parse(forged)
        return forged

    def _next(self, role: str, real: int) -> int:
        self._forged[role] = max(real, self._forged.get(role, 0)) + 1
        return self._forged[role]

    def _targets(self, role: str) -> Targets:
        version = self._snapshot(self._timestamp()).signed.meta[f"{role}.json"].version
        found: Metadata[Targets] = _read(_metadata(self._repository, role, version), Targets)
        return found.signed

    def _timestamp(self) -> Metadata[Timestamp]:
        return _read(self._repository / layout.METADATA_DIR / "timestamp.json", Timestamp)

    def _snapshot(self, timestamp: Metadata[Timestamp]) -> Metadata[Snapshot]:
        return _read(_metadata(self._repository, "snapshot", timestamp.signed.snapshot_meta.version), Snapshot)

    def _sign(self, metadata: Metadata[Any], role: str, signer: CryptoSigner) -> None:
        metadata.sign(signer)
        name = "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
        self._put(f"{layout.METADATA_DIR}/{name}", metadata.to_bytes())

    def _put(self, relative: str, data: bytes) -> None:
        target = self._overlay / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def _metadata(repository: Path, role: str, version: int) -> Path:
    return repository / layout.METADATA_DIR / f"{version}.{role}.json"


def _read(path: Path, kind: type[Any]) -> Metadata[Any]:
    try:
        metadata: Metadata[Any] = Metadata.from_file(str(path))
    except Exception as error:  # tuf wraps missing files and bad content in errors of several families
        raise Failed(f"{path}: cannot be read: {error}") from None
    if not isinstance(metadata.signed, kind):
        raise Failed(f"{path}: wanted {kind.__name__}, got {metadata.signed.type}")
    return metadata


def _online_signer(path: Path) -> CryptoSigner:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise Failed(f"{path}: the server's online key cannot be read: {error}") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise Failed(f"{path}: wanted an Ed25519 or EC key")
    return CryptoSigner(key)
