"""Approval: the next version of the catalog, made from the last one that the operator's own root vouches for.

Owns applying a named change to the last catalog, showing the difference, and signing. Reading that catalog is
``verified_catalog``, fetching and checking bundles ``bundle_source``; what callers need of both is named here too. Rules:

- Nothing that the server made is ever signed. ``read_catalog`` verifies the last catalog from the operator's root;
  ``propose`` builds a new document from it and the named change; ``cosign`` rebuilds a colleague's proposal from the
  difference and signs its own copy, only when the two are the same document.
- A bundle enters the catalog only after its manifest and all its files were fetched and matched their digests.
- A catalog older than one this operator has seen is refused, whoever signed it.
- What the server says is not what the approver reads: who submitted a bundle is a name or is refused, and each line of a
  difference stays one line.

Left to others: sending the bytes (the command posts them) and who may (the server asks for the role of an approver; devices
ask for the keys).
"""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Signer
from skerry_contract import floors as floor_rules
from skerry_contract import ids, layout
from skerry_contract.errors import ContractError
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, TargetFile, Targets

from skerry_cli import cosigning, output
from skerry_cli.bundle_source import BundleSource, FolderSource, RepositorySource, checked_bundle
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_cli.offline_roles import CATALOG_LIFE, CLOCK_SLACK
from skerry_cli.verified_catalog import Entry, VerifiedCatalog, entries, read_catalog, under_targets

