"""``skerry push``, ``approve`` and ``floor set``: into the register, and into the signed catalog."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from skerry_cli import bundle, catalog, keys, model_signers, output, publishing, restoring, seen
from skerry_cli.client import Api, quote
from skerry_cli.commands.session import Session, now, session
from skerry_cli.errors import Failed, RefusedForSafety, Usage
from skerry_cli.publishing import find_bundle

__all__ = ["approve", "find_bundle", "floor_app", "push", "restore"]

floor_app = typer.Typer(no_args_is_help=True, help="The lowest version of a model that devices may activate.")

_MOST_USERS, _USER = 20, re.compile(r"(?:group|rollout|pin):[a-z0-9][a-z0-9-]{0,62}")
"""Of what the server says to use a bundle: it stands between the difference and the question, and may neither push the one away nor look
like a part of it."""

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
ApproverName = Annotated[str, typer.Option("--as", help="Name of the approver whose key signs.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Expect = Annotated[
    list[str] | None, typer.Option("--expect", help="Digest of a bundle that comes in; repeat. Needed with --yes.")
]
Ahead = Annotated[bool, typer.Option("--ahead", help="Allow a floor that no approved bundle reaches yet.")]
Lower = Annotated[bool, typer.Option("--lower", help="Allow a floor to go down or away.")]
ProposalOut = Annotated[
    Path | None, typer.Option("--proposal", help="Where to keep the proposal when further approvers must sign.")
]


def push(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    content_key: Annotated[
        Path | None,
        typer.Option("--content-key", help="Of an encrypted bundle, when it does not lie beside the folder."),
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="In the clear is meant, though another version of the model is encrypted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Sends a bundle to the server's register, which validates it."""
    made, run = bundle.read_bundle(folder), session(context)
    pushed = publishing.push(
        run.api,
        made,
        content_key=content_key,
        must_be_encrypted=run.profile.encrypted_models,
        clear=clear,
        say=output.note,
    )
    if as_json:
        output.show_json(
            {"digest": pushed.digest, "state": pushed.state, "reason": pushed.reason, "sent_bytes": pushed.sent_bytes}
        )
    else:
        output.say(
            f"{made.manifest.model} {made.manifest.version} is {pushed.state}, digest {pushed.digest}; "
            f"{pushed.sent_files} files sent."
        )
    if pushed.state not in ("validated", "approved", "deprecated"):
        raise Failed(f"the server says {pushed.state}: {pushed.reason or 'no reason given'}")


