"""``skerry keys``: the ceremony and its record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skerry_cli import key_files, keys, output
from skerry_cli.commands.session import now, session
from skerry_cli.errors import Usage

app = typer.Typer(no_args_is_help=True, help="Make and show the operator's keys.")


@app.command()
def init(
    context: typer.Context,
    directory: Annotated[Path, typer.Option("--dir", help="New folder for the keys; keep it offline.")],
    online: Annotated[
        Path | None,
        typer.Option("--online", help="The server's public key (online.pub.json); asked of the server when left out."),
    ] = None,
    approver: Annotated[
        list[str] | None, typer.Option("--approver", help="Name of one who approves; repeat for more.")
    ] = None,
    threshold: Annotated[int, typer.Option("--threshold", help="How many approvers must sign.")] = 1,
    key_type: Annotated[str, typer.Option("--key-type", help="ed25519 or ecdsa (P-256).")] = "ed25519",
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Write private keys unencrypted, for automation.")
    ] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Also give the signed documents to the server.")] = False,
) -> None:
    """Holds the ceremony: root, targets and approver keys, and the first signed documents."""
    run = session(context)
    if key_type not in ("ed25519", "ecdsa"):
        raise Usage(f"--key-type {key_type!r}: wanted ed25519 or ecdsa")
    if online is None:
        text = run.api.fetch("/api/v1/repository/online-keys")
        if text is None:
            raise Usage("the server names no online keys; use --online FILE")
    else:
        try:
            text = online.read_bytes()
        except OSError as error:
            raise Usage(f"{online}: {error.strerror or error}; wanted the server's online.pub.json") from None
    made = keys.hold_ceremony(
        directory,
        online_keys=key_files.read_online_keys(text),
        password=None if no_password else run.password(confirm=True),
        now=now(),
        approvers=tuple(approver or ("approver",)),
        threshold=threshold,
        key_type="ecdsa" if key_type == "ecdsa" else "ed25519",
    )
    output.say(f"Keys and first documents are in {directory}.")
    output.say(f"root.json has sha256 {made.root_sha256}: every enrolment token carries it.")
    if no_password:
        output.say("The private keys are not encrypted: whoever reads the folder can sign.")
    if publish:
        publish_ceremony(context, made)
        output.say("The server holds root, targets and the empty catalog.")


@app.command()
def publish(context: typer.Context) -> None:
    """Gives root, targets and catalog of the ceremony to the server (once, with an admin's token)."""
    run = session(context)
    publish_ceremony(context, keys.read_ceremony(run.keys))
    output.say("The server holds root, targets and the empty catalog.")


@app.command()
def show(
    context: typer.Context,
    directory: Annotated[Path | None, typer.Option("--dir", help="The ceremony's folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Shows who holds which key, thresholds and expiries. Opens no private key."""
    made = keys.read_ceremony(directory or session(context).keys)
    if as_json:
        output.show_json(made.record)
        return
    output.show_fields(
        str(made.directory),
        {"made": made.record.get("made"), "root sha256": made.root_sha256, "encrypted": made.record.get("encrypted")},
    )
    output.show_table(
        "keys",
        ("name", "role", "key id", "file"),
        [(k["name"], k.get("role"), k["keyid"][:16], k["file"]) for k in made.record["keys"]],
    )
    output.show_fields("expires", made.record.get("expires", {}))


def publish_ceremony(context: typer.Context, made: keys.Ceremony) -> None:
    """Posts the ceremony's documents in their order."""
    api = session(context).api
    for role, metadata in (("root", made.root), ("targets", made.targets)):
        api.post("/api/v1/repository/metadata", {"role": role, "metadata": metadata.decode()})
    api.post(
        "/api/v1/repository/metadata",
        {"role": "catalog", "metadata": made.catalog.decode(), "floors": made.floors.decode()},
    )
