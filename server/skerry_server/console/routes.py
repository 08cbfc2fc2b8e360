"""Routes of the page: sign in with an API token, look, sign out. They change nothing but the session.

The page renews itself: a small script asks for ``/console/live`` and puts the answer in place of the old content; without
scripts the browser reloads it. What the page shows comes from devices and operators, so templates escape everything, and the
content security policy admits only this server's own script and style.
"""

from __future__ import annotations

import hashlib
import urllib.parse
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, Cookie, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.staticfiles import StaticFiles

from skerry_server import access
from skerry_server.api.context import Ctx, RawBody
from skerry_server.console import formats, overview
from skerry_server.console.sessions import Sessions
from skerry_server.db.engine import reading, writing
from skerry_server.errors import Forbidden, Unauthenticated

_HERE = Path(__file__).parent
COOKIE = "skerry_session"
WRONG_TOKEN = "This API token is unknown, expired or revoked. Paste all of it, from skt_ on."  # noqa: S105 - words, no secret
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

router = APIRouter(include_in_schema=False)
Held = Annotated[str | None, Cookie(alias=COOKIE, max_length=200)]


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= formats.FILTERS
    environment.globals["findings_drawn"] = overview.FINDINGS
    environment.globals["detail_drawn"] = overview.DETAIL
    return environment


_environment = _templates()


def assets() -> StaticFiles:
    """The page's script and style, to be mounted at ``/console/assets``."""
    return StaticFiles(directory=_HERE / "assets")


def _page(template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(_environment.get_template(template).render(**values), status_code=status, headers=HEADERS)


def _sessions(request: Request) -> Sessions:
    sessions: Sessions = request.app.state.sessions
    return sessions


def _viewer(context: Ctx, sessions: Sessions, cookie: str | None) -> access.Caller | None:
    """Who is signed in and may still read, or None."""
    now_ms = context.now_ms()
    name = sessions.holder(cookie, now_ms) if cookie else None
    if name is None:
        return None
    with reading(context.engine) as conn:
        caller = access.caller_named(conn, name, now_ms)
    return caller if caller is not None and caller.may("viewer") else None


def _overview(context: Ctx, request: Request) -> overview.Overview:
    shared: overview.Shared = request.app.state.overview

    def read() -> overview.Overview:
        parts = context.probe()
        with reading(context.engine) as conn:
            return overview.gather(
                conn,
                name=context.settings.server.name,
                parts=parts,
                now_ms=context.now_ms(),
                clock_behind=context.publication.clock_behind,
            )

    return shared.get(read, context.now_ms())


def _refuse_other_sites(request: Request) -> None:
    # A browser says where a form came from: another site must not sign somebody in or out.
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Forbidden("other_site", "this form must come from this server's own page")


def _field(body: bytes, name: str) -> str:
    try:
        fields = urllib.parse.parse_qs(body.decode("ascii"), max_num_fields=10, encoding="utf-8", errors="strict")
    except (UnicodeDecodeError, ValueError):
        return ""
    return fields.get(name, [""])[0]


@router.get("/")
def front(context: Ctx, request: Request, held: Held = None) -> Response:
    """The whole page, or the way to the sign-in page."""
    caller = _viewer(context, _sessions(request), held)
    if caller is None:
        return RedirectResponse("/console/sign-in", status_code=303, headers=HEADERS)
    return _page("page.html", o=_overview(context, request), caller=caller)


@router.get("/console/live")
def live(context: Ctx, request: Request, held: Held = None) -> Response:
    """The changing part of the page. 401 tells the script to go to the sign-in page."""
    if _viewer(context, _sessions(request), held) is None:
        return Response(status_code=401, headers=HEADERS)
    body = _environment.get_template("live.html").render(o=_overview(context, request)).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=HEADERS | {"ETag": tag})
    return HTMLResponse(body, headers=HEADERS | {"ETag": tag})


@router.get("/console/sign-in")
def sign_in_form(context: Ctx) -> Response:
    """The form."""
    return _page("sign_in.html", name=context.settings.server.name, fault="")


@router.post("/console/sign-in")
def sign_in(context: Ctx, request: Request, body: RawBody) -> Response:
    """Opens a session for the bearer of an API token."""
    _refuse_other_sites(request)
    token = _field(body, "token")
    now_ms = context.now_ms()
    try:
        with reading(context.engine) as conn:
            caller, due = access.find_caller(conn, token.strip(), now_ms)
    except Unauthenticated:
        return _page("sign_in.html", status=401, name=context.settings.server.name, fault=WRONG_TOKEN)
    if due:
        with writing(context.engine) as conn:
            access.note_use(conn, caller.name, now_ms)
    response = RedirectResponse("/", status_code=303, headers=HEADERS)
    # No Max-Age: the browser forgets it when it closes. Strict: no other site can send it along.
    cookie = _sessions(request).begin(caller.name, now_ms)
    response.set_cookie(COOKIE, cookie, secure=True, httponly=True, samesite="strict", path="/")
    return response


@router.post("/console/sign-out")
def sign_out(request: Request, held: Held = None) -> Response:
    """Ends the session."""
    _refuse_other_sites(request)
    if held:
        _sessions(request).end(held)
    response = RedirectResponse("/console/sign-in", status_code=303, headers=HEADERS)
    response.delete_cookie(COOKIE, secure=True, httponly=True, samesite="strict", path="/")
    return response
