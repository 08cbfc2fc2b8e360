"""``skerry export-update``: an update for devices without a network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from skerry_cli import exporting, output
from skerry_cli.commands.session import session


def export_update(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where to: empty, not there yet, or of an earlier export.")],
    groups: Annotated[
        list[str] | None, typer.Option("--group", help="Only this group's devices; repeat. All without.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Writes what devices of the groups are given into a folder, for `skerry-agent import`."""
    done = exporting.export(session(context).api, folder, groups=groups or [], say=output.note)
    if as_json:
        output.show_json({"folder": str(folder), **dataclasses.asdict(done)})
        return
    output.say(f"{folder}: {done.files} files, {done.bytes / 1e6:.1f} MB, {done.came / 1e6:.1f} MB of it fetched now.")
    rows = [(one["model"], one["version"], output.short(one["digest"]), one["bytes"]) for one in done.bundles]
    output.show_table(f"bundles for {', '.join(done.groups)}", ("model", "version", "digest", "bytes"), rows)
    for one in done.missing:
        output.say(f"! {one['model']} {one['version']} is not in it: {one['why']}")
    output.say(
        f"Signed to {done.expires}; devices take it for updates.import_age_s after that (30 days where nothing is set)."
    )
