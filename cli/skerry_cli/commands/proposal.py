"""``skerry proposal``: catalogs that wait for further approvers' signatures.

What ``list`` and ``show`` say is the server's view. What is signed is rebuilt by this tool from the operator's own root, and shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skerry_cli import keys, output, publishing
from skerry_cli.client import Api, quote
from skerry_cli.commands import publish
from skerry_cli.commands.publish import Ahead, ApproverName, AsJson, Expect, Lower, Yes
from skerry_cli.commands.session import Session, now, session
from skerry_cli.errors import CliError, RefusedForSafety, Usage

app = typer.Typer(no_args_is_help=True, help="Catalogs that wait for further approvers' signatures.")

Proposal = Annotated[str, typer.Argument(metavar="ID", help="The proposal, as list shows it.")]
_PATH = "/api/v1/repository/proposals"


@app.command("list")
def list_(
    context: typer.Context,
    ended: Annotated[
        bool, typer.Option("--all", help="Also those that were published, withdrawn, void or expired.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Lists what waits for signatures: who signed, how many are missing, what each changes."""
    run = session(context)
    items = list(run.api.get(f"{_PATH}?ended=true" if ended else _PATH)["items"])
    if as_json:
        output.show_json({"items": items})
        return
    names = _names(run)
    output.show_table(
        "proposals",
        ("id", "state", "catalog", "by", "signed", "wanted", "changes", "until"),
        [
            (
                item["id"],
                item["state"],
                item["version"],
                item["proposed_by"],
                [names.get(keyid, keyid[:8]) for keyid in item["signed"]],
                f"{len(item['signed'])} of {item['threshold']}",
                _in_a_line(item),
                output.when(item["expires_ms"]),
            )
            for item in items
        ],
    )


@app.command()
def show(context: typer.Context, proposal: Proposal, as_json: AsJson = False) -> None:
    """Shows one: its state and why, who signed, who is missing, what it changes as the server sees it."""
    run = session(context)
    found = _one(run.api, proposal)
    if as_json:
        output.show_json(found)
        return
    names = _names(run)
    output.show_fields(
        f"proposal {proposal}",
        {
            "state": found["state"],
            "why": found["reason"],
            "catalog version": found["version"],
            "proposed by": found["proposed_by"],
            "at": output.when(found["proposed_ms"]),
            "until": output.when(found["expires_ms"]),
            "signatures": f"{len(found['signed'])} of {found['threshold']}",
            "signed by": [names.get(keyid, keyid[:16]) for keyid in found["signed"]],
            "may still sign": [names.get(keyid, keyid[:16]) for keyid in found["missing"]],
            "brings": [name for name in ("targets", "root") if found[f"with_{name}"]],
        },
    )
    changes = found.get("changes") or {}
    for entry in changes.get("added", ()):
        output.say(f"+ {entry['model']}@{entry['version']}  {entry['digest']}")
    for entry in changes.get("removed", ()):
        output.say(f"- {entry['model']}@{entry['version']}  {entry['digest']}")
    for kind, words in (("floors", "floor"), ("forced", "forced floor")):
        for entry in changes.get(kind, ()):
            output.say(f"~ {words} of {entry['model']}: {entry['before'] or 'none'} -> {entry['after'] or 'none'}")


