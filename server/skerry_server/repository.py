"""The update repository on disk: static files that any HTTP server, bucket or CDN can serve.

Owns everything under one folder (``metadata/ targets/ blobs/``): it takes the offline roles after ``trust`` checked them, and
signs fleet, snapshot and timestamp with the online key. The folder is its only state. Rules:

- ``timestamp.json`` decides what is current. New versioned files come first, each synced with its folder; the timestamp comes
  last. A crash before it leaves the old state complete; what the crash left behind is overwritten later.
- One writer at a time, in this process and between processes (lock file).
- The online key can list group documents and nothing else; what a device may run is in the offline-signed catalog.
- A catalog that names a manifest or a file that is not here is refused: devices would fail on it.

Left to others: who may call (the API), what a group document says (the orchestrator), and serving the files.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives import serialization
from securesystemslib.signer import CryptoSigner, Signer
from skerry_contract import canonical, floors, group, ids, layout, manifest
from skerry_contract.errors import ContractError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from skerry_server import durable, trust
from skerry_server.trust import CatalogEntry, RepositoryRefused

__all__ = ["CatalogEntry", "Repository", "RepositoryRefused", "load_online_signer", "make_online_key"]

ONLINE_LIFE = dt.timedelta(days=7)
TIMESTAMP_LIFE = dt.timedelta(days=1)
KEPT_VERSIONS = 32
"""Superseded versions of snapshot and fleet that stay, for devices in the middle of reading them."""
MAX_BLOB_BYTES = 1 << 40
ONLINE_ROLES = (Timestamp.type, Snapshot.type, layout.FLEET_ROLE)

_S = TypeVar("_S", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """A role as it lies on disk."""

    signed: Any
    data: bytes

    @property
    def version(self) -> int:
        return int(self.signed.version)


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    root: _Held | None = None
    targets: _Held | None = None
    catalog: _Held | None = None
    fleet: _Held | None = None
    snapshot: _Held | None = None
    timestamp: _Held | None = None


class Repository:
    """See the module.

    Args:
        root_dir: the folder to serve; made when missing.
        online_signer: signs fleet, snapshot and timestamp.
        now: the server's clock, aware, UTC.
    """

    def __init__(self, root_dir: Path, online_signer: Signer, now: Callable[[], dt.datetime]) -> None:
        self._dir = root_dir
        self._signer = online_signer
        self._now = now
        self._thread = threading.RLock()
        for part in (layout.METADATA_DIR, layout.TARGETS_DIR, "blobs/sha256"):
            durable.make_folder(root_dir / part)
        with self._writing():
            for folder, _, _ in os.walk(root_dir):
                if Path(folder).relative_to(root_dir).parts[:1] != ("blobs",):
                    durable.drop_unfinished(Path(folder))

    # --- the offline roles ---

    def install_root(self, data: bytes) -> None:
        """Takes the operator's root: the first as it is, later ones signed by the one before and by themselves.

        Posting the current version again changes nothing, so a lost answer can be asked for twice.

        Raises:
            RepositoryRefused: see ``trust.next_root``.
        """
        with self._writing():
            state = self._load()
            if state.root is not None and state.root.data == data:
                return
            previous = state.root.signed if state.root else None
            root = trust.next_root(data, previous, self._signer.public_key.keyid, self._now())
            if state.targets is not None:
                # Devices follow this root at once: what it does not vouch for they would refuse.
                trust.verify(root, Targets.type, trust.parse(state.targets.data, Targets, "targets"))
            durable.write(self._metadata(Root.type, root.version), data)
            self._publish(replace(state, root=_Held(signed=root, data=data)))

    def install_targets(self, data: bytes) -> None:
        """Takes the operator's targets role, which names the approvers and this server's key for ``fleet``.

        Raises:
            RepositoryRefused: see ``trust.next_targets``; also ``bad_signature`` when the catalog being served would not
                hold under it, and ``no_trust`` without a root.
        """
        with self._writing():
            state = self._load()
            if state.targets is not None and state.targets.data == data:
                return
            root = _needed(state.root, "root")
            previous = state.targets.signed if state.targets else None
            targets = trust.next_targets(data, root.signed, previous, self._signer.public_key.keyid, self._now())
            if state.catalog is not None:
                trust.verify(targets, layout.CATALOG_ROLE, trust.parse(state.catalog.data, Targets, "catalog"))
            durable.write(self._metadata(Targets.type, targets.version), data)
            self._publish(replace(state, targets=_Held(signed=targets, data=data)))

    def install_catalog(
        self, data: bytes, floors_data: bytes | None, manifests: Callable[[str], bytes | None]
    ) -> tuple[CatalogEntry, ...]:
        """Takes a catalog that the approvers signed, and from then on serves what it lists.

        Args:
            data: the metadata.
            floors_data: the text of its ``floors.json``; None when it did not change.
            manifests: digest -> bytes of a manifest that the repository does not hold yet, or None.

        Returns:
            The bundles that it lists.

        Raises:
            RepositoryRefused: see ``trust.next_catalog``; ``manifest_missing``, ``blob_missing``, ``hash_mismatch`` and
                ``size_mismatch`` for what devices could not download, ``bad_document`` for floors or a manifest that no
                device could read, ``no_trust`` without root and targets.
        """
        with self._writing():
            state = self._load()
            targets = _needed(state.targets, "targets")
            if state.catalog is not None and state.catalog.data == data:
                return trust.catalog_entries(state.catalog.signed)
            previous = state.catalog.signed if state.catalog else None
            catalog = trust.next_catalog(data, targets.signed, previous, self._now())
            self._take_floors(catalog.targets[layout.FLOORS_TARGET], floors_data)
            entries = trust.catalog_entries(catalog)
            for entry in entries:
                self._take_manifest(entry, manifests)
            durable.write(self._metadata(layout.CATALOG_ROLE, catalog.version), data)
            self._publish(replace(state, catalog=_Held(signed=catalog, data=data)))
            return entries

    # --- content ---

    def publish_manifest(self, data: bytes) -> str:
        """Puts a manifest where devices will look for it once a catalog lists it; until then nobody trusts it.

        Returns:
            The path of the file, relative to the repository's root.

        Raises:
            RepositoryRefused: ``bad_document`` when it is no manifest.
        """
        try:
            parsed = manifest.parse(data)
            target = layout.manifest_target(ids.model_name(parsed.model), parsed.version)
        except ContractError as error:
            raise RepositoryRefused("bad_document", str(error)) from None
        path = layout.target_file(target, canonical.sha256(data))
        with self._writing():
            if not (self._dir / path).exists():
                durable.write(self._dir / path, data)
        return path

    def put_blob(self, stream: Iterable[bytes], sha256: str, max_bytes: int = MAX_BLOB_BYTES) -> int:
        """Stores a bundle's file under its digest; it appears only when all of it has arrived and matches.

        Args:
            stream: the bytes in pieces.
            sha256: hex digest that they must have.
            max_bytes: the most that is read.

        Returns:
            The size in bytes.

        Raises:
            RepositoryRefused: ``hash_mismatch``, ``too_large``.
        """
        with self.open_blob(sha256) as writer:
            for piece in stream:
                if writer.size + len(piece) > max_bytes:
                    raise RepositoryRefused("too_large", f"blob {sha256}: at most {max_bytes} bytes")
                writer.write(piece)
            self.finish_blob(writer, sha256)
            return writer.size

    def open_blob(self, sha256: str) -> durable.CheckedWriter:
        """A writer for callers that get the pieces one by one; end with ``finish_blob``. Raises ``Malformed``."""
        return durable.CheckedWriter(self._dir / layout.blob(sha256))

    def finish_blob(self, writer: durable.CheckedWriter, sha256: str) -> None:
        """Gives a written blob its name. Raises ``RepositoryRefused`` (``hash_mismatch``)."""
        if writer.sha256() != sha256:
            raise RepositoryRefused("hash_mismatch", f"blob: the bytes have sha256 {writer.sha256()}, wanted {sha256}")
        writer.commit()

    def blob_size(self, sha256: str) -> int | None:
        """Size in bytes of a stored blob, or None."""
        try:
            return (self._dir / layout.blob(sha256)).stat().st_size
        except FileNotFoundError:
            return None

    # --- the online roles ---

    def publish_group(self, name: str, document: bytes) -> bool:
        """Publishes the document of one group. See ``publish_groups``."""
        return self.publish_groups({name: document})

    def publish_groups(self, documents: Mapping[str, bytes]) -> bool:
        """Publishes group documents: signs fleet, snapshot and timestamp once for all of them.

        Returns:
            False when every document was published already, and then nothing was written.

        Raises:
            RepositoryRefused: ``bad_document`` when one is not canonical or names another group; ``no_trust`` before the
                ceremony's documents are here.
        """
        with self._writing():
            state = self._load()
            fleet = _needed(state.fleet, "root, targets and a catalog").signed
            listed = dict(fleet.targets)
            for name, data in documents.items():
                try:
                    target = layout.group_target(ids.group_name(name))
                    if group.parse(data).group != name:
                        raise RepositoryRefused("bad_document", f"group {name}: the document names another group")
                except ContractError as error:
                    raise RepositoryRefused("bad_document", f"group {name}: {error}") from None
                sha256 = canonical.sha256(data)
                path = self._dir / layout.target_file(target, sha256)
                if not path.exists():
                    durable.write(path, data)
                listed[target] = TargetFile(len(data), {"sha256": sha256}, target)
            if listed == fleet.targets:
                return False
            self._publish(state, fleet_targets=listed)
            return True

    def refresh_expiring(self) -> tuple[str, ...]:
        """Signs anew what has less than half its life left, or no longer holds under a new root; deletes what is old.

        Returns:
            The roles that were signed; empty when nothing was due or the repository has no trust yet.
        """
        with self._writing():
            state = self._load()
            if state.timestamp is None:
                return ()
            signed = self._publish(state, only_due=True)
            self._prune()
            return signed

    def raise_versions(self, role: str, above: int) -> None:
        """Makes the next version of an online role higher than ``above``.

        For a repository restored from a backup: devices that hold a higher version would refuse what it signs next.

        Raises:
            RepositoryRefused: ``offline_role`` for a role that only its holders can sign, ``no_trust`` before there is one.
        """
        if role not in ONLINE_ROLES:
            raise RepositoryRefused("offline_role", f"{role}: its holders must sign a version above {above}")
        with self._writing():
            state = self._load()
            _needed(state.timestamp, "root, targets and a catalog")
            self._publish(state, floor={role: above})

    # --- reading ---

    def has_trust(self) -> bool:
        """Whether root, targets and a catalog are here, so that devices can be served."""
        with self._writing():
            return self._load().timestamp is not None

    def status(self) -> dict[str, dict[str, Any]]:
        """Role -> {version, expires (RFC 3339), expires_ms} of what is being served."""
        with self._writing():
            state = self._load()
        return {
            role: {
                "version": held.version,
                "expires": held.signed.expires.isoformat(),
                "expires_ms": int(held.signed.expires.timestamp() * 1000),
            }
            for role, held in self._held(state).items()
        }

    def metadata(self, role: str) -> bytes | None:
        """The bytes of a role that are being served, or None."""
        with self._writing():
            held = self._held(self._load()).get(role)
        return held.data if held else None

    def catalog_entries(self) -> tuple[CatalogEntry, ...]:
        """The bundles that the catalog lists; empty before there is one."""
        with self._writing():
            catalog = self._load().catalog
        return trust.catalog_entries(catalog.signed) if catalog else ()

    def floors(self) -> dict[str, str]:
        """Model -> lowest version that may be activated; empty before there is a catalog."""
        with self._writing():
            catalog = self._load().catalog
            if catalog is None:
                return {}
            target = catalog.signed.targets[layout.FLOORS_TARGET]
            return floors.parse((self._dir / layout.target_file(target.path, target.hashes["sha256"])).read_bytes())

    # --- inside ---

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._thread, durable.locked(self._dir / ".lock"):
            yield

    def _metadata(self, role: str, version: int) -> Path:
        return self._dir / layout.METADATA_DIR / f"{version}.{role}.json"

    @staticmethod
    def _held(state: _State) -> dict[str, _Held]:
        parts = {
            Root.type: state.root,
            Timestamp.type: state.timestamp,
            Snapshot.type: state.snapshot,
            Targets.type: state.targets,
            layout.CATALOG_ROLE: state.catalog,
            layout.FLEET_ROLE: state.fleet,
        }
        return {role: held for role, held in parts.items() if held is not None}

    def _load(self) -> _State:
        """What the files say. Before the first timestamp, the newest version of each offline role counts."""
        root = self._newest(Root.type, Root)
        path = self._dir / layout.METADATA_DIR / f"{Timestamp.type}.json"
        if not path.exists():
            return _State(root=root, targets=self._newest(Targets.type, Targets))
        data = path.read_bytes()
        timestamp = trust.parse(data, Timestamp, Timestamp.type).signed
        snapshot = self._read(Snapshot.type, timestamp.snapshot_meta.version, Snapshot)
        versions = {name.removesuffix(".json"): meta.version for name, meta in snapshot.signed.meta.items()}
        try:
            return _State(
                root=root,
                targets=self._read(Targets.type, versions[Targets.type], Targets),
                catalog=self._read(layout.CATALOG_ROLE, versions[layout.CATALOG_ROLE], Targets),
                fleet=self._read(layout.FLEET_ROLE, versions[layout.FLEET_ROLE], Targets),
                snapshot=snapshot,
                timestamp=_Held(signed=timestamp, data=data),
            )
        except KeyError as error:
            raise RepositoryRefused(
                "repository_damaged", f"snapshot {snapshot.version} does not name {error}"
            ) from None

    def _newest(self, role: str, kind: type[_S]) -> _Held | None:
        names = (self._dir / layout.METADATA_DIR).glob(f"*.{role}.json")
        versions = [int(path.name.partition(".")[0]) for path in names if path.name.partition(".")[0].isdigit()]
        return self._read(role, max(versions), kind) if versions else None

    def _read(self, role: str, version: int, kind: type[_S]) -> _Held:
        try:
            data = self._metadata(role, version).read_bytes()
        except OSError as error:
            raise RepositoryRefused(
                "repository_damaged", f"{role} version {version} is named and missing: {error}"
            ) from None
        return _Held(signed=trust.parse(data, kind, role).signed, data=data)

    def _take_floors(self, target: TargetFile, data: bytes | None) -> None:
        path = self._dir / layout.target_file(target.path, target.hashes["sha256"])
        if data is None and path.exists():
            return
        if data is None:
            raise RepositoryRefused("manifest_missing", "floors: the catalog names floors that were not sent with it")
        _match("floors", data, target.hashes["sha256"], target.length)
        try:
            floors.parse(data)
        except ContractError as error:
            raise RepositoryRefused("bad_document", str(error)) from None
        durable.write(path, data)

    def _take_manifest(self, entry: CatalogEntry, manifests: Callable[[str], bytes | None]) -> None:
        name = f"{entry.model}@{entry.version}"
        path = self._dir / layout.target_file(entry.target, entry.digest)
        known = path.exists()
        data = path.read_bytes() if known else manifests(entry.digest)
        if data is None:
            raise RepositoryRefused("manifest_missing", f"{name}: no manifest {entry.digest} was pushed to this server")
        _match(name, data, entry.digest, entry.length)
        try:
            parsed = manifest.parse(data)
        except ContractError as error:
            raise RepositoryRefused("bad_document", f"{name}: {error}") from None
        if (parsed.model, parsed.version) != (entry.model, entry.version):
            raise RepositoryRefused("bad_document", f"{name}: its manifest is of {parsed.model}@{parsed.version}")
        for file in parsed.files():
            size = self.blob_size(file.sha256)
            if size is None:
                raise RepositoryRefused("blob_missing", f"{name}: {file.path} ({file.sha256}) was not pushed")
            if size != file.size:
                raise RepositoryRefused("size_mismatch", f"{name}: {file.path} has {size} bytes, wanted {file.size}")
        if not known:
            durable.write(path, data)

    def _publish(
        self,
        state: _State,
        *,
        fleet_targets: Mapping[str, TargetFile] | None = None,
        only_due: bool = False,
        floor: Mapping[str, int] | None = None,
    ) -> tuple[str, ...]:
        """Signs what changed or is due, writes it in order, the timestamp last. Returns the roles that were signed."""
        root, targets, catalog = state.root, state.targets, state.catalog
        if root is None or targets is None or catalog is None:
            return ()
        now, floor = self._now(), floor or {}
        signed: list[str] = []

        fleet = state.fleet
        due = fleet is None or fleet_targets is not None or layout.FLEET_ROLE in floor
        if fleet is None or due or self._due(targets.signed, layout.FLEET_ROLE, fleet, ONLINE_LIFE):
            listed = dict(fleet_targets if fleet_targets is not None else fleet.signed.targets if fleet else {})
            version = _above(fleet, floor.get(layout.FLEET_ROLE, 0))
            fleet = self._sign(
                targets.signed, layout.FLEET_ROLE, Targets(version=version, expires=now + ONLINE_LIFE, targets=listed)
            )
            durable.write(self._metadata(layout.FLEET_ROLE, version), fleet.data)
            signed.append(layout.FLEET_ROLE)

        meta = {
            f"{role}.json": _meta_file(held)
            for role, held in ((Targets.type, targets), (layout.CATALOG_ROLE, catalog), (layout.FLEET_ROLE, fleet))
        }
        snapshot = state.snapshot
        due = snapshot is None or snapshot.signed.meta != meta or Snapshot.type in floor
        if snapshot is None or due or self._due(root.signed, Snapshot.type, snapshot, ONLINE_LIFE):
            version = _above(snapshot, floor.get(Snapshot.type, 0))
            snapshot = self._sign(
                root.signed, Snapshot.type, Snapshot(version=version, expires=now + ONLINE_LIFE, meta=meta)
            )
            durable.write(self._metadata(Snapshot.type, version), snapshot.data)
            signed.append(Snapshot.type)

        timestamp = state.timestamp
        if only_due and not signed and timestamp is not None:
            if not self._due(root.signed, Timestamp.type, timestamp, TIMESTAMP_LIFE):
                return ()
        # Never earlier than the last one: devices take it as a lower bound of now, and our clock may have been set back.
        signed_at = max(int(now.timestamp()), _signed_at(timestamp))
        new = Timestamp(
            version=_above(timestamp, floor.get(Timestamp.type, 0)),
            expires=dt.datetime.fromtimestamp(signed_at, dt.UTC) + TIMESTAMP_LIFE,
            snapshot_meta=_meta_file(snapshot),
            unrecognized_fields={layout.SIGNED_AT_FIELD: signed_at},
        )
        held = self._sign(root.signed, Timestamp.type, new)
        durable.write(self._dir / layout.METADATA_DIR / f"{Timestamp.type}.json", held.data)
        return (*signed, Timestamp.type)

    def _due(self, delegator: Root | Targets, role: str, held: _Held, life: dt.timedelta) -> bool:
        if held.signed.expires - self._now() < life / 2:
            return True
        try:
            trust.verify(delegator, role, Metadata.from_bytes(held.data))
        except RepositoryRefused:
            return True
        return False

    def _sign(self, delegator: Root | Targets, role: str, signed: Snapshot | Targets | Timestamp) -> _Held:
        metadata: Metadata[Any] = Metadata(signed)
        metadata.sign(self._signer)
        try:
            trust.verify(delegator, role, metadata)
        except RepositoryRefused as error:
            raise RepositoryRefused(
                "online_key_not_trusted", f"this server's key cannot sign {role} any more: {error.message}"
            ) from None
        return _Held(signed=signed, data=metadata.to_bytes())

    def _prune(self) -> None:
        """Deletes superseded snapshots, fleets and group documents past ``KEPT_VERSIONS``. Offline roles stay for ever."""
        folder = self._dir / layout.METADATA_DIR
        listed: set[Path] = set()
        for role in (Snapshot.type, layout.FLEET_ROLE):
            paths = sorted(folder.glob(f"*.{role}.json"), key=lambda path: int(path.name.partition(".")[0]))
            for path in paths[:-KEPT_VERSIONS]:
                path.unlink()
            if role == layout.FLEET_ROLE:
                for path in paths[-KEPT_VERSIONS:]:
                    for target in Metadata[Targets].from_bytes(path.read_bytes()).signed.targets.values():
                        listed.add(self._dir / layout.target_file(target.path, target.hashes["sha256"]))
        for path in (self._dir / layout.TARGETS_DIR / "fleet").glob("*.json"):
            if path not in listed:
                path.unlink()


def make_online_key(private_path: Path, public_path: Path) -> CryptoSigner:
    """Makes the server's online key on its first start: ``online.pem`` (0600) and ``online.pub.json`` for the ceremony.

    An existing key is never replaced; its public part is written again when it is missing.

    Raises:
        ValueError: the existing private file holds no usable key.
    """
    if private_path.exists():
        signer = load_online_signer(private_path)
    else:
        signer = CryptoSigner.generate_ed25519()
        private_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        previous = os.umask(0o077)
        try:
            durable.write(private_path, signer.private_bytes)
        finally:
            os.umask(previous)
    if not public_path.exists():
        keys = {"keys": {signer.public_key.keyid: signer.public_key.to_dict()}}
        durable.write(public_path, json.dumps(keys, indent=2).encode() + b"\n")
    return signer


def load_online_signer(private_path: Path) -> CryptoSigner:
    """Opens the online key. Raises ``ValueError`` when the file holds none, ``OSError`` when it cannot be read."""
    return CryptoSigner(serialization.load_pem_private_key(private_path.read_bytes(), None))


def _needed(held: _Held | None, what: str) -> _Held:
    if held is None:
        raise RepositoryRefused("no_trust", f"the repository has no trust yet: first post the ceremony's {what}")
    return held


def _match(name: str, data: bytes, sha256: str, length: int) -> None:
    got = canonical.sha256(data)
    if got != sha256:
        raise RepositoryRefused("hash_mismatch", f"{name}: the bytes have sha256 {got}, the catalog says {sha256}")
    if len(data) != length:
        raise RepositoryRefused("size_mismatch", f"{name}: {len(data)} bytes, the catalog says {length}")


def _meta_file(held: _Held) -> MetaFile:
    return MetaFile(version=held.version, length=len(held.data), hashes={"sha256": canonical.sha256(held.data)})


def _above(held: _Held | None, floor: int) -> int:
    return max(held.version if held else 0, floor) + 1


def _signed_at(timestamp: _Held | None) -> int:
    value = timestamp.signed.unrecognized_fields.get(layout.SIGNED_AT_FIELD, 0) if timestamp else 0
    return value if isinstance(value, int) else 0
