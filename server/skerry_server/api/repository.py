"""Routes: the update repository's metadata."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from skerry_server import proposals, upkeep
from skerry_server.api.bodies import Route
from skerry_server.api.context import Admin, Approver, Ctx, Limit, Viewer, require_role
from skerry_server.db.engine import reading
from skerry_server.errors import Invalid

router = APIRouter(prefix="/api/v1/repository", tags=["repository"], route_class=Route)


class SignedMetadata(BaseModel):
    """Metadata that the operator signed."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["root", "targets", "catalog"]
    metadata: str = Field(description="The text of the signed metadata file")
    floors: str | None = Field(default=None, description="The text of floors.json, with a catalog that changes it")


class SignedSet(BaseModel):
    """Metadata that appears together."""

    model_config = ConfigDict(extra="forbid")
    root: str | None = None
    targets: str | None = None
    catalog: str | None = None
    floors: str | None = Field(default=None, description="The text of floors.json, with a catalog that changes it")
    restoring: bool = Field(
        default=False,
        description="Versions of targets and catalog may be left out: of a server that a backup took back",
    )
    roots: list[str] = Field(
        default=[], max_length=256, description="Roots before `root` that this server does not have, oldest first"
    )


class Proposed(BaseModel):
    """A next catalog that lacks signatures."""

    model_config = ConfigDict(extra="forbid")
    metadata: str = Field(description="The catalog with at least one approver's signature")
    floors: str = Field(description="The text of its floors.json")
    targets: str | None = Field(
        default=None, description="Signed targets that appear with it, for another set of approvers"
    )
    root: str | None = Field(default=None, description="A signed root that appears with them")


class Signed(BaseModel):
    """The same catalog with further signatures."""

    model_config = ConfigDict(extra="forbid")
    metadata: str


class Withdrawal(BaseModel):
    """Why."""

    model_config = ConfigDict(extra="forbid")
    reason: str = Field(default="", max_length=2000)


@router.get("/online-keys", summary="Public keys of the online roles, for the ceremony")
def online_keys(context: Ctx, _caller: Viewer) -> dict[str, Any]:
    return context.online_keys


@router.get("/status", summary="Version and expiry per TUF role")
def status(context: Ctx, _caller: Viewer) -> dict[str, Any]:
    """Empty before the ceremony's documents are installed."""
    return context.publication.status()


@router.get("/alerts", summary="What a person must see to: roles that will expire, devices that hold newer versions")
def alerts(context: Ctx, _caller: Viewer) -> dict[str, Any]:
    """The most urgent first, each with `do`. A role is listed from a third of its life on."""
    with reading(context.engine) as conn:
        found = upkeep.alerts(conn, context.now_ms(), clock_behind=context.publication.clock_behind)
    items = [alert.to_builtins() for alert in found]
    return {"items": items, "next": None}


@router.post(
    "/metadata",
    summary="Install metadata signed by the operator or the approvers",
    openapi_extra={"x-needs": "admin (root, targets), approver (catalog)"},
)
def install(context: Ctx, caller: Viewer, wanted: SignedMetadata) -> dict[str, Any]:
    """Root and targets need the role admin, the catalog approver. The signature decides; the role only keeps order."""
    require_role(caller, "approver" if wanted.role == "catalog" else "admin")
    floors = None if wanted.floors is None else wanted.floors.encode()
    result = context.publication.install(wanted.role, wanted.metadata.encode(), floors, actor=caller.actor)
    context.wake()
    return result


@router.post("/set", summary="Install root, targets and catalog in one snapshot")
def install_set(context: Ctx, caller: Admin, wanted: SignedSet) -> dict[str, Any]:
    """Devices see all of it or nothing. So an approver's key can go: with a catalog that the others signed."""
    if wanted.root is None and wanted.targets is None and wanted.catalog is None:
        raise Invalid("bad_request", "wanted at least one of root, targets and catalog")
    if wanted.roots and wanted.root is None:
        raise Invalid("bad_request", "roots: those before root, wanted that too")
    if wanted.floors is not None and wanted.catalog is None:
        raise Invalid("bad_request", "floors belong to a catalog")
    result = context.publication.install_together(
        root=_bytes(wanted.root),
        targets=_bytes(wanted.targets),
        catalog=_bytes(wanted.catalog),
        floors=_bytes(wanted.floors),
        actor=caller.actor,
        restoring=wanted.restoring,
        earlier=[text.encode() for text in wanted.roots],
    )
    context.wake()
    return result


@router.get("/proposals", summary="Catalogs that lack signatures")
def list_proposals(
    context: Ctx,
    _caller: Viewer,
    ended: Annotated[bool, Query(description="Also those that ended")] = False,
    limit: Limit = 100,
) -> dict[str, Any]:
    """Who signed, who is missing, what each changes, as this server sees it. Newest first, on one page."""
    return {"items": _proposals(context).listed(ended=ended, limit=limit), "next": None}


@router.get("/proposals/{proposal}", summary="One proposal with its documents")
def get_proposal(context: Ctx, _caller: Viewer, proposal: str) -> dict[str, Any]:
    return _proposals(context).one(proposal)


@router.post("/proposals", summary="Propose a catalog; it is published when enough approvers signed")
def propose(context: Ctx, caller: Approver, wanted: Proposed) -> dict[str, Any]:
    """The same document again adds its signatures. New targets or a root in it need the role admin."""
    if wanted.targets is not None or wanted.root is not None:
        require_role(caller, "admin")
    made = _proposals(context).submit(
        wanted.metadata.encode(),
        wanted.floors.encode(),
        targets=_bytes(wanted.targets),
        root=_bytes(wanted.root),
        actor=caller.actor,
    )
    context.wake()
    return made


@router.post("/proposals/{proposal}/signatures", summary="Add signatures to a proposal")
def sign_proposal(context: Ctx, caller: Approver, proposal: str, wanted: Signed) -> dict[str, Any]:
    """With the last one that is needed it is published."""
    made = _proposals(context).sign(proposal, wanted.metadata.encode(), actor=caller.actor)
    context.wake()
    return made


@router.post("/proposals/{proposal}/withdraw", summary="End a proposal")
def withdraw_proposal(context: Ctx, caller: Approver, proposal: str, why: Withdrawal | None = None) -> dict[str, Any]:
    return _proposals(context).withdraw(proposal, reason=why.reason if why else "", actor=caller.actor)


def _proposals(context: Ctx) -> proposals.Proposals:
    return proposals.Proposals(context.engine, context.publication, context.now_ms)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()
