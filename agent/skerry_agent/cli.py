"""``skerry-agent``: run the agent, ask it, enrol the device, examine it, go back to the previous bundle, say who may ask and how often.

Exit codes: 0 done, 1 failed, 2 wrong use or configuration, 3 refused for safety.
"""

# ruff: noqa: T201 - what a command prints is its result.

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from skerry_agent import __version__, bringing
from skerry_agent.commands import conversation, orders, telling, tokens
from skerry_agent.errors import AgentError, BadConfig, Rejected

_USAGE_CODES = frozenset({"client_exists", "client_invalid", "client_unknown"})
"""What a person asked for that cannot be: another try with the same words ends the same."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code = int(options.command(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader went away; nothing is left to say, and the interpreter must not try again while it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return conversation.FAILED
    except KeyboardInterrupt:
        print("skerry-agent: stopped", file=sys.stderr)
        return conversation.INTERRUPTED
    except BadConfig as error:
        for fault in error.faults:
            print(f"skerry-agent: {fault}", file=sys.stderr)
        return conversation.USAGE
    except AgentError as error:
        print(f"skerry-agent: {error.code}: {error.detail}", file=sys.stderr)
        if error.advice:
            print(f"  {error.advice}", file=sys.stderr)
        if error.code in _USAGE_CODES:
            return conversation.USAGE
        return conversation.REFUSED if isinstance(error, Rejected) else conversation.FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skerry-agent", description="Runs and updates models on this device.")
    parser.add_argument("--version", action="version", version=f"skerry-agent {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, words: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=words, description=words)
        found.set_defaults(command=function)
        if name not in ("lifecycle", "token"):
            conversation.add_config(found)
        return found

    run = command("run", _run, "run the agent in the foreground")
    run.add_argument("--log-json", action="store_true", help="one JSON object per log line")
    enrol = command("enrol", _enrol, "give this device its identity by a one-time token")
    enrol.add_argument("--token", default="", help="the token; without it SKERRY_ENROLMENT_TOKEN, then standard input")
    enrol.add_argument("--device", default="", metavar="ID", help="the id to ask for, with a token for a serial prefix")
    enrol.add_argument("--json", action="store_true")
    telling.add_parsers(command)
    orders.add_parsers(command)
    bringing.add_parser(lambda name, words: command(name, _import, words))
    acts = command("token", None, "who may ask the local endpoint").add_subparsers(required=True, metavar="ACT")
    tokens.add_parsers(acts)
    doctor = command("doctor", _doctor, "check this device, whether or not the agent runs")
    doctor.add_argument("--json", action="store_true")
    table = command("lifecycle", _lifecycle, "the table of an update's states")
    table.add_argument("--print", action="store_true", dest="show", required=True)
    return parser


def _run(options: argparse.Namespace) -> int:
    # Only this command needs the loop and all that hangs on it.
    from skerry_agent import logs, supervisor
    from skerry_agent.logring import LogRing

    config = conversation.read_config(options)
    os.umask(0o077)
    ring = LogRing(config.log_file)
    logs.configure(as_json=options.log_json or config.log.json, level=config.log.level, ring=ring)
    try:
        return supervisor.run(config, os.environ, config_path=options.config, ring=ring)
    finally:
        ring.flush()


def _enrol(options: argparse.Namespace) -> int:
    token = options.token or os.environ.get("SKERRY_ENROLMENT_TOKEN", "") or sys.stdin.readline().strip()
    if not token:
        print("skerry-agent: enrol: no token given", file=sys.stderr)
        return conversation.USAGE
    import asyncio

    from skerry_agent.errand import Errands

    config = conversation.read_config(options)
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    message = {
        "state_dir": str(config.state_dir),
        "server_url": config.server.url,
        "repository_url": config.repository.url,
        "lower_bound_s": 0.0,
        "now_s": time.time(),
        "encryption_key": config.encryption.key,
        "token": token,
        "csr_subject": options.device,
    }
    found = asyncio.run(Errands().run("enrol", message, timeout_s=config.timing.courier_s))
    if options.json:
        print(json.dumps(found))
    else:
        print(f"enrolled as {found.get('device_id', '?')} in group {found.get('group', '?')}")
    return conversation.OK


def _import(options: argparse.Namespace) -> int:
    return bringing.run(options, lambda method, path, body: conversation.asked(options, method, path, body))


def _doctor(options: argparse.Namespace) -> int:
    # Only this command needs what it looks at.
    import dataclasses

    from skerry_agent.doctor.examination import examine

    findings = []
    for finding in examine(options.config, os.environ):
        findings.append(finding)
        if not options.json:
            print(f"{finding.verdict:<5} {finding.check}: {finding.detail}", flush=True)
            if finding.advice:
                print(f"        {finding.advice}", flush=True)
    well = all(finding.verdict != "fail" for finding in findings)
    if options.json:
        print(json.dumps({"ok": well, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    return conversation.OK if well else conversation.FAILED


def _lifecycle(_options: argparse.Namespace) -> int:
    from skerry_agent.core import lifecycle

    print(lifecycle.printed())
    return conversation.OK


if __name__ == "__main__":
    sys.exit(main())
