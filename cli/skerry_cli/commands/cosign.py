"""``skerry keys review``, ``sign``, ``rotate``, ``collect``, ``accept``: documents that several holders sign, one after the other or at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skerry_cli import history, key_files, keyring, keys, output
from skerry_cli import signing_requests as requests
from skerry_cli.commands.keys import AsJson, Directory, post_later
from skerry_cli.commands.session import now, session
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_cli.offline_roles import spoken

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; needs --sha256.")]
Parts = Annotated[list[Path] | None, typer.Option(help="NAME.pub.json of a holder to add; repeat.")]
Names = Annotated[list[str] | None, typer.Option(help="Name or key id to take out; repeat.")]


def review(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The signing request.")],
    directory: Directory = None,
    as_json: AsJson = False,
) -> None:
    """Shows what a signing request would change, held against what your folder trusts, and who has signed. Signs nothing."""
    folder = directory or session(context).keys
    request = requests.read(file)
    names = history.read_names(folder)
    reviewed = requests.review(request, trusted_of(folder), own_names=names, now=now())
    if as_json:
        output.show_json(as_value(reviewed, request, names))
    else:
        tell(reviewed, request, names, output.say)


def sign(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The signing request.")],
    name: Annotated[str, typer.Option("--as", help="Name of your key that signs.")],
    directory: Directory = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the signed copy goes; FILE itself when left out.")
    ] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", help="What must be signed, as others have it (skerry keys review).")
    ] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Signs a request with your own key: checks it against what your folder trusts, shows the change, asks."""
    run = session(context)
    folder = directory or run.keys
    if yes and sha256 is None:
        raise RefusedForSafety(
            "--yes signs what nobody has looked at",
            advice="give --sha256 of what is to be signed, from a machine that you trust (skerry keys review)",
        )
    request = requests.read(file)
    names = history.read_names(folder)
    reviewed = requests.review(request, trusted_of(folder), own_names=names, now=now())
    digest = requests.digest(reviewed)
    if sha256 is not None and sha256.replace(" ", "").lower() != digest:
        raise RefusedForSafety(f"{file}: what is signed has sha256 {digest}, wanted {sha256}")
    tell(reviewed, request, names, output.note if as_json else output.say)
    if not yes:
        ask("Sign this?")
    signer = keyring.open_key(folder, name, secret=run.secret, environment=run.environment)
    signed = requests.sign(request, reviewed, signer)
    place = out or file
    requests.write(place, signed)
    after = requests.review(signed, trusted_of(folder), own_names=names, now=now())
    if as_json:
        output.show_json(as_value(after, signed, names))
        return
    for one in after:
        output.say(f"{one.role}: {one.standing.text(dict(signed.names) | names)}")
    output.say(f"The signed copy is {place}; it goes back to who collects.")


def rotate(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="New file for the signing request.")],
    directory: Directory = None,
    root: Annotated[bool, typer.Option("--root", help="Make the next root, if only to renew its expiry.")] = False,
    targets: Annotated[bool, typer.Option("--targets", help="Make the next targets, if only to renew it.")] = False,
    add_root: Parts = None,
    remove_root: Names = None,
    root_threshold: Annotated[int | None, typer.Option(help="How many root holders must sign.")] = None,
    add_targets: Parts = None,
    remove_targets: Names = None,
    targets_threshold: Annotated[int | None, typer.Option(help="How many targets holders must sign.")] = None,
    add_approver: Parts = None,
    remove_approver: Names = None,
    approver_threshold: Annotated[int | None, typer.Option(help="How many approvers must sign a catalog.")] = None,
    add_online: Annotated[Path | None, typer.Option(help="Public keys of the server (online.pub.json) to add.")] = None,
    remove_online: Annotated[list[str] | None, typer.Option(help="Key id of the server's to take out; repeat.")] = None,
    as_json: AsJson = False,
) -> None:
    """Makes a request for the next root, the next targets or both, from the last ones that your folder verified. Signs nothing."""
    folder = directory or session(context).keys
    if out.exists():
        raise Usage(f"{out}: it is there already; name a new file")
    trusted = history.read_trusted(folder)
    names = history.read_names(folder)
    parts = {
        what: _parts(files, names)
        for what, files in (("root", add_root), ("targets", add_targets), ("approver", add_approver))
    }
    online = None
    if add_online is not None or remove_online:
        held = requests.online_of(trusted)
        added = key_files.read_online_keys(_read(add_online)) if add_online is not None else {}
        online = requests.other_online(held, add=added, remove=tuple(_keyid(k, {}, held) for k in remove_online or ()))
    wants_root = any(
        (root, add_root, remove_root, root_threshold, add_targets, remove_targets, targets_threshold, online)
    )
    wants_targets = any((targets, add_approver, remove_approver, approver_threshold, online))
    if not (wants_root or wants_targets):
        raise Usage("wanted --root, --targets or a change")
    known = requests.keys_of(trusted)
    change = (
        requests.RootChange(
            add_root=parts["root"],
            remove_root=tuple(_keyid(one, names, known) for one in remove_root or ()),
            root_threshold=root_threshold,
            add_targets=parts["targets"],
            remove_targets=tuple(_keyid(one, names, known) for one in remove_targets or ()),
            targets_threshold=targets_threshold,
            online=online,
        )
        if wants_root
        else None
    )
    delegated = requests.TargetsChange(
        add=parts["approver"],
        remove=tuple(_keyid(one, names, known) for one in remove_approver or ()),
        threshold=approver_threshold,
        online=online,
    )
    request = requests.rotate(
        trusted, root=change, targets=delegated if wants_targets else None, names=names, now=now()
    )
    if not wants_targets and requests.orphans_targets(request, trusted):
        output.note("skerry: the next root would not accept the last targets, so targets is signed anew, too")
        request = requests.rotate(trusted, root=change, targets=delegated, names=names, now=now())
    reviewed = requests.review(request, trusted, own_names=names, now=now())
    key_files.write_new(out, request.encode(), mode=0o644)
    if as_json:
        output.show_json(as_value(reviewed, request, names))
        return
    tell(reviewed, request, names, output.say)
    output.say(f"Holders sign {out} with: skerry keys sign {out.name} --as NAME")


