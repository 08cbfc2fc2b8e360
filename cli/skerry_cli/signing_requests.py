"""Signing requests: documents that travel between holders until enough of them have signed, each after their own check.

A request is one file: the documents of one change, the signatures so far, and who holds which key as its maker says. Rules:

- Nobody signs bytes blindly. ``review`` holds each document against the holder's own last verified version: it must be the next
  one, hold nothing but keys, thresholds and an expiry, and live no longer than its role may. What it changes is said in
  words, with whole fingerprints, and only then may it be signed.
- Names in a request are its maker's word; a holder's own record wins, and a key that it does not know is marked. They are of the grammar of
  names or the request is refused: a text of any length before a fingerprint could draw lines of its own on the screen.
- Documents of a ceremony are first versions: they have no base, so everything in them is shown, and the fingerprints are what
  the holders compare.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from securesystemslib.signer import Key, Signer
from skerry_contract import canonical, layout
from skerry_contract.errors import Malformed
from tuf.api.metadata import Metadata, Root, Targets

from skerry_cli import cosigning, key_files, keyring, offline_roles
from skerry_cli.cosigning import Authority, Standing
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_cli.history import Trusted
from skerry_cli.offline_roles import CATALOG_LIFE, CLOCK_SLACK, ROOT_LIFE, TARGETS_LIFE, RootWish, TargetsWish

KIND = "skerry signing request"
ORDER = ("root", "targets", "catalog")
_KINDS: dict[str, type[Root] | type[Targets]] = {"root": Root, "targets": Targets, "catalog": Targets}
_LIVES = {"root": ROOT_LIFE, "targets": TARGETS_LIFE, "catalog": CATALOG_LIFE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """See the module. ``documents``: by role, in the order of ``ORDER``; ``names``: key id -> holder, as the maker says."""

    documents: Mapping[str, Metadata[Any]]
    names: Mapping[str, str]

    def encode(self) -> bytes:
        """The file's bytes."""
        documents = {role: self.documents[role].to_dict() for role in ORDER if role in self.documents}
        value = {"schema": 1, "kind": KIND, "documents": documents, "names": dict(self.names)}
        return json.dumps(value, indent=2).encode() + b"\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reviewed:
    """One document that may be shown and signed. ``sha256``: of what is signed, to be compared between holders."""

    role: str
    metadata: Metadata[Any]
    authorities: tuple[Authority, ...]
    lines: tuple[str, ...]
    sha256: str

    @property
    def standing(self) -> Standing:
        """How far it is."""
        return cosigning.standing(self.metadata, self.authorities)

    def named(self, keyid: str) -> bool:
        """Whether a key's signature counts here."""
        return any(keyid in authority.keys for authority in self.authorities)


@dataclass(frozen=True, kw_only=True, slots=True)
class RootChange:
    """What a new root changes; everything empty renews the expiry. Removed keys are key ids."""

    add_root: Mapping[str, Key]
    remove_root: tuple[str, ...]
    root_threshold: int | None
    add_targets: Mapping[str, Key]
    remove_targets: tuple[str, ...]
    targets_threshold: int | None
    online: Mapping[str, Key] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetsChange:
    """What a new targets role changes; everything empty renews the expiry."""

    add: Mapping[str, Key]
    remove: tuple[str, ...]
    threshold: int | None
    online: Mapping[str, Key] | None


