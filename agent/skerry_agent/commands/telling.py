"""What an agent tells: status, why, the locks that hold updates back, its log and its metrics."""

# ruff: noqa: T201 - what a command prints is its result.

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from skerry_agent.commands import conversation


def add_parsers(command: Any) -> None:
    """The parsers of these commands; ``command(name, function, words)`` makes one."""
    status = command("status", _status, "what a running agent serves, sends and updates")
    why = command("why", _why, "what this device does, since when, what it waits for and what to do")
    locks = command("locks", _locks, "who holds updates back, why and for how long")
    for one in (status, why, locks):
        one.add_argument("--json", action="store_true")
    lines = command("logs", _logs, "the last lines of the agent's log, one JSON object each, without secrets")
    lines.add_argument("--last", type=conversation.count, default=0, metavar="N", help="at most so many lines")
    command("metrics", _metrics, "everything of this moment in Prometheus' text format")


def _status(options: argparse.Namespace) -> int:
    answer = conversation.asked(options, "GET", "/skerry/v1/status")
    if options.json:
        print(json.dumps(answer.body))
        return conversation.OK
    body = answer.body
    print(f"device {body['device']}  group {body['group']}  agent {body['agent']}")
    for name, slot in body["running"].items():
        print(f"  {name} {slot['version']}  {slot['state']}  {slot['variant']}  {slot['digest'][:12]}")
        engine = body["engines"].get(name, {})
        if engine.get("fallback"):
            print(f"    on the CPU: {engine['fallback']}")
    if not body["running"]:
        print("  nothing runs; skerry-agent why says what it waits for")
    update = body["update"]
    if update is not None:
        reason = f": {update['code']} ({update['detail']})" if update["code"] else ""
        print(f"  last update: {update['model']} {update['version']} {update['state']}{reason}")
        if fetched := update.get("progress"):
            left = f", about {fetched['left_s']:.0f} s more" if fetched["left_s"] is not None else ""
            print(f"    {fetched['done_bytes'] / 1e6:.1f} of {fetched['size_bytes'] / 1e6:.1f} MB are here{left}")
    link, outbox = body["link"], body["outbox"]
    print(
        f"  link {'up' if link['connected'] else 'down'}, server {'online' if link['server_online'] else 'not seen'}, "
        f"{outbox['pending']} records wait"
    )
    serving = body["serving"]
    places = [f"http://{serving['host']}:{serving['port']}"] if "port" in serving else []
    places += [serving["socket"]] if "socket" in serving else []
    print(f"  answers at {', '.join(places)}")
    if serving["throttle"] is not None:
        print(f"  throttled: {conversation.throttle_words(serving['throttle'])}")
    return conversation.OK


def _why(options: argparse.Namespace) -> int:
    answer = conversation.asked(options, "GET", "/skerry/v1/why")
    if options.json:
        print(json.dumps(answer.body))
        return conversation.OK
    from skerry_agent.core.why import since

    for told in answer.body["told"]:
        print(f"{told['about']}: {told['says']}{since(told['since_s'])}")
        for name, text in (("waits for", told["waits_for"]), ("to do", told["do"])):
            if text:
                print(f"  {name + ':':<11}{text}")
    return conversation.OK


def _locks(options: argparse.Namespace) -> int:
    answer = conversation.asked(options, "GET", "/skerry/v1/locks")
    if options.json:
        print(json.dumps(answer.body))
        return conversation.OK
    for lock in answer.body["locks"]:
        print(f"{lock['owner']}  {lock['left_s']:.0f} s more  {lock['reason']}")
    if not answer.body["locks"]:
        print("nobody holds updates back")
    return conversation.OK


def _logs(options: argparse.Namespace) -> int:
    answer = conversation.asked(options, "GET", "/skerry/v1/logs")
    if answer.status != 200:
        print(f"skerry-agent: {answer.body['error']}", file=sys.stderr)
        return conversation.FAILED
    lines = answer.body.decode().splitlines()
    for line in lines[-options.last :] if options.last > 0 else lines:
        print(line)
    return conversation.OK


def _metrics(options: argparse.Namespace) -> int:
    answer = conversation.asked(options, "GET", "/metrics")
    if answer.status != 200:
        print(f"skerry-agent: {answer.body['error']}", file=sys.stderr)
        return conversation.FAILED
    sys.stdout.write(answer.body.decode())
    return conversation.OK
