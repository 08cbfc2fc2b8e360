"""``skerry bundle``: build, validate, inspect, verify and sign bundles on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skerry_cli import bundle, output, sealing, validation
from skerry_cli.commands.session import now, session
from skerry_cli.errors import Failed, Usage

app = typer.Typer(no_args_is_help=True, help="Build, check and sign bundles.")

Folder = Annotated[Path, typer.Argument(help="The bundle's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


@app.command()
def build(
    spec: Annotated[Path, typer.Argument(help="The spec, TOML or JSON.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the bundle.")],
    encrypt: Annotated[
        bool,
        typer.Option("--encrypt", help="Files leave this machine encrypted; the content key lies beside the folder."),
    ] = False,
    content_key: Annotated[
        Path | None,
        typer.Option("--content-key", help="Encrypt with this content key: files shared with a bundle of it are one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Makes a bundle from a spec: the manifest's fields, and files whose digests are filled in."""
    if encrypt and content_key is not None:
        raise Usage("wanted --encrypt, which makes a content key, or --content-key with one that is there")
    key = None if content_key is None else sealing.read_key(content_key)
    if encrypt:
        key = sealing.make_key(sealing.key_file(out))
    try:
        made = _build(spec, out, key)
    except BaseException:
        if encrypt:
            # Nothing was encrypted with it.
            sealing.key_file(out).unlink(missing_ok=True)
        raise
    if as_json:
        output.show_json(summary(made))
        return
    output.say(f"{made.manifest.model} {made.manifest.version} is in {out}, digest {made.digest}.")
    if encrypt:
        output.say(
            f"Its content key is {sealing.key_file(out)}: whoever has it can read the model; keep it, and keep it apart."
        )


def _build(spec: Path, out: Path, content_key: bytes | None) -> bundle.Bundle:
    return bundle.build_bundle(
        bundle.read_spec(spec),
        source=spec.parent,
        out=out,
        created=now().strftime("%Y-%m-%dT%H:%M:%SZ"),
        what=str(spec),
        content_key=content_key,
    )


@app.command()
def validate(folder: Folder, as_json: AsJson = False) -> None:
    """Runs the bundle on this machine's runtime, in a child process with limits: proof, precision, cost."""
    made = bundle.read_bundle(folder)
    bundle.check_files(made)
    report = validation.validate(made)
    if as_json:
        output.show_json(report)
    else:
        output.show_fields(
            f"{made.manifest.model} {made.manifest.version}", {n: v for n, v in report.items() if n != "variants"}
        )
        for variant in report.get("variants", ()):
            output.show_fields(variant["id"], variant)
    if not report["ok"]:
        raise Failed(f"{folder}: not valid: {report['code']}: {report['detail']}", advice=report.get("advice", ""))


@app.command()
def inspect(folder: Folder, as_json: AsJson = False) -> None:
    """Shows what a bundle is and asks for. Runs nothing."""
    made = bundle.read_bundle(folder)
    if as_json:
        output.show_json(summary(made))
        return
    told = summary(made)
    variants = told.pop("variants")
    output.show_fields(str(folder), told)
    output.show_table(
        "variants",
        ("id", "runtime", "arch", "precision", "memory MB", "files"),
        [(v["id"], v["runtime"], v["arch"] or "any", v["precision"], v["rss_mb"], v["files"]) for v in variants],
    )


@app.command()
def verify(
    folder: Folder,
    key: Annotated[
        Path | None, typer.Option("--key", help="Public key (PEM, or NAME.pub.json): also check model.sig.")
    ] = None,
    digest: Annotated[str | None, typer.Option("--digest", help="The digest that the bundle must have.")] = None,
    as_json: AsJson = False,
) -> None:
    """Checks every file against the manifest, and the signature when a key is given."""
    from skerry_cli import signing
    from skerry_cli.errors import RefusedForSafety

    made = bundle.read_bundle(folder)
    if digest is not None and digest != made.digest:
        raise RefusedForSafety(f"{folder}: its digest is {made.digest}, wanted {digest}")
    bundle.check_files(made)
    if key is not None:
        signing.verify(made, key)
    told = {"digest": made.digest, "files": len(made.manifest.files()), "signature": "holds" if key else "not checked"}
    if as_json:
        output.show_json(told)
    else:
        output.say(
            f"{folder}: {told['files']} files match the manifest, digest {made.digest}; signature {told['signature']}."
        )


@app.command()
def sign(
    context: typer.Context,
    folder: Folder,
    key: Annotated[Path | None, typer.Option("--key", help="Private key (P-256, PEM).")] = None,
    encrypted: Annotated[bool, typer.Option("--encrypted", help="The key of --key has a password.")] = False,
    name: Annotated[
        str | None,
        typer.Option("--as", help="Instead: a key of your folder by name, wherever it lies (skerry keys make, use)."),
    ] = None,
    directory: Annotated[Path | None, typer.Option("--dir", help="Folder of your keys; --keys when left out.")] = None,
) -> None:
    """Writes model.sig (OpenSSF Model Signing) beside the manifest."""
    from skerry_cli import keyring, signing

    made = bundle.read_bundle(folder)
    run = session(context)
    if (key is None) == (name is None):
        raise Usage("wanted --key FILE or --as NAME")
    if name is not None:
        signer = keyring.open_key(directory or run.keys, name, secret=run.secret, environment=run.environment)
        path = signing.sign_with(made, signer, name)
    else:
        assert key is not None
        path = signing.sign(made, key, run.password(encrypted=encrypted))
    output.say(f"{path} is written.")


def summary(made: bundle.Bundle) -> dict[str, Any]:
    """A bundle in few words."""
    manifest = made.manifest
    return {
        "model": manifest.model,
        "version": manifest.version,
        "digest": made.digest,
        "created": manifest.created,
        "owner": f"{manifest.owner.name} <{manifest.owner.contact}>",
        "licence": manifest.licence,
        "card": manifest.card,
        "inputs": [f"{t.name} {t.datatype} {list(t.shape)}" for t in manifest.inputs],
        "outputs": [f"{t.name} {t.datatype} {list(t.shape)}" for t in manifest.outputs],
        "features": len(manifest.features),
        "reference_rows": manifest.reference.n,
        "accuracy": manifest.reference.accuracy,
        "signed": made.signature is not None,
        "encrypted": manifest.encryption is not None,
        "size_bytes": sum(file.size for file in manifest.files()),
        "variants": [
            {
                "id": v.id,
                "runtime": v.runtime,
                "arch": list(v.arch),
                "precision": v.precision,
                "rss_mb": v.needs.rss_mb,
                "files": [file.path for file in v.files],
            }
            for v in manifest.variants
        ],
    }
