"""``skerry device``: look at devices and their logs, let new ones in, pin and revoke."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from skerry_contract import ids

from skerry_cli import device_logs, keys, output
from skerry_cli.client import quote
from skerry_cli.commands.publish import find_bundle
from skerry_cli.commands.session import session
from skerry_cli.enrolling import complete_token
from skerry_cli.errors import Usage

app = typer.Typer(no_args_is_help=True, help="Look at devices, enrol, pin and revoke them.")

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Device = Annotated[str, typer.Argument(help="The device's id.")]


@app.command("list")
def list_(
    context: typer.Context,
    group: Annotated[str | None, typer.Option("--group", help="Only of this group.")] = None,
    online: Annotated[
        bool | None, typer.Option("--online/--offline", help="Only those now online, or offline.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Lists devices and what they run."""
    wanted = None if online is None else str(online).lower()
    items = list(session(context).api.items("/api/v1/devices", group=group, online=wanted))
    if as_json:
        output.show_json({"items": items})
        return
    output.show_table(
        "devices",
        ("id", "group", "status", "online", "runs", "seen"),
        [
            (d["id"], d["group"], d["status"], d["online"], running_text(d), output.when(d.get("seen_ms")))
            for d in items
        ],
    )


@app.command()
def show(context: typer.Context, device: Device, as_json: AsJson = False) -> None:
    """Shows one device: state, versions, pins, last events."""
    api = session(context).api
    found = api.get(f"/api/v1/devices/{quote(device)}")
    events = list(api.items(f"/api/v1/devices/{quote(device)}/events"))
    if as_json:
        output.show_json({**found, "events": events})
        return
    output.show_fields(
        f"device {device}", {n: v for n, v in found.items() if n not in ("state", "running", "public_key_pem")}
    )
    output.say(f"runs: {running_text(found)}")
    output.show_table(
        "events",
        ("at", "event", "code", "data"),
        [(output.when(e.get("at_ms")), e["name"], e["code"], e["data"]) for e in events[-20:]],
    )


@app.command()
def why(context: typer.Context, device: Device, as_json: AsJson = False) -> None:
    """Says why a device runs what it runs, and why not what it should: the assignment, its last word, what it waits for, the evidence."""
    found = session(context).api.get(f"/api/v1/devices/{quote(device)}/why")
    if as_json:
        output.show_json(found)
        return
    where = "online" if found["online"] else "offline"
    heard = f"last heard of {output.when(found['seen_ms'])}" if found["seen_ms"] else "never heard of"
    status = "" if found["status"] == "enrolled" else f"{found['status']}, "
    output.say(f"{device} in group {found['group']}: {status}{where}, {heard}")
    for one in found["models"]:
        output.say("")
        since = f", since {output.when(one['since_ms'])}" if one.get("since_ms") else ""
        output.say(f"{one['model']}: {one['state'].replace('_', ' ')}{since}")
        for name, text in (
            ("should run", one["assignment"]),
            ("runs", _runs(one["running"])),
            ("because", one["because"]),
            ("waits for", one["waits_for"] or "nothing"),
            ("to do", one.get("do") or "nothing"),
            ("evidence", _evidence(one["evidence"])),
        ):
            output.say(f"  {name + ':':<12}{text}")
    if not found["models"]:
        output.say(f"Group {found['group']} runs no model, and the device reported none.")
    output.say("")
    for order in found.get("orders", ()):
        output.say(_order_words(order, found["at_ms"]))
    output.say(f"how far behind: {_behind(found['behind'])}")


def _order_words(order: dict[str, Any], now_ms: int) -> str:
    whole, _, name = str(order.get("of", "")).partition(":")
    where = f", with all of group {name}," if whole == "group" else ""
    told = f"ordered to {order['kind']}{where} by {order['actor']} {output.when(order['at_ms'])} ({order['reason']}): "
    if order["kind"] == "renew" and order["obeyed_ms"] is None:
        return told + f"it may renew its certificate until {output.when(order['expires_ms'])}"
    if order["obeyed_ms"] is not None:
        return told + f"obeyed {output.when(order['obeyed_ms'])}" + (f", {order['code']}" if order["code"] else "")
    return told + ("not taken within its life" if order["expires_ms"] <= now_ms else "not obeyed yet")


