"""From a folder to the fleet: push a bundle to the register, and put it in the signed catalog.

Pushing needs an engineer's token, approving an approver's token *and* key. The steps are the same for a person and for the
demo; what an approval signs is decided in ``catalog``, from the operator's own root.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesystemslib.signer import Signer
from skerry_contract import ids, layout
from skerry_contract import manifest as m

from skerry_cli import catalog
from skerry_cli.bundle import Bundle, check_files
from skerry_cli.client import Api, quote
from skerry_cli.errors import Failed, RefusedForSafety, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What the register says of a bundle after a push. ``sent_bytes``: of files that it did not have."""

    digest: str
    state: str
    reason: str
    sent_files: int
    sent_bytes: int


def push(api: Api, bundle: Bundle, *, say: Callable[[str], None] = lambda _: None) -> Pushed:
    """Sends manifest and missing files, and has the server validate the bundle.

    Raises:
        RefusedForSafety: the folder does not match its manifest.
        Failed, Usage: the server does not take it.
    """
    check_files(bundle)
    headers = {"X-Skerry-Signature": base64.b64encode(bundle.signature).decode()} if bundle.signature else None
    answer = api.send("POST", "/api/v1/bundles", bundle.data, headers)
    if answer.get("digest") != bundle.digest:
        raise RefusedForSafety(f"the server calls the bundle {answer.get('digest')}, it is {bundle.digest}")
    missing = set(answer.get("missing", ()))
    sent = [file for file in {f.sha256: f for f in bundle.manifest.files()}.values() if file.sha256 in missing]
    for file in sent:
        say(f"sending {file.path} ({file.size} bytes)")
        with (bundle.folder / file.path).open("rb") as stream:
            api.send("PUT", f"/api/v1/blobs/{file.sha256}", stream, {"Content-Length": str(file.size)})
    state, reason = str(answer.get("state")), ""
    if state in ("draft", "rejected"):
        say("the server runs the bundle in a child process")
        # Who pushes a rejected bundle again wants it looked at again.
        again = "?again=true" if state == "rejected" else ""
        found = api.post(f"/api/v1/bundles/{bundle.digest}/validate{again}")
        state, reason = str(found.get("state")), str(found.get("reason") or "")
    return Pushed(
        digest=bundle.digest,
        state=state,
        reason=reason,
        sent_files=len(sent),
        sent_bytes=sum(file.size for file in sent),
    )


def find_bundle(api: Api, wish: str) -> dict[str, Any]:
    """A bundle of the register by ``MODEL@VERSION`` or digest.

    The answer is the server's: it may be about another bundle. What comes back is the one that was asked for.

    Raises:
        Usage: no such bundle, or neither form.
        RefusedForSafety: the server answers with another bundle.
    """
    model, at, version = wish.partition("@")
    if not at:
        found = dict(api.get(f"/api/v1/bundles/{ids.bundle_digest(wish)}"))
        if found.get("digest") != wish:
            raise RefusedForSafety(f"the server was asked for bundle {wish} and answers with {found.get('digest')}")
        return found
    ids.model_name(model)
    ids.version_key(version)
    listed = list(api.items("/api/v1/bundles", model=model))
    for item in listed:
        if (item["model"], item["version"]) == (model, version):
            return item
    raise Usage(
        f"{wish}: not in the register; {model} has {', '.join(str(i['version']) for i in listed) or 'no version'}"
    )


class Approver:
    """One approver at work: reads the catalog from their own root, changes it, signs.

    Args:
        repository_url: where the catalog is read; root: bytes of the operator's root.json.
        cache_dir: remembers what was seen, against rollback; one per fleet.
    """

    def __init__(
        self, api: Api, *, root: bytes, signer: Signer, name: str, cache_dir: Path, repository_url: str | None = None
    ) -> None:
        self._api = api
        self._root = root
        self._signer = signer
        self._name = name
        self._cache_dir = cache_dir
        self._url = repository_url or f"{api.server}/repository"
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.answer: dict[str, Any] = {}
        """What the server said to the catalog that it took last."""
        self._ca_file = cache_dir / "fleet-ca.pem"
        self._ca_file.write_text(api.ca_pem, encoding="ascii")

    def change(
        self,
        change: catalog.Change,
        *,
        now: dt.datetime,
        approvers: Sequence[str] = (),
        folder: Path | None = None,
        confirm: Callable[[catalog.Difference], bool] = lambda _: True,
    ) -> catalog.Proposal:
        """Signs the next catalog; posts it when this signature completes it."""
        proposal = catalog.propose(
            self._verified(now),
            change,
            source=self._source(folder),
            signer=self._signer,
            approvers=tuple(approvers) or (self._name,),
            now=now,
            confirm=confirm,
        )
        self._post(proposal)
        return proposal

    def cosign(
        self,
        metadata: bytes,
        floors: bytes,
        *,
        now: dt.datetime,
        folder: Path | None = None,
        lower_floors: bool = False,
        confirm: Callable[[catalog.Difference], bool] = lambda _: True,
    ) -> catalog.Proposal:
        """Adds this approver's signature to a colleague's proposal; posts it when that completes it."""
        proposal = catalog.cosign(
            self._verified(now),
            metadata,
            floors,
            source=self._source(folder),
            signer=self._signer,
            approver=self._name,
            now=now,
            lower_floors=lower_floors,
            confirm=confirm,
        )
        self._post(proposal)
        return proposal

    def _verified(self, now: dt.datetime) -> catalog.VerifiedCatalog:
        return catalog.read_catalog(
            self._url, root=self._root, cache_dir=self._cache_dir / "catalog", ca_file=self._ca_file, now=now
        )

    def _source(self, folder: Path | None) -> catalog.BundleSource:
        if folder is not None:
            return catalog.FolderSource(folder)
        return catalog.RepositorySource(self._url, self._manifest, self._ca_file)

    def _manifest(self, digest: str) -> bytes:
        data = self._api.fetch(f"/api/v1/bundles/{quote(digest)}/manifest", max_bytes=m.MAX_BYTES)
        if data is None:
            raise Failed(f"bundle {digest[:12]}: the register has no manifest", advice="push the bundle first")
        return data

    def _post(self, proposal: catalog.Proposal) -> None:
        if proposal.complete:
            self.answer = self._api.post(
                "/api/v1/repository/metadata",
                {
                    "role": layout.CATALOG_ROLE,
                    "metadata": proposal.metadata.decode(),
                    "floors": proposal.floors.decode(),
                },
            )


def write_proposal(path: Path, proposal: catalog.Proposal) -> None:
    """Keeps an incomplete proposal for the next approver. It holds no secret."""
    document = {"schema": 1, "metadata": proposal.metadata.decode(), "floors": proposal.floors.decode()}
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(json.dumps(document), encoding="utf-8")
    staging.replace(path)


def read_proposal(path: Path) -> tuple[bytes, bytes]:
    """A colleague's proposal: metadata and floors.

    Raises:
        Usage: missing, or not such a file.
    """
    try:
        document = json.loads(path.read_bytes())
        if document["schema"] != 1:
            raise Usage(f"{path}: schema {document['schema']}: wanted 1")
        return str(document["metadata"]).encode(), str(document["floors"]).encode()
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}; wanted a proposal") from None
    except (ValueError, KeyError, TypeError):
        raise Usage(f"{path}: wanted a proposal written by skerry approve") from None
