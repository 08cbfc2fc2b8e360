"""Who may ask the local endpoint: ``skerry-agent token``."""

# ruff: noqa: T201 - what a command prints is its result.

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from skerry_agent.commands import conversation


def add_parsers(acts: Any) -> None:
    """The parsers of ``token add``, ``list`` and ``remove``."""

    def act(name: str, function: Any, words: str) -> Any:
        found = acts.add_parser(name, help=words, description=words)
        found.set_defaults(command=function)
        conversation.add_config(found)
        return found

    add = act("add", _add, "add a client; its token is printed once and stands nowhere")
    add.add_argument("name")
    who = add.add_mutually_exclusive_group()
    who.add_argument("--uid", type=int, help="known by its user on the unix socket, in place of a token")
    who.add_argument("--gid", type=int, help="known by its primary group on the unix socket")
    add.add_argument("--model", action="append", default=[], help="that it may ask, again for more; without: all")
    add.add_argument("--read-only", action="store_true", help="it may not send labels")
    add.add_argument("--rate", type=float, help="requests per second, 0 for no limit; without: access.rate")
    add.add_argument("--burst", type=int, help="requests at once after a pause; without: access.burst")
    add.add_argument("--json", action="store_true")
    act("list", _list, "the clients, without their tokens").add_argument("--json", action="store_true")
    act("remove", _remove, "remove a client; it is refused within a second").add_argument("name")


def _add(options: argparse.Namespace) -> int:
    from skerry_agent import clients

    config = conversation.read_config(options)
    client = clients.Client(
        name=options.name, uid=options.uid, gid=options.gid, models=tuple(options.model), label=not options.read_only,
        rate=options.rate, burst=options.burst,
    )  # fmt: skip
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    token = clients.add(config.clients_file, client, token=options.uid is None and options.gid is None)
    if options.json:
        print(json.dumps({"name": options.name, "token": token or None}))
    elif token:
        print(token)
    if not config.access.required:
        print("skerry-agent: access.required is false: everyone who can connect may ask", file=sys.stderr)
    return conversation.OK


def _list(options: argparse.Namespace) -> int:
    from skerry_agent import clients

    found = clients.read(conversation.read_config(options).clients_file)
    if options.json:
        import msgspec

        print(json.dumps([{**msgspec.to_builtins(client), "token_sha256": None} for client in found]))
        return conversation.OK
    for client in found:
        known = (
            "token" if client.token_sha256 else f"uid {client.uid}" if client.uid is not None else f"gid {client.gid}"
        )
        rate = "access.rate" if client.rate is None else f"{client.rate:g}/s" if client.rate else "no limit"
        asks = ", ".join(client.models) or "all models"
        print(f"{client.name}  {known}  {asks}  {'asks and labels' if client.label else 'asks only'}  {rate}")
    return conversation.OK


def _remove(options: argparse.Namespace) -> int:
    from skerry_agent import clients

    clients.remove(conversation.read_config(options).clients_file, options.name)
    return conversation.OK
