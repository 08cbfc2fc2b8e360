"""``skerry-agent``: run the agent, ask it, enrol the device, examine it, go back to the previous bundle.

Exit codes: 0 done, 1 failed, 2 wrong use or configuration, 3 refused for safety.
"""

# ruff: noqa: T201 - what a command prints is its result.

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skerry_agent import __version__
from skerry_agent.config import Config, load
from skerry_agent.control import Answer, ask
from skerry_agent.core import lifecycle
from skerry_agent.errand import Errands
from skerry_agent.errors import AgentError, BadConfig, Rejected

OK, FAILED, USAGE, REFUSED = 0, 1, 2, 3
DEFAULT_CONFIG = "/etc/skerry/agent.toml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except BadConfig as error:
        for fault in error.faults:
            print(f"skerry-agent: {fault}", file=sys.stderr)
        return USAGE
    except AgentError as error:
        print(f"skerry-agent: {error.code}: {error.detail}", file=sys.stderr)
        if error.advice:
            print(f"  {error.advice}", file=sys.stderr)
        return REFUSED if isinstance(error, Rejected) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skerry-agent", description="Runs and updates models on this device.")
    parser.add_argument("--version", action="version", version=f"skerry-agent {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, words: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=words, description=words)
        found.set_defaults(command=function)
        if name != "lifecycle":
            found.add_argument(
                "--config",
                type=Path,
                default=Path(os.environ.get("SKERRY_AGENT_CONFIG", DEFAULT_CONFIG)),
                metavar="FILE",
            )
        return found

    run = command("run", _run, "run the agent in the foreground")
    run.add_argument("--log-json", action="store_true", help="one JSON object per log line")
    status = command("status", _status, "what a running agent serves, sends and updates")
    status.add_argument("--json", action="store_true")
    enrol = command("enrol", _enrol, "give this device its identity by a one-time token")
    enrol.add_argument("--token", default="", help="the token; without it SKERRY_ENROLMENT_TOKEN, then standard input")
    enrol.add_argument("--device", default="", metavar="ID", help="the id to ask for, with a token for a serial prefix")
    enrol.add_argument("--json", action="store_true")
    revert = command("revert", _revert, "go back to the previous bundle; the present one is not taken again")
    revert.add_argument("--model", default="")
    revert.add_argument("--json", action="store_true")
    sync = command("sync", _sync, "look for updates now")
    sync.add_argument("--pardon", action="store_true", help="try bundles again that used up their attempts")
    sync.add_argument("--json", action="store_true")
    doctor = command("doctor", _doctor, "check this device, whether or not the agent runs")
    doctor.add_argument("--json", action="store_true")
    table = command("lifecycle", _lifecycle, "the table of an update's states")
    table.add_argument("--print", action="store_true", dest="show", required=True)
    return parser


def _config(options: argparse.Namespace) -> Config:
    return load(options.config, os.environ)


def _run(options: argparse.Namespace) -> int:
    # Only this command needs the loop and all that hangs on it.
    from skerry_agent import logs, supervisor

    config = _config(options)
    logs.configure(as_json=options.log_json or config.log.json, level=config.log.level)
    os.umask(0o077)
    return supervisor.run(config, os.environ)


def _asked(options: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
    config = _config(options)
    try:
        return ask(config.run_dir / "control.sock", method, path, body)
    except OSError as error:
        raise AgentError(
            "not_running",
            f"no agent answers in {config.run_dir}: {error}",
            advice="run: skerry-agent run --config FILE",
        ) from None


def _status(options: argparse.Namespace) -> int:
    answer = _asked(options, "GET", "/skerry/v1/status")
    if options.json:
        print(json.dumps(answer.body))
        return OK
    body = answer.body
    print(f"device {body['device']}  group {body['group']}  agent {body['agent']}")
    for name, slot in body["running"].items():
        print(f"  {name} {slot['version']}  {slot['state']}  {slot['variant']}  {slot['digest'][:12]}")
    if not body["running"]:
        print("  nothing runs yet")
    update = body["update"]
    if update is not None:
        reason = f": {update['code']} ({update['detail']})" if update["code"] else ""
        print(f"  last update: {update['model']} {update['version']} {update['state']}{reason}")
    link, outbox = body["link"], body["outbox"]
    print(
        f"  link {'up' if link['connected'] else 'down'}, server {'online' if link['server_online'] else 'not seen'}, "
        f"{outbox['pending']} records wait"
    )
    serving = body["serving"]
    places = [f"http://{serving['host']}:{serving['port']}"] if "port" in serving else []
    places += [serving["socket"]] if "socket" in serving else []
    print(f"  answers at {', '.join(places)}")
    return OK


def _enrol(options: argparse.Namespace) -> int:
    token = options.token or os.environ.get("SKERRY_ENROLMENT_TOKEN", "") or sys.stdin.readline().strip()
    if not token:
        print("skerry-agent: enrol: no token given", file=sys.stderr)
        return USAGE
    config = _config(options)
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    message = {
        "state_dir": str(config.state_dir),
        "server_url": config.server.url,
        "repository_url": config.repository.url,
        "lower_bound_s": 0.0,
        "now_s": time.time(),
        "token": token,
        "csr_subject": options.device,
    }
    found = asyncio.run(Errands().run("enrol", message, timeout_s=config.timing.courier_s))
    if options.json:
        print(json.dumps(found))
    else:
        print(f"enrolled as {found.get('device_id', '?')} in group {found.get('group', '?')}")
    return OK


def _ordered(options: argparse.Namespace, path: str, body: dict[str, Any], words: str) -> int:
    answer = _asked(options, "POST", path, body)
    if options.json:
        print(json.dumps(answer.body))
    elif answer.status == 200:
        print(words.format(**answer.body))
    else:
        print(f"skerry-agent: {answer.body['error']}", file=sys.stderr)
    if answer.status == 409:
        return REFUSED
    return OK if answer.status == 200 else FAILED


def _revert(options: argparse.Namespace) -> int:
    body = {"model": options.model} if options.model else {}
    return _ordered(options, "/skerry/v1/revert", body, "going back to {model} {version}")


def _sync(options: argparse.Namespace) -> int:
    return _ordered(options, "/skerry/v1/sync", {"pardon": options.pardon}, "looking; {pardoned} bundles pardoned")


def _doctor(options: argparse.Namespace) -> int:
    # Only this command needs what it looks at.
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
    return OK if well else FAILED


def _lifecycle(_options: argparse.Namespace) -> int:
    print(lifecycle.printed())
    return OK


if __name__ == "__main__":
    sys.exit(main())