def _runs(running: dict[str, Any] | None) -> str:
    if not running:
        return "nothing of it"
    standing = str(running["state"]).replace("_", " ")
    return f"{running['version']} ({running['variant'] or 'variant not named'}, {standing}), {output.short(running['digest'])}"


def _evidence(evidence: dict[str, list[int]]) -> str:
    parts = [f"{kind} {', '.join(map(str, ids))}" for kind, ids in evidence.items() if ids]
    return "; ".join(parts) or "none recorded"


_TAKEN = {
    "duplicate": "records that had come before",
    "labels_unfit": "windows taken without their labels, which no device can have counted",
    "latency_unfit": "windows taken without their latency, which is too coarse",
    "profile_unfit": "parts of windows left out of drift, accuracy or attributions, since they do not fit the bundle",
    "shadow_unfit": "pairs of a shadow left out, since their histograms are too coarse",
    "shadow_unknown": "pairs left out of a shadow that the server does not know for this model",
    "stale_state": "states that were older than the one known",
}
"""What ingest counts beside refusals. Later servers may count more."""


def _behind(behind: dict[str, Any]) -> str:
    document, records = behind["group_document"], behind["records"]
    parts = [f"group document {document['device']} of {document['server']}"]
    late = {role: one for role, one in behind["metadata"].items() if (one["device"] or 0) < one["server"]}
    parts += [f"{role} {one['device'] or 'never'} of {one['server']}" for role, one in late.items()]
    if records["reported"] is not None:
        # A device tells its newest record with its state, which it does not send with every record.
        parts.append(
            f"records {records['committed'] or 0} of {max(records['reported'], records['committed'] or 0)} committed"
        )
    parts += [f"lost by {cause}: {n}" for cause, n in sorted(behind["lost"].items())]
    parts += [
        f"{_TAKEN.get(cause, f'messages or records refused as {cause}')}: {n}"
        for cause, n in sorted(behind["refused_messages"].items())
    ]
    return "; ".join(parts)


