"""Routes: enrolment tokens, devices, pins, revocation."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from skerry_server import device_orders, devices, why
from skerry_server.api.bodies import Route
from skerry_server.api.context import After, Ctx, Limit, Operator, Viewer, cursor, page, read_cursor
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing

router = APIRouter(prefix="/api/v1", tags=["devices"], route_class=Route)

Version = Annotated[int | None, Field(description="The membership_version that was read; 409 when it has changed")]


class NewEnrolmentToken(BaseModel):
    """A token for one device, or for devices whose ids begin alike."""

    model_config = ConfigDict(extra="forbid")
    group: str
    device_id: str | None = None
    serial_prefix: str | None = None
    expires_s: float = 3600.0
    uses: Annotated[int, Field(ge=1, le=100_000)] = 1
    tags: dict[str, str] = {}


class Pin(BaseModel):
    """A bundle that one device runs whatever its group runs."""

    model_config = ConfigDict(extra="forbid")
    digest: str
    reason: str = Field(default="", max_length=2000)
    version: Version = None


class Membership(BaseModel):
    """Where a device belongs; what is left out stays."""

    model_config = ConfigDict(extra="forbid")
    group: str | None = None
    tags: dict[str, str] | None = None
    version: Version = None


class Order(BaseModel):
    """Why a device is ordered something."""

    model_config = ConfigDict(extra="forbid")
    reason: Annotated[str, Field(min_length=1, max_length=2000)]


class Revocation(BaseModel):
    """Why a device's rights end."""

    model_config = ConfigDict(extra="forbid")
    reason: Annotated[str, Field(min_length=1, max_length=2000)]


_HIDDEN = ("public_key_pem", "state")


def _shape(row: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(row).items() if name not in _HIDDEN}


@router.post("/enrolment-tokens", summary="Make an enrolment token", status_code=201)
def create_enrolment_token(context: Ctx, caller: Operator, wanted: NewEnrolmentToken) -> dict[str, Any]:
    """The secret is in this answer and nowhere else. The operator's tool completes it with the root's digest and the CA's."""
    with writing(context.engine) as conn:
        token = devices.create_enrolment_token(
            conn,
            device=wanted.device_id,
            serial_prefix=wanted.serial_prefix,
            group=wanted.group,
            expires_s=wanted.expires_s,
            uses=wanted.uses,
            tags=wanted.tags,
            actor=caller.actor,
            now_ms=context.now_ms(),
        )
    return {"token": token}


