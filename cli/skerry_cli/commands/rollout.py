"""``skerry rollout``: start, watch and steer rollouts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from skerry_cli import bundle, output
from skerry_cli.client import Api, quote
from skerry_cli.commands.publish import find_bundle
from skerry_cli.commands.session import session
from skerry_cli.errors import Failed, Usage

app = typer.Typer(no_args_is_help=True, help="Send a bundle out by stages, and watch or stop it.")

ENDED = frozenset({"completed", "rolled_back", "aborted"})
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Reason = Annotated[str, typer.Option("--reason", help="Why, for the record.")]
IfVersion = Annotated[
    int | None, typer.Option("--if-version", help="Only while the rollout is at this version, as show told it.")
]
_STAGE_KEYS = {"devices": int, "share": float, "inferences": int, "confirmed": int, "seconds": float, "max": float}


@app.command()
def start(
    context: typer.Context,
    group: Annotated[str, typer.Option("--group", help="The group of devices.")],
    candidate: Annotated[str, typer.Argument(help="MODEL@VERSION or digest of the bundle.")],
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", help="devices=4,inferences=200,seconds=60,max=3600 (or share=0.1); repeat, in order."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Stages and gates from a TOML or JSON file instead.")
    ] = None,
    max_error_rate: Annotated[
        float | None, typer.Option("--max-error-rate", help="Gate: share of failed requests.")
    ] = None,
    latency_p95_ms: Annotated[
        float | None, typer.Option("--latency-p95-ms", help="Gate: p95 on the device, ms.")
    ] = None,
    rollout_id: Annotated[
        str | None, typer.Option("--id", help="The rollout's id; the server chooses one when left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Starts a rollout of an approved bundle."""
    api = session(context).api
    if plan is not None and (stage or max_error_rate is not None or latency_p95_ms is not None):
        raise Usage("--plan holds stages and gates: wanted it alone")
    wishes: dict[str, Any]
    if plan is not None:
        wishes = bundle.read_spec(plan)
    else:
        wishes = {"stages": [parse_stage(text) for text in stage or ["share=1"]]}
        gates = {"max_error_rate": max_error_rate, "latency_p95_ms": latency_p95_ms}
        wishes["gates"] = {name: value for name, value in gates.items() if value is not None}
    found = find_bundle(api, candidate)
    body = {**wishes, "group": group, "model": found["model"], "candidate": found["digest"]}
    if rollout_id is not None:
        body["id"] = rollout_id
    made = api.post("/api/v1/rollouts", body)
    if as_json:
        output.show_json(made)
    else:
        output.say(f"Rollout {made['id']} of {found['model']} {found['version']} to {group} is {made['state']}.")


@app.command()
def watch(
    context: typer.Context,
    rollout: Annotated[str, typer.Argument(help="The rollout's id.")],
    timeout_s: Annotated[float, typer.Option("--timeout", help="Give up after so many seconds; 0 for never.")] = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: each decision, and last where the rollout stands.")
    ] = False,
) -> None:
    """Follows a rollout to its end, every decision with its reason. Exit code 0 only when it completed."""
    api = session(context).api
    began = time.monotonic()
    shown = 0
    while True:
        # The state first: whatever led to it is then among the decisions.
        now = api.get(f"/api/v1/rollouts/{quote(rollout)}")
        decisions = list(api.items(f"/api/v1/rollouts/{quote(rollout)}/decisions"))
        for decision in decisions[shown:]:
            if as_json:
                output.show_json_line({"type": "decision", **decision})
            else:
                output.say(decision_text(decision))
        shown = len(decisions)
        ended = now["state"] in ENDED
        late = not ended and timeout_s > 0 and time.monotonic() - began > timeout_s
        if as_json and (ended or late):
            output.show_json_line({"type": "rollout", **now})
        if ended:
            if not as_json:
                output.say(f"Rollout {rollout} is {now['state']}.")
            if now["state"] != "completed":
                raise Failed(f"rollout {rollout} {now['state']}: {now.get('reason') or 'no reason given'}")
            return
        if late:
            raise Failed(f"rollout {rollout}: still {now['state']} after {timeout_s:g} s")
        time.sleep(1.0)


