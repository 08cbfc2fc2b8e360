"""``skerry-agent import``: names the folder to the agent, says how it goes on, and how it ended."""

# ruff: noqa: T201 - what a command prints is its result.

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skerry_agent.asking import Answer

_LOOK_S = 0.5
_REFUSED, _FAILED = 3, 1

Ask = Callable[[str, str, dict[str, Any] | None], Answer]


def add_parser(command: Any) -> None:
    """The command's arguments; ``command`` makes its parser."""
    parser = command("import", "take an update from a folder that was carried here, without any network")
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `skerry export-update` made")
    parser.add_argument("--no-wait", action="store_true", help="do not wait until it has ended")
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace, ask: Ask) -> int:
    """One import, from beginning to end or until it waits for something else. Returns the exit code."""
    answer = ask("POST", "/skerry/v1/import", {"folder": str(options.folder.absolute())})
    if answer.status != 200:
        if options.json:
            print(json.dumps(answer.body))
        else:
            print(f"skerry-agent: {answer.body.get('code', '')}: {answer.body['error']}", file=sys.stderr)
        return _REFUSED if answer.body.get("code") == "folder_unreadable" else _FAILED
    told, update = _followed(options, ask)
    if options.json:
        print(json.dumps({**told, "update": update}))
    else:
        _say(told, update)
    if told["state"] == "refused":
        return _REFUSED
    failed = any(one["code"] for one in told["updates"]) or (update is not None and bool(update["code"]))
    return _FAILED if failed else 0


def _followed(options: argparse.Namespace, ask: Ask) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Until it ended, or until it waits for more than time. Returns what is told of it, and the update that goes on."""
    said, waited = "", False
    while True:
        told = dict(ask("GET", "/skerry/v1/import", None).body)
        if told["state"] not in ("checking", "taken"):
            return told, None
        update = ask("GET", "/skerry/v1/status", None).body["update"] if told["state"] == "taken" else None
        waits = update is not None and (
            update["state"] == "ready" or (update["state"] == "idle" and bool(update["code"]))
        )
        if update is not None and (options.no_wait or (waits and waited)):
            return told, update
        # Looked at twice: it may be on its way from one state to the next.
        waited = waits
        words = _words(update) if update is not None else "looking at the folder"
        if words != said and not options.json:
            print(words, file=sys.stderr)
        said = words
        time.sleep(_LOOK_S)


def _ended(update: dict[str, Any]) -> str:
    """The state in which it came to rest: of what failed the lifecycle says no more than that it rests."""
    return "failed" if update["state"] == "idle" and update["code"] else str(update["state"])


def _words(update: dict[str, Any]) -> str:
    words = f"{update['model']} {update['version']}: {_ended(update)}"
    if progress := update.get("progress"):
        words += f", {progress['done_bytes'] / 1e6:.1f} of {progress['size_bytes'] / 1e6:.1f} MB"
    return words


def _say(told: dict[str, Any], update: dict[str, Any] | None) -> None:
    if told["state"] == "refused":
        print(f"skerry-agent: {told['code']}: {told['detail']}", file=sys.stderr)
        return
    for one in told["updates"]:
        why = f": {one['code']} ({one['detail']})" if one["code"] else ""
        print(f"{one['model']} {one['version']} {_ended(one)}{why}")
    if update is not None:
        why = f" ({update['code']}: {update['detail']}); it is tried again" if update["code"] else ""
        print(f"{_words(update)}{why or (', waits for ' + update['detail'] if update['state'] == 'ready' else '')}")
    elif not told["updates"]:
        print("taken: it gives this device nothing that it does not run already")
    for model, one in sorted(told["running"].items()):
        print(f"  runs {model} {one['version']}  {one['state']}")
