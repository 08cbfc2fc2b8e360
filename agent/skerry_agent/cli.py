"""``skerry-agent``: run the agent, ask it, enrol the device, examine it, go back to the previous bundle, say who may ask and how often.

Exit codes: 0 done, 1 failed, 2 wrong use or configuration, 3 refused for safety.
"""

# ruff: noqa: T201 - what a command prints is its result.

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry_agent import __version__, bringing
from skerry_agent.asking import PATIENCE_S, Answer, ask, control_socket
from skerry_agent.errors import AgentError, BadConfig, Rejected

if TYPE_CHECKING:
    from skerry_agent.config import Config

OK, FAILED, USAGE, REFUSED = 0, 1, 2, 3
_USAGE_CODES = frozenset({"client_exists", "client_invalid", "client_unknown"})
"""What a person asked for that cannot be: another try with the same words ends the same."""
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
        if error.code in _USAGE_CODES:
            return USAGE
        return REFUSED if isinstance(error, Rejected) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skerry-agent", description="Runs and updates models on this device.")
    parser.add_argument("--version", action="version", version=f"skerry-agent {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, words: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=words, description=words)
        found.set_defaults(command=function)
        if name not in ("lifecycle", "token"):
            _add_config(found)
        return found

    run = command("run", _run, "run the agent in the foreground")
    run.add_argument("--log-json", action="store_true", help="one JSON object per log line")
    status = command("status", _status, "what a running agent serves, sends and updates")
    status.add_argument("--json", action="store_true")
    why = command("why", _why, "what this device does, since when, what it waits for and what to do")
    why.add_argument("--json", action="store_true")
    enrol = command("enrol", _enrol, "give this device its identity by a one-time token")
    enrol.add_argument("--token", default="", help="the token; without it SKERRY_ENROLMENT_TOKEN, then standard input")
    enrol.add_argument("--device", default="", metavar="ID", help="the id to ask for, with a token for a serial prefix")
    enrol.add_argument("--json", action="store_true")
    revert = command("revert", _revert, "go back to the previous bundle; the present one is not taken again")
    revert.add_argument("--model", default="")
    revert.add_argument("--json", action="store_true")
    cancel = command("cancel", _cancel, "end the update under way; its bundle is not tried again before a pardon")
    cancel.add_argument("--json", action="store_true")
    activate = command("activate", _activate, "start an update that lies ready and is held back, whatever the hour")
    activate.add_argument("--despite-locks", action="store_true", help="even while an application has locked updates")
    activate.add_argument("--json", action="store_true")
    _lock_parsers(command)
    bringing.add_parser(lambda name, words: command(name, _import, words))
    sync = command("sync", _sync, "look for updates now")
    sync.add_argument("--pardon", action="store_true", help="try bundles again that used up their attempts")
    sync.add_argument("--json", action="store_true")
    throttle = command("throttle", _throttle, "bound how many inferences per second this device answers")
    bound = throttle.add_mutually_exclusive_group(required=True)
    bound.add_argument("--rate", type=_rate, metavar="N", help="inferences per second, of all clients together")
    bound.add_argument("--off", action="store_true", help="no bound any more")
    throttle.add_argument(
        "--for", type=_duration, dest="for_s", metavar="TIME", help="e.g. 30s, 10m, 2h; else until --off"
    )
    throttle.add_argument("--json", action="store_true")
    acts = command("token", None, "who may ask the local endpoint").add_subparsers(required=True, metavar="ACT")
    _token_parsers(acts)
    lines = command("logs", _logs, "the last lines of the agent's log, one JSON object each, without secrets")
    lines.add_argument("--last", type=_count, default=0, metavar="N", help="at most so many lines")
    command("metrics", _metrics, "everything of this moment in Prometheus' text format")
    reload = command("reload", _reload, "read the configuration again, as far as that goes without a restart")
    reload.add_argument("--json", action="store_true")
    doctor = command("doctor", _doctor, "check this device, whether or not the agent runs")
    doctor.add_argument("--json", action="store_true")
    table = command("lifecycle", _lifecycle, "the table of an update's states")
    table.add_argument("--print", action="store_true", dest="show", required=True)
    return parser


def _lock_parsers(command: Any) -> None:
    lock = command(
        "lock", _lock, "hold updates back for a while: they are fetched and checked, and begin to answer later"
    )
    lock.add_argument("--for", type=_duration, dest="for_s", metavar="TIME", required=True, help="e.g. 30s, 10m, 2h")
    lock.add_argument("--reason", required=True, help="in words, for whoever asks why")
    unlock = command("unlock", _unlock, "end a lock before its time")
    for one in (lock, unlock):
        one.add_argument("--owner", default=None, help="who holds it, one lock each; without: the user's name")
        one.add_argument("--json", action="store_true")
    command("locks", _locks, "who holds updates back, why and for how long").add_argument("--json", action="store_true")


def _add_config(parser: argparse.ArgumentParser) -> None:
    known = Path(os.environ.get("SKERRY_AGENT_CONFIG", DEFAULT_CONFIG))
    parser.add_argument("--config", type=Path, default=known, metavar="FILE")


def _token_parsers(acts: Any) -> None:
    def act(name: str, function: Any, words: str) -> Any:
        found = acts.add_parser(name, help=words, description=words)
        found.set_defaults(command=function)
        _add_config(found)
        return found

    add = act("add", _token_add, "add a client; its token is printed once and stands nowhere")
    add.add_argument("name")
    who = add.add_mutually_exclusive_group()
    who.add_argument("--uid", type=int, help="known by its user on the unix socket, in place of a token")
    who.add_argument("--gid", type=int, help="known by its primary group on the unix socket")
    add.add_argument("--model", action="append", default=[], help="that it may ask, again for more; without: all")
    add.add_argument("--read-only", action="store_true", help="it may not send labels")
    add.add_argument("--rate", type=float, help="requests per second, 0 for no limit; without: access.rate")
    add.add_argument("--burst", type=int, help="requests at once after a pause; without: access.burst")
    add.add_argument("--json", action="store_true")
    act("list", _token_list, "the clients, without their tokens").add_argument("--json", action="store_true")
    act("remove", _token_remove, "remove a client; it is refused within a second").add_argument("name")


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _duration(text: str) -> float:
    found = math.nan
    with contextlib.suppress(ValueError, KeyError):
        found = float(text[:-1]) * _UNITS[text[-1:]]
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a time as 30s, 10m, 2h or 1d, got {text!r}")
    return found


def _rate(text: str) -> float:
    found = math.nan
    with contextlib.suppress(ValueError):
        found = float(text)
    if found == 0:
        raise argparse.ArgumentTypeError("0 is no bound: --off lifts the throttle, and to serve nothing stop the agent")
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a number of inferences per second above 0, got {text!r}")
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 1, got {text!r}")
    return int(text)


def _config(options: argparse.Namespace) -> Config:
    # Checks every key, which takes longer than to ask an agent that runs.
    from skerry_agent.config import load

    return load(options.config, os.environ)


def _run(options: argparse.Namespace) -> int:
    # Only this command needs the loop and all that hangs on it.
    from skerry_agent import logs, supervisor
    from skerry_agent.logring import LogRing

    config = _config(options)
    os.umask(0o077)
    ring = LogRing(config.log_file)
    logs.configure(as_json=options.log_json or config.log.json, level=config.log.level, ring=ring)
    try:
        return supervisor.run(config, os.environ, config_path=options.config, ring=ring)
    finally:
        ring.flush()


def _silent(path: Path) -> AgentError:
    return AgentError(
        "agent_silent",
        f"the agent behind {path} runs, and does not answer within {PATIENCE_S:g} s",
        advice="restart it: systemctl restart skerry-agent; its log says what it did last",
    )


def _asked(options: argparse.Namespace, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
    found = control_socket(options.config, os.environ)
    if found is not None:
        try:
            return ask(found, method, path, body)
        except TimeoutError:
            raise _silent(found) from None
        except OSError:
            # A full reading may know another place.
            pass
    config = _config(options)
    try:
        return ask(config.run_dir / "control.sock", method, path, body)
    except TimeoutError:
        raise _silent(config.run_dir / "control.sock") from None
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
        engine = body["engines"].get(name, {})
        if engine.get("fallback"):
            print(f"    on the CPU: {engine['fallback']}")
    if not body["running"]:
        print("  nothing runs yet")
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
        print(f"  throttled: {throttle_words(serving['throttle'])}")
    return OK


def _why(options: argparse.Namespace) -> int:
    answer = _asked(options, "GET", "/skerry/v1/why")
    if options.json:
        print(json.dumps(answer.body))
        return OK
    from skerry_agent.core.why import since

    for told in answer.body["told"]:
        print(f"{told['about']}: {told['says']}{since(told['since_s'])}")
        for name, text in (("waits for", told["waits_for"]), ("to do", told["do"])):
            if text:
                print(f"  {name + ':':<11}{text}")
    return OK


def _enrol(options: argparse.Namespace) -> int:
    token = options.token or os.environ.get("SKERRY_ENROLMENT_TOKEN", "") or sys.stdin.readline().strip()
    if not token:
        print("skerry-agent: enrol: no token given", file=sys.stderr)
        return USAGE
    import asyncio

    from skerry_agent.errand import Errands

    config = _config(options)
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
    if answer.status == 400:
        return USAGE
    return OK if answer.status == 200 else FAILED


def _revert(options: argparse.Namespace) -> int:
    body = {"model": options.model} if options.model else {}
    return _ordered(options, "/skerry/v1/revert", body, "going back to {model} {version}")


def _cancel(options: argparse.Namespace) -> int:
    return _ordered(
        options, "/skerry/v1/cancel", {}, "cancelled: {model} {version}; to try it again: skerry-agent sync --pardon"
    )


def _activate(options: argparse.Namespace) -> int:
    answer = _asked(options, "POST", "/skerry/v1/activate", {"despite_locks": options.despite_locks})
    if options.json:
        print(json.dumps(answer.body))
    elif answer.status != 200:
        print(f"skerry-agent: {answer.body['error']}", file=sys.stderr)
    else:
        when = f"starts after: {answer.body['waits_for']}" if answer.body["waits_for"] else "starts now"
        print(f"{answer.body['model']} {answer.body['version']} {when}")
    return OK if answer.status == 200 else REFUSED


def _owner(options: argparse.Namespace) -> str:
    import getpass

    return str(options.owner if options.owner is not None else getpass.getuser())


def _lock(options: argparse.Namespace) -> int:
    body = {"owner": _owner(options), "reason": options.reason, "for_s": options.for_s}
    return _ordered(options, "/skerry/v1/lock", body, "locked by {owner}; `skerry-agent unlock` ends it")


def _unlock(options: argparse.Namespace) -> int:
    return _ordered(options, "/skerry/v1/unlock", {"owner": _owner(options)}, "unlocked by {owner}")


def _locks(options: argparse.Namespace) -> int:
    answer = _asked(options, "GET", "/skerry/v1/locks")
    if options.json:
        print(json.dumps(answer.body))
        return OK
    for lock in answer.body["locks"]:
        print(f"{lock['owner']}  {lock['left_s']:.0f} s more  {lock['reason']}")
    if not answer.body["locks"]:
        print("nobody holds updates back")
    return OK


def _import(options: argparse.Namespace) -> int:
    return bringing.run(options, lambda method, path, body: _asked(options, method, path, body))


def _sync(options: argparse.Namespace) -> int:
    return _ordered(options, "/skerry/v1/sync", {"pardon": options.pardon}, "looking; {pardoned} bundles pardoned")


def _throttle(options: argparse.Namespace) -> int:
    if options.off and options.for_s is not None:
        print("skerry-agent: throttle: --for goes with --rate", file=sys.stderr)
        return USAGE
    body: dict[str, Any] = {"rate": 0 if options.off else options.rate}
    if options.for_s is not None:
        body["for_s"] = options.for_s
    answer = _asked(options, "POST", "/skerry/v1/throttle", body)
    if options.json:
        print(json.dumps(answer.body))
    elif answer.status == 200:
        print(f"throttle: {throttle_words(answer.body['throttle'])}")
    else:
        print(f"skerry-agent: {answer.body['error']}", file=sys.stderr)
    return OK if answer.status == 200 else USAGE if answer.status == 400 else FAILED


def throttle_words(throttle: dict[str, Any] | None) -> str:
    """A throttle as a person reads it."""
    if throttle is None:
        return "off"
    left_s = throttle["left_s"]
    return f"{throttle['rate']:g} inferences/s, {'until --off' if left_s is None else f'for {left_s:.0f} s more'}"


def _token_add(options: argparse.Namespace) -> int:
    from skerry_agent import clients

    config = _config(options)
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
    return OK


def _token_list(options: argparse.Namespace) -> int:
    from skerry_agent import clients

    found = clients.read(_config(options).clients_file)
    if options.json:
        import msgspec

        print(json.dumps([{**msgspec.to_builtins(client), "token_sha256": None} for client in found]))
        return OK
    for client in found:
        known = (
            "token" if client.token_sha256 else f"uid {client.uid}" if client.uid is not None else f"gid {client.gid}"
        )
        rate = "access.rate" if client.rate is None else f"{client.rate:g}/s" if client.rate else "no limit"
        asks = ", ".join(client.models) or "all models"
        print(f"{client.name}  {known}  {asks}  {'asks and labels' if client.label else 'asks only'}  {rate}")
    return OK


def _token_remove(options: argparse.Namespace) -> int:
    from skerry_agent import clients

    clients.remove(_config(options).clients_file, options.name)
    return OK


def _logs(options: argparse.Namespace) -> int:
    answer = _asked(options, "GET", "/skerry/v1/logs")
    if answer.status != 200:
        print(f"skerry-agent: {answer.body['error']}", file=sys.stderr)
        return FAILED
    lines = answer.body.decode().splitlines()
    for line in lines[-options.last :] if options.last > 0 else lines:
        print(line)
    return OK


def _metrics(options: argparse.Namespace) -> int:
    answer = _asked(options, "GET", "/metrics")
    if answer.status != 200:
        print(f"skerry-agent: {answer.body['error']}", file=sys.stderr)
        return FAILED
    sys.stdout.write(answer.body.decode())
    return OK


def _reload(options: argparse.Namespace) -> int:
    answer = _asked(options, "POST", "/skerry/v1/reload", {})
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
    return OK if answer.status == 200 else USAGE if answer.body.get("code") == "bad_config" else FAILED


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
    return OK if well else FAILED


def _lifecycle(_options: argparse.Namespace) -> int:
    from skerry_agent.core import lifecycle

    print(lifecycle.printed())
    return OK


if __name__ == "__main__":
    sys.exit(main())