def collect(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The signing request that gathers the signatures.")],
    others: Annotated[list[Path] | None, typer.Argument(help="Signed copies of it.")] = None,
    directory: Directory = None,
    publish: Annotated[bool, typer.Option("--publish", help="Also give the finished documents to the server.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merges signed copies into a request; when every threshold is met, takes its documents into your folder."""
    run = session(context)
    folder = directory or run.keys
    names = history.read_names(folder)
    trusted = history.read_trusted(folder)
    request = requests.read(file)
    for other in others or ():
        reviewed = requests.review(request, trusted, own_names=names, now=now())
        request = requests.merge(request, requests.read(other), reviewed)
    reviewed = requests.review(request, trusted, own_names=names, now=now())
    if others:
        requests.write(file, request)
    complete = all(one.standing.complete for one in reviewed)
    placed: list[Path] = []
    if complete:
        said = dict(request.names) | names
        for one in reviewed:
            placed.append(history.accept(folder, one.metadata.to_bytes(), now=now(), names=said))
        if publish:
            post_later(run, placed)
    if as_json:
        value = as_value(reviewed, request, names)
        output.show_json(value | {"files": [str(path) for path in placed], "posted": bool(complete and publish)})
    else:
        tell(reviewed, request, names, output.say)
        for path in placed:
            output.say(f"{path} is complete{' and on the server' if publish else ''}.")
    if publish and not complete:
        raise RefusedForSafety("signatures are missing: nothing was given to the server")


def accept(
    context: typer.Context,
    files: Annotated[
        list[Path], typer.Argument(help="Finished root or targets metadata, in the order of their versions.")
    ],
    directory: Directory = None,
    as_json: AsJson = False,
) -> None:
    """Takes later versions of root and targets into your folder, each verified from the one before."""
    folder = directory or session(context).keys
    placed = []
    for file in files:
        names = history.read_names(folder)
        placed.append(history.accept(folder, _read(file), now=now(), names=names))
    if as_json:
        output.show_json({"files": [str(path) for path in placed]})
        return
    for path in placed:
        output.say(f"{path} holds.")


def trusted_of(folder: Path) -> history.Trusted | None:
    """What the folder trusts; None when it has no root yet."""
    return history.read_trusted(folder) if (folder / keys.ROOT_FILE).exists() else None


def as_value(
    reviewed: tuple[requests.Reviewed, ...], request: requests.Request, names: dict[str, str]
) -> dict[str, Any]:
    """Builtins, for ``--json``."""
    said = dict(request.names) | names
    return {
        "sha256": requests.digest(reviewed),
        "complete": all(one.standing.complete for one in reviewed),
        "documents": [
            {
                "role": one.role,
                "version": one.metadata.signed.version,
                "changes": list(one.lines),
                "signed_by": [said.get(keyid, keyid) for keyid in one.standing.signed],
                "lacks": [
                    {"for": lack.whose, "wanted": lack.wanted, "of": [said.get(keyid, keyid) for keyid in lack.keyids]}
                    for lack in one.standing.lacks
                ],
            }
            for one in reviewed
        ],
    }


def tell(reviewed: tuple[requests.Reviewed, ...], request: requests.Request, names: dict[str, str], say: Any) -> None:
    """Changes, signatures and what to compare, for a person."""
    said = dict(request.names) | names
    for one in reviewed:
        for line in one.lines:
            say(line)
        say(f"  {one.standing.text(said)}")
    say("All holders must see the same sha256 of what is signed:")
    say(f"  {spoken(requests.digest(reviewed))}")


def ask(question: str) -> None:
    """Asks on the terminal. Raises ``RefusedForSafety`` without a yes."""
    try:
        if typer.confirm(question, err=True):
            return
    except typer.Abort:
        raise RefusedForSafety(
            f"{question!r} got no answer: nothing was signed", advice="in a script use --yes with --sha256"
        ) from None
    raise RefusedForSafety("not confirmed: nothing was signed")


def _parts(files: list[Path] | None, names: dict[str, str]) -> dict[str, Any]:
    found = {}
    for file in files or ():
        part = keyring.read_public_part(file)
        taken = [keyid for keyid, name in names.items() if name == part.name and keyid != part.key.keyid]
        if taken:
            raise Usage(f"{file}: {part.name} holds key {taken[0][:16]} already; wanted another name")
        names[part.key.keyid] = part.name
        found[part.key.keyid] = part.key
        output.note(f"{part.name}: {part.fingerprint}")
    return found


def _keyid(wish: str, names: dict[str, str], known: Any) -> str:
    found = [keyid for keyid in known if keyid == wish or names.get(keyid) == wish]
    if len(found) != 1:
        listed = ", ".join(names.get(keyid, keyid[:16]) for keyid in known)
        raise Usage(f"{wish}: wanted a name or a key id of {listed}")
    return str(found[0])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}") from None