@router.get("/devices", summary="List devices")
def list_devices(
    context: Ctx,
    _caller: Viewer,
    group: Annotated[str | None, Query(max_length=63)] = None,
    online: bool | None = None,
    after: After = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    (last,) = read_cursor(after, str) or ("",)
    with reading(context.engine) as conn:
        rows = queries.devices_page(conn, group=group, online=online, after=last, limit=limit)
    items = [_shape(row._mapping) for row in rows]
    return page(items, limit, items[-1]["id"] if items else "")


@router.get("/devices/{device}", summary="One device, with its reported state and pins")
def get_device(context: Ctx, _caller: Viewer, device: str) -> dict[str, Any]:
    with reading(context.engine) as conn:
        row = devices.require(conn, device)
        query = select(t.pins.c.model, t.pins.c.digest).where(t.pins.c.device == device)
        pinned = {pin.model: pin.digest for pin in conn.execute(query)}
        counters = queries.ingest_counts(conn, device=device)
    return _shape(row) | {"state": row["state"], "pins": pinned, "refused_messages": counters}


@router.get("/devices/{device}/why", summary="Why a device runs what it runs, and why not what it should")
def device_why(context: Ctx, _caller: Viewer, device: str) -> dict[str, Any]:
    """Per model a stable `state`, its reason in words, what it waits for next, and the ids of the records that this rests on."""
    roles = {role: int(found["version"]) for role, found in context.publication.status().items()}
    seen_s = context.settings.rollout.seen_s
    with reading(context.engine) as conn:
        grace_s = context.settings.devices.renewal_grace_s
        return why.explain(conn, device, roles=roles, now_ms=context.now_ms(), seen_s=seen_s, grace_s=grace_s)


@router.get("/devices/{device}/events", summary="What a device reported, oldest first")
def device_events(
    context: Ctx, _caller: Viewer, device: str, after: After = None, limit: Limit = 100
) -> dict[str, Any]:
    (last,) = read_cursor(after, int) or (0,)
    with reading(context.engine) as conn:
        devices.require(conn, device)
        rows = queries.events_page(conn, device=device, after=last, limit=limit)
    items = [dict(row._mapping) for row in rows]
    return {"items": items, "next": cursor(items[-1]["id"]) if len(items) >= limit else None}


@router.put("/devices/{device}/pins/{model}", summary="Pin a bundle on one device")
def set_pin(context: Ctx, caller: Operator, device: str, model: str, pin: Pin) -> dict[str, Any]:
    with writing(context.engine) as conn:
        version = devices.set_pin(
            conn,
            device=device,
            model=model,
            digest=pin.digest,
            reason=pin.reason,
            actor=caller.actor,
            now_ms=context.now_ms(),
            version=pin.version,
        )
    context.wake()
    floor = context.publication.floors().get(model, "")
    return {"device": device, "model": model, "digest": pin.digest, "version": version, "floor": floor}


@router.delete("/devices/{device}/pins/{model}", summary="Take a pin away", status_code=204)
def clear_pin(
    context: Ctx, caller: Operator, device: str, model: str, version: Annotated[int | None, Query()] = None
) -> None:
    with writing(context.engine) as conn:
        devices.clear_pin(
            conn, device=device, model=model, actor=caller.actor, now_ms=context.now_ms(), version=version
        )
    context.wake()


@router.put("/devices/{device}/membership", summary="Move a device to another group, or give it other tags")
def set_membership(context: Ctx, caller: Operator, device: str, wanted: Membership) -> dict[str, Any]:
    with writing(context.engine) as conn:
        version = devices.set_membership(
            conn,
            device=device,
            group=wanted.group,
            tags=wanted.tags,
            actor=caller.actor,
            now_ms=context.now_ms(),
            version=wanted.version,
        )
    context.wake()
    return {"device": device, "version": version}


@router.post("/devices/{device}/revoke", summary="End a device's rights for good")
def revoke(context: Ctx, caller: Operator, device: str, wish: Revocation) -> dict[str, Any]:
    """Its certificate and key are refused from now on, and the broker cuts it off."""
    with writing(context.engine) as conn:
        devices.revoke(conn, device=device, reason=wish.reason, actor=caller.actor, now_ms=context.now_ms())
    context.refresh_broker_users()
    context.wake()
    return {"device": device, "status": "revoked"}


@router.post("/devices/{device}/retry", summary="Let a device try again what it gave up", status_code=202)
def retry(context: Ctx, caller: Operator, device: str, wish: Order) -> dict[str, Any]:
    """It forgets what it holds against bundles that failed, as `skerry-agent sync --pardon` does; within a week, when it asks next."""
    return _order(context, caller.actor, device, "retry", wish)


@router.post(
    "/devices/{device}/renew", summary="Let a device renew a certificate that ended too long ago", status_code=202
)
def allow_renewal(context: Ctx, caller: Operator, device: str, wish: Order) -> dict[str, Any]:
    """Within a week, by itself, with the key that it enrolled with. Not for a device that may be in other hands: revoke that one."""
    return _order(context, caller.actor, device, "renew", wish)


@router.post("/devices/{device}/cancel", summary="End the update that is under way on a device", status_code=202)
def cancel(context: Ctx, caller: Operator, device: str, wish: Order) -> dict[str, Any]:
    """It goes back to what it confirmed, and does not try the bundle again before a retry is ordered."""
    return _order(context, caller.actor, device, "cancel", wish)


def _order(context: Ctx, actor: str, device: str, kind: device_orders.Kind, wish: Order) -> dict[str, Any]:
    with writing(context.engine) as conn:
        given = device_orders.give(
            conn, device=device, kind=kind, reason=wish.reason, actor=actor, now_ms=context.now_ms()
        )
    context.wake()
    return {"device": device, **given}
