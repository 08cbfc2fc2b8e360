"""``skerry keys ceremony``, ``join``, ``verify-record``: root creation by several people, and what they keep of it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib import parse

import typer

from skerry_cli import ceremony, history, key_files, keyring, keys, output, record, signers
from skerry_cli import signing_requests as requests
from skerry_cli.commands import cosign
from skerry_cli.commands.keys import AsJson, Directory, make_on_token, online_keys
from skerry_cli.commands.session import Session, now, session
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_cli.offline_roles import spoken

_ANSWERS = {"organiser", "online", "holders", "thresholds", "keys", "signed"}
_KEY_ANSWERS = {"make", "key_type", "password", "token", "uri", "public", "fingerprint"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a script answers instead of a person. ``keys``: by holder's name."""

    organiser: str
    online: Path
    holders: dict[str, tuple[str, ...]]
    thresholds: dict[str, int]
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    signed: tuple[Path, ...] = ()


def hold(
    context: typer.Context,
    directory: Annotated[Path, typer.Option("--dir", help="Folder of this ceremony; run again to go on.")],
    answers: Annotated[
        Path | None, typer.Option("--answers", help="TOML with all answers: nothing is asked but secrets.")
    ] = None,
    signed: Annotated[
        list[Path] | None, typer.Option("--signed", help="A holder's signed copy of request.json; repeat.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Walks through root creation by several holders: who holds what, their keys, the documents, the signatures, the record.

    Each step is kept: an interrupted ceremony goes on with the same command, and nothing is written over.
    """
    run = session(context)
    given = read_answers(answers) if answers is not None else None
    say = output.note if as_json else output.say
    state = ceremony.read(directory, now())
    if not state.finished:
        if state.plan is None or given is not None:
            ceremony.start(directory, _plan(run, given), now=now())
        _gather(run, directory, given, say)
        state = ceremony.read(directory, now())
        if not state.waiting_keys:
            path = ceremony.make_documents(directory, now=now())
            _sign(run, directory, given, say)
            for copy in (*(signed or ()), *(given.signed if given else ())):
                who = ceremony.take_signatures(directory, requests.read(copy), now=now())
                say(f"{copy}: {'signed by ' + ', '.join(who) if who else 'no new signature'}")
            if ceremony.finish(directory, now=now()) is None:
                waiting = ceremony.read(directory, now()).waiting_signatures
                say(f"Signatures are wanted of {', '.join(waiting)}. Each of them signs {path} on their own machine:")
                say(f"  skerry keys sign {path.name} --as NAME --dir THEIR-FOLDER")
                say(f"and the signed copy comes back: skerry keys ceremony --dir {directory} --signed COPY")
        state = ceremony.read(directory, now())
    if as_json:
        output.show_json(state.to_json())
    elif state.finished:
        made = keys.read_ceremony(directory)
        say(f"The ceremony is done. The record is {directory / record.TEXT_FILE}; root.json has sha256")
        say(f"  {spoken(made.root_sha256)}")
        say(f"Each holder takes it in: skerry keys join {directory} --dir THEIR-FOLDER")


def join(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="Folder with the ceremony's documents and record.")],
    directory: Directory = None,
    root_sha256: Annotated[
        str | None, typer.Option("--root-sha256", help="sha256 of root.json as read aloud at the ceremony.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Takes a ceremony's documents and record into your own folder, after checking all of it. Private keys stay where they are."""
    folder = directory or session(context).keys
    failed = [one for one in record.check(source) if not one.holds]
    if failed:
        raise RefusedForSafety(f"{source}: {failed[0].what}: no: {failed[0].detail}")
    made = keys.read_ceremony(source)
    if root_sha256 is None:
        (output.note if as_json else output.say)(f"root.json has sha256 {spoken(made.root_sha256)}")
        cosign.ask("Is this what was read aloud at the ceremony?")
    elif root_sha256.replace(" ", "").lower() != made.root_sha256:
        raise RefusedForSafety(f"{source}: root.json has sha256 {made.root_sha256}, wanted {root_sha256}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    names = [*record.DOCUMENTS, record.TEXT_FILE, history.HISTORY_FILE]
    names += [path.name for role in history.ROLES for path in sorted(source.glob(f"*.{role}.json"))]
    for name in dict.fromkeys((*names, record.RECORD_FILE)):
        if not (source / name).exists():
            continue
        data = (source / name).read_bytes()
        place = folder / name
        if not place.exists():
            key_files.write_new(place, data, mode=0o644)
        elif place.read_bytes() != data:
            raise RefusedForSafety(f"{place}: another one is here; nothing is written over")
    own = [name for name, key in keyring.read_keyring(folder).items() if made.holder(key.key.keyid)]
    if as_json:
        output.show_json({"root_sha256": made.root_sha256, "own_keys": own})
    else:
        output.say(f"{folder} trusts this root; keys of yours in it: {', '.join(own) or 'none'}.")


def verify_record(
    context: typer.Context,
    directory: Directory = None,
    root_sha256: Annotated[
        str | None, typer.Option("--root-sha256", help="sha256 of root.json from elsewhere, e.g. a printed record.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Checks a ceremony's record against its documents: digests, signatures, keys, thresholds, later versions."""
    folder = directory or session(context).keys
    checks = record.check(folder)
    if root_sha256 is not None:
        got = str(keys.read_ceremony(folder).root_sha256)
        holds = root_sha256.replace(" ", "").lower() == got
        checks.append(record.Check(what="root is the one named", holds=holds, detail=got))
    good = all(one.holds for one in checks)
    if as_json:
        output.show_json(
            {"holds": good, "checks": [{"what": c.what, "holds": c.holds, "detail": c.detail} for c in checks]}
        )
    else:
        for one in checks:
            output.say(f"{'yes' if one.holds else 'NO '}  {one.what}: {one.detail}")
    if not good:
        raise RefusedForSafety(f"{folder}: the record does not hold")


def read_answers(path: Path) -> Answers:
    """A script's answers; files are relative to the answers' own folder.

    Raises:
        Usage: with every fault found.
    """
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}; wanted TOML with answers") from None
    except ValueError as error:
        raise Usage(f"{path}: wanted TOML: {error}") from None
    faults = [f"unknown key {name!r}" for name in sorted(set(value) - _ANSWERS)]
    faults += [f"{name}: missing" for name in ("organiser", "online", "holders", "thresholds") if name not in value]
    for name in ("holders", "thresholds", "keys"):
        if not isinstance(value.get(name, {}), dict):
            faults.append(f"{name}: wanted a table")
            value[name] = {}
    for name in ("organiser", "online"):
        if not isinstance(value.get(name, ""), str):
            faults.append(f"{name}: wanted text")
    for role in ceremony.ROLES:
        holders = value.get("holders", {}).get(role)
        if not isinstance(holders, list) or not all(isinstance(one, str) for one in holders):
            faults.append(f"holders.{role}: wanted a list of names")
        if type(value.get("thresholds", {}).get(role)) is not int:
            faults.append(f"thresholds.{role}: wanted a number")
    for table in ("holders", "thresholds"):
        faults += [f"{table}: unknown role {r!r}" for r in sorted(set(value.get(table, {})) - set(ceremony.ROLES))]
    for name, entry in value.get("keys", {}).items():
        if not isinstance(entry, dict):
            faults.append(f"keys.{name}: wanted a table")
            continue
        faults += [f"keys.{name}: unknown key {key!r}" for key in sorted(set(entry) - _KEY_ANSWERS)]
        if sum(key in entry for key in ("make", "token", "uri", "public")) != 1:
            faults.append(f"keys.{name}: wanted one of make, token, uri, public")
        if "public" in entry and "fingerprint" not in entry:
            faults.append(f"keys.{name}: a key that was handed over wants the fingerprint that its holder read out")
    signed = value.get("signed", [])
    if not isinstance(signed, list) or not all(isinstance(one, str) for one in signed):
        faults.append("signed: wanted a list of files")
    if faults:
        raise Usage(f"{path}: {'; '.join(faults)}")
    return Answers(
        organiser=value["organiser"],
        online=path.parent / value["online"],
        holders={role: tuple(value["holders"][role]) for role in ceremony.ROLES},
        thresholds={role: value["thresholds"][role] for role in ceremony.ROLES},
        keys={
            name: entry | ({"public": str(path.parent / entry["public"])} if "public" in entry else {})
            for name, entry in value.get("keys", {}).items()
        },
        signed=tuple(path.parent / one for one in signed),
    )


def _plan(run: Session, given: Answers | None) -> ceremony.Plan:
    if given is not None:
        return ceremony.Plan(
            organiser=given.organiser,
            holders=given.holders,
            thresholds=given.thresholds,
            online=online_keys(run, given.online),
        )
    organiser = _asked("Who leads this ceremony?")
    holders: dict[str, tuple[str, ...]] = {}
    thresholds: dict[str, int] = {}
    about = {
        "root": ("names all other keys; kept offline by several people", "root-1 root-2 root-3"),
        "targets": ("names the approvers; kept offline", "targets-1 targets-2"),
        "approver": ("approve bundles; in use each week", "approver-1 approver-2"),
    }
    for role, (what, example) in about.items():
        output.note(f"{role}: {what}. A name stands for one key; a person may hold several.")
        holders[role] = tuple(_asked(f"Names of the {role} keys, apart by spaces", example).split())
        most = len(holders[role])
        thresholds[role] = int(
            typer.prompt(f"How many of the {most} must sign", default=min(2, most), type=int, err=True)
        )
    file = _asked("The server's online.pub.json; empty to ask the server", "")
    return ceremony.Plan(
        organiser=organiser,
        holders=holders,
        thresholds=thresholds,
        online=online_keys(run, Path(file) if file else None),
    )


def _gather(run: Session, folder: Path, given: Answers | None, say: Any) -> None:
    """Takes in the public parts that are missing, as far as they can be had now."""
    for name in ceremony.read(folder, now()).waiting_keys:
        wish = _wish(given, name)
        if wish is None:
            say(f"{name}: waiting for the public part of the key")
            continue
        if "public" in wish:
            path = Path(str(wish["public"]))
            if given is not None and not path.exists():
                say(f"{name}: waiting for {path}")
                continue
            part = keyring.read_public_part(path)
            if part.name != name:
                raise Usage(f"{path}: it is the public part of {part.name}, wanted {name}")
            compared = _compare(part, wish.get("fingerprint"))
            kept = "the holder's own keeping"
        else:
            own = _own(run, folder, name, wish)
            part, compared = own.public, "made at the ceremony"
            kept = _kept(own.uri, folder)
        ceremony.hand_over(folder, part, kept=kept, compared=compared, now=now())
        say(f"{name}: {part.fingerprint}")


def _wish(given: Answers | None, name: str) -> dict[str, Any] | None:
    if given is not None:
        return given.keys.get(name)
    say = (
        "m: make it here, t: make it on a token, u: it lies behind a URI, h: a NAME.pub.json was handed over, l: later"
    )
    choice = _asked(f"Key of {name} ({say})", "h").strip().lower()[:1]
    if choice == "m":
        return {"make": True}
    if choice == "t":
        return {"token": _asked("The token", "hsm:2?label=TOKEN")}
    if choice == "u":
        return {"uri": _asked("The URI")}
    if choice == "h":
        return {"public": _asked("The file", f"{name}.pub.json")}
    return None


def _own(run: Session, folder: Path, name: str, wish: dict[str, Any]) -> keyring.OwnKey:
    """The holder's key on this machine: the one that an interrupted run made, or a new one."""
    held = keyring.read_keyring(folder).get(name)
    if held is not None:
        return held
    if "make" in wish and (folder / f"{name}.pem").exists():
        # An interrupted run made the file and did not come to note it.
        wish = {"uri": f"{signers.FILE}:{name}.pem"}
    if "make" in wish:
        password = None if wish.get("password") is False else run.password(confirm=True, whose=name)
        return keyring.make_file_key(folder, name, key_type=str(wish.get("key_type", "ed25519")), password=password)
    if "token" in wish:
        return make_on_token(run, folder, name, str(wish["token"]))
    uri, key = signers.import_key(
        str(wish["uri"]), whose=name, folder=folder, secret=run.secret, environment=run.environment
    )
    own = keyring.OwnKey(name=name, uri=uri, key=key)
    keyring.add_key(folder, own)
    return own


def _compare(part: keyring.PublicPart, read_out: Any) -> str:
    if read_out is not None:
        if str(read_out).replace(" ", "").lower() != part.key.keyid:
            raise RefusedForSafety(
                f"{part.name}: the key handed over has fingerprint {part.fingerprint}, its holder read out {read_out}",
                advice="somebody changed the file on its way: have it handed over again",
            )
        return "the fingerprint that the holder read out is the same"
    output.note(f"{part.name}'s key has the fingerprint")
    output.note(f"  {part.fingerprint}")
    if not typer.confirm(f"Has {part.name} read out the same?", err=True):
        raise RefusedForSafety(f"{part.name}: the fingerprints were not compared: the key is not taken")
    return "the holder read out the same fingerprint"


def _sign(run: Session, folder: Path, given: Answers | None, say: Any) -> None:
    """Signs with the keys that are on this machine, after showing what is signed."""
    state = ceremony.read(folder, now())
    local = keyring.read_keyring(folder)
    waiting = [
        name
        for name in state.handed
        if name in local
        and local[name].key.keyid == state.handed[name].part.key.keyid
        and any(
            one.named(local[name].key.keyid) and local[name].key.keyid not in one.standing.signed
            for one in state.reviewed
        )
    ]
    request = requests.read(folder / ceremony.REQUEST_FILE)
    cosign.tell(state.reviewed, request, history.read_names(folder), say)
    for name in waiting:
        if given is None:
            try:
                cosign.ask(f"Sign this as {name}?")
            except RefusedForSafety:
                say(f"{name}: not signed now")
                continue
        signer = keyring.open_key(folder, name, secret=run.secret, environment=run.environment)
        current = ceremony.read(folder, now())
        mine = requests.read(folder / ceremony.REQUEST_FILE)
        ceremony.take_signatures(folder, requests.sign(mine, current.reviewed, signer), now=now())
        say(f"{name}: signed")


def _kept(uri: str, folder: Path) -> str:
    """Where the private part lies, as it is and not as it was wished."""
    scheme = signers.scheme_of(uri)
    if scheme == signers.FILE:
        path = folder / parse.unquote(uri.partition(":")[2])
        return "an encrypted file" if key_files.is_encrypted(path) else "a file that is not encrypted"
    if scheme == signers.TOKEN:
        return "a PKCS#11 token"
    if scheme == signers.VARIABLE:
        return "an environment variable"
    return f"{scheme}, outside"


def _asked(question: str, default: str | None = None) -> str:
    try:
        return str(typer.prompt(question, default=default, err=True, show_default=bool(default))).strip()
    except typer.Abort:
        raise Usage(
            f"{question}: nobody answered", advice="what was answered is kept: run it again, or give --answers FILE"
        ) from None
