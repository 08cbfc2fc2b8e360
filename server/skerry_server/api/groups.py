"""Routes: groups and what they run."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from skerry_contract import canonical, ids
from sqlalchemy import Connection, func, select

from skerry_server import device_orders, groups
from skerry_server.api.bodies import Route
from skerry_server.api.context import After, Ctx, Limit, Operator, Viewer, page, read_cursor
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from skerry_server.errors import Conflict

router = APIRouter(prefix="/api/v1/groups", tags=["groups"], route_class=Route)


class GroupSettings(BaseModel):
    """How the group's agents behave; see the group document. Left out: unchanged."""

    model_config = ConfigDict(extra="forbid")
    settings: dict[str, Any] | None = None
    version: int | None = Field(default=None, description="That was read, 0 for no group; 409 when it has changed")


class Assignment(BaseModel):
    """The first bundle of a model in a group."""

    model_config = ConfigDict(extra="forbid")
    stable: str


class InShadow(BaseModel):
    """A bundle that sees what the stable one sees and answers nobody."""

    model_config = ConfigDict(extra="forbid")
    digest: str


class Retry(BaseModel):
    """Why a group's devices are let try again."""

    model_config = ConfigDict(extra="forbid")
    reason: Annotated[str, Field(min_length=1, max_length=2000)]


def _shape(conn: Connection, row: dict[str, Any]) -> dict[str, Any]:
    name = row["name"]
    models = conn.execute(select(t.group_models).where(t.group_models.c.group == name)).mappings()
    count = (
        select(func.count()).select_from(t.devices).where(t.devices.c.group == name, t.devices.c.status == "enrolled")
    )
    return {
        "name": name,
        "generation": row["generation"],
        "settings": row["settings"],
        "version": row["version"],
        "created_ms": row["created_ms"],
        "devices": conn.execute(count).scalar_one(),
        "models": {
            model["model"]: {
                "stable": model["stable"],
                "fallback": model["fallback"],
                "shadow": model["shadow"],
                "rollout": groups.active_rollout(conn, name, model["model"]),
            }
            for model in models
        },
    }


@router.put("/{name}", summary="Make a group, or change its settings")
def put_group(context: Ctx, caller: Operator, name: str, wanted: GroupSettings | None = None) -> dict[str, Any]:
    with writing(context.engine) as conn:
        groups.put(
            conn,
            name=name,
            settings=wanted.settings if wanted else None,
            version=wanted.version if wanted else None,
            actor=caller.actor,
            now_ms=context.now_ms(),
        )
        shaped = _shape(conn, groups.require(conn, name))
    context.wake()
    return shaped


@router.post("/{name}/retry", summary="Let every device of a group try again what it gave up", status_code=202)
def retry(context: Ctx, caller: Operator, name: str, wish: Retry) -> dict[str, Any]:
    """One order that each device of the group reads when it asks next, within a week. `devices`: how many are enrolled in it now."""
    with writing(context.engine) as conn:
        given = device_orders.give_group(
            conn, group=name, reason=wish.reason, actor=caller.actor, now_ms=context.now_ms()
        )
    context.wake()
    return {"group": name, **given}


@router.get("", summary="List groups")
def list_groups(context: Ctx, _caller: Viewer, after: After = None, limit: Limit = 100) -> dict[str, Any]:
    (last,) = read_cursor(after, str) or ("",)
    query = select(t.groups).where(t.groups.c.name > last).order_by(t.groups.c.name).limit(limit)
    with reading(context.engine) as conn:
        items = [_shape(conn, dict(row)) for row in conn.execute(query).mappings().all()]
    return page(items, limit, items[-1]["name"] if items else "")


@router.get("/{name}", summary="One group, with the document last composed for it")
def get_group(context: Ctx, _caller: Viewer, name: str) -> dict[str, Any]:
    with reading(context.engine) as conn:
        row = groups.require(conn, name)
        document = None
        if row["published"] is not None:
            document = canonical.decode(row["published"], what="group document", max_bytes=len(row["published"]))
        return _shape(conn, row) | {"document": document}


@router.put("/{name}/models/{model}", summary="Assign a model's first bundle")
def assign(context: Ctx, caller: Operator, name: str, model: str, wanted: Assignment) -> dict[str, Any]:
    """At once and to everyone. Later changes go by rollouts."""
    floor = context.publication.floors().get(model)
    with writing(context.engine) as conn:
        row = groups.runnable(conn, wanted.stable, model=model)
        if floor is not None and ids.version_key(row["version"]) < ids.version_key(floor):
            raise Conflict("below_floor", f"{model} {row['version']} is below the floor {floor}", floor=floor)
        groups.assign_first(
            conn, name=name, model=model, digest=wanted.stable, actor=caller.actor, now_ms=context.now_ms()
        )
    context.wake()
    return {"group": name, "model": model, "stable": wanted.stable}


@router.put("/{name}/models/{model}/shadow", summary="Put a bundle in the shadow of what the group runs of a model")
def put_shadow(context: Ctx, caller: Operator, name: str, model: str, wanted: InShadow) -> dict[str, Any]:
    """A candidate before its rollout, or the version that was replaced, so that it can be put back at once."""
    return _set_shadow(context, caller, name, model, wanted.digest)


@router.delete("/{name}/models/{model}/shadow", summary="End a model's shadow in the group")
def delete_shadow(context: Ctx, caller: Operator, name: str, model: str) -> dict[str, Any]:
    return _set_shadow(context, caller, name, model, None)


def _set_shadow(context: Ctx, caller: Operator, name: str, model: str, digest: str | None) -> dict[str, Any]:
    with writing(context.engine) as conn:
        groups.set_shadow(conn, name=name, model=model, digest=digest, actor=caller.actor, now_ms=context.now_ms())
    context.wake()
    return {"group": name, "model": model, "shadow": digest}
