"""The ``skerry`` program: puts the commands together and turns errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 refused for safety. Command modules are imported when their command
runs, so ``skerry --help`` stays quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from skerry_contract.errors import ContractError

from skerry_cli import __version__, errors
from skerry_cli.commands import (
    bundle,
    ceremony,
    cosign,
    delta,
    demo,
    device,
    exporting,
    group,
    insight,
    keys,
    proposal,
    publish,
    rollout,
    server,
)
from skerry_cli.commands.session import Session
from skerry_cli.output import note
from skerry_cli.profile import Options

INTERRUPTED = 130
# Some releases of typer bring a click of their own, so the class is found from what typer shows.
_ClickException: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run models on fleets of devices and keep them right.",
)
keys.app.command("ceremony")(ceremony.hold)
keys.app.command("join")(ceremony.join)
keys.app.command("verify-record")(ceremony.verify_record)
keys.app.command("review")(cosign.review)
keys.app.command("sign")(cosign.sign)
keys.app.command("rotate")(cosign.rotate)
keys.app.command("collect")(cosign.collect)
keys.app.command("accept")(cosign.accept)
app.add_typer(keys.app, name="keys")
app.add_typer(bundle.app, name="bundle")
app.add_typer(delta.app, name="delta")
app.add_typer(proposal.app, name="proposal")
app.add_typer(publish.floor_app, name="floor")
app.add_typer(rollout.app, name="rollout")
app.add_typer(device.app, name="device")
app.add_typer(group.app, name="group")
app.command("push")(publish.push)
app.command("approve")(publish.approve)
app.command("restore")(publish.restore)
app.command("info")(server.info)
app.command("audit")(server.audit)
app.command("drift")(insight.drift)
app.command("accuracy")(insight.accuracy)
app.command("attributions")(insight.attributions)
app.command("samples")(insight.samples)
app.command("export-update")(exporting.export_update)
app.command("demo")(demo.demo)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"skerry {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    server_url: Annotated[str | None, typer.Option("--server", help="https://host:port of the fleet server.")] = None,
    token: Annotated[Path | None, typer.Option("--token", help="File with the API token.")] = None,
    ca: Annotated[str | None, typer.Option("--ca", help="The fleet's CA: PEM file, or its sha256 fingerprint.")] = None,
    keys_dir: Annotated[Path | None, typer.Option("--keys", help="Folder of the key ceremony.")] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="Profile of the config file.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Config file instead of the usual one.")] = None,
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    context.obj = Session(
        Options(profile=profile, config=config, server=server_url, token=token, ca=ca, keys=keys_dir), os.environ
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the program and exits the process."""
    sys.exit(run(arguments))


def _words(error: Exception) -> str:
    """What was wrong with the arguments, by the name of the option: typer's own text of a missing one names the variable."""
    message = getattr(error, "format_message", None)
    return str(message() if message is not None else error)


def run(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    try:
        result = app(arguments, standalone_mode=False, prog_name="skerry")
        if result == INTERRUPTED:
            # Some releases of typer turn Ctrl-C into an exit code themselves, without a word.
            note("skerry: stopped")
        return result if isinstance(result, int) else errors.OK
    except errors.CliError as error:
        note(f"skerry: {error.message}")
        if error.advice:
            note(f"  {error.advice}")
        return error.exit_code
    except ContractError as error:
        note(f"skerry: {error}")
        return errors.USAGE
    except typer.Abort:
        note("skerry: stopped")
        return errors.FAILED
    except _ClickException as error:
        if type(error).__name__ != "NoArgsIsHelpError":
            for line in f"skerry: {_words(error)}".splitlines():
                note(line)
        return errors.USAGE
    except KeyboardInterrupt:
        note("skerry: stopped")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away; nothing is left to say, and the interpreter must not try again while it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.FAILED
