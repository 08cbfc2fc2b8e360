"""The HTTP application: which routes there are, in which order, behind which limits. Composing what they need is ``app``'s."""

from __future__ import annotations

from fastapi import FastAPI

from skerry_server import __version__
from skerry_server.api import (
    access as access_routes,
)
from skerry_server.api import (
    bundles,
    content_keys,
    deltas,
    device,
    devices,
    faults,
    files,
    groups,
    health,
    insight,
    limits,
    logs,
    repository,
    rollouts,
)
from skerry_server.api import (
    telemetry as telemetry_routes,
)
from skerry_server.api.context import Context
from skerry_server.console import overview
from skerry_server.console import routes as console
from skerry_server.console.sessions import Sessions

TAGS = [
    {"name": "server", "description": "Who this server is."},
    {
        "name": "tokens",
        "description": "API tokens and their roles: viewer, engineer, approver, operator, auditor, admin.",
    },
    {"name": "audit", "description": "The hash-chained record of every change."},
    {"name": "repository", "description": "The TUF repository that devices verify."},
    {"name": "bundles", "description": "Model packages: draft, validated, approved, deprecated, retired, rejected."},
    {"name": "content keys", "description": "What opens encrypted bundles, and who was given it."},
    {"name": "devices", "description": "Enrolment, pins, membership, revocation."},
    {"name": "groups", "description": "Devices that share one signed document."},
    {"name": "rollouts", "description": "Candidates on their way through stages, on recorded evidence."},
    {"name": "telemetry", "description": "What devices counted."},
    {"name": "insight", "description": "What counts and labels say of a model: drift and accuracy."},
    {"name": "device", "description": "What devices call; requests are signed with the device's key."},
    {"name": "health", "description": "For machines that watch this server."},
]


def create_app(context: Context) -> FastAPI:
    """The HTTP application over composed parts."""
    app = FastAPI(
        title="Skerry",
        version=__version__,
        summary="ModelOps for edge fleets",
        description='Errors: `{"error": {"code", "message", "details"?}}`. Lists: `{"items": [...], "next": cursor or null}`.',
        openapi_tags=TAGS,
        docs_url=None,
        redoc_url=None,
    )
    app.state.context = context
    app.state.sessions = Sessions(context.settings.data / "sessions.json")
    app.state.overview = overview.Shared()
    for module in (
        access_routes,
        repository,
        bundles,
        content_keys,
        deltas,
        devices,
        logs,
        groups,
        rollouts,
        telemetry_routes,
        insight,
        device,
        health,
    ):
        app.include_router(module.router)
    folder = context.settings.data / "repository"
    app.mount("/repository", files.RepositoryFiles(directory=folder), name="repository")
    app.include_router(console.router)
    app.mount("/console/assets", console.assets(), name="assets")
    faults.install(app)
    app.add_middleware(limits.BodyLimit, limits=context.settings.limits)
    app.add_middleware(limits.Timed, telemetry=context.telemetry)
    return app
