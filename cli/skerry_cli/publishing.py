"""From a folder to the fleet: push a bundle to the register, and put it in the signed catalog.

Pushing needs an engineer's token, approving an approver's token *and* key. The steps are the same for a person and for the
demo; what an approval signs is decided in ``catalog``, from the operator's own root.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from securesystemslib.signer import Signer
from skerry_contract import floors as floor_rules
from skerry_contract import ids, layout
from skerry_contract import manifest as m

from skerry_cli import catalog, encrypted_models, rebasing, restoring, sealing
from skerry_cli.bundle import Bundle, check_files
from skerry_cli.bundle_source import open_pool
from skerry_cli.client import Api, quote
from skerry_cli.errors import Failed, RefusedForSafety, Usage

_MOST_IN_A_HEADER = 4096
_MAX_SIGNATURE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What the register says of a bundle after a push. ``sent_bytes``: of files that it did not have."""

    digest: str
    state: str
    reason: str
    sent_files: int
    sent_bytes: int


def push(
    api: Api,
    bundle: Bundle,
    *,
    content_key: Path | None = None,
    must_be_encrypted: frozenset[str] = frozenset(),
    clear: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Pushed:
    """Sends manifest and missing files, and has the server validate the bundle.

    Args:
        content_key: file with that of an encrypted bundle; None for the one beside its folder.
        must_be_encrypted: as ``encrypted_models.read``; of these nothing is sent in the clear.
        clear: in the clear is meant, though another version of the model is encrypted.

    Raises:
        RefusedForSafety: the folder does not match its manifest; it is in the clear and must not be.
        Failed, Usage: the server does not take it; an encrypted bundle has no content key here.
    """
    encrypted_models.require(bundle.manifest, must_be_encrypted)
    check_files(bundle)
    encrypted = bundle.manifest.encryption is not None
    if content_key is not None and not encrypted:
        raise Usage(f"{bundle.folder}: --content-key goes with an encrypted bundle; this one is not")
    key = sealing.key_for(bundle.manifest, bundle.folder, content_key) if encrypted else None
    signature = bundle.signature or b""
    short = 0 < len(signature) <= _MOST_IN_A_HEADER
    headers = {"X-Skerry-Signature": base64.b64encode(signature).decode()} if short else None
    answer = api.send("POST", f"/api/v1/bundles{'?clear=true' if clear else ''}", bundle.data, headers)
    if answer.get("digest") != bundle.digest:
        raise RefusedForSafety(f"the server calls the bundle {answer.get('digest')}, it is {bundle.digest}")
    if signature and not short:
        api.send("PUT", f"/api/v1/bundles/{bundle.digest}/signature", signature)
    missing = set(answer.get("missing", ()))
    sent = [file for file in {f.sha256: f for f in bundle.manifest.files()}.values() if file.sha256 in missing]
    for file in sent:
        say(f"sending {file.path} ({file.size} bytes)")
        place = bundle.folder / file.path
        with place.open("rb") if key is None else sealing.sealed_copy(place, key, file) as stream:
            api.send("PUT", f"/api/v1/blobs/{file.sha256}", stream, {"Content-Length": str(file.size)})
    state, reason = str(answer.get("state")), ""
    if key is not None and not answer.get("content_key"):
        say("giving the server the content key, over TLS")
        api.put(f"/api/v1/bundles/{bundle.digest}/key", {"key": base64.b64encode(key).decode()})
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalDocuments:
    """What makes up a proposal; none of it is believed before an approver's tool has rebuilt it."""

    metadata: bytes
    floors: bytes
    targets: bytes | None
    root: bytes | None


class Approver:
    """One approver at work: reads the catalog from their own root, changes it, signs.

    Args:
        repository_url: where the catalog is read; root: bytes of the operator's root.json.
        cache_dir: remembers what was seen, against rollback; one per fleet.
        model_signers: name -> public key (PEM); one of them must have signed each added bundle. None asks for nobody's.
        must_be_encrypted: as ``encrypted_models.read``; of these no bundle in the clear is signed.
        say: told who signed what.
        names: key id -> who holds it, for what a person is shown.
    """

    def __init__(
        self,
        api: Api,
        *,
        root: bytes,
        signer: Signer,
        name: str,
        cache_dir: Path,
        repository_url: str | None = None,
        model_signers: Mapping[str, bytes] | None = None,
        must_be_encrypted: frozenset[str] = frozenset(),
        say: Callable[[str], None] = lambda _: None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._names = dict(names or {})
        self._model_signers = model_signers
        self._must_be_encrypted = must_be_encrypted
        self._say = say
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
        targets: bytes | None = None,
        root: bytes | None = None,
        confirm: Callable[[catalog.Difference], bool] = lambda _: True,
        leave: bool = False,
    ) -> catalog.Proposal:
        """Signs the next catalog; posts it when this signature completes it, else leaves it on the server where asked.

        Raises:
            Usage: this approver is not among ``approvers``, who stand in the signed entries. Else as ``catalog.propose``.

        Args:
            targets, root: signed, to appear with it; their approvers sign it.
            leave: an incomplete one waits on the server for the next approver.
        """
        named = tuple(approvers) or (self._name,)
        if self._name not in named:
            raise Usage(f"approvers: {', '.join(named)} would stand in what {self._name} signs")
        proposal = catalog.propose(
            self._ground(now, targets, root),
            change,
            source=self._source(folder),
            signer=self._signer,
            approvers=named,
            now=now,
            confirm=confirm,
        )
        return self._post(replace(proposal, targets=targets, root=root), leave=leave)

    def cosign(
        self,
        metadata: bytes,
        floors: bytes,
        *,
        now: dt.datetime,
        folder: Path | None = None,
        lower_floors: bool = False,
        targets: bytes | None = None,
        root: bytes | None = None,
        confirm: Callable[[catalog.Difference], bool] = lambda _: True,
        leave: bool = False,
        waiting: str = "",
    ) -> catalog.Proposal:
        """Adds this approver's signature to a colleague's proposal; posts it when that completes it. ``leave``: as ``change``.

        ``waiting``: the proposal on the server that this one is, where it came from there.
        """
        proposal = catalog.cosign(
            self._ground(now, targets, root),
            metadata,
            floors,
            source=self._source(folder),
            signer=self._signer,
            approver=self._name,
            now=now,
            lower_floors=lower_floors,
            confirm=confirm,
        )
        return self._post(replace(proposal, targets=targets, root=root), leave=leave, waiting=waiting)

    def floor_change(
        self, model: str, version: str | None, *, forced: bool, lower: bool, now: dt.datetime
    ) -> catalog.Change:
        """Another floor; a forced one that stands above it goes down or away with it, which ``lower`` must allow."""
        verified = self._verified(now)
        force: dict[str, str | None] = {model: version} if forced else {}
        standing = verified.forced.get(model)
        if standing is not None and not forced:
            if version is None or ids.version_key(standing) > ids.version_key(version):
                force = {model: version}
        if (
            forced
            and version is not None
            and not floor_rules.allows({model: verified.floors.get(model, version)}, model, version)
        ):
            # The floor above it stays: it is what may go on serving that is asked for.
            return catalog.Change(forced=force, lower_floors=lower)
        return catalog.Change(floors={model: version}, forced=force, lower_floors=lower)

    def rebased(
        self, metadata: bytes, floors: bytes, *, now: dt.datetime, lower_floors: bool = False
    ) -> rebasing.Rebased:
        """What a proposal that another catalog made void still changes."""
        documents = rebasing.Documents(self._url, open_pool(self._ca_file))
        return rebasing.rebase(self._verified(now), metadata, floors, documents=documents, lower_floors=lower_floors)

    def _ground(self, now: dt.datetime, targets: bytes | None, root: bytes | None) -> catalog.VerifiedCatalog:
        verified = self._verified(now)
        return verified if targets is None else catalog.under_targets(verified, targets, root=root, names=self._names)

    def _verified(self, now: dt.datetime) -> catalog.VerifiedCatalog:
        return catalog.read_catalog(
            self._url, root=self._root, cache_dir=self._cache_dir / "catalog", ca_file=self._ca_file, now=now
        )

    def _source(self, folder: Path | None) -> catalog.BundleSource:
        source: catalog.BundleSource = catalog.RepositorySource(
            self._url, self._manifest, self._ca_file, self._content_key
        )
        if folder is not None:
            source = catalog.FolderSource(folder, self._content_key)
        source = encrypted_models.EncryptedSource(source, self._must_be_encrypted)
        if self._model_signers is None:
            return source
        from skerry_cli.model_signers import SignedSource

        own = None if folder is None else folder / m.SIGNATURE_FILE

        def signature(digest: str) -> bytes | None:
            if own is not None and own.is_file():
                return own.read_bytes()
            return self._api.fetch(f"/api/v1/bundles/{quote(digest)}/signature", max_bytes=_MAX_SIGNATURE_BYTES)

        return SignedSource(source, self._model_signers, signature, self._say)

    def _content_key(self, digest: str) -> bytes:
        """What the server keeps for an encrypted bundle; whether it is the one that the manifest names, the caller looks."""
        answer = self._api.find(f"/api/v1/bundles/{quote(digest)}/key")
        if answer is None:
            raise Failed(f"bundle {digest[:12]}: the server has no content key", advice="push the bundle again")
        try:
            return base64.b64decode(answer["key"], validate=True)
        except (KeyError, TypeError, ValueError):
            raise RefusedForSafety(f"bundle {digest[:12]}: what the server gives is no content key") from None

    def _manifest(self, digest: str) -> bytes:
        data = self._api.fetch(f"/api/v1/bundles/{quote(digest)}/manifest", max_bytes=m.MAX_BYTES)
        if data is None:
            raise Failed(f"bundle {digest[:12]}: the register has no manifest", advice="push the bundle first")
        return data

    def _post(self, proposal: catalog.Proposal, *, leave: bool, waiting: str = "") -> catalog.Proposal:
        catalog_text = proposal.metadata.decode()
        documents = {"metadata": catalog_text, "floors": proposal.floors.decode()}
        for name, data in (("targets", proposal.targets), ("root", proposal.root)):
            documents |= {} if data is None else {name: data.decode()}
        base = "/api/v1/repository"
        if waiting:
            self.answer = self._api.post(f"{base}/proposals/{quote(waiting)}/signatures", {"metadata": catalog_text})
        elif proposal.complete and proposal.targets is None:
            self.answer = self._api.post(f"{base}/metadata", {"role": layout.CATALOG_ROLE, **documents})
        elif proposal.complete or leave:
            self.answer = self._api.post(f"{base}/proposals", documents)
        if proposal.complete:
            restoring.remember(self._cache_dir, {layout.CATALOG_ROLE: documents.pop("metadata"), **documents})
        return proposal


def write_proposal(path: Path, proposal: catalog.Proposal) -> None:
    """Keeps an incomplete proposal for the next approver. It holds no secret."""
    document: dict[str, Any] = {"schema": 1, "metadata": proposal.metadata.decode(), "floors": proposal.floors.decode()}
    for name, data in (("targets", proposal.targets), ("root", proposal.root)):
        document |= {} if data is None else {name: data.decode()}
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(json.dumps(document), encoding="utf-8")
    staging.replace(path)


def read_proposal(path: Path) -> ProposalDocuments:
    """A colleague's proposal.

    Raises:
        Usage: missing, or not such a file.
    """
    try:
        document = json.loads(path.read_bytes())
        if document["schema"] != 1:
            raise Usage(f"{path}: schema {document['schema']}: wanted 1")
        return proposal_documents(document)
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}; wanted a proposal") from None
    except (ValueError, KeyError, TypeError):
        raise Usage(f"{path}: wanted a proposal written by skerry approve") from None


def proposal_documents(document: Mapping[str, Any]) -> ProposalDocuments:
    """The documents of a proposal, from its file or the server's answer. Raises ``KeyError`` without a catalog."""
    targets, root = document.get("targets"), document.get("root")
    return ProposalDocuments(
        metadata=str(document["metadata"]).encode(),
        floors=str(document["floors"]).encode(),
        targets=None if targets is None else str(targets).encode(),
        root=None if root is None else str(root).encode(),
    )
