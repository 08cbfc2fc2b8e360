"""``skerry export-update``: an update for devices without a network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from skerry_cli import exporting, keys, output
from skerry_cli.commands.publish import seen_dir
from skerry_cli.commands.session import now, session
from skerry_cli.errors import Failed


def export_update(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where to: empty, not there yet, or of an earlier export.")],
    groups: Annotated[
        list[str] | None, typer.Option("--group", help="Only this group's devices; repeat. All without.")
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option("--device", help="Content keys of encrypted bundles come along, wrapped for this device; repeat."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Writes what devices of the groups are given into a folder, for `skerry-agent import`; verified from your own root (--keys)."""
    run = session(context)
    done = exporting.export(
        run.api,
        folder,
        root=keys.read_ceremony(run.keys).root,
        cache_dir=seen_dir(run) / "catalog",
        now=now(),
        groups=groups or [],
        devices=devices or [],
        say=output.note,
    )
    keyless = done.keyless(devices or [])
    if as_json:
        output.show_json({"folder": str(folder), **dataclasses.asdict(done)})
        if keyless:
            raise typer.Exit(1)
        return
    output.say(f"{folder}: {done.files} files, {done.bytes / 1e6:.1f} MB, {done.came / 1e6:.1f} MB of it fetched now.")
    rows = [(one["model"], one["version"], output.short(one["digest"]), one["bytes"]) for one in done.bundles]
    output.show_table(f"bundles for {', '.join(done.groups)}", ("model", "version", "digest", "bytes"), rows)
    for one in done.missing:
        output.say(f"! {one['model']} {one['version']} is not in it: {one['why']}")
    for one in done.locked:
        output.say(f"! {one['device']} gets no content key of {one['model']} {one['version']}: {one['why']}")
    for one in done.bundles:
        if "devices" in one:
            able = ", ".join(one["devices"]) or "no device"
            output.say(f"! {one['model']} {one['version']} is encrypted: its content key is in it for {able}.")
            output.say(
                "  Other devices open it only when they had the key before, or have a network. --device ID brings it along."
            )
    output.say(
        f"Signed to {done.expires}; devices take it for updates.import_age_s after that (30 days where nothing is set)."
    )
    if keyless:
        raise Failed(f"no content key was written for {', '.join(keyless)}, see above; all the rest is in the folder")
    if devices and not done.encrypted:
        output.say("No bundle of it is encrypted: --device brings nothing along.")
