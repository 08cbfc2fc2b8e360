"""``skerry keys``: the quick ceremony, one's own keys, and what a folder of keys holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from skerry_cli import history, key_files, keyring, keys, output, signers
from skerry_cli.commands.session import Session, now, session
from skerry_cli.errors import Usage

app = typer.Typer(no_args_is_help=True, help="Make, use, replace and show the operator's keys.")

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Directory = Annotated[Path | None, typer.Option("--dir", help="Folder of your keys; --keys when left out.")]


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
    """The quick way: makes every key in one place and signs the first documents. For several holders see ceremony."""
    run = session(context)
    if key_type not in ("ed25519", "ecdsa"):
        raise Usage(f"--key-type {key_type!r}: wanted ed25519 or ecdsa")
    made = keys.hold_ceremony(
        directory,
        online_keys=online_keys(run, online),
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
def make(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The holder's name for this key, e.g. ada or ada-root.")],
    directory: Directory = None,
    key_type: Annotated[str, typer.Option("--key-type", help="ed25519 or ecdsa (P-256).")] = "ed25519",
    token: Annotated[
        str | None,
        typer.Option("--token", help="Make it on a PKCS#11 token instead, P-256: hsm:NUMBER?label=TOKEN."),
    ] = None,
    no_password: Annotated[bool, typer.Option("--no-password", help="Write the file unencrypted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Makes a key of your own, on this machine. Only NAME.pub.json is for others; read its fingerprint out to them."""
    run = session(context)
    folder = directory or run.keys
    if token is not None:
        own = make_on_token(run, folder, name, token)
    else:
        keyring.check_name(name)
        password = None if no_password else run.password(confirm=True, whose=name)
        own = keyring.make_file_key(folder, name, key_type=key_type, password=password)
    show_own(folder, own, as_json)


@app.command()
def use(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The holder's name for this key.")],
    uri: Annotated[
        str,
        typer.Option(
            "--uri", help="file2:PATH, envvar:NAME, hsm:NUMBER?label=TOKEN, or awskms:, gcpkms:, azurekms:, hv:."
        ),
    ],
    public: Annotated[
        Path | None, typer.Option("--public", help="The public key (PEM), where it cannot be read from the URI.")
    ] = None,
    directory: Directory = None,
    as_json: AsJson = False,
) -> None:
    """Names a key that exists already, wherever it lies, and writes its NAME.pub.json."""
    run = session(context)
    folder = directory or run.keys
    keyring.check_name(name)
    if public is not None:
        signers.scheme_of(uri)
        key = signers.read_public(public)
    else:
        uri, key = signers.import_key(uri, whose=name, folder=folder, secret=run.secret, environment=run.environment)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = keyring.OwnKey(name=name, uri=uri, key=key)
    keyring.add_key(folder, own)
    show_own(folder, own, as_json)


@app.command()
def pem(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="One of your keys, or a NAME.pub.json.")],
    directory: Directory = None,
) -> None:
    """Prints a public key in PEM, as other tools read it (model_signing verify key --public_key)."""
    if name.endswith(".json"):
        key = keyring.read_public_part(Path(name)).key
    else:
        held = keyring.read_keyring(directory or session(context).keys)
        if name not in held:
            raise Usage(f"no key {name!r} of yours, only {', '.join(held) or 'none'}")
        key = held[name].key
    for line in signers.public_pem(key).decode().splitlines():
        output.say(line)


@app.command()
def publish(
    context: typer.Context,
    files: Annotated[
        list[Path] | None, typer.Argument(help="Instead: finished later versions, e.g. 2.root.json, in their order.")
    ] = None,
    directory: Directory = None,
) -> None:
    """Gives root, targets and catalog of the ceremony to the server (once, with an admin's token), or later versions of root and targets."""
    if files:
        post_later(session(context), files)
        output.say(f"The server holds {', '.join(path.name for path in files)}.")
        return
    publish_ceremony(context, keys.read_ceremony(directory or session(context).keys))
    output.say("The server holds root, targets and the empty catalog.")


