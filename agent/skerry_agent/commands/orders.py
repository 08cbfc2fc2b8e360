"""Orders to a running agent: updates begun, ended, held back and looked for, the throttle, a configuration read again."""

# ruff: noqa: T201 - what a command prints is its result.

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from skerry_agent.commands import conversation

_TIMES = "e.g. 30s, 10m, 2h"


def add_parsers(command: Any) -> None:
    """The parsers of these commands; ``command(name, function, words)`` makes one."""
    revert = command("revert", _revert, "go back to the previous bundle; the present one is not taken again")
    revert.add_argument("--model", default="")
    cancel = command("cancel", _cancel, "end the update under way; its bundle is not tried again before a pardon")
    cancel.add_argument(
        "--model", default="", help="this one's; without: what is under way, else all that wait for their next try"
    )
    activate = command("activate", _activate, "start an update that lies ready and is held back, whatever the hour")
    activate.add_argument("--despite-locks", action="store_true", help="even while an application has locked updates")
    lock = command(
        "lock", _lock, "hold updates back for a while: they are fetched and checked, and begin to answer later"
    )
    lock.add_argument("--for", type=conversation.duration, dest="for_s", metavar="TIME", required=True, help=_TIMES)
    lock.add_argument("--reason", required=True, help="in words, for whoever asks why")
    unlock = command("unlock", _unlock, "end a lock before its time")
    for one in (lock, unlock):
        one.add_argument("--owner", default=None, help="who holds it, one lock each; without: the user's name")
    sync = command("sync", _sync, "look for updates now")
    sync.add_argument("--pardon", action="store_true", help="try bundles again that used up their attempts")
    throttle = command("throttle", _throttle, "bound how many inferences per second this device answers")
    bound = throttle.add_mutually_exclusive_group(required=True)
    bound.add_argument(
        "--rate", type=conversation.rate, metavar="N", help="inferences per second, of all clients together"
    )
    bound.add_argument("--off", action="store_true", help="no bound any more")
    throttle.add_argument(
        "--for", type=conversation.duration, dest="for_s", metavar="TIME", help=f"{_TIMES}; else until --off"
    )
    reload = command("reload", _reload, "read the configuration again, as far as that goes without a restart")
    for one in (revert, cancel, activate, lock, unlock, sync, throttle, reload):
        one.add_argument("--json", action="store_true")


def _revert(options: argparse.Namespace) -> int:
    body = {"model": options.model} if options.model else {}
    return conversation.ordered(options, "/skerry/v1/revert", body, "going back to {model} {version}")


def _cancel(options: argparse.Namespace) -> int:
    body = {"model": options.model} if options.model else {}
    words = "cancelled: {names}; to try it again: skerry-agent sync --pardon"
    return conversation.ordered(options, "/skerry/v1/cancel", body, words)


def _activate(options: argparse.Namespace) -> int:
    answer = conversation.asked(options, "POST", "/skerry/v1/activate", {"despite_locks": options.despite_locks})
    if options.json:
        print(json.dumps(answer.body))
    elif answer.status != 200:
        print(f"skerry-agent: {answer.body['error']}", file=sys.stderr)
    else:
        when = f"starts after: {answer.body['waits_for']}" if answer.body["waits_for"] else "starts now"
        print(f"{answer.body['model']} {answer.body['version']} {when}")
    return conversation.OK if answer.status == 200 else conversation.REFUSED


def _owner(options: argparse.Namespace) -> str:
    import getpass

    return str(options.owner if options.owner is not None else getpass.getuser())


def _lock(options: argparse.Namespace) -> int:
    body = {"owner": _owner(options), "reason": options.reason, "for_s": options.for_s}
    named = "" if options.owner is None else " --owner {owner}"
    said = f"locked by {{owner}}; `skerry-agent unlock{named}` ends it"
    return conversation.ordered(options, "/skerry/v1/lock", body, said)


def _unlock(options: argparse.Namespace) -> int:
    return conversation.ordered(options, "/skerry/v1/unlock", {"owner": _owner(options)}, "unlocked by {owner}")


def _sync(options: argparse.Namespace) -> int:
    return conversation.ordered(
        options, "/skerry/v1/sync", {"pardon": options.pardon}, "looking; {pardoned} bundles pardoned"
    )


def _throttle(options: argparse.Namespace) -> int:
    if options.off and options.for_s is not None:
        print("skerry-agent: throttle: --for goes with --rate", file=sys.stderr)
        return conversation.USAGE
    body: dict[str, Any] = {"rate": 0 if options.off else options.rate}
    if options.for_s is not None:
        body["for_s"] = options.for_s
    answer = conversation.asked(options, "POST", "/skerry/v1/throttle", body)
    if options.json:
        print(json.dumps(answer.body))
    elif answer.status == 200:
        print(f"throttle: {conversation.throttle_words(answer.body['throttle'])}")
    else:
        print(f"skerry-agent: {answer.body['error']}", file=sys.stderr)
    return (
        conversation.OK if answer.status == 200 else conversation.USAGE if answer.status == 400 else conversation.FAILED
    )


def _reload(options: argparse.Namespace) -> int:
    answer = conversation.asked(options, "POST", "/skerry/v1/reload", {})
    if options.json:
        print(json.dumps(answer.body))
    elif answer.status != 200:
        for fault in answer.body.get("faults", [answer.body["error"]]):
            print(f"skerry-agent: {fault}", file=sys.stderr)
        print("  nothing was changed", file=sys.stderr)
    else:
        words = {"live": "changed", "next_worker": "with the next worker", "restart": "wait for a restart"}
        said = [f"{words[when]}: {', '.join(keys)}" for when, keys in answer.body.items() if keys]
        print("; ".join(said) or "nothing is different")
    return (
        conversation.OK
        if answer.status == 200
        else conversation.USAGE
        if answer.body.get("code") == "bad_config"
        else conversation.FAILED
    )