def approve(
    context: typer.Context,
    bundles: Annotated[list[str] | None, typer.Argument(help="MODEL@VERSION or digests to approve.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="MODEL@VERSION to take out; repeat.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--from", help="Check against this local bundle instead of the server's copy.")
    ] = None,
    approver: ApproverName = "approver",
    others: Annotated[list[str] | None, typer.Option("--with", help="Others who will sign too; repeat.")] = None,
    cosign: Annotated[Path | None, typer.Option("--cosign", help="A colleague's proposal to sign.")] = None,
    proposal_out: ProposalOut = None,
    renew: Annotated[bool, typer.Option("--renew", help="Change nothing but the expiry.")] = False,
    targets: Annotated[
        Path | None,
        typer.Option("--targets", help="Signed targets that appear with it, e.g. without a revoked approver."),
    ] = None,
    root: Annotated[Path | None, typer.Option("--root", help="A signed root that appears with them.")] = None,
    expect: Expect = None,
    lower: Lower = False,
    ahead: Ahead = False,
    force: Annotated[bool, typer.Option("--force", help="Take out a bundle although something runs it.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Signs the next catalog: verifies the last one from your own root, checks every added bundle, shows the difference."""
    run = session(context)
    if cosign is not None and (bundles or remove or renew):
        raise Usage("--cosign signs the proposal as it is: wanted it alone")
    if cosign is None and not (bundles or remove or renew):
        raise Usage("wanted a bundle to approve, --remove, --renew or --cosign")
    if (cosign is not None and (targets or root)) or (root is not None and targets is None):
        raise Usage("--targets goes with a new catalog, --root with --targets")
    if cosign is None and (expect is not None or lower or ahead):
        raise Usage("--expect, --lower and --ahead go with --cosign")
    worker = approver_of(run, approver)
    if cosign is not None:
        theirs = publishing.read_proposal(cosign)
        made = worker.cosign(
            theirs.metadata,
            theirs.floors,
            targets=theirs.targets,
            root=theirs.root,
            now=now(),
            folder=folder,
            lower_floors=lower,
            confirm=confirm(
                yes,
                as_json,
                expected(
                    expect, seen=not yes or folder is not None, then=reached(ahead, then=unused(run.api, force=force))
                ),
            ),
            leave=proposal_out is None,
        )
    else:
        change = catalog.Change(
            add=tuple(_addition(run.api, wish, sure=folder is not None or not yes) for wish in bundles or ()),
            remove=tuple(_listed(text) for text in remove or ()),
        )
        made = worker.change(
            change,
            now=now(),
            approvers=(approver, *(others or ())),
            folder=folder,
            targets=document(targets),
            root=document(root),
            confirm=confirm(yes, as_json, unused(run.api, force=force)),
            leave=proposal_out is None,
        )
    report(worker, made, proposal_out, as_json)


def restore(context: typer.Context, as_json: AsJson = False) -> None:
    """Gives a server that was restored from a backup the newest root, targets and catalog that this machine has verified."""
    run = session(context)
    done = restoring.restore(run.api, seen_dir(run))
    if as_json:
        output.show_json({"roles": {r: {"before": a, "after": b} for r, (a, b) in done.roles.items()}})
        return
    for role, (before, after) in done.roles.items():
        output.say(f"{role}: version {before} -> {after}")
    if not done.roles:
        output.say("The server has everything that this machine has seen.")


def seen_dir(run: Session) -> Path:
    """Where this operator's tool remembers what it has seen of this fleet."""
    return seen.folder(run.keys, keys.read_ceremony(run.keys).root_sha256)


@floor_app.command("set")
def floor_set(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model.")],
    version: Annotated[str, typer.Argument(help="Lowest version; 'none' takes the floor away.")],
    forced: Annotated[
        bool,
        typer.Option(
            "--forced", help="Also stop what serves below it, at once. Only for what must not answer any more."
        ),
    ] = False,
    lower: Lower = False,
    ahead: Ahead = False,
    approver: ApproverName = "approver",
    others: Annotated[list[str] | None, typer.Option("--with", help="Others who will sign too; repeat.")] = None,
    proposal_out: ProposalOut = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Signs a catalog with another floor: devices refuse older versions from then on, whoever asks."""
    wanted = None if version == "none" else version
    worker = approver_of(session(context), approver)
    change = worker.floor_change(model, wanted, forced=forced, lower=lower, now=now())
    made = worker.change(
        change,
        now=now(),
        approvers=(approver, *(others or ())),
        confirm=confirm(yes, as_json, reached(ahead)),
        leave=proposal_out is None,
    )
    report(worker, made, proposal_out, as_json)


def approver_of(run: Session, name: str) -> publishing.Approver:
    """Whoever signs under this name, with the key of the ceremony's folder. Raises ``Usage`` without such a key."""
    ceremony = keys.read_ceremony(run.keys)
    signer = ceremony.open_key(name, secret=run.secret, environment=run.environment)
    wanted = run.profile.model_signers
    return publishing.Approver(
        run.api,
        root=ceremony.root,
        signer=signer,
        name=name,
        names={str(key["keyid"]): str(key["name"]) for key in ceremony.record["keys"]},
        cache_dir=seen.folder(run.keys, ceremony.root_sha256),
        model_signers=None if wanted is None else model_signers.read(wanted),
        must_be_encrypted=run.profile.encrypted_models,
        say=output.note,
    )


def _addition(api: Api, wish: str, *, sure: bool) -> catalog.Addition:
    # Only the server says which digest a version has. A person sees it and may know better; --yes needs another witness.
    if "@" in wish and not sure:
        raise RefusedForSafety(
            f"{wish}: with --yes the server alone would choose what is signed",
            advice="name the digest, or give --from FOLDER",
        )
    found = find_bundle(api, wish)
    if found["state"] in ("draft", "rejected", "retired"):
        raise RefusedForSafety(f"{wish} is {found['state']}: {found.get('reason') or 'wanted a validated bundle'}")
    return catalog.Addition(
        model=str(found["model"]),
        version=str(found["version"]),
        digest=str(found["digest"]),
        submitter=str(found.get("submitter", "")),
    )


def _listed(text: str) -> tuple[str, str]:
    model, at, version = text.partition("@")
    if not at:
        raise Usage(f"--remove {text!r}: wanted MODEL@VERSION")
    return model, version


def expected(
    expect: list[str] | None, *, seen: bool, then: Callable[[catalog.Difference], None]
) -> Callable[[catalog.Difference], None]:
    """Refuses a colleague's proposal that adds what nobody named: a stolen key of one approver's must not sign with a script's.

    Args:
        expect: digests that must come in, and no other; None when they were not named.
        seen: a person answers, or a local bundle is what is compared.
        then: looks at the difference afterwards.
    """

    def check(difference: catalog.Difference) -> None:
        added = {entry.digest for entry in difference.added}
        if expect is not None and added != set(expect):
            raise RefusedForSafety(f"the proposal adds {sorted(added) or 'no bundle'}, --expect says {sorted(expect)}")
        if added and expect is None and not seen:
            raise RefusedForSafety(
                "with --yes nobody looks at what comes in",
                advice="name every digest with --expect, give --from FOLDER, or answer the question",
            )
        then(difference)

    return check


def reached(
    ahead: bool, then: Callable[[catalog.Difference], None] = lambda _: None
) -> Callable[[catalog.Difference], None]:
    """Refuses a floor that no listed bundle reaches, unless ``ahead``: as a slip of the finger it stops a model on every device.

    Devices take no forced floor back, so what is signed here ends with a bundle above it and not with another catalog.
    """

    def check(difference: catalog.Difference) -> None:
        if difference.beyond and not ahead:
            model, floor, highest = difference.beyond[0]
            raise RefusedForSafety(
                f"floor of {model}: no approved bundle reaches {floor}, "
                + (f"the highest is {highest}" if highest else f"the catalog lists none of {model!r}"),
                advice="approve one that does first; or say --ahead where the model shall not run before there is one",
            )
        then(difference)

    return check


def unused(api: Api, *, force: bool) -> Callable[[catalog.Difference], None]:
    """Refuses to take out what groups, rollouts or pins name, or only says so with ``force``."""

    def check(difference: catalog.Difference) -> None:
        for entry in difference.removed:
            used = (api.find(f"/api/v1/bundles/{quote(entry.digest)}") or {}).get("used_by") or []
            if not used:
                continue
            said = f"{entry.model}@{entry.version} is in use by {users(used)}"
            if not force:
                raise RefusedForSafety(
                    f"{said}; devices that do not hold it yet could not fetch it any more",
                    advice="move them to another bundle first, or take it out all the same with --force",
                )
            output.note(f"skerry: {said}; taken out all the same")

    return check


def users(used: Sequence[object]) -> str:
    """What the server says to use a bundle, in words that nobody can take for anything else.

    >>> users(["group:field", "pin:press-7", "group:x   + gas@9.0.0"])
    'group:field, pin:press-7 and 1 more'
    """
    named = [str(one) for one in used if _USER.fullmatch(str(one))][:_MOST_USERS]
    more = f"{len(used) - len(named)} more" if len(used) > len(named) else ""
    return " and ".join(part for part in (", ".join(named), more) if part)


def confirm(
    yes: bool, as_json: bool, check: Callable[[catalog.Difference], None] = lambda _: None
) -> Callable[[catalog.Difference], bool]:
    """Shows the difference, lets ``check`` look at it, and asks unless ``yes``."""

    def ask(difference: catalog.Difference) -> bool:
        # With --json stdout holds the answer alone: the question and its matter go to stderr.
        for line in difference.lines():
            (output.note if as_json else output.say)(line)
        check(difference)
        if yes:
            return True
        try:
            return typer.confirm("Sign this?", err=True)
        except typer.Abort:
            # Closed input or an interrupt. A script that forgot --yes must not take this for a fault of the server's.
            raise RefusedForSafety(
                "'Sign this?' got no answer: nothing was signed",
                advice="answer y or n; in a script name the digest, or give --from FOLDER, and use --yes",
            ) from None

    return ask


def report(worker: publishing.Approver, made: catalog.Proposal, proposal_out: Path | None, as_json: bool) -> None:
    """What became of a signed catalog: on the server, waiting there, or in a file."""
    waits = "" if made.complete or proposal_out is not None else str(worker.answer.get("id", ""))
    if not made.complete and proposal_out is not None:
        publishing.write_proposal(proposal_out, made)
    if as_json:
        output.show_json(
            {
                **made.difference.to_json(),
                "signatures": len(made.signed),
                "threshold": made.threshold,
                "posted": made.complete,
                "proposal": waits or None,
            }
        )
    elif made.complete:
        output.say(f"Catalog {made.difference.to_version} is signed and on the server.")
    elif waits:
        output.say(f"{len(made.signed)} of {made.threshold} signatures; it waits on the server as proposal {waits}.")
        output.say(f"The next approver: skerry proposal sign {waits} --as NAME")
    else:
        output.say(f"{len(made.signed)} of {made.threshold} signatures; pass {proposal_out} to the next approver.")


def document(path: Path | None) -> bytes | None:
    """The bytes of a signed document that was named, or None. Raises ``Usage`` when it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}; wanted signed metadata") from None