def read(path: Path) -> Request:
    """A request from its file.

    Raises:
        Usage: missing, or not such a file.
    """
    try:
        value = canonical.refuse_repeated_keys(path.read_bytes(), what="signing request")
    except (OSError, ValueError, RecursionError, Malformed) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Usage(f"{path}: {reason}; wanted a signing request") from None
    try:
        if value["kind"] != KIND:
            raise Usage(f"{path}: wanted a signing request")
        if value["schema"] != 1:
            raise Usage(f"{path}: schema {value['schema']}: wanted 1")
        unknown = set(value["documents"]) - set(ORDER)
        if unknown or not value["documents"]:
            raise Usage(f"{path}: wanted documents of {', '.join(ORDER)}, got {', '.join(sorted(unknown)) or 'none'}")
        documents: dict[str, Metadata[Any]] = {
            role: offline_roles.parse(json.dumps(value["documents"][role]).encode(), _KINDS[role], f"{path}: {role}")
            for role in ORDER
            if role in value["documents"]
        }
        names = keyring.checked_names(value["names"], str(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise Usage(f"{path}: wanted a signing request: {error!r}") from None
    return Request(documents=documents, names=names)


def write(path: Path, request: Request) -> None:
    """Writes a request whole or not at all. It holds no secret."""
    key_files.replace(path, request.encode())


def rotate(
    trusted: Trusted,
    *,
    root: RootChange | None,
    targets: TargetsChange | None,
    names: Mapping[str, str],
    now: dt.datetime,
) -> Request:
    """The next root, the next targets, or both, unsigned, from the last verified ones.

    Raises:
        Usage: the change cannot be; see ``offline_roles.with_keys``.
    """
    documents: dict[str, Metadata[Any]] = {}
    if root is not None:
        old = RootWish.read(trusted.root)
        wish = RootWish(
            root=offline_roles.with_keys(
                old.root, add=root.add_root, remove=root.remove_root, threshold=root.root_threshold
            ),
            targets=offline_roles.with_keys(
                old.targets, add=root.add_targets, remove=root.remove_targets, threshold=root.targets_threshold
            ),
            online=old.online if root.online is None else root.online,
        )
        documents["root"] = Metadata(wish.build(trusted.root.version + 1, offline_roles.after(now, ROOT_LIFE)))
    if targets is not None:
        if trusted.targets_role is None:
            raise Usage("targets: this folder holds none to begin with")
        held = TargetsWish.read(trusted.targets_role)
        next_wish = TargetsWish(
            catalog=offline_roles.with_keys(
                held.catalog, add=targets.add, remove=targets.remove, threshold=targets.threshold
            ),
            online=held.online if targets.online is None else targets.online,
        )
        expires = offline_roles.after(now, TARGETS_LIFE)
        documents["targets"] = Metadata(next_wish.build(trusted.targets_role.version + 1, expires))
    return Request(documents=documents, names=names)


def review(
    request: Request, trusted: Trusted | None, *, own_names: Mapping[str, str], now: dt.datetime
) -> tuple[Reviewed, ...]:
    """Checks every document of a request against what this holder trusts; see the module.

    Args:
        trusted: None for a ceremony: there is nothing before it.
        own_names: key id -> holder, of this holder's own record; it wins over the request's.

    Raises:
        RefusedForSafety: a document is not the next version, holds more than it may, lives too long or no more, or brings an
            online key back that an earlier root took out.
    """
    names = {keyid: f"{name} (as the request says)" for keyid, name in request.names.items()}
    if trusted is None:
        names = dict(request.names)
    names |= own_names
    found = []
    roles = {role: metadata.signed for role, metadata in request.documents.items()}
    next_root = roles.get("root")
    if trusted is None and set(roles) != set(ORDER):
        raise RefusedForSafety(
            f"request: this folder trusts no root yet, and a ceremony has {', '.join(ORDER)}; got {', '.join(roles)}",
            advice="take the fleet's documents in with 'skerry keys join'",
        )
    if trusted is not None and "catalog" in roles:
        raise RefusedForSafety("request: a catalog comes with a ceremony only; later ones are skerry approve's")
    for role, signed in roles.items():
        base = _base(role, trusted)
        wanted = 1 if base is None else base.version + 1
        if signed.version != wanted:
            raise RefusedForSafety(
                f"{role}: wanted version {wanted}, got {signed.version}",
                advice="take the versions between in with 'skerry keys accept'" if signed.version > wanted else "",
            )
        if not now < signed.expires <= now + _LIVES[role] + CLOCK_SLACK:
            raise RefusedForSafety(
                f"{role}: it expires {signed.expires:%Y-%m-%d}, wanted within {_LIVES[role].days} days from now, {now:%Y-%m-%d %H:%M} UTC by "
                "this machine's clock"
            )
        metadata = request.documents[role]
        authorities: tuple[Authority, ...]
        if role == "catalog":
            if signed.to_dict() != offline_roles.first_catalog(signed.expires).to_dict():
                raise RefusedForSafety("catalog: a ceremony's lists no bundle and no floor")
            authorities = (Authority.of(roles["targets"], layout.CATALOG_ROLE),)
            lines: tuple[str, ...] = (f"catalog version 1, expires {signed.expires:%Y-%m-%d}", "  no bundle, no floor")
        else:
            offline_roles.require_plain(role, signed)
            if role == "root":
                authorities = cosigning.authorities_of_root(trusted.root if trusted else None, signed)
            else:
                delegator = next_root if next_root is not None else trusted.root if trusted else None
                assert delegator is not None
                authorities = (Authority.of(delegator, role),)
            lines = offline_roles.difference(base, signed, names)
        sha256 = canonical.sha256(metadata.signed_bytes)
        found.append(Reviewed(role=role, metadata=metadata, authorities=authorities, lines=lines, sha256=sha256))
    _require_apart(roles, trusted)
    if trusted is not None:
        _require_gone(roles, trusted)
    return tuple(found)


def digest(reviewed: tuple[Reviewed, ...]) -> str:
    """One sha256 of all that is signed, for holders to compare before they sign. Signatures do not change it."""
    return canonical.sha256("".join(f"{one.role} {one.sha256}\n" for one in reviewed).encode())


def sign(request: Request, reviewed: tuple[Reviewed, ...], signer: Signer) -> Request:
    """The request with this signer's signature on every document that names its key.

    Raises:
        RefusedForSafety: none of them does.
    """
    keyid = signer.public_key.keyid
    documents = dict(request.documents)
    if not any(one.named(keyid) for one in reviewed):
        raise RefusedForSafety(f"key {keyid[:16]} is named by none of {', '.join(one.role for one in reviewed)}")
    for one in reviewed:
        if one.named(keyid):
            documents[one.role] = cosigning.add_signature(one.metadata, signer, one.authorities)
    return replace(request, documents=documents)


def merge(mine: Request, theirs: Request, reviewed: tuple[Reviewed, ...]) -> Request:
    """One request with the signatures of both; ``reviewed`` is mine.

    Raises:
        RefusedForSafety: they do not say the same.
    """
    if set(theirs.documents) != set(mine.documents):
        raise RefusedForSafety(
            f"requests: one has {', '.join(mine.documents)}, the other {', '.join(theirs.documents)}; wanted the same"
        )
    documents = {
        one.role: cosigning.merge([one.metadata, theirs.documents[one.role]], one.authorities) for one in reviewed
    }
    return replace(mine, documents=documents)


def keys_of(trusted: Trusted) -> dict[str, Key]:
    """Every offline key that the last root and targets name."""
    wish = RootWish.read(trusted.root)
    found = {**wish.root.keys, **wish.targets.keys}
    if trusted.targets_role is not None:
        found |= TargetsWish.read(trusted.targets_role).catalog.keys
    return found


def online_of(trusted: Trusted) -> dict[str, Key]:
    """The server's keys that the last root names."""
    return dict(RootWish.read(trusted.root).online)


def other_online(held: Mapping[str, Key], *, add: Mapping[str, Key], remove: tuple[str, ...]) -> dict[str, Key]:
    """Other online keys: ``remove`` wins, since a file without a newest one still lists the key that it replaces.

    Raises:
        Usage: none would be left.
    """
    found = {keyid: key for keyid, key in {**held, **add}.items() if keyid not in remove}
    if not found:
        raise Usage("online: wanted at least one key of the server")
    return found


def orphans_targets(request: Request, trusted: Trusted) -> bool:
    """Whether the request's root would not accept the last targets, so that targets must be signed anew with it."""
    root = request.documents.get("root")
    if root is None or trusted.targets is None:
        return False
    last = offline_roles.parse(trusted.targets, Targets, "targets")
    return not cosigning.standing(last, (Authority.of(root.signed, Targets.type),)).complete


def _base(role: str, trusted: Trusted | None) -> Root | Targets | None:
    if trusted is None:
        return None
    return trusted.root if role == "root" else trusted.targets_role


def _require_apart(roles: Mapping[str, Root | Targets], trusted: Trusted | None) -> None:
    root = roles.get("root") or (trusted.root if trusted else None)
    targets = roles.get("targets") or (trusted.targets_role if trusted else None)
    if not isinstance(root, Root) or not isinstance(targets, Targets):
        return
    wish, delegated = RootWish.read(root), TargetsWish.read(targets)
    offline = set(wish.root.keys) | set(wish.targets.keys) | set(delegated.catalog.keys)
    both = offline & (set(wish.online) | set(delegated.online))
    if both:
        raise RefusedForSafety(
            f"key {min(both)[:16]} is the server's online key: it may sign no offline role, or a stolen server approves"
        )


def _require_gone(roles: Mapping[str, Root | Targets], trusted: Trusted) -> None:
    # Keys go because they were stolen or may have been. Whoever has one signs all online roles again the day it is back.
    held = RootWish.read(trusted.root).online
    past = [RootWish.read(offline_roles.parse(data, Root, "root").signed).online for data in trusted.roots]
    gone = {keyid for online in past for keyid in online} - held.keys()
    for role, signed in roles.items():
        wish = RootWish.read(signed) if isinstance(signed, Root) else TargetsWish.read(signed)
        back = sorted(gone & wish.online.keys())
        if back:
            raise RefusedForSafety(
                f"{role}: it brings back the online key {back[0][:16]}, which an earlier root took out",
                advice="make another one with 'skerry-server new-online-key', and add what its online.pub.json calls newest",
            )
