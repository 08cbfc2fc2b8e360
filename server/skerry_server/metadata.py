"""The repository's metadata on disk, and the online key that signs fleet, snapshot and timestamp.

Owns the folder ``metadata/`` and the order in which its files appear: new versioned files first, each synced with its folder,
the timestamp last, since it decides what is current. Owns the online key's files. Which offline metadata is believed is decided
in ``trust``, which targets a role lists in ``repository``; whoever calls holds the repository's lock.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives import serialization
from securesystemslib.signer import CryptoSigner, Signer
from skerry_contract import canonical, layout
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Role, Root, Snapshot, TargetFile, Targets, Timestamp

from skerry_server import clock, durable, trust
from skerry_server.core import signing_time
from skerry_server.core.expiry import LIVES_MS
from skerry_server.core.signing_time import Count, Judged
from skerry_server.errors import Unavailable
from skerry_server.trust import RepositoryRefused

log = logging.getLogger(__name__)

ONLINE_LIFE = dt.timedelta(days=7)
TIMESTAMP_LIFE = dt.timedelta(days=1)
KEPT_VERSIONS = 32
"""Superseded versions of snapshot and fleet that stay, for devices in the middle of reading them."""
ONLINE_ROLES = (Timestamp.type, Snapshot.type, layout.FLEET_ROLE)

_S = TypeVar("_S", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A role as it lies on disk."""

    signed: Any
    data: bytes

    @property
    def version(self) -> int:
        """Its version number."""
        return int(self.signed.version)


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """The roles that are being served; None before there is one."""

    root: Held | None = None
    targets: Held | None = None
    catalog: Held | None = None
    fleet: Held | None = None
    snapshot: Held | None = None
    timestamp: Held | None = None


