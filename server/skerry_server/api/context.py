"""What the routes need, and who may use them. One ``Context`` per server, passed through the application's state."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from skerry_contract import ids
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from skerry_server import access, device_auth
from skerry_server.ca import FleetCA
from skerry_server.config import Settings
from skerry_server.content_keys import ReleaseKey
from skerry_server.db.engine import can_write, reading, writing
from skerry_server.errors import Forbidden, Invalid, Unauthenticated
from skerry_server.publication import Publication
from skerry_server.repository import Repository
from skerry_server.telemetry import Telemetry
from skerry_server.validation import Validator

_bearer = HTTPBearer(auto_error=False, description="An API token")


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The parts of the server that routes call.

    Attributes:
        url: where this server is reached, without a trailing slash; mqtt: host and port where devices find the broker.
        online_keys: key id -> TUF key of the online roles.
        wake: makes the orchestrator look now.
        refresh_broker_users: tells the broker who is enrolled now.
        probe: whether each part is well.
        now_ms: the server's clock.
    """

    settings: Settings
    engine: Engine
    authority: FleetCA
    publication: Publication
    repository: Repository
    validator: Validator
    release_key: ReleaseKey
    nonces: device_auth.Nonces
    telemetry: Telemetry
    url: str
    mqtt: dict[str, Any]
    online_keys: dict[str, Any]
    wake: Callable[[], None]
    refresh_broker_users: Callable[[], None]
    probe: Callable[[], dict[str, bool]]
    now_ms: Callable[[], int]


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(_context)]


def _caller(
    context: Ctx, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> access.Caller:
    if credentials is None:
        raise Unauthenticated("bad_token", "wanted a header Authorization: Bearer <token>")
    now_ms = context.now_ms()
    with reading(context.engine) as conn:
        caller, due = access.find_caller(conn, credentials.credentials, now_ms)
    # When a token was used last is worth noting, and not worth a wait or a refusal while something holds the database.
    if due and can_write(context.engine, 0.0):
        with contextlib.suppress(DBAPIError), writing(context.engine) as conn:
            access.note_use(conn, caller.name, now_ms)
    return caller


def _needs(role: str) -> Callable[[access.Caller], access.Caller]:
    def check(caller: Annotated[access.Caller, Depends(_caller)]) -> access.Caller:
        require_role(caller, role)
        return caller

    return check


def require_role(caller: access.Caller, role: str) -> None:
    """Raises ``Forbidden`` unless the caller's role includes ``role``."""
    if not caller.may(role):
        raise Forbidden("role_missing", f"this needs the role {role}; yours is {caller.role}", needs=role)


Viewer = Annotated[access.Caller, Depends(_needs("viewer"))]
Engineer = Annotated[access.Caller, Depends(_needs("engineer"))]
Approver = Annotated[access.Caller, Depends(_needs("approver"))]
Operator = Annotated[access.Caller, Depends(_needs("operator"))]
Auditor = Annotated[access.Caller, Depends(_needs("auditor"))]
Admin = Annotated[access.Caller, Depends(_needs("admin"))]


async def _raw_body(request: Request) -> bytes:
    return await request.body()


RawBody = Annotated[bytes, Depends(_raw_body)]


def _device(context: Ctx, request: Request, body: RawBody) -> ids.DeviceId:
    with reading(context.engine) as conn:
        return device_auth.verify(
            conn,
            context.nonces,
            authorization=request.headers.get("authorization"),
            method=request.method,
            path=request.url.path,
            body=body,
            now_ms=context.now_ms(),
            skew_s=context.settings.devices.clock_skew_s,
        )


SignedByDevice = Annotated[ids.DeviceId, Depends(_device)]
Limit = Annotated[int, Query(ge=1, le=1000, description="Most items of one page")]
After = Annotated[str | None, Query(max_length=1000, description="The cursor `next` of the page before")]


def cursor(*key: Any) -> str:
    """The cursor for the page after the row with this key: plain for one part, opaque for several."""
    if len(key) == 1:
        return str(key[0])
    return base64.urlsafe_b64encode(json.dumps(key).encode()).rstrip(b"=").decode()


def _storable(part: object) -> bool:
    if isinstance(part, int):
        return abs(part) < 1 << 63
    return not isinstance(part, str) or not any("\ud800" <= c <= "\udfff" for c in part)


def read_cursor(text: str | None, *kinds: type) -> tuple[Any, ...] | None:
    """The key in a cursor, or None without one.

    Raises:
        Invalid: not a cursor that ``cursor`` made for such a key.
    """
    if text is None:
        return None
    key: Any = None
    if kinds == (str,):
        key = [text]
    elif kinds == (int,):
        key = [int(text)] if text.isascii() and text.isdigit() and len(text) < 19 else None
    else:
        with contextlib.suppress(ValueError, RecursionError):
            key = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    fits = isinstance(key, list) and len(key) == len(kinds) and all(_storable(part) for part in key)
    if not fits or not all(type(part) is kind for part, kind in zip(key, kinds, strict=True)):
        raise Invalid("bad_cursor", "after: wanted the cursor of the page before")
    return tuple(key)


def page(items: list[Any], limit: int, *key: Any) -> dict[str, Any]:
    """The shape of a list. ``key`` is that of the last item; there is a next page when this one is full."""
    return {"items": items, "next": cursor(*key) if items and len(items) >= limit else None}
