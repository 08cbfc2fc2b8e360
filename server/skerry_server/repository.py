"""The update repository on disk: static files that any HTTP server, bucket or CDN can serve.

Owns what is in one folder (``metadata/ targets/ blobs/``), its only state: it takes bundles, group documents and the offline
roles after ``trust`` checked them, and says what is served. ``metadata`` signs the online roles and keeps the files in order.
Rules:

- ``timestamp.json`` decides what is current and is written last. A crash before it leaves the old state complete; what the
  crash left behind is overwritten later.
- One writer at a time, in this process and between processes (lock file).
- The online key can list group documents and nothing else; what a device may run is in the offline-signed catalog.
- A catalog that names a manifest or a file that is not here is refused: devices would fail on it.

Left to others: who may call (the API), what a group document says (the orchestrator), and serving the files.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from securesystemslib.signer import Signer
from skerry_contract import canonical, floors, group, ids, layout, manifest
from skerry_contract.errors import ContractError
from tuf.api.metadata import Root, Snapshot, TargetFile, Targets, Timestamp

from skerry_server import clock, durable, trust
from skerry_server.metadata import ONLINE_ROLES, Held, MetadataFolder, State
from skerry_server.trust import CatalogEntry, RepositoryRefused

__all__ = ["CatalogEntry", "Repository", "RepositoryRefused"]

MAX_BLOB_BYTES = 1 << 40

_UPLOAD_S = 3600.0
"""An unfinished upload that nobody has written to for so long was cut off."""


class Repository:
    """See the module.

    Args:
        root_dir: the folder to serve; made when missing.
        online_signer: signs fleet, snapshot and timestamp; of several, the newest that the operator's roles name.
        now: the server's clock, aware, UTC.
        monotonic_s: seconds by a clock that nobody sets.
    """

    def __init__(
        self,
        root_dir: Path,
        online_signer: Signer | Sequence[Signer],
        now: Callable[[], dt.datetime],
        monotonic_s: Callable[[], float] = clock.monotonic_s,
    ) -> None:
        self._dir = root_dir
        self._now = now
        self._thread = threading.RLock()
        signers = tuple(online_signer) if isinstance(online_signer, Sequence) else (online_signer,)
        self._metadata = MetadataFolder(root_dir / layout.METADATA_DIR, signers, now, monotonic_s)
        for part in (layout.TARGETS_DIR, "blobs/sha256"):
            durable.make_folder(root_dir / part)
        with self._writing():
            for folder, _, _ in os.walk(root_dir):
                # Another process may be taking an upload; none pauses for hours.
                blobs = Path(folder).relative_to(root_dir).parts[:1] == ("blobs",)
                durable.drop_unfinished(Path(folder), older_than_s=_UPLOAD_S if blobs else 0.0)

    # --- the offline roles ---

    def install_root(self, data: bytes) -> None:
        """Takes the operator's root. See ``install``."""
        self.install(root=data)

    def install_targets(self, data: bytes) -> None:
        """Takes the operator's targets role. See ``install``."""
        self.install(targets=data)

    def install_catalog(
        self, data: bytes, floors_data: bytes | None, manifests: Callable[[str], bytes | None]
    ) -> tuple[CatalogEntry, ...]:
        """Takes a catalog that the approvers signed; returns the bundles that it lists. See ``install``."""
        return self.install(catalog=data, floors_data=floors_data, manifests=manifests)

    def install(
        self,
        *,
        root: bytes | None = None,
        targets: bytes | None = None,
        catalog: bytes | None = None,
        floors_data: bytes | None = None,
        manifests: Callable[[str], bytes | None] = lambda _: None,
        restoring: bool = False,
        earlier: Sequence[bytes] = (),
    ) -> tuple[CatalogEntry, ...]:
        """Takes new offline roles together: devices see all of them in one snapshot, or none.

        So an approver's key can go: targets without it would strand the catalog that it signed, and come with one that the
        others signed. What is being served already changes nothing, so a lost answer can be asked for twice.

        Args:
            root: the first is believed as it is, later ones are signed by the one before and by themselves.
            targets: names the approvers and this server's key for ``fleet``.
            catalog: what the approvers signed; floors_data: its ``floors.json``, None when it did not change.
            manifests: digest -> bytes of a manifest that the repository does not hold yet, or None.
            restoring: targets and catalog may leave versions out: of a repository that a backup took back.
            earlier: roots before ``root`` that are not here, oldest first. Alone none of them need hold with what is served.

        Returns:
            The bundles that the catalog lists from now on; empty without one.

        Raises:
            RepositoryRefused: see ``trust``; ``bad_signature`` also when what stays would not hold under what comes;
                ``manifest_missing``, ``blob_missing``, ``hash_mismatch`` and ``size_mismatch`` for what devices could not
                download, ``bad_document`` for floors or a manifest that no device could read, ``no_trust`` without what is
                above.
            Unavailable: ``online_key_unavailable``: the server's key does not sign now; nothing has changed.
        """
        with self._writing():
            state = before = self._metadata.load()
            now, keyids = self._now(), self._metadata.online_keyids
            roots: list[Held] = []
            for data in earlier if root is not None else ():
                if state.root is None or trust.parse(data, Root, "root").signed.version > state.root.version:
                    above = state.root.signed if state.root else None
                    roots.append(Held(signed=trust.next_root(data, above, keyids, now, passed=True), data=data))
                    state = replace(state, root=roots[-1])
            if root is not None and not _is_served(state.root, root):
                previous = state.root.signed if state.root else None
                state = replace(state, root=Held(signed=trust.next_root(root, previous, keyids, now), data=root))
            if targets is not None and not _is_served(state.targets, targets):
                signed = trust.next_targets(
                    targets,
                    _needed(state.root, "root").signed,
                    state.targets.signed if state.targets else None,
                    keyids,
                    now,
                    restoring=restoring,
                )
                state = replace(state, targets=Held(signed=signed, data=targets))
            if catalog is not None and not _is_served(state.catalog, catalog):
                signed = trust.next_catalog(
                    catalog,
                    _needed(state.targets, "targets").signed,
                    state.catalog.signed if state.catalog else None,
                    now,
                    restoring=restoring,
                )
                self._take_floors(signed.targets[layout.FLOORS_TARGET], floors_data)
                for entry in trust.catalog_entries(signed):
                    self._take_manifest(entry, manifests)
                state = replace(state, catalog=Held(signed=signed, data=catalog))
            self._require_chain(before, state)
            fresh = [
                (role, held)
                for role, held, old in (
                    (layout.CATALOG_ROLE, state.catalog, before.catalog),
                    (Targets.type, state.targets, before.targets),
                    *((Root.type, one, None) for one in roots),
                    (Root.type, state.root, roots[-1] if roots else before.root),
                )
                if held is not None and held is not old
            ]
            if state is not before:
                self._metadata.publish(state, fresh=fresh)
            return trust.catalog_entries(state.catalog.signed) if state.catalog is not None else ()

    def _require_chain(self, before: State, state: State) -> None:
        """What stays must hold under what comes: devices follow a new root at once, and would refuse the rest."""
        if state.root is not before.root and state.targets is not None and state.targets is before.targets:
            trust.verify(
                _needed(state.root, "root").signed,
                Targets.type,
                trust.parse(state.targets.data, Targets, Targets.type),
            )
        if state.targets is not before.targets and state.catalog is not None and state.catalog is before.catalog:
            trust.verify(
                _needed(state.targets, "targets").signed,
                layout.CATALOG_ROLE,
                trust.parse(state.catalog.data, Targets, layout.CATALOG_ROLE),
            )

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

    def drop_damaged_blobs(self, sizes: Mapping[str, int]) -> list[str]:
        """Removes stored blobs that are not what their names say, so that they are asked for again; returns them, sorted.

        Args:
            sizes: sha256 -> bytes, as a manifest lists them.
        """
        damaged = []
        for sha256, size in sorted(sizes.items()):
            path = self._dir / layout.blob(sha256)
            if self.blob_size(sha256) == size:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                        continue
            path.unlink(missing_ok=True)
            damaged.append(sha256)
        return damaged

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
            state = self._metadata.load()
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
            self._metadata.publish(state, fleet_targets=listed)
            return True

    def refresh_expiring(self) -> tuple[str, ...]:
        """Signs anew what has less than half its life left, or no longer holds under a new root; deletes what is old.

        Returns:
            The roles that were signed; empty when nothing was due or the repository has no trust yet.
        """
        with self._writing():
            state = self._metadata.load()
            if state.timestamp is None:
                return ()
            signed = self._metadata.publish(state, only_due=True)
            listed = {self._dir / layout.target_file(path, sha256) for path, sha256 in self._metadata.prune()}
            for path in (self._dir / layout.TARGETS_DIR / "fleet").glob("*.json"):
                if path not in listed:
                    path.unlink()
            return signed

    def raise_versions(self, above: Mapping[str, int]) -> None:
        """Makes the next versions of online roles higher than these, in one publication.

        For a repository restored from a backup: devices that hold a higher version would refuse what it signs next.

        Raises:
            RepositoryRefused: ``offline_role`` for a role that only its holders can sign, ``no_trust`` before there is one.
        """
        for role, version in above.items():
            if role not in ONLINE_ROLES:
                raise RepositoryRefused("offline_role", f"{role}: its holders must sign a version above {version}")
        with self._writing():
            state = self._metadata.load()
            _needed(state.timestamp, "root, targets and a catalog")
            self._metadata.publish(state, floor=above)

    # --- reading ---

    def has_trust(self) -> bool:
        """Whether root, targets and a catalog are here, so that devices can be served."""
        with self._writing():
            return self._metadata.load().timestamp is not None

    def status(self) -> dict[str, dict[str, Any]]:
        """Role -> {version, expires (RFC 3339), expires_ms} of what is being served."""
        with self._writing():
            state = self._metadata.load()
        return {
            role: {
                "version": held.version,
                "expires": held.signed.expires.isoformat(),
                "expires_ms": int(held.signed.expires.timestamp() * 1000),
            }
            for role, held in _by_role(state).items()
        }

    def metadata(self, role: str) -> bytes | None:
        """The bytes of a role that are being served, or None."""
        with self._writing():
            held = _by_role(self._metadata.load()).get(role)
        return held.data if held else None

    def served(self) -> tuple[bytes, bytes, bytes, bytes] | None:
        """Root, targets, catalog and floors as one state; None before there is one."""
        with self._writing():
            state = self._metadata.load()
            if state.root is None or state.targets is None or state.catalog is None:
                return None
            return state.root.data, state.targets.data, state.catalog.data, self._floors_data(state.catalog)

    @property
    def online_keyids(self) -> frozenset[str]:
        """Of the keys that can sign here."""
        return self._metadata.online_keyids

    @property
    def clock_behind(self) -> bool:
        """Whether the server's clock was behind what was signed and the time since, when that was last looked at."""
        return self._metadata.clock_behind

    def catalog_entries(self) -> tuple[CatalogEntry, ...]:
        """The bundles that the catalog lists; empty before there is one."""
        with self._writing():
            catalog = self._metadata.load().catalog
        return trust.catalog_entries(catalog.signed) if catalog else ()

    def floors(self) -> dict[str, str]:
        """Model -> lowest version that may be activated; empty before there is a catalog."""
        with self._writing():
            catalog = self._metadata.load().catalog
            if catalog is None:
                return {}
            return floors.parse(self._floors_data(catalog))

    def _floors_data(self, catalog: Held) -> bytes:
        target = catalog.signed.targets[layout.FLOORS_TARGET]
        return (self._dir / layout.target_file(target.path, target.hashes["sha256"])).read_bytes()

    # --- inside ---

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._thread, durable.locked(self._dir / ".lock"):
            yield

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


def _is_served(held: Held | None, data: bytes) -> bool:
    return held is not None and held.data == data


def _needed(held: Held | None, what: str) -> Held:
    if held is None:
        raise RepositoryRefused("no_trust", f"the repository has no trust yet: first post the ceremony's {what}")
    return held


def _match(name: str, data: bytes, sha256: str, length: int) -> None:
    got = canonical.sha256(data)
    if got != sha256:
        raise RepositoryRefused("hash_mismatch", f"{name}: the bytes have sha256 {got}, the catalog says {sha256}")
    if len(data) != length:
        raise RepositoryRefused("size_mismatch", f"{name}: {len(data)} bytes, the catalog says {length}")


def _by_role(state: State) -> dict[str, Held]:
    parts = {
        Root.type: state.root,
        Timestamp.type: state.timestamp,
        Snapshot.type: state.snapshot,
        Targets.type: state.targets,
        layout.CATALOG_ROLE: state.catalog,
        layout.FLEET_ROLE: state.fleet,
    }
    return {role: held for role, held in parts.items() if held is not None}