class MetadataFolder:
    """See the module.

    Args:
        folder: ``metadata/``; made when missing.
        signers: hold the server's online keys, oldest first: after one was made to replace another, both are here until the
            operator's roles name the new one.
        now: the server's clock, aware, UTC.
        monotonic_s: seconds by a clock that nobody sets.
    """

    def __init__(
        self,
        folder: Path,
        signers: Sequence[Signer],
        now: Callable[[], dt.datetime],
        monotonic_s: Callable[[], float] = clock.monotonic_s,
    ) -> None:
        self._monotonic_s = monotonic_s
        self._count: Count | None = None
        self._clock_behind = False
        self._folder = folder
        self._signers = {str(signer.public_key.keyid): signer for signer in signers}
        self._now = now
        durable.make_folder(folder)

    @property
    def online_keyids(self) -> frozenset[str]:
        """Of the keys that can sign here."""
        return frozenset(self._signers)

    @property
    def clock_behind(self) -> bool:
        """Whether the server's clock was behind what was signed and the time since, when that was last looked at."""
        return self._clock_behind

    def load(self) -> State:
        """What the files say. Before the first timestamp, the newest version of each offline role counts."""
        root = self._newest(Root.type, Root)
        path = self._timestamp()
        if not path.exists():
            return State(root=root, targets=self._newest(Targets.type, Targets))
        data = path.read_bytes()
        timestamp = trust.parse(data, Timestamp, Timestamp.type).signed
        snapshot = self._read(Snapshot.type, timestamp.snapshot_meta.version, Snapshot)
        versions = {name.removesuffix(".json"): meta.version for name, meta in snapshot.signed.meta.items()}
        try:
            targets, catalog = self._under(
                root,
                self._read(Targets.type, versions[Targets.type], Targets),
                self._read(layout.CATALOG_ROLE, versions[layout.CATALOG_ROLE], Targets),
            )
            return State(
                root=root,
                targets=targets,
                catalog=catalog,
                fleet=self._read(layout.FLEET_ROLE, versions[layout.FLEET_ROLE], Targets),
                snapshot=snapshot,
                timestamp=Held(signed=timestamp, data=data),
            )
        except KeyError as error:
            raise RepositoryRefused(
                "repository_damaged", f"snapshot {snapshot.version} does not name {error}"
            ) from None

    def _under(self, root: Held | None, targets: Held, catalog: Held) -> tuple[Held, Held]:
        """Targets and catalog as served; where a crash came between a new root and its snapshot, those that came with it."""
        if root is None or _holds(root.signed, Targets.type, targets):
            return targets, catalog
        for version in range(targets.version + 1, self._highest(Targets.type) + 1):
            if not self._path(Targets.type, version).exists():
                continue
            newer = self._read(Targets.type, version, Targets)
            if not _holds(root.signed, Targets.type, newer):
                continue
            for held in (self._newest(layout.CATALOG_ROLE, Targets), catalog):
                if held is not None and _holds(newer.signed, layout.CATALOG_ROLE, held):
                    return newer, held
        return targets, catalog

    def publish(
        self,
        state: State,
        *,
        fleet_targets: Mapping[str, TargetFile] | None = None,
        only_due: bool = False,
        floor: Mapping[str, int] | None = None,
        fresh: Sequence[tuple[str, Held]] = (),
    ) -> tuple[str, ...]:
        """Signs what changed or is due, and then writes all of it, the timestamp last. Returns the roles that were signed.

        Nothing is written before everything is signed: a key that does not sign leaves what is served as it is. A new root is written
        right before the timestamp that goes with it: devices find it by its number, and refuse a timestamp that does not.

        Args:
            fresh: offline roles that came now, each root after the one before it; the last of each is part of ``state``.

        Raises:
            RepositoryRefused: ``online_key_not_trusted``. Unavailable: ``online_key_unavailable``.
        """
        offline = [(role, held) for role, held in fresh if role != Root.type]
        roots = [(role, held) for role, held in fresh if role == Root.type]
        made, signed, count = self._signed(state, fleet_targets, only_due, floor or {})
        for role, held in (*offline, *made[:-1], *roots, *made[-1:]):
            self._write(role, held)
        self._count = count
        return signed

    def _signed(
        self,
        state: State,
        fleet_targets: Mapping[str, TargetFile] | None,
        only_due: bool,
        floor: Mapping[str, int],
    ) -> tuple[list[tuple[str, Held]], tuple[str, ...], Count | None]:
        """What is to be written, the timestamp last, the names of its roles, and what is held of the time once it is written; nothing
        before there is a catalog.
        """
        root, targets, catalog = state.root, state.targets, state.catalog
        if root is None or targets is None or catalog is None:
            return [], (), self._count
        judged = self._judge_time(root, targets, catalog, state.timestamp)
        signed_at = judged.signed_s
        # Devices take it to be signed_at at least, however far behind it this clock is: what is signed must outlive that.
        now = max(self._now(), dt.datetime.fromtimestamp(signed_at, dt.UTC))
        made: list[tuple[str, Held]] = []

        fleet = state.fleet
        due = fleet is None or fleet_targets is not None or layout.FLEET_ROLE in floor
        if fleet is None or due or self._due(targets.signed, layout.FLEET_ROLE, fleet, ONLINE_LIFE, now):
            listed = dict(fleet_targets if fleet_targets is not None else fleet.signed.targets if fleet else {})
            version = _above(fleet, floor.get(layout.FLEET_ROLE, 0))
            fleet = self._sign(
                targets.signed, layout.FLEET_ROLE, Targets(version=version, expires=now + ONLINE_LIFE, targets=listed)
            )
            made.append((layout.FLEET_ROLE, fleet))

        meta = {
            f"{role}.json": _meta_file(held)
            for role, held in ((Targets.type, targets), (layout.CATALOG_ROLE, catalog), (layout.FLEET_ROLE, fleet))
        }
        snapshot = state.snapshot
        due = snapshot is None or snapshot.signed.meta != meta or Snapshot.type in floor
        if snapshot is None or due or self._due(root.signed, Snapshot.type, snapshot, ONLINE_LIFE, now):
            version = _above(snapshot, floor.get(Snapshot.type, 0))
            snapshot = self._sign(
                root.signed, Snapshot.type, Snapshot(version=version, expires=now + ONLINE_LIFE, meta=meta)
            )
            made.append((Snapshot.type, snapshot))

        timestamp = state.timestamp
        if only_due and not made and timestamp is not None:
            # A process that ends forgets what it measured: where that is all there is to go by, it is signed often.
            astray = judged.behind and signed_at - _signed_at(timestamp) >= signing_time.ASTRAY_S
            if not astray and not self._due(root.signed, Timestamp.type, timestamp, TIMESTAMP_LIFE, now):
                return [], (), self._count
        new = Timestamp(
            version=_above(timestamp, floor.get(Timestamp.type, 0)),
            expires=now + TIMESTAMP_LIFE,
            snapshot_meta=_meta_file(snapshot),
            unrecognized_fields={layout.SIGNED_AT_FIELD: signed_at},
        )
        made.append((Timestamp.type, self._sign(root.signed, Timestamp.type, new)))
        return made, tuple(role for role, _ in made), judged.count

    def prune(self) -> set[tuple[str, str]]:
        """Deletes superseded snapshots and fleets past ``KEPT_VERSIONS``. Offline roles stay for ever.

        Returns:
            (target, sha256) of every group document that a fleet which stays lists.
        """
        listed: set[tuple[str, str]] = set()
        for role in (Snapshot.type, layout.FLEET_ROLE):
            paths = sorted(self._folder.glob(f"*.{role}.json"), key=lambda path: int(path.name.partition(".")[0]))
            for path in paths[:-KEPT_VERSIONS]:
                path.unlink()
            if role == layout.FLEET_ROLE:
                for path in paths[-KEPT_VERSIONS:]:
                    for target in Metadata[Targets].from_bytes(path.read_bytes()).signed.targets.values():
                        listed.add((target.path, target.hashes["sha256"]))
        return listed

    def _newest(self, role: str, kind: type[_S]) -> Held | None:
        highest = self._highest(role)
        return self._read(role, highest, kind) if highest else None

    def _highest(self, role: str) -> int:
        names = self._folder.glob(f"*.{role}.json")
        return max((int(p.name.partition(".")[0]) for p in names if p.name.partition(".")[0].isdigit()), default=0)

    def _read(self, role: str, version: int, kind: type[_S]) -> Held:
        try:
            data = self._path(role, version).read_bytes()
        except OSError as error:
            raise RepositoryRefused(
                "repository_damaged", f"{role} version {version} is named and missing: {error}"
            ) from None
        return Held(signed=trust.parse(data, kind, role).signed, data=data)

    def _judge_time(self, root: Held, targets: Held, catalog: Held, timestamp: Held | None) -> Judged:
        """See ``signing_time``. Devices forget what a key said that root names no more, so that is no bound here either: the first
        timestamp of a key is bounded by when the offline roles were signed.
        """
        now_s, at_s = int(self._now().timestamp()), self._monotonic_s()
        last_s = clock_s = 0
        if timestamp is not None and _holds(root.signed, Timestamp.type, timestamp):
            last_s = _signed_at(timestamp)
            # What is signed ends a day after the later of the two.
            clock_s = int((timestamp.signed.expires - TIMESTAMP_LIFE).timestamp())
        count = self._count
        if not signing_time.plausible(last_s):
            offline = {Root.type: root, Targets.type: targets, layout.CATALOG_ROLE: catalog}
            expires = {role: int(held.signed.expires.timestamp()) for role, held in offline.items()}
            known_s = min(now_s, signing_time.known_s(expires, {role: ms // 1000 for role, ms in LIVES_MS.items()}))
            # Nobody's clock can be believed before 2024; all the same the time does not go back.
            now_s = max(now_s, last_s)
            count = Count.begun(now_s, known_s if signing_time.plausible(known_s) else now_s, at_s)
        elif count is None or last_s < count.last_s:
            count = self._count = Count.begun(now_s, last_s, at_s, clock_s)
        elif last_s > count.last_s:
            # Another process signed it.
            count = self._count = replace(count, last_s=last_s, at_s=at_s)
        judged = signing_time.judge(now_s, at_s, count)
        self._clock_behind = judged.behind
        if judged.signed_s != now_s:
            log.warning("signing time is not the clock's signed_at=%d now=%d", judged.signed_s, now_s)
        return judged

    def _due(self, delegator: Root | Targets, role: str, held: Held, life: dt.timedelta, now: dt.datetime) -> bool:
        left = held.signed.expires - now
        # Longer than it should be: signed by a clock that was ahead. Nobody shall be able to show it for so long.
        if left < life / 2 or (left > life + dt.timedelta(seconds=signing_time.ASTRAY_S) and not self._clock_behind):
            return True
        return not _holds(delegator, role, held)

    def _sign(self, delegator: Root | Targets, role: str, signed: Snapshot | Targets | Timestamp) -> Held:
        metadata: Metadata[Any] = Metadata(signed)
        named = (delegator.roles if isinstance(delegator, Root) else _delegated(delegator))[role].keyids
        known = [signer for keyid, signer in self._signers.items() if keyid in named]
        try:
            metadata.sign(known[-1] if known else next(iter(self._signers.values())))
        except UnsignedMetadataError as error:
            reason = str(error.__cause__ or error)
            raise Unavailable(
                "online_key_unavailable",
                f"the online key does not sign {role}: {reason}; nothing was published, what is served stays",
            ) from error
        try:
            trust.verify(delegator, role, metadata)
        except RepositoryRefused as error:
            raise RepositoryRefused(
                "online_key_not_trusted", f"this server's key cannot sign {role} any more: {error.message}"
            ) from None
        return Held(signed=signed, data=metadata.to_bytes())

    def _write(self, role: str, held: Held) -> None:
        durable.write(self._timestamp() if role == Timestamp.type else self._path(role, held.version), held.data)

    def _path(self, role: str, version: int) -> Path:
        return self._folder / f"{version}.{role}.json"

    def _timestamp(self) -> Path:
        return self._folder / f"{Timestamp.type}.json"


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
        durable.write(private_path, signer.private_bytes, mode=0o600)
    if not public_path.exists():
        keys = {"keys": {signer.public_key.keyid: signer.public_key.to_dict()}}
        durable.write(public_path, json.dumps(keys, indent=2).encode() + b"\n")
    return signer


def load_online_signer(private_path: Path) -> CryptoSigner:
    """Opens the online key. Raises ``ValueError`` when the file holds none, ``OSError`` when it cannot be read."""
    return CryptoSigner(serialization.load_pem_private_key(private_path.read_bytes(), None))


def _delegated(targets: Targets) -> Mapping[str, Role]:
    return (targets.delegations.roles or {}) if targets.delegations is not None else {}


def _holds(delegator: Root | Targets, role: str, held: Held) -> bool:
    try:
        trust.verify(delegator, role, Metadata.from_bytes(held.data))
    except RepositoryRefused:
        return False
    return True


def _meta_file(held: Held) -> MetaFile:
    return MetaFile(version=held.version, length=len(held.data), hashes={"sha256": canonical.sha256(held.data)})


def _above(held: Held | None, floor: int) -> int:
    return max(held.version if held else 0, floor) + 1


def _signed_at(timestamp: Held | None) -> int:
    value = timestamp.signed.unrecognized_fields.get(layout.SIGNED_AT_FIELD, 0) if timestamp else 0
    return value if isinstance(value, int) else 0
