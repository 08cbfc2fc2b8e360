"""Routes: the update repository's metadata."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from skerry_server.api.context import Ctx, Viewer, require_role

router = APIRouter(prefix="/api/v1/repository", tags=["repository"])


class SignedMetadata(BaseModel):
    """Metadata that the operator signed."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["root", "targets", "catalog"]
    metadata: str = Field(description="The text of the signed metadata file")
    floors: str | None = Field(default=None, description="The text of floors.json, with a catalog that changes it")


@router.get("/online-keys", summary="Public keys of the online roles, for the ceremony")
def online_keys(context: Ctx, _caller: Viewer) -> dict[str, Any]:
    return context.online_keys


@router.get("/status", summary="Version and expiry per TUF role")
def status(context: Ctx, _caller: Viewer) -> dict[str, Any]:
    """Empty before the ceremony's documents are installed."""
    return context.publication.status()


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
