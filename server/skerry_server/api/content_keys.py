"""Routes: content keys of encrypted bundles, and devices' encryption keys."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from skerry_server import content_keys, registry
from skerry_server.api.bodies import Route
from skerry_server.api.context import (
    After,
    Approver,
    Auditor,
    Ctx,
    Engineer,
    Limit,
    Operator,
    SignedByDevice,
    page,
)
from skerry_server.db.engine import reading, writing
from skerry_server.errors import Invalid

router = APIRouter(tags=["content keys"], route_class=Route)


class ContentKey(BaseModel):
    """32 bytes in base64. A secret: it opens the bundle for whoever has it."""

    model_config = ConfigDict(extra="forbid")
    key: str = Field(max_length=64, repr=False)


class Why(BaseModel):
    """Why."""

    model_config = ConfigDict(extra="forbid")
    reason: str = Field(min_length=1, max_length=2000)


class Release(BaseModel):
    """A device asks for a content key; the request is signed with its other key."""

    encryption_key: str = Field(max_length=content_keys.MAX_PEM_CHARS, description="PEM of a P-256 public key")


@router.put("/api/v1/bundles/{digest}/key", summary="Give the server the content key of an encrypted bundle")
def put_key(context: Ctx, caller: Engineer, digest: str, wanted: ContentKey) -> dict[str, Any]:
    """It must be the one that the manifest names. It is kept sealed, and released to devices that may run the bundle."""
    try:
        key = base64.b64decode(wanted.key, validate=True)
    except binascii.Error:
        raise Invalid("bad_request", "key: wanted base64") from None
    with writing(context.engine) as conn:
        row = registry.require(conn, digest)
        new = content_keys.put(
            conn, context.release_key, digest=digest, manifest=row["manifest"], key=key, actor=caller.actor,
            now_ms=context.now_ms(),
        )  # fmt: skip
    return {"digest": digest, "stored": new}


@router.get("/api/v1/bundles/{digest}/key", summary="The content key of an encrypted bundle")
def get_key(context: Ctx, caller: Approver, digest: str) -> dict[str, Any]:
    """For approvers, who look into what they sign. Each reading stands in the audit."""
    with writing(context.engine) as conn:
        content_keys.require_encrypted(conn, digest)
        key = content_keys.show(conn, context.release_key, digest=digest, actor=caller.actor, now_ms=context.now_ms())
    return {"digest": digest, "key": base64.b64encode(key).decode()}


@router.get("/api/v1/bundles/{digest}/releases", summary="Which devices were given a bundle's content key")
def list_releases(
    context: Ctx, _caller: Auditor, digest: str, after: After = None, limit: Limit = 100
) -> dict[str, Any]:
    with reading(context.engine) as conn:
        content_keys.require_encrypted(conn, digest)
        items = content_keys.releases(conn, digest, after=after or "", limit=limit)
    return page(items, limit, *((items[-1]["device"],) if items else ()))


@router.post("/api/v1/devices/{device}/forget-key", summary="Take the next encryption key that a device names")
def forget_key(context: Ctx, caller: Operator, device: str, why: Why) -> dict[str, Any]:
    """For a device whose key was lost, after a person looked at it: content keys go to whichever key it names next."""
    with writing(context.engine) as conn:
        content_keys.forget_device_key(conn, device, reason=why.reason, actor=caller.actor, now_ms=context.now_ms())
    return {"device": device, "forgotten": True}


@router.post(
    "/api/v1/bundles/{digest}/key/{device}", summary="A bundle's content key, wrapped for a device without network"
)
def carry(context: Ctx, caller: Operator, digest: str, device: str) -> dict[str, Any]:
    """For `skerry export-update --device`. Only that device can open it, and only what its group or a pin gives it. Each stands in the audit."""
    with writing(context.engine) as conn:
        content_keys.require_encrypted(conn, digest)
        wrapped = content_keys.release_by_hand(
            conn, context.release_key, device=device, digest=digest, actor=caller.actor, now_ms=context.now_ms()
        )
    return {"digest": digest, "device": device, "wrapped": wrapped}


@router.post("/device/v1/keys/{digest}", summary="A bundle's content key, wrapped for the device that asks")
def release(context: Ctx, device: SignedByDevice, digest: str, wanted: Release) -> dict[str, Any]:
    """Only of bundles that the device's group or a pin gives it."""
    with writing(context.engine) as conn:
        wrapped = content_keys.release_to(
            conn, context.release_key, device=device, digest=digest, pem=wanted.encryption_key,
            now_ms=context.now_ms(),
        )  # fmt: skip
    return {"digest": digest, "wrapped": wrapped}