@app.command()
def sign(
    context: typer.Context,
    proposal: Proposal,
    approver: ApproverName = "approver",
    folder: Annotated[
        Path | None, typer.Option("--from", help="Check against this local bundle instead of the server's copy.")
    ] = None,
    expect: Expect = None,
    lower: Lower = False,
    ahead: Ahead = False,
    force: Annotated[bool, typer.Option("--force", help="Take out a bundle although something runs it.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Rebuilds a colleague's proposal from your own root, shows what it changes, and signs it; with the last signature it is published."""
    run = session(context)
    found = _one(run.api, proposal)
    if found["state"] != "open":
        raise RefusedForSafety(f"proposal {proposal} is {found['state']}: {found['reason']}")
    theirs = publishing.proposal_documents(found)
    worker = publish.approver_of(run, approver)
    then = publish.reached(ahead, then=publish.unused(run.api, force=force))
    check = publish.expected(expect, seen=not yes or folder is not None, then=then)
    made = worker.cosign(
        theirs.metadata,
        theirs.floors,
        targets=theirs.targets,
        root=theirs.root,
        now=now(),
        folder=folder,
        lower_floors=lower,
        confirm=publish.confirm(yes, as_json, check),
        waiting=proposal,
    )
    publish.report(worker, made, None, as_json)


@app.command()
def rebase(
    context: typer.Context,
    proposal: Proposal,
    approver: ApproverName = "approver",
    others: Annotated[list[str] | None, typer.Option("--with", help="Others who will sign too; repeat.")] = None,
    expect: Expect = None,
    lower: Lower = False,
    ahead: Ahead = False,
    force: Annotated[bool, typer.Option("--force", help="Take out a bundle although something runs it.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Applies a proposal's change anew to the catalog that appeared since, and signs that. Signatures of the old one are void."""
    run = session(context)
    found = _one(run.api, proposal)
    if found["state"] not in ("void", "expired", "open"):
        raise RefusedForSafety(f"proposal {proposal} is {found['state']}: {found['reason']}")
    theirs = publishing.proposal_documents(found)
    if theirs.targets is not None:
        raise Usage(
            f"proposal {proposal} brings new targets: propose it anew, with targets that follow the present ones"
        )
    worker = publish.approver_of(run, approver)
    rebased = worker.rebased(theirs.metadata, theirs.floors, now=now(), lower_floors=lower)
    said = output.note if as_json else output.say
    void = len(found["signed"])
    said(
        f"Proposal {proposal} followed an older catalog: its {void} signatures are void. What is left of it is proposed anew."
    )
    for line in rebased.done:
        said(f"  not again: {line}")
    then = publish.reached(ahead, then=publish.unused(run.api, force=force))
    made = worker.change(
        rebased.change,
        now=now(),
        approvers=_signers(approver, others, rebased.approvers),
        confirm=publish.confirm(yes, as_json, publish.expected(expect, seen=not yes, then=then)),
        leave=True,
    )
    if found["state"] == "open" or not made.complete:
        run.api.post(
            f"{_PATH}/{quote(proposal)}/withdraw", {"reason": f"rebased as catalog {made.difference.to_version}"}
        )
    publish.report(worker, made, None, as_json)


@app.command()
def withdraw(
    context: typer.Context,
    proposal: Proposal,
    reason: Annotated[str, typer.Option("--reason", help="Why; it stands in the audit.")],
    as_json: AsJson = False,
) -> None:
    """Ends a proposal. What was signed stays a signature: withdraw before the last one is given."""
    found = session(context).api.post(f"{_PATH}/{quote(proposal)}/withdraw", {"reason": reason})
    if as_json:
        output.show_json(found)
    else:
        output.say(f"Proposal {proposal} is {found['state']}.")


def _signers(approver: str, others: list[str] | None, former: tuple[str, ...]) -> tuple[str, ...]:
    """Who stands in the entries: those named now, else those of the old proposal where whoever signs is one of them."""
    if others or not former:
        return (approver, *(others or ()))
    if approver not in former:
        raise Usage(
            f"the old proposal was to be signed by {', '.join(former)}, not by {approver}",
            advice="name who signs with you: --with NAME",
        )
    return former


def _one(api: Api, proposal: str) -> dict[str, Any]:
    found = dict(api.get(f"{_PATH}/{quote(proposal)}"))
    if found.get("id") != proposal:
        raise RefusedForSafety(f"the server was asked for proposal {proposal} and answers with {found.get('id')}")
    return found


def _names(run: Session) -> dict[str, str]:
    """Key id -> holder, where this machine has the ceremony's record."""
    try:
        record = keys.read_ceremony(run.keys).record
    except CliError:
        return {}
    return {str(entry["keyid"]): str(entry["name"]) for entry in record["keys"]}


def _in_a_line(item: dict[str, Any]) -> str:
    changes = item.get("changes") or {}
    parts = [f"+{e['model']}@{e['version']}" for e in changes.get("added", ())]
    parts += [f"-{e['model']}@{e['version']}" for e in changes.get("removed", ())]
    parts += [f"floor {e['model']} {e['after'] or 'none'}" for e in changes.get("floors", ())]
    parts += [f"forced floor {e['model']} {e['after'] or 'none'}" for e in changes.get("forced", ())]
    return " ".join(parts) or ("renews" if item.get("changes") else item["reason"])