@app.command()
def show(
    context: typer.Context,
    directory: Annotated[Path | None, typer.Option("--dir", help="The ceremony's folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Shows who holds which key, thresholds and expiries, and which keys are yours. Opens no private key."""
    folder = directory or session(context).keys
    own = keyring.read_keyring(folder)
    if own and not (folder / keys.RECORD_FILE).exists():
        # A holder's folder before the ceremony has ended, or before its documents were taken in.
        _show_keyring(folder, own, as_json)
        return
    made = keys.read_ceremony(folder)
    trusted = history.read_trusted(folder)
    newest = {"root": trusted.root.version} | (
        {"targets": trusted.targets_role.version} if trusted.targets_role is not None else {}
    )
    if as_json:
        output.show_json(made.record | {"own_keys": [one.to_json() for one in own.values()], "newest": newest})
        return
    output.show_fields(
        str(made.directory),
        {
            "made": made.record.get("made"),
            "root sha256": made.root_sha256,
            "encrypted": made.record.get("encrypted"),
            "newest versions": newest,
        },
    )
    output.show_table(
        "keys",
        ("name", "role", "key id", "kept", "yours"),
        [
            (k["name"], k.get("role"), k["keyid"][:16], k.get("kept"), own[k["name"]].uri if k["name"] in own else "")
            for k in made.record["keys"]
        ],
    )
    output.show_fields("expires", made.record.get("expires", {}))


def online_keys(run: Session, path: Path | None) -> dict[str, Any]:
    """The server's public keys, from a file or from the server. Raises ``Usage`` when there are none."""
    if path is not None:
        try:
            return key_files.read_online_keys(path.read_bytes())
        except OSError as error:
            raise Usage(f"{path}: {error.strerror or error}; wanted the server's online.pub.json") from None
    text = run.api.fetch("/api/v1/repository/online-keys")
    if text is None:
        raise Usage("the server names no online keys; use --online FILE")
    return key_files.read_online_keys(text)


def make_on_token(run: Session, folder: Path, name: str, uri: str) -> keyring.OwnKey:
    """Has a token make a key, and records it in the folder."""
    keyring.check_name(name)
    if name in keyring.read_keyring(folder):
        raise Usage(f"{folder} holds a key {name!r} already; nothing is written over")
    uri, key = signers.make_on_token(uri, whose=name, secret=run.secret, environment=run.environment)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = keyring.OwnKey(name=name, uri=uri, key=key)
    keyring.add_key(folder, own)
    return own


def show_own(folder: Path, own: keyring.OwnKey, as_json: bool) -> None:
    """What to do with a new key."""
    public = folder / f"{own.name}.pub.json"
    if as_json:
        output.show_json(own.to_json() | {"public": str(public)})
        return
    output.say(f"{own.name} signs with {own.uri}. Hand over {public}, and read out:")
    output.say(f"  {own.public.fingerprint}")


def post_later(run: Session, files: list[Path]) -> None:
    """Gives finished versions of root and targets to the server: what follows one another in different roles, in one snapshot.

    A root that names other keys for targets and the targets that they signed hold only together.

    Raises:
        Usage: a file holds neither.
    """
    snapshots: list[dict[str, str]] = []
    for path in files:
        try:
            data = path.read_bytes()
            role = str(json.loads(data)["signed"]["_type"])
        except OSError as error:
            raise Usage(f"{path}: {error.strerror or error}; wanted metadata of root or of targets") from None
        except (ValueError, KeyError, TypeError):
            role = ""
        if role not in history.ROLES:
            raise Usage(f"{path}: wanted metadata of root or of targets")
        if not snapshots or role in snapshots[-1]:
            snapshots.append({})
        snapshots[-1][role] = data.decode()
    for together in snapshots:
        run.api.post("/api/v1/repository/set", together)


def publish_ceremony(context: typer.Context, made: keys.Ceremony) -> None:
    """Posts the ceremony's documents in their order."""
    api = session(context).api
    for role, metadata in (("root", made.root), ("targets", made.targets)):
        api.post("/api/v1/repository/metadata", {"role": role, "metadata": metadata.decode()})
    api.post(
        "/api/v1/repository/metadata",
        {"role": "catalog", "metadata": made.catalog.decode(), "floors": made.floors.decode()},
    )


def _show_keyring(folder: Path, own: dict[str, keyring.OwnKey], as_json: bool) -> None:
    if as_json:
        output.show_json({"own_keys": [one.to_json() for one in own.values()]})
        return
    output.show_table(
        str(folder), ("name", "key id", "signs with"), [(o.name, o.key.keyid, o.uri) for o in own.values()]
    )
