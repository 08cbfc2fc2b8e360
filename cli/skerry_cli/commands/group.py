"""``skerry group``: groups, their settings and what they run."""

from __future__ import annotations

from typing import Annotated

import typer

from skerry_cli import group_settings, output
from skerry_cli.client import quote
from skerry_cli.commands.publish import find_bundle
from skerry_cli.commands.session import session
from skerry_cli.errors import Usage

app = typer.Typer(no_args_is_help=True, help="Make, list and configure groups of devices.")

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Group = Annotated[str, typer.Argument(help="The group's name.")]


@app.command()
def create(
    context: typer.Context,
    group: Group,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, e.g. sync_s=300 or networks=wifi; NAME= for the default; repeat."),
    ] = None,
) -> None:
    """Makes a group, or changes the named settings of one that is there. Refused when somebody changes it meanwhile."""
    named = group_settings.parse(setting or [])
    api, path = session(context).api, f"/api/v1/groups/{quote(group)}"
    found = api.find(path) or {"settings": {}, "version": 0}
    merged = {name: value for name, value in {**found["settings"], **named}.items() if value is not None}
    api.put(path, {"settings": merged, "version": found["version"]})
    output.say(f"Group {group} is set.")


@app.command("list")
def list_(context: typer.Context, as_json: AsJson = False) -> None:
    """Lists groups."""
    items = list(session(context).api.items("/api/v1/groups"))
    if as_json:
        output.show_json({"items": items})
    else:
        output.show_table("groups", ("name", "generation"), [(g["name"], g.get("generation")) for g in items])


@app.command()
def show(context: typer.Context, group: Group, as_json: AsJson = False) -> None:
    """Shows a group: settings, models, generation."""
    found = session(context).api.get(f"/api/v1/groups/{quote(group)}")
    if as_json:
        output.show_json(found)
    else:
        output.show_fields(f"group {group}", found)


@app.command()
def retry(
    context: typer.Context,
    group: Group,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the record.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Lets every device of a group try again what it gave up: one order, which each reads when it asks next."""
    api, path = session(context).api, f"/api/v1/groups/{quote(group)}"
    if not yes:
        count = api.get(path)["devices"]
        asked = f"Have {count} devices of {group} forget what they hold against bundles, and try them again?"
        typer.confirm(asked, abort=True, err=True)
    found = api.post(f"{path}/retry", {"reason": reason})
    if as_json:
        output.show_json(found)
        return
    until = output.when(found["expires_ms"])
    output.say(
        f"Order {found['number']}: {found['devices']} devices of {group} try again when they ask next, until {until}."
    )
    output.say("skerry device why ID says of each when it was obeyed.")


@app.command()
def shadow(
    context: typer.Context,
    group: Group,
    model: Annotated[str, typer.Argument(help="The model.")],
    digest: Annotated[
        str | None, typer.Argument(help="MODEL@VERSION or digest of the bundle; left out, how the shadows compare.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="End the shadow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Puts a bundle in the shadow of what the group runs: it sees the same requests and answers nobody. Or shows what came of it."""
    if off and digest is not None:
        raise Usage("wanted a digest or --off, not both")
    api, path = session(context).api, f"/api/v1/groups/{quote(group)}/models/{quote(model)}/shadow"
    if off or digest is not None:
        wanted = None if digest is None else str(find_bundle(api, digest)["digest"])
        found = api.delete(path) if wanted is None else api.put(path, {"digest": wanted})
        if as_json:
            output.show_json(found)
        elif wanted is None:
            output.say(f"{model} in {group} has no shadow any more.")
        else:
            output.say(f"{output.short(wanted)} is in the shadow of {model} in {group}.")
    else:
        api.get(f"/api/v1/groups/{quote(group)}")
        items = list(api.items("/api/v1/shadows", model=model))
        if as_json:
            output.show_json({"items": items})
        else:
            output.show_table("shadows", ("candidate", "beside", "devices", "pairs", "agreement", "only one right", "p"), [
                (i["candidate"][:12], i["bundle"][:12], i["devices"], i["pairs"], i["agreement"],
                 f"{i['labelled']['only_answer_right']} : {i['labelled']['only_candidate_right']}", i["labelled"]["p"])
                for i in items
            ])  # fmt: skip