@app.command("list")
def list_(
    context: typer.Context,
    group: Annotated[str | None, typer.Option("--group", help="Only of this group.")] = None,
    as_json: AsJson = False,
) -> None:
    """Lists rollouts."""
    items = [item for item in session(context).api.items("/api/v1/rollouts") if group in (None, item["group"])]
    if as_json:
        output.show_json({"items": items})
        return
    output.show_table(
        "rollouts",
        ("id", "group", "model", "candidate", "state", "stage", "created"),
        [
            (
                r["id"],
                r["group"],
                r["model"],
                output.short(r["candidate"]),
                r["state"],
                r["stage"],
                output.when(r.get("created_ms")),
            )
            for r in items
        ],
    )


@app.command()
def show(
    context: typer.Context, rollout: Annotated[str, typer.Argument(help="The rollout's id.")], as_json: AsJson = False
) -> None:
    """Shows a rollout and every decision about it."""
    api = session(context).api
    found = api.get(f"/api/v1/rollouts/{quote(rollout)}")
    decisions = list(api.items(f"/api/v1/rollouts/{quote(rollout)}/decisions"))
    if as_json:
        output.show_json({**found, "decisions": decisions})
        return
    output.show_fields(
        f"rollout {rollout}", {name: value for name, value in found.items() if not isinstance(value, dict | list)}
    )
    for decision in decisions:
        output.say(decision_text(decision))


@app.command()
def pause(
    context: typer.Context, rollout: Annotated[str, typer.Argument()], reason: Reason, if_version: IfVersion = None
) -> None:
    """Holds the cut where it is."""
    _command(session(context).api, rollout, "pause", reason, if_version)


@app.command()
def resume(
    context: typer.Context, rollout: Annotated[str, typer.Argument()], reason: Reason, if_version: IfVersion = None
) -> None:
    """Lets a paused rollout go on."""
    _command(session(context).api, rollout, "resume", reason, if_version)


@app.command()
def abort(
    context: typer.Context, rollout: Annotated[str, typer.Argument()], reason: Reason, if_version: IfVersion = None
) -> None:
    """Sends every candidate back to the stable bundle."""
    _command(session(context).api, rollout, "abort", reason, if_version)


def parse_stage(text: str) -> dict[str, Any]:
    """Reads one ``--stage``.

    >>> parse_stage("devices=4,inferences=200")
    {'devices': 4, 'min_inferences': 200}

    Raises:
        Usage: an unknown key, or a value that is no number.
    """
    names = {"inferences": "min_inferences", "confirmed": "min_devices", "seconds": "min_seconds", "max": "max_seconds"}
    stage: dict[str, Any] = {}
    for part in text.split(","):
        key, sep, value = part.strip().partition("=")
        if not sep or key not in _STAGE_KEYS:
            raise Usage(f"--stage {text!r}: wanted KEY=NUMBER with {', '.join(_STAGE_KEYS)}, got {part!r}")
        try:
            stage[names.get(key, key)] = _STAGE_KEYS[key](value)
        except ValueError:
            raise Usage(f"--stage {text!r}: {key}: wanted a number, got {value!r}") from None
    return stage


def decision_text(decision: dict[str, Any]) -> str:
    """One decision in one line."""
    verdict = f" [{decision['verdict']}]" if decision.get("verdict") else ""
    return f"{output.when(decision.get('at_ms'))}  stage {decision.get('stage')}: {decision['action']}{verdict}: {decision['reason']}"


def _command(api: Api, rollout: str, verb: str, reason: str, version: int | None) -> None:
    now = api.post(f"/api/v1/rollouts/{quote(rollout)}/{verb}", {"reason": reason, "version": version})
    output.say(f"Rollout {rollout} is {now.get('state', verb)}.")