@app.command()
def logs(
    context: typer.Context,
    device: Device,
    wait_s: Annotated[
        float, typer.Option("--wait", min=0.0, max=86_400.0, help="Seconds to wait for the answer.")
    ] = 120.0,
    request: Annotated[
        int | None, typer.Option("--request", min=1, help="An earlier request instead of a new one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Asks a device for the last lines of its log, waits for them and shows them."""
    api = session(context).api
    found = device_logs.earlier(api, device, request) if request is not None else device_logs.ask(api, device)
    found = device_logs.answered(api, found, wait_s=wait_s)
    if as_json:
        output.show_json({**found, "lines": [device_logs.parsed(line) for line in found["lines"]]})
        return
    for line in found["lines"]:
        output.say(device_logs.text_of(line))


@app.command()
def token(
    context: typer.Context,
    group: Annotated[str, typer.Option("--group", help="The group that the device joins.")],
    device: Annotated[str | None, typer.Option("--device", help="The one id that may use it.")] = None,
    serial_prefix: Annotated[str | None, typer.Option("--serial-prefix", help="Or: ids that start so.")] = None,
    expires_s: Annotated[float, typer.Option("--expires", help="Seconds until it ends.")] = 3600.0,
    as_json: AsJson = False,
) -> None:
    """Makes an enrolment token, completed with your root and the fleet's CA. It is a secret."""
    if (device is None) == (serial_prefix is None):
        raise Usage("wanted exactly one of --device and --serial-prefix")
    run = session(context)
    root_sha256 = keys.read_ceremony(run.keys).root_sha256
    text = complete_token(
        run.api,
        root_sha256,
        {"device_id": device, "serial_prefix": serial_prefix, "group": group, "expires_s": expires_s},
    )
    if as_json:
        output.show_json({"token": text})
    else:
        output.say(text)


@app.command()
def pin(
    context: typer.Context,
    device: Device,
    bundle: Annotated[str, typer.Argument(help="MODEL@VERSION or digest.")],
) -> None:
    """Makes one device run one approved bundle, whatever its group runs."""
    api = session(context).api
    found = find_bundle(api, bundle)
    answer = api.put(f"/api/v1/devices/{quote(device)}/pins/{quote(found['model'])}", {"digest": found["digest"]})
    output.say(f"{device} is pinned to {found['model']} {found['version']}.")
    floor = str(answer.get("floor") or "")
    if floor and ids.version_key(found["version"]) < ids.version_key(floor):
        output.say(
            f"! It is below the signed floor {floor}: a device that has seen that refuses it, and runs what its group gives it."
        )


@app.command()
def unpin(context: typer.Context, device: Device, model: Annotated[str, typer.Argument(help="The model.")]) -> None:
    """Lets the device run what its group runs."""
    session(context).api.delete(f"/api/v1/devices/{quote(device)}/pins/{quote(model)}")
    output.say(f"{device} follows its group in {model}.")


Reason = Annotated[str, typer.Option("--reason", help="Why, for the record.")]


@app.command()
def retry(context: typer.Context, device: Device, reason: Reason, as_json: AsJson = False) -> None:
    """Lets a device try again what it gave up: it forgets what it holds against bundles that failed."""
    _order(context, device, "retry", reason, as_json, "forgets what it holds against bundles and tries them again")


@app.command()
def renew(
    context: typer.Context,
    device: Device,
    reason: Reason,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Lets a device renew a certificate that ended longer ago than the server's days of grace. It says nothing about bundles."""
    if not yes:
        asked = (
            f"Let {device} back in? Whoever holds its key comes in with it; revoke a device that may be in other hands."
        )
        typer.confirm(asked, abort=True, err=True)
    _order(context, device, "renew", reason, as_json, "may renew its certificate")


@app.command()
def cancel(context: typer.Context, device: Device, reason: Reason, as_json: AsJson = False) -> None:
    """Ends the update under way on a device; it does not try that bundle again before `skerry device retry`."""
    _order(context, device, "cancel", reason, as_json, "ends its update and goes back to what it confirmed")


@app.command("forget-key")
def forget_key(context: typer.Context, device: Device, reason: Reason, as_json: AsJson = False) -> None:
    """Lets the server take the next encryption key that a device names: after its board or its token was replaced."""
    found = session(context).api.post(f"/api/v1/devices/{quote(device)}/forget-key", {"reason": reason})
    if as_json:
        output.show_json(found)
    else:
        output.say(
            f"Content keys go to whichever encryption key {device} names next. If it was stolen, revoke it instead."
        )


def _order(context: typer.Context, device: str, kind: str, reason: str, as_json: bool, words: str) -> None:
    found = session(context).api.post(f"/api/v1/devices/{quote(device)}/{kind}", {"reason": reason})
    if as_json:
        output.show_json(found)
        return
    output.say(
        f"Order {found['number']}: {device} {words} when it asks next, until {output.when(found['expires_ms'])}."
    )
    output.say(f"skerry device why {device} says when it was obeyed.")


@app.command()
def revoke(
    context: typer.Context,
    device: Device,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the record.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Takes the device's certificate away; it keeps serving what it has, unheard."""
    if not yes:
        typer.confirm(f"Revoke {device}? It must be enrolled anew to come back.", abort=True, err=True)
    session(context).api.post(f"/api/v1/devices/{quote(device)}/revoke", {"reason": reason})
    output.say(f"{device} is revoked.")


def running_text(device: dict[str, Any]) -> str:
    """What a device runs, in one line."""
    parts = [
        f"{model} {run.get('version')} ({run.get('state')})" for model, run in (device.get("running") or {}).items()
    ]
    return ", ".join(parts) or "nothing yet"
