"""A device's log, asked for through the server: asking, waiting with progress, and lines in words.

The lines were written on a device, which may be in a stranger's hands: they are text and nothing more. Who shows them escapes
what a terminal would obey.
"""

from __future__ import annotations

import json
import time
from typing import Any

from skerry_cli import output
from skerry_cli.client import Api, quote
from skerry_cli.errors import CliError, Failed

POLL_S = 0.5
_SAY_EVERY_S = 10.0


def ask(api: Api, device: str) -> dict[str, Any]:
    """Makes a request, or takes up the one that waits already; what is known of it."""
    found: dict[str, Any] = api.post(f"/api/v1/devices/{quote(device)}/logs")
    if found["repeated"]:
        output.note(f"Request {found['number']} of {output.when(found['asked_ms'])} waits already: no second one.")
    else:
        output.note(f"{device} is asked for its log: request {found['number']}.")
    return found


def earlier(api: Api, device: str, number: int) -> dict[str, Any]:
    """A request made before."""
    found: dict[str, Any] = api.get(f"/api/v1/devices/{quote(device)}/logs/{number}")
    return found


def answered(api: Api, found: dict[str, Any], *, wait_s: float) -> dict[str, Any]:
    """The request with its lines.

    Raises:
        Failed: it ended otherwise, or has no answer after ``wait_s`` seconds.
    """
    began = said = time.monotonic()
    if found["state"] == "waiting" and not found["online"]:
        output.note(f"{found['device']} is {_away(found)}: it answers when it is back.")
    while found["state"] == "waiting":
        now = time.monotonic()
        if now - began >= wait_s:
            raise _late(found, wait_s)
        if now - said >= _SAY_EVERY_S:
            said = now
            where = "it is online" if found["online"] else f"it is {_away(found)}"
            output.note(f"Waiting for {found['device']} since {now - began:.0f} s; {where}.")
        time.sleep(max(0.0, min(POLL_S, wait_s - (now - began))))
        found = earlier(api, found["device"], found["number"])
    if found["state"] != "answered":
        raise _ended(found)
    return found


def _away(found: dict[str, Any]) -> str:
    seen = found.get("seen_ms")
    return f"offline, last heard of {output.when(seen)}" if seen else "offline, never heard of"


def _late(found: dict[str, Any], wait_s: float) -> CliError:
    device, number = found["device"], found["number"]
    where = "it is online" if found["online"] else f"it is {_away(found)}"
    return Failed(
        f"{device}: no answer within {wait_s:g} s; {where}. Request {number} stays open until {output.when(found['expires_ms'])}",
        advice=f"skerry device logs {device} --request {number}",
    )


def _ended(found: dict[str, Any]) -> CliError:
    device, number, state = found["device"], found["number"], found["state"]
    words = {
        "expired": f"it ended at {output.when(found['expires_ms'])} without an answer",
        "revoked": "the device is revoked, and not heard any more",
        "failed": f"the device's answer was not taken: {found['fault']}",
    }
    return Failed(f"{device}: request {number}: {words.get(state, state)}")


def parsed(line: str) -> Any:
    """A line as the device's agent writes it, one JSON object; the text of any other."""
    try:
        found = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return line
    return found if isinstance(found, dict) else line


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def text_of(line: str) -> str:
    """A line in words: time, level, logger, message, ``name=value``; any other line as it is. Not yet escaped."""
    found = parsed(line)
    if not isinstance(found, dict):
        return line
    at = found.get("at")
    stamp = output.when(at * 1000) if isinstance(at, int | float) and 0 <= at < 1e11 else "-"
    fields = found.get("fields")
    parts = [stamp, str(found.get("level", "-")), str(found.get("logger", "-")), str(found.get("message", ""))]
    parts += [f"{name}={value}" for name, value in (fields.items() if isinstance(fields, dict) else ())]
    if found.get("exception"):
        parts.append(f"exception={found['exception']}")
    return " ".join(parts)