__all__ = [
    "Addition",
    "BundleSource",
    "Change",
    "Difference",
    "Entry",
    "FolderSource",
    "Proposal",
    "change_between",
    "RepositorySource",
    "VerifiedCatalog",
    "cosign",
    "entries",
    "propose",
    "read_catalog",
    "require_colleague",
    "under_targets",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Addition:
    """A bundle to approve. ``submitter``: who pushed it, a token's name as the server's register says; it is signed with the entry."""

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
        forced: model -> lowest version that may go on serving, at most the floor; None takes that away.
        lower_floors: must be True for a floor, forced or not, to go down or away.
    """

    add: tuple[Addition, ...] = ()
    remove: tuple[tuple[str, str], ...] = ()
    floors: Mapping[str, str | None] = field(default_factory=dict)
    forced: Mapping[str, str | None] = field(default_factory=dict)
    lower_floors: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What a proposal changes, for a person (``text``) and for programs (``to_json``).

    Attributes:
        beyond: (model, floor, highest version listed or empty) of every floor that moves here and that no listed bundle reaches.
        brings: of new targets, and a new root, that appear with the catalog: who comes in and who goes out.
    """

    from_version: int
    to_version: int
    was_expired: bool
    expires_before: str
    expires_after: str
    added: tuple[Entry, ...]
    removed: tuple[Entry, ...]
    floors: tuple[tuple[str, str | None, str | None], ...]
    forced: tuple[tuple[str, str | None, str | None], ...] = ()
    beyond: tuple[tuple[str, str, str], ...] = ()
    brings: tuple[str, ...] = ()

    def text(self) -> str:
        """The lines as one text."""
        return "\n".join(self.lines())

    def lines(self) -> tuple[str, ...]:
        """For a terminal; ``+`` in, ``-`` out, ``!`` a floor that goes down or away. Nothing in a value can begin a line of its own."""
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
        for model, before, after in self.forced:
            mark = "!" if _goes_down(before, after) else "~"
            lines.append(f"{mark} forced floor of {model}: {before or 'none'} -> {after or 'none'}")
            if after is not None and not _goes_down(before, after):
                lines.append(f"    devices that serve {model} below {after} stop it at once")
        for model, floor, highest in self.beyond:
            lists = f"the highest is {highest}" if highest else "none is listed at all"
            lines.append(
                f"! no bundle of {model} reaches {floor} ({lists}): no device may begin any, until one that does is approved"
            )
        lines += self.brings
        if not (self.added or self.removed or self.floors or self.forced):
            lines.append("  no bundle and no floor changes: this renews the expiry")
        return tuple(output.visible(line) for line in lines)

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
            "forced": [{"model": model, "before": before, "after": after} for model, before, after in self.forced],
            "beyond": [{"model": model, "floor": floor, "highest": highest} for model, floor, highest in self.beyond],
            "brings": list(self.brings),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A signed next catalog.

    Attributes:
        metadata: to post as ``metadata`` with the role ``catalog``; a colleague co-signs the same bytes first while
            ``complete`` is False.
        floors: the text of ``floors.json`` that belongs to it, to post beside.
        targets, root: signed roles that must appear with it in one snapshot, where it was made under them.
        signed: key ids whose signatures hold; threshold: how many are needed.
    """

    metadata: bytes
    floors: bytes
    difference: Difference
    signed: tuple[str, ...]
    threshold: int
    targets: bytes | None = None
    root: bytes | None = None

    @property
    def complete(self) -> bool:
        """Whether devices will accept it."""
        return len(self.signed) >= self.threshold


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
        RefusedForSafety: a bundle that is not what its digest says, a second digest for a version, a submitter or an approver
            whose name is none, a bundle below its floor, a floor that goes down without ``lower_floors``, a key that is no approver's, or no confirmation.
        Usage: the change names what is not there or is there already.
        Failed: a bundle cannot be fetched.
    """
    if len(approvers) < verified.threshold or len(set(approvers)) != len(approvers):
        raise Usage(
            f"approvers: wanted {verified.threshold} different names at least, got {', '.join(approvers)}",
            advice="name who else will sign with --with",
        )
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
        RefusedForSafety: the proposal is not the next version of the verified catalog with nothing but a change in it, no
            approver has signed it, or any reason of ``propose``.
        Usage, Failed: as ``propose``.
    """
    try:
        theirs = Metadata[Targets].from_bytes(metadata)
    except (tuf_errors.RepositoryError, ContractError) as error:
        raise Usage(f"proposal: {error}") from None
    if not isinstance(theirs.signed, Targets) or theirs.signed.version != verified.catalog.version + 1:
        raise RefusedForSafety(
            f"proposal: wanted version {verified.catalog.version + 1} of the catalog, this is {theirs.signed.version}",
            advice="another catalog appeared since: its signatures are void, rebase it",
        )
    require_colleague(verified, theirs)
    if not now < theirs.signed.expires <= now + CATALOG_LIFE + CLOCK_SLACK:
        raise RefusedForSafety(
            f"proposal: it expires {theirs.signed.expires:%Y-%m-%d}, wanted within {CATALOG_LIFE.days} days from now, {now:%Y-%m-%d %H:%M} UTC by "
            "this machine's clock",
            advice="compare the clocks of who proposed it and of this machine",
        )
    before, after = entries(verified.catalog), entries(theirs.signed)
    added = {key: entry for key, entry in after.items() if before.get(key) != entry}
    names = {entry.approvers for entry in added.values()}
    if len(names) > 1 or any(approver not in group for group in names):
        raise RefusedForSafety(f"proposal: its new entries do not all name {approver!r} among their approvers")
    change = change_between(verified, theirs.signed, floors, lower_floors=lower_floors)
    new, own_floors = _apply(verified, change, next(iter(names), ()), theirs.signed.expires, source)
    if own_floors != floors or new.to_dict() != theirs.signed.to_dict():
        raise RefusedForSafety("proposal: it holds more than a change of bundles and floors")
    return _sign(verified, new, own_floors, _difference(verified, new, own_floors), signer, theirs.signatures, confirm)


def require_colleague(verified: VerifiedCatalog, proposal: Metadata[Targets]) -> None:
    """Checks that an approver signed these very bytes: else whoever holds the server could have made, or changed, them.

    Raises:
        RefusedForSafety: none has.
    """
    if not _holding(verified, proposal):
        raise RefusedForSafety(
            "proposal: no approver's signature holds over it: it was made or changed by somebody who is none",
            advice="look at who holds the server, or the file on its way here; have the colleague propose it anew",
        )


def change_between(verified: VerifiedCatalog, new: Targets, floors: bytes, *, lower_floors: bool) -> Change:
    """What makes ``new`` of the verified catalog. Raises ``Usage`` for floors that cannot be read."""
    before, after = entries(verified.catalog), entries(new)
    try:
        new_floors, new_forced = floor_rules.parse(floors), floor_rules.parse_forced(floors)
    except ContractError as error:
        raise Usage(f"proposal: {error}") from None
    return Change(
        add=tuple(
            Addition(model=e.model, version=e.version, digest=e.digest, submitter=e.submitter)
            for key, e in after.items()
            if before.get(key) != e
        ),
        remove=tuple(key for key in before if key not in after),
        floors=_moved(verified.floors, new_floors),
        forced=_moved(verified.forced, new_forced),
        lower_floors=lower_floors,
    )


def _moved(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str | None]:
    return {m: after.get(m) for m in sorted(before.keys() | after.keys()) if before.get(m) != after.get(m)}


def _apply(
    verified: VerifiedCatalog, change: Change, approvers: tuple[str, ...], expires: dt.datetime, source: BundleSource
) -> tuple[Targets, bytes]:
    targets = copy.deepcopy(verified.catalog.targets)
    listed = entries(verified.catalog)
    floors = _new_floors("floor", verified.floors, change.floors, lower=change.lower_floors)
    forced = _new_floors("forced floor", verified.forced, change.forced, lower=change.lower_floors)
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
        _require_name(name, "submitter", addition.submitter)
        for approver in approvers:
            _require_name(name, "approver", approver)
        data = checked_bundle(addition.model, addition.version, addition.digest, source)
        if not floor_rules.allows(floors, addition.model, addition.version):
            floor = floors[addition.model]
            raise RefusedForSafety(f"add {name}: it is below the floor {floor}, so no device could activate it")
        path = layout.manifest_target(ids.ModelName(addition.model), addition.version)
        custom = {"submitter": addition.submitter, "approvers": list(approvers)}
        targets[path] = TargetFile(len(data), {"sha256": addition.digest}, path, {"custom": custom})
    try:
        floors_data = floor_rules.encode(floors, forced)
    except ContractError as error:
        raise Usage(f"{error}", advice="a forced floor goes with a floor at least as high") from None
    targets[layout.FLOORS_TARGET] = TargetFile.from_data(layout.FLOORS_TARGET, floors_data, ["sha256"])
    return Targets(version=verified.catalog.version + 1, expires=expires, targets=targets), floors_data


def _require_name(added: str, what: str, text: str) -> None:
    # The grammar of a token's name. Free text would be read by whoever signs next, as if this tool had said it.
    try:
        ids.device_id(text)
    except ContractError:
        raise RefusedForSafety(
            f"add {added}: its {what} is {text[:60]!r}, wanted a name: [a-z0-9][a-z0-9-]{{0,62}}",
            advice="the server or a colleague's proposal says so; tokens cannot have such names",
        ) from None


def _new_floors(what: str, old: Mapping[str, str], wanted: Mapping[str, str | None], *, lower: bool) -> dict[str, str]:
    floors = dict(old)
    for model, version in wanted.items():
        try:
            ids.model_name(model)
            if version is not None:
                ids.version_key(version)
        except ContractError as error:
            raise Usage(f"{what} of {model!r}: {error}") from None
        if _goes_down(old.get(model), version) and not lower:
            raise RefusedForSafety(
                f"{what} of {model}: {old.get(model)} -> {version or 'none'} lowers it",
                advice="--lower allows it, for devices that have not seen the higher one: those that have keep it",
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


def _difference(verified: VerifiedCatalog, new: Targets, floors: bytes) -> Difference:
    before, after = entries(verified.catalog), entries(new)
    moved = _steps(verified.floors, floor_rules.parse(floors))
    forced = _steps(verified.forced, floor_rules.parse_forced(floors))
    return Difference(
        from_version=verified.catalog.version,
        to_version=new.version,
        was_expired=verified.expired,
        expires_before=verified.catalog.expires.isoformat(),
        expires_after=new.expires.isoformat(),
        added=tuple(after[key] for key in sorted(after) if key not in before),
        removed=tuple(before[key] for key in sorted(before) if key not in after),
        floors=moved,
        forced=forced,
        beyond=_beyond(
            {m: floor for m, was, floor in (*forced, *moved) if floor is not None and not _goes_down(was, floor)}, after
        ),
        brings=verified.brings,
    )


def _beyond(raised: Mapping[str, str], listed: Mapping[tuple[str, str], Entry]) -> tuple[tuple[str, str, str], ...]:
    found = []
    for model, floor in sorted(raised.items()):
        highest = max((version for name, version in listed if name == model), key=ids.version_key, default="")
        if not highest or ids.version_key(highest) < ids.version_key(floor):
            found.append((model, floor, highest))
    return tuple(found)


def _steps(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[tuple[str, str | None, str | None], ...]:
    return tuple((model, before.get(model), version) for model, version in _moved(before, after).items())


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
    cosigning.make_signature(signed, signer)
    # An unknown key or a signature over something else counts for nothing and is not passed on.
    holding = _holding(verified, signed)
    signed = Metadata(new, {keyid: signed.signatures[keyid] for keyid in holding})
    return Proposal(
        metadata=signed.to_bytes(),
        floors=floors,
        difference=difference,
        signed=holding,
        threshold=verified.threshold,
    )


def _holding(verified: VerifiedCatalog, metadata: Metadata[Targets]) -> tuple[str, ...]:
    holding = []
    for keyid, signature in metadata.signatures.items():
        if keyid in verified.keys:
            with contextlib.suppress(UnverifiedSignatureError, VerificationError):
                verified.keys[keyid].verify_signature(signature, metadata.signed_bytes)
                holding.append(keyid)
    return tuple(holding)
