"""``skerry info`` and ``skerry audit``: the server itself, and who changed what."""

from __future__ import annotations

from typing import Annotated

import typer

from skerry_cli import output
from skerry_cli.commands.session import session

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


def info(context: typer.Context, as_json: AsJson = False) -> None:
    """Shows the server: version, addresses, CA fingerprint, and the update repository's roles."""
    api = session(context).api
    told = api.get("/api/v1/info")
    roles = api.get("/api/v1/repository/status")
    alerts = list(api.get("/api/v1/repository/alerts")["items"])
    if as_json:
        output.show_json({**told, "repository": roles, "alerts": alerts})
        return
    output.show_fields("server", {name: value for name, value in told.items() if name != "ca_pem"})
    output.show_table(
        "update repository" + ("" if roles else ": waits for the key ceremony"),
        ("role", "version", "expires"),
        [(name, role.get("version"), role.get("expires")) for name, role in sorted(roles.items())],
    )
    for alert in alerts:
        output.say(f"! {alert['text']}")
        output.say(f"    {alert['do']}")


def audit(
    context: typer.Context,
    after: Annotated[int, typer.Option("--after", help="Only rows with a greater number.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Lists who changed what, when and why."""
    items = [row for row in session(context).api.items("/api/v1/audit") if row["id"] > after]
    if as_json:
        output.show_json({"items": items})
        return
    output.show_table(
        "audit",
        ("nr", "at", "who", "did", "to", "why"),
        [(r["id"], output.when(r["at_ms"]), r["actor"], r["action"], r["subject"], r["reason"]) for r in items],
    )
