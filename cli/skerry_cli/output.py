"""How answers are shown: JSON for programs, tables for people.

With ``--json`` stdout holds exactly one JSON document, or one per line where a command follows something. Everything that is not
the answer (progress, questions, errors) goes to stderr.

Much of what is shown was written by devices, and a device may be in a stranger's hands. So text for people leaves through
``visible``: what a terminal would obey, or read in another order, is written out. JSON escapes what a terminal obeys itself.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_COLUMNS = 160
"""Width of tables when nobody's terminal says another."""

_OBEYED = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 but the tab, DEL, C1, what turns the direction of writing or ends a line, and halves of surrogate pairs (no terminal takes them)."""

stdout = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
stderr = Console(stderr=True, soft_wrap=True, highlight=False)


def show_json(value: Any) -> None:
    """Prints one JSON document on stdout."""
    print(json.dumps(value, indent=2, sort_keys=True))  # noqa: T201 - the answer itself, byte for byte


def show_json_line(value: Any) -> None:
    """Prints one JSON document in one line on stdout, at once: a reader may be waiting for it."""
    print(json.dumps(value, sort_keys=True), flush=True)  # noqa: T201 - as above


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints rows as a table on stdout."""
    table = Table(title=Text(visible(title)), title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(as_text(cell))) for cell in row))
    stdout.print(table)


def show_fields(title: str, fields: Mapping[str, Any]) -> None:
    """Prints names and values, one per line."""
    show_table(title, ("", ""), fields.items())


def say(text: str) -> None:
    """One line of plain words on stdout. What stands in it is never read as markup, nor obeyed by a terminal."""
    stdout.print(Text(visible(text)))


def note(text: str) -> None:
    """One line on stderr, for what is not the answer."""
    stderr.print(Text(visible(text)))


def visible(text: str) -> str:
    """The text with everything written out that a terminal would obey: it stays one line, in the order of its characters."""
    return _OBEYED.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def as_text(value: Any) -> str:
    """A value as a person reads it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={as_text(part)}" for name, part in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(as_text(part) for part in value) or "-"
    return str(value)


def short(digest: Any) -> str:
    """A digest as tables show it."""
    return str(digest)[:12] if digest else "-"


def when(ms: Any) -> str:
    """Milliseconds since 1970 as UTC text."""
    if not isinstance(ms, int | float) or not ms:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(ms / 1000))
