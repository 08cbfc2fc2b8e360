"""Routes: who this server is, API tokens, the audit record."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from skerry_server import __version__, access, audit
from skerry_server.api.bodies import Route
from skerry_server.api.context import Admin, After, Auditor, Ctx, Limit, Viewer, page, read_cursor
from skerry_server.db.engine import reading, writing

router = APIRouter(prefix="/api/v1", route_class=Route)


class NewToken(BaseModel):
    """A token to make."""

    model_config = ConfigDict(extra="forbid")
    name: str
    role: str = Field(description=", ".join(access.ROLES))
    expires_s: Annotated[float, Field(gt=0, le=10 * 31_536_000)] | None = None


@router.get("/info", tags=["server"], summary="Name, version, addresses and CA of this fleet")
def info(context: Ctx, _caller: Viewer) -> dict[str, Any]:
    return {
        "name": context.settings.server.name,
        "version": __version__,
        "ca_sha256": context.authority.sha256,
        "ca_pem": context.authority.pem,
        "mqtt": context.mqtt,
        "url": context.url,
    }


@router.post("/tokens", tags=["tokens"], summary="Make an API token", status_code=201)
def create_token(context: Ctx, caller: Admin, wanted: NewToken) -> dict[str, Any]:
    """The secret is in this answer and nowhere else."""
    with writing(context.engine) as conn:
        token = access.create_token(
            conn,
            name=wanted.name,
            role=wanted.role,
            expires_s=wanted.expires_s,
            now_ms=context.now_ms(),
            actor=caller.actor,
        )
    return {"token": token, "name": wanted.name, "role": wanted.role}


@router.get("/tokens", tags=["tokens"], summary="List API tokens, without their secrets")
def list_tokens(context: Ctx, _caller: Admin) -> dict[str, Any]:
    with reading(context.engine) as conn:
        return {"items": access.list_tokens(conn), "next": None}


@router.delete("/tokens/{name}", tags=["tokens"], summary="Revoke an API token", status_code=204)
def revoke_token(context: Ctx, caller: Admin, name: str) -> None:
    with writing(context.engine) as conn:
        access.revoke_token(conn, name=name, now_ms=context.now_ms(), actor=caller.actor)


@router.get("/audit", tags=["audit"], summary="The record of every change, oldest first")
def audit_rows(context: Ctx, _caller: Auditor, after: After = None, limit: Limit = 100) -> dict[str, Any]:
    """Each row's `chain` is the sha256 over the row before and its own content."""
    (last,) = read_cursor(after, int) or (0,)
    with reading(context.engine) as conn:
        items = audit.rows(conn, after=last, limit=limit)
    return page(items, limit, items[-1]["id"] if items else 0)
