"""The two roles that name all others, as values: how root and targets of a fleet look, and what one of their versions changes.

Builds ``Root`` and ``Targets`` from keys and thresholds, takes the keys and thresholds out of them again, and says in words what
changes from one version to the next. Whoever rebuilds a role from what it found in it and gets another document has found a
document that holds more than keys and thresholds. What is shown of a key is its id, so an id that does not follow from its key is
refused wherever a role is read: else a stranger's key travels under the fingerprint that a holder reads out. Signing is
``cosigning``'s, keys and files are ``keys``' and ``key_files``'.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from securesystemslib.signer import Key
from skerry_contract import canonical, floors, layout
from skerry_contract.errors import Malformed
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Role, Root, Snapshot, TargetFile, Targets, Timestamp

from skerry_cli import key_files
from skerry_cli.errors import RefusedForSafety, Usage

ROOT_LIFE = dt.timedelta(days=365)
TARGETS_LIFE = dt.timedelta(days=365)
CATALOG_LIFE = dt.timedelta(days=180)
CLOCK_SLACK = dt.timedelta(days=1)
"""So far another's clock may be ahead of one's own before what they signed lives too long."""
EMPTY_FLOORS = floors.encode({})

_S = TypeVar("_S", Root, Targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Holders:
    """Who may sign a role: keys by key id, in the document's order, and how many of them must."""

    keys: Mapping[str, Key]
    threshold: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RootWish:
    """All that a root of this tool says beside version and expiry."""

    root: Holders
    targets: Holders
    online: Mapping[str, Key]

    def build(self, version: int, expires: dt.datetime) -> Root:
        """The role."""
        online = list(self.online)
        return Root(
            version=version,
            expires=expires,
            keys={**self.root.keys, **self.targets.keys, **self.online},
            roles={
                Root.type: Role(list(self.root.keys), self.root.threshold),
                Targets.type: Role(list(self.targets.keys), self.targets.threshold),
                Snapshot.type: Role(online, 1),
                Timestamp.type: Role(online, 1),
            },
            consistent_snapshot=True,
        )

    @classmethod
    def read(cls, root: Root) -> RootWish:
        """What a root says."""
        return cls(
            root=_holders(root.keys, root.roles[Root.type]),
            targets=_holders(root.keys, root.roles[Targets.type]),
            online=_holders(root.keys, root.roles[Timestamp.type]).keys,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetsWish:
    """All that the top-level targets role of this tool says beside version and expiry."""

    catalog: Holders
    online: Mapping[str, Key]

    def build(self, version: int, expires: dt.datetime) -> Targets:
        """The role."""
        approvers, online = self.catalog, self.online
        delegations = Delegations(
            keys={**approvers.keys, **online},
            roles={
                # First and terminating: nothing later may ever answer for a path of the catalog.
                layout.CATALOG_ROLE: DelegatedRole(
                    layout.CATALOG_ROLE, list(approvers.keys), approvers.threshold, True, list(layout.CATALOG_PATHS)
                ),
                layout.FLEET_ROLE: DelegatedRole(layout.FLEET_ROLE, list(online), 1, False, list(layout.FLEET_PATHS)),
            },
        )
        return Targets(version=version, expires=expires, delegations=delegations)

    @classmethod
    def read(cls, targets: Targets) -> TargetsWish:
        """What a targets role says. Raises ``RefusedForSafety`` when it does not delegate catalog and fleet."""
        roles = targets.delegations.roles if targets.delegations is not None else None
        if targets.delegations is None or not roles or not {layout.CATALOG_ROLE, layout.FLEET_ROLE} <= roles.keys():
            raise RefusedForSafety("targets: it does not delegate catalog and fleet, so it is not from this tool")
        keys = targets.delegations.keys
        return cls(
            catalog=_holders(keys, roles[layout.CATALOG_ROLE]), online=_holders(keys, roles[layout.FLEET_ROLE]).keys
        )


def first_catalog(expires: dt.datetime) -> Targets:
    """Version 1 of the catalog: no bundle, no floor."""
    floors_target = TargetFile.from_data(layout.FLOORS_TARGET, EMPTY_FLOORS, ["sha256"])
    return Targets(version=1, expires=expires, targets={layout.FLOORS_TARGET: floors_target})


def after(now: dt.datetime, life: dt.timedelta) -> dt.datetime:
    """When something made ``now`` expires; metadata knows whole seconds."""
    return (now.astimezone(dt.UTC) + life).replace(microsecond=0)


def with_keys(holders: Holders, *, add: Mapping[str, Key], remove: tuple[str, ...], threshold: int | None) -> Holders:
    """Other holders: ``remove`` key ids out, ``add`` in at the end, another threshold when given.

    Raises:
        Usage: a key that is not there goes out or one that is there comes in, or a threshold that the keys cannot meet.
    """
    for keyid in remove:
        if keyid not in holders.keys:
            raise Usage(f"remove: key {keyid[:16]} is not among {', '.join(k[:16] for k in holders.keys)}")
    for keyid in add:
        if keyid in holders.keys:
            raise Usage(f"add: key {keyid[:16]} is there already")
    keys = {keyid: key for keyid, key in holders.keys.items() if keyid not in remove} | dict(add)
    wanted = holders.threshold if threshold is None else threshold
    if not 1 <= wanted <= len(keys):
        raise Usage(f"threshold: wanted 1 to {len(keys)} of {len(keys)} keys, got {wanted}")
    return replace(holders, keys=keys, threshold=wanted)


def require_plain(what: str, signed: Root | Targets) -> None:
    """Checks that a role of this tool holds keys, thresholds, version and expiry, and nothing else.

    Raises:
        RefusedForSafety: it holds more.
    """
    wish: RootWish | TargetsWish = RootWish.read(signed) if isinstance(signed, Root) else TargetsWish.read(signed)
    if wish.build(signed.version, signed.expires).to_dict() != signed.to_dict():
        raise RefusedForSafety(f"{what}: it holds more than keys, thresholds and an expiry")


def difference(old: Root | Targets | None, new: Root | Targets, names: Mapping[str, str]) -> tuple[str, ...]:
    """Lines for a terminal; ``+`` comes in, ``-`` goes out. ``names``: key id -> who holds it, where that is known.

    Of a first version (``old`` None) everything comes in.
    """
    before, after_ = _summary(old), _summary(new)
    version = f"version {new.version}" if old is None else f"version {old.version} -> {new.version}"
    expires = f"{new.expires:%Y-%m-%d}" if old is None else f"{old.expires:%Y-%m-%d} -> {new.expires:%Y-%m-%d}"
    lines = [f"{new.type} {version}, expires {expires}"]
    changed = False
    for role, holders in after_.items():
        was = before.get(role, Holders(keys={}, threshold=0))
        for mark, keys in (
            ("+", [k for k in holders.keys if k not in was.keys]),
            ("-", [k for k in was.keys if k not in holders.keys]),
        ):
            lines += [f"{mark} {role}: {names.get(keyid, 'unnamed')}  {spoken(keyid)}" for keyid in keys]
            changed = changed or bool(keys)
        if was.threshold != holders.threshold:
            of = f"{holders.threshold} of {len(holders.keys)} must sign"
            lines.append(f"~ {role}: {of}" + (f", was {was.threshold}" if was.threshold else ""))
            changed = True
    if not changed:
        lines.append("  no key and no threshold changes: this renews the expiry")
    return tuple(lines)


def spoken(keyid: str) -> str:
    """A fingerprint as it is read aloud: all of it, in groups of four."""
    return " ".join(keyid[i : i + 4] for i in range(0, len(keyid), 4))


def parse(data: bytes, kind: type[_S], what: str) -> Metadata[_S]:
    """Reads metadata of one role; verifies nothing.

    Raises:
        Usage: it is not metadata of that role.
    """
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(data)
        canonical.refuse_repeated_keys(data, what=what)
    except Malformed as error:
        raise Usage(str(error)) from None
    except (RepositoryError, RecursionError) as error:
        raise Usage(f"{what}: wanted TUF metadata: {error}") from None
    if not isinstance(metadata.signed, kind):
        raise Usage(f"{what}: wanted TUF metadata of that role, got {metadata.signed.type}")
    return metadata


def _summary(signed: Root | Targets | None) -> dict[str, Holders]:
    if signed is None:
        return {}
    if isinstance(signed, Root):
        wish = RootWish.read(signed)
        return {"root": wish.root, "targets": wish.targets, "online": Holders(keys=wish.online, threshold=1)}
    delegated = TargetsWish.read(signed)
    return {"catalog": delegated.catalog, "fleet": Holders(keys=delegated.online, threshold=1)}


def _holders(keys: Mapping[str, Key], role: Role) -> Holders:
    strange = [keyid for keyid in role.keyids if keyid not in keys]
    if strange:
        raise RefusedForSafety(f"role names key {strange[0][:16]} and does not hold it")
    for keyid in role.keyids:
        key_files.require_own_id(keyid, keys[keyid])
    return Holders(keys={keyid: keys[keyid] for keyid in role.keyids}, threshold=role.threshold)
