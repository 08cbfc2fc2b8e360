"""Two proposals met: the second is applied anew to the catalog that the first became.

A proposal follows one catalog. When another one appears first, its signatures are void: they are of a document that no device
would take. What can be kept is the change, and nobody's word is believed about it: an approver's signature must hold over the
proposal, and the catalog that it followed is fetched and verified again, so that the change is the difference of two documents
that approvers signed. The new proposal is then made, shown and signed like any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import urllib3
from skerry_contract import floors as floor_rules
from skerry_contract import layout
from skerry_contract.errors import ContractError
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Targets

from skerry_cli import catalog
from skerry_cli.catalog import Change, VerifiedCatalog, entries
from skerry_cli.errors import Failed, RefusedForSafety, Usage

_MOST_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebased:
    """What is left of a proposal's change on the new catalog.

    Attributes:
        approvers: who were to sign it, as its new entries say; empty without any.
        done: what the new catalog has already, in words.
    """

    change: Change
    approvers: tuple[str, ...]
    done: tuple[str, ...]


class Documents:
    """Reads files of the repository; nothing that it returns is believed."""

    def __init__(self, repository_url: str, pool: urllib3.PoolManager) -> None:
        self._url = repository_url.rstrip("/")
        self._pool = pool

    def read(self, path: str, most_bytes: int) -> bytes:
        """A file. Raises ``Failed``."""
        try:
            response = self._pool.request("GET", f"{self._url}/{path}", preload_content=False)
            with contextlib.closing(response):
                if response.status != 200:
                    raise Failed(f"{path}: HTTP {response.status}")
                data = response.read(most_bytes + 1)
        except urllib3.exceptions.HTTPError as error:
            raise Failed(f"{path}: {error}") from None
        if len(data) > most_bytes:
            raise RefusedForSafety(f"{path}: more than {most_bytes} bytes")
        return data


def rebase(
    verified: VerifiedCatalog, metadata: bytes, floors: bytes, *, documents: Documents, lower_floors: bool = False
) -> Rebased:
    """What a void proposal still changes.

    Args:
        verified: the catalog that is served now.
        metadata, floors: the proposal.

    Raises:
        RefusedForSafety: no approver signed it, or the catalog that it followed does not hold under the present approvers.
        Usage: it is no proposal, or nothing of it is left.
        Failed: the repository cannot be read.
    """
    try:
        theirs = Metadata[Targets].from_bytes(metadata)
    except tuf_errors.RepositoryError as error:
        raise Usage(f"proposal: {error}") from None
    if not isinstance(theirs.signed, Targets) or not 2 <= theirs.signed.version <= verified.catalog.version + 1:
        raise Usage(f"proposal: version {theirs.signed.version} cannot follow catalog {verified.catalog.version}")
    catalog.require_colleague(verified, theirs)
    followed = theirs.signed.version - 1
    base = verified if followed == verified.catalog.version else _base(verified, followed, documents)
    wanted = catalog.change_between(base, theirs.signed, floors, lower_floors=lower_floors)
    was, now = entries(theirs.signed), entries(verified.catalog)
    done: list[str] = []
    add = []
    for addition in wanted.add:
        there = now.get((addition.model, addition.version))
        if there is not None and there.digest == addition.digest:
            done.append(f"+ {addition.model}@{addition.version} is listed already")
        else:
            add.append(addition)
    remove = []
    for key in wanted.remove:
        if key in now:
            remove.append(key)
        else:
            done.append(f"- {key[0]}@{key[1]} is out already")
    change = Change(
        add=tuple(add),
        remove=tuple(remove),
        floors=_left("floor", wanted.floors, verified.floors, done),
        forced=_left("forced floor", wanted.forced, verified.forced, done),
        lower_floors=lower_floors,
    )
    renews = not (wanted.add or wanted.remove or wanted.floors or wanted.forced)
    if renews or not (change.add or change.remove or change.floors or change.forced):
        raise Usage(
            f"proposal: nothing of it is left to change on catalog {verified.catalog.version}",
            advice="withdraw it: skerry proposal withdraw ID",
        )
    names = {was[(a.model, a.version)].approvers for a in wanted.add}
    if len(names) > 1:
        raise RefusedForSafety("proposal: its new entries name different approvers")
    return Rebased(change=change, approvers=next(iter(names), ()), done=tuple(done))


def _left(
    what: str, wanted: Mapping[str, str | None], present: Mapping[str, str], done: list[str]
) -> dict[str, str | None]:
    left = {}
    for model, version in wanted.items():
        if present.get(model) == version:
            done.append(f"~ {what} of {model} is {version or 'none'} already")
        else:
            left[model] = version
    return left


def _base(verified: VerifiedCatalog, version: int, documents: Documents) -> VerifiedCatalog:
    """The catalog that a proposal followed, verified by the approvers of today."""
    data = documents.read(f"{layout.METADATA_DIR}/{version}.{layout.CATALOG_ROLE}.json", _MOST_BYTES)
    try:
        metadata = Metadata[Targets].from_bytes(data)
        verified.targets.verify_delegate(layout.CATALOG_ROLE, metadata.signed_bytes, metadata.signatures)
        base = metadata.signed
        if not isinstance(base, Targets) or base.version != version:
            raise RefusedForSafety(f"catalog {version}: the repository shows version {base.version}")
        info = base.targets.get(layout.FLOORS_TARGET)
        if info is None or info.length > floor_rules.MAX_BYTES:
            raise RefusedForSafety(f"catalog {version}: it lists no floors of a sensible size")
        text = documents.read(layout.target_file(info.path, info.hashes["sha256"]), floor_rules.MAX_BYTES)
        info.verify_length_and_hashes(text)
        floors, forced = floor_rules.parse(text), floor_rules.parse_forced(text)
    except tuf_errors.RepositoryError as error:
        raise RefusedForSafety(
            f"catalog {version}, which the proposal followed: {error}",
            advice="were approvers replaced since? then propose the change anew",
        ) from None
    except ContractError as error:
        raise RefusedForSafety(f"catalog {version}: {error}") from None
    return replace(verified, catalog=base, floors=floors, forced=forced)
