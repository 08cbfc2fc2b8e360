"""How the page writes numbers and times. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any


def percent(share: float | None) -> str:
    """A share as a percentage with two digits behind the point.

    >>> percent(0.0123), percent(None)
    ('1.23%', '-')
    """
    return "-" if share is None else f"{share:.2%}"


def count(n: int) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{n:,}".replace(",", "\N{THIN SPACE}")


def brief(text: str, most: int) -> str:
    """The beginning of a text that may be long.

    >>> brief("abcdef", 4), brief("abcd", 4)
    ('abc…', 'abcd')
    """
    return text if len(text) <= most else text[: most - 1] + "…"


def milliseconds(value: float | None) -> str:
    """Three significant digits, and the unit.

    >>> milliseconds(0.4567), milliseconds(12.0), milliseconds(None)
    ('0.457 ms', '12 ms', '-')
    """
    return "-" if value is None else f"{value:.3g} ms"


def number(value: float | None) -> str:
    """Two significant digits behind the point.

    >>> number(0.12345), number(None)
    ('0.12', '-')
    """
    return "-" if value is None else f"{value:.2f}"


def clock(ms: int) -> str:
    """Time of day in UTC.

    >>> clock(1_700_000_000_000)
    '22:13:20'
    """
    return _utc(ms).strftime("%H:%M:%S")


def when(ms: int, now_ms: int) -> str:
    """Time of day in UTC, and the day before it unless that is today's.

    >>> when(1_700_000_000_000, 1_700_000_001_000), when(1_700_000_000_000, 1_700_100_000_000)
    ('22:13:20', '14 Nov 22:13:20')
    """
    then, now = _utc(ms), _utc(now_ms)
    return then.strftime("%H:%M:%S" if then.date() == now.date() else "%-d %b %H:%M:%S")


def moment(ms: int) -> str:
    """Date and time in UTC, as machines read it.

    >>> moment(1_700_000_000_000)
    '2023-11-14T22:13:20Z'
    """
    return _utc(ms).strftime("%Y-%m-%dT%H:%M:%SZ")


def span(ms: int) -> str:
    """How long, in its two largest units.

    >>> span(5_000), span(90_000), span(3_700_000), span(200_000_000)
    ('5 s', '1 min 30 s', '1 h 1 min', '2 d 7 h')
    """
    left = max(0, ms) // 1000
    parts = []
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        n, left = divmod(left, size)
        if n:
            parts.append(f"{n} {unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0 s"


def _utc(ms: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC)


FILTERS: dict[str, Callable[..., Any]] = {
    "percent": percent,
    "count": count,
    "brief": brief,
    "milliseconds": milliseconds,
    "number": number,
    "clock": clock,
    "when": when,
    "moment": moment,
    "span": span,
}
