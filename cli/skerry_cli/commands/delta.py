"""``skerry delta``: what the server made so that devices fetch less than whole files."""

from __future__ import annotations

from typing import Annotated

import typer

from skerry_cli import output
from skerry_cli.commands.session import session

app = typer.Typer(no_args_is_help=True, help="Deltas between the files of bundles.")

Model = Annotated[str | None, typer.Option("--model", help="Only this model.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


@app.command("list")
def list_(
    context: typer.Context,
    model: Model = None,
    state: Annotated[
        str | None, typer.Option("--state", help="Only waiting, making, ready, useless or failed ones.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Shows from which file to which there is a delta, what it saves, and why there is none."""
    items = list(session(context).api.items("/api/v1/deltas", model=model, state=state))
    if as_json:
        output.show_json({"items": items})
        return
    if not items:
        output.say("No device runs anything from which it could be patched to what it is given.")
        return
    columns = ("model", "from", "to", "file", "state", "bytes", "of", "share", "seconds", "devices", "why")
    rows = [
        (
            item["model"],
            item["from_version"],
            item["to_version"],
            item["path"],
            item["state"],
            item["bytes"],
            item["whole_bytes"],
            "" if item["share"] is None else f"{item['share']:.1%}",
            item["took_s"],
            item["devices"],
            item["detail"],
        )
        for item in items
    ]
    output.show_table("deltas", columns, rows)


@app.command()
def retry(context: typer.Context, model: Model = None, as_json: AsJson = False) -> None:
    """Has the server try again what failed, or was not worth keeping."""
    answer = session(context).api.post("/api/v1/deltas/retry", {} if model is None else {"model": model})
    if as_json:
        output.show_json(answer)
    else:
        output.say(f"{answer['waiting']} wait now.")
