"""A group's settings as a person writes them: ``NAME=VALUE``. What the values may be is the contract's, and the server's to say."""

from __future__ import annotations

import datetime as dt
from typing import Any

from skerry_contract import opening

from skerry_cli.errors import Usage

NUMBERS = frozenset(
    {
        "window_s", "sample_rate", "sync_s", "jitter_s", "max_kib_s", "trial_s", "trial_inferences", "shadow_share", "shadow_cpu",
        "shadow_c",
    }
)  # fmt: skip
_HOURS = "hours as 'fri sat 22:00-04:00, daily 12:00-13:00'"
OTHERS = {
    "fetch_windows": _HOURS,
    "networks": "kinds as wifi,unmetered",
    "opens_at": "a time as 2027-01-31T22:00Z",
    "windows": _HOURS,
}


def parse(texts: list[str]) -> dict[str, Any]:
    """Reads ``NAME=VALUE`` pairs; a name without a value is None, for the default.

    Raises:
        Usage: an unknown name, or no such value.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, sep, value = text.partition("=")
        if not sep or name not in NUMBERS | OTHERS.keys():
            raise Usage(f"--set {text!r}: wanted NAME=VALUE with one of {', '.join(sorted(NUMBERS | OTHERS.keys()))}")
        try:
            settings[name] = None if not value else _READ.get(name, _number)(value)
        except ValueError:
            raise Usage(f"--set {text!r}: wanted {OTHERS.get(name, 'a number')}, got {value!r}") from None
    return settings


def _number(value: str) -> int | float:
    return int(value) if value.lstrip("-").isdigit() else float(value)


def _networks(value: str) -> list[str]:
    return [part.strip() for part in value.split(",")]


def _time(value: str) -> int:
    """Seconds since 1970. A time without a zone could be meant anywhere."""
    found = dt.datetime.fromisoformat(value)
    if found.tzinfo is None:
        raise ValueError(value)
    return int(found.timestamp())


def _windows(value: str) -> list[dict[str, Any]]:
    found = []
    for part in value.split(","):
        *days, hours = part.split()
        start, dash, end = hours.partition("-")
        if not dash or (days != ["daily"] and any(day not in opening.DAYS for day in days)):
            raise ValueError(value)
        named = [] if days == ["daily"] else days
        found.append({"start": start, "end": end, **({"days": named} if named else {})})
    return found


_READ = {"fetch_windows": _windows, "networks": _networks, "opens_at": _time, "windows": _windows}
