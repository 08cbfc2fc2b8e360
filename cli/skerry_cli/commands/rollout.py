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
from skerry_cli.explaining import explain_stage

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
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            help="Compare candidates with controls: end_s=600 (or end_labels=5000), look_s=60, guard_s=30, min_devices=2, ...",
        ),
    ] = None,
    guardrail: Annotated[
        list[str] | None,
        typer.Option("--guardrail", help="labelled_errors,alpha=0.02,margin=1.5; repeat. All four when left out."),
    ] = None,
    small_fleet: Annotated[
        bool,
        typer.Option(
            "--small-fleet", help="Let a stage pass whose fleet is too small to compare, on absolute limits alone."
        ),
    ] = False,
    rollout_id: Annotated[
        str | None, typer.Option("--id", help="The rollout's id; the server chooses one when left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Starts a rollout of an approved bundle."""
    api = session(context).api
    if plan is not None and (stage or judge or guardrail or max_error_rate is not None or latency_p95_ms is not None):
        raise Usage("--plan holds stages, gates and judge: wanted it alone")
    wishes: dict[str, Any]
    if plan is not None:
        wishes = bundle.read_spec(plan)
    else:
        wishes = {"stages": [parse_stage(text) for text in stage or ["share=1"]]}
        gates = {"max_error_rate": max_error_rate, "latency_p95_ms": latency_p95_ms}
        wishes["gates"] = {name: value for name, value in gates.items() if value is not None}
        if judge is not None or guardrail:
            wishes["judge"] = parse_judge(judge or "", guardrail or [])
    if small_fleet:
        if not isinstance(wishes.get("judge"), dict):
            raise Usage(
                "--small-fleet lets a judged stage pass, and nothing is judged: wanted --judge too, such as --judge end_s=600"
            )
        wishes["judge"] = {**wishes["judge"], "small_fleet": True}
    found = find_bundle(api, candidate)
    body = {**wishes, "group": group, "model": found["model"], "candidate": found["digest"]}
    if rollout_id is not None:
        body["id"] = rollout_id
    made = api.post("/api/v1/rollouts", body)
    ruled = made["plan"].get("judge")
    if ruled and ruled.get("end_s") is None and ruled.get("end_labels") is None:
        output.note(
            "skerry: the judge has no planned end (end_s or end_labels): a stage it judges can fail, and never pass"
        )
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
                stage_text(r),
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
    plain = {name: value for name, value in found.items() if not isinstance(value, dict | list)}
    output.show_fields(f"rollout {rollout}", {**plain, "stage": stage_text(found)})
    for decision in decisions:
        output.say(decision_text(decision))


@app.command()
def explain(
    context: typer.Context,
    rollout: Annotated[str, typer.Argument(help="The rollout's id.")],
    stage: Annotated[
        int | None, typer.Option("--stage", min=1, help="Counted from 1; the last judged one when left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recomputes every look of the judge at a stage from the stored evidence, and says what the last verdict rests on.

    Exit code 1 when what is recomputed differs from what was stored, or a stored look cannot be read. Many looks take a
    while (up to 0.1 s each): the server recomputes 50 at a time.
    """
    found = explain_stage(
        session(context).api,
        rollout,
        None if stage is None else stage - 1,
        progress=lambda done, of: output.note(f"skerry: {done} of {of} looks recomputed"),
    )
    if as_json:
        output.show_json(found)
    elif not found["looks"]:
        output.say(f"Stage {found['stage'] + 1} of rollout {rollout} was not looked at by the judge.")
    else:
        _show_explained(rollout, found)
    if not found["identical"]:
        raise Failed(f"rollout {rollout}: the stored evidence does not give the rulings that are stored")


def _show_explained(rollout: str, found: dict[str, Any]) -> None:
    if found["ruling"] is None:
        output.say(f"Rollout {rollout}, stage {found['stage'] + 1}: the last look cannot be read.")
    else:
        _show_ruling(rollout, found["stage"], found["ruling"])
    for look in found["looks"]:
        said = f"{look['verdict']} ({look['information']:.0%})" if look["verdict"] else f"({look['information']:.0%})"
        fault = f"; {look['fault']}" if "fault" in look else ""
        output.say(f"{output.when(look['at_ms'])}  look {look['number']}: {said}{fault}")
    looks = len(found["looks"])
    different = [str(look["number"]) for look in found["looks"] if not look["identical"]]
    said = f"different at look {', '.join(different)}" if different else "identical"
    output.say(f"recomputed: {said} ({looks} {'look' if looks == 1 else 'looks'})")


def _show_ruling(rollout: str, stage: int, ruling: dict[str, Any]) -> None:
    output.say(
        f"Rollout {rollout}, stage {stage + 1}: {ruling['verdict']} at look {ruling['look']} "
        f"({ruling['information']:.0%} of the way)."
    )
    output.show_table(
        "",
        ("guardrail", "candidates", "controls", "ratio", "bound", "margin", "detectable", "ways as bad", "verdict"),
        [
            (
                finding["guardrail"],
                _arm_text(finding, "candidate"),
                _arm_text(finding, "control"),
                _number(finding["ratio"]),
                _number(finding["upper"]),
                _number(finding["margin"]),
                _number(finding["detectable_ratio"]),
                f"{finding['at_least']} of {finding['assignments']}" if finding["at_least"] else "",
                finding["verdict"],
            )
            for finding in ruling["findings"]
        ],
    )
    for reason in ruling["reasons"]:
        output.say(reason)


def _arm_text(finding: dict[str, Any], name: str) -> str:
    arm = finding[name]
    if arm["value"] is None:
        return f"{arm['devices']} of {arm['of']} devices"
    value = f"{arm['value']:.4g}" if finding["kind"] == "level" else f"{arm['value']:.2%} of {arm['n']}"
    return f"{value}, {arm['devices']} of {arm['of']} devices"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


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
def rollback(
    context: typer.Context, rollout: Annotated[str, typer.Argument()], reason: Reason, if_version: IfVersion = None
) -> None:
    """Sends every candidate back to the stable bundle; the rollout ends when no device online answers with the other."""
    _command(session(context).api, rollout, "rollback", reason, if_version)


@app.command()
def abort(
    context: typer.Context, rollout: Annotated[str, typer.Argument()], reason: Reason, if_version: IfVersion = None
) -> None:
    """Ends it now: sends every candidate back to the stable bundle and waits for none."""
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


def parse_judge(text: str, guardrails: list[str]) -> dict[str, Any]:
    """Reads ``--judge`` and each ``--guardrail``.

    >>> parse_judge("end_s=600,look_s=60", ["labelled_errors,margin=1.2", "trouble"])
    {'end_s': 600, 'look_s': 60, 'guardrails': {'labelled_errors': {'margin': 1.2}, 'trouble': {}}}
    >>> parse_judge("", ["labelled_errors,past=false"])
    {'guardrails': {'labelled_errors': {'past': False}}}

    Raises:
        Usage: a value that is neither a number nor true or false.
    """
    judge: dict[str, Any] = _values(f"--judge {text!r}", [part for part in text.split(",") if part])
    if guardrails:
        judge["guardrails"] = {}
        for one in guardrails:
            name, *parts = one.split(",")
            judge["guardrails"][name.strip()] = _values(f"--guardrail {one!r}", parts)
    return judge


def _values(where: str, parts: list[str]) -> dict[str, bool | int | float]:
    found: dict[str, bool | int | float] = {}
    for part in parts:
        key, sep, value = part.strip().partition("=")
        if value in ("true", "false"):
            found[key] = value == "true"
            continue
        try:
            number = float(value)
        except ValueError:
            number, sep = 0.0, ""
        if not sep:
            raise Usage(f"{where}: wanted KEY=NUMBER (or true, false), got {part!r}")
        found[key] = int(number) if number.is_integer() else number
    return found


def decision_text(decision: dict[str, Any]) -> str:
    """One decision in one line."""
    verdict = f" [{decision['verdict']}]" if decision.get("verdict") else ""
    return f"{output.when(decision.get('at_ms'))}  stage {decision['stage'] + 1}: {decision['action']}{verdict}: {decision['reason']}"


def stage_text(rollout: dict[str, Any]) -> str:
    """Where a rollout stands. People count stages from 1; JSON counts from 0.

    >>> stage_text({"stage": 0, "plan": {"stages": [{}, {}]}}), stage_text({"stage": 2, "plan": {"stages": [{}, {}]}})
    ('1 of 2', 'all 2 passed')
    """
    stages = len(rollout["plan"]["stages"])
    return f"{rollout['stage'] + 1} of {stages}" if rollout["stage"] < stages else f"all {stages} passed"


def _command(api: Api, rollout: str, verb: str, reason: str, version: int | None) -> None:
    now = api.post(f"/api/v1/rollouts/{quote(rollout)}/{verb}", {"reason": reason, "version": version})
    output.say(f"Rollout {rollout} is {now.get('state', verb)}.")
