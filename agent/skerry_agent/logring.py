"""The last log lines of the agent, kept for who asks later: a bounded ring in memory, and two files of bounded size.

Structured, one JSON object per line, redacted before they are kept anywhere: what looks like a secret, and every field named like
one. Lines of the agent's own loggers and of its workers', which say theirs on the control channel. To spare the flash, lines are written
together, at once only when one is a warning or worse; what was not yet written when the power fails is lost.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Final

MEMORY_BYTES: Final = 256 * 1024
FILE_BYTES: Final = 256 * 1024
"""Of each of the two files."""
LINE_BYTES: Final = 4096
EVERY_S: Final = 60.0
"""Between two writes of lines that are no warning."""
HIDDEN: Final = "[hidden]"

_SECRET_NAMES = re.compile(r"(?i)(token|secret|passw(or)?d|authorization|credential|private_?key|cookie)")
_WHOLE = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL),
    re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(\.[A-Za-z0-9_-]*)?"),
    re.compile(r"\bsk[a-z]_[A-Za-z0-9_-]{8,}"),
)
"""Private keys, HTTP credentials, JSON web tokens, Skerry's own tokens."""
_NAMED = re.compile(r"(?i)\b(token|secret|password|passwd|authorization|api[_-]?key)\b(\"?\s*[=:]\s*\"?)[^\s\",;&]+")
_IN_ADDRESS = re.compile(r"(?i)://[^/\s:@]+:[^/\s@]+@")


def redacted(text: str) -> str:
    """The text without what looks like a secret.

    >>> redacted("GET /x token=abcdef Authorization: Bearer abcdefgh12345678")
    'GET /x token=[hidden] Authorization: [hidden]'
    """
    for whole in _WHOLE:
        text = whole.sub(HIDDEN, text)
    text = _NAMED.sub(lambda found: f"{found[1]}{found[2]}{HIDDEN}", text)
    return _IN_ADDRESS.sub(f"://{HIDDEN}@", text)


class LogRing(logging.Handler):
    """Keeps what is logged.

    Args:
        path: of the newer file; the older one has ``.1`` behind it. None keeps lines in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path
        self._lines: deque[str] = deque()
        self._bytes = 0
        self._unwritten: list[str] = []
        self._written_s = 0.0
        self._own = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record; a full disk is no reason to fail."""
        try:
            line = structured(record)
            with self._own:
                self._lines.append(line)
                self._bytes += len(line) + 1
                while self._bytes > MEMORY_BYTES:
                    self._bytes -= len(self._lines.popleft()) + 1
                self._unwritten.append(line)
                now_s = time.monotonic()
                if record.levelno >= logging.WARNING or now_s - self._written_s >= EVERY_S:
                    self._written_s = now_s
                    self._write()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Writes what waits."""
        with self._own:
            self._write()

    def _write(self) -> None:
        lines, self._unwritten = self._unwritten, []
        if self._path is None or not lines:
            return
        data = ("\n".join(lines) + "\n").encode()[-FILE_BYTES:]
        try:
            if self._path.exists() and self._path.stat().st_size + len(data) > FILE_BYTES:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)
        except OSError:
            # The lines are in memory, and nothing may come of a log line but a log line.
            return

    def tail(self, most_bytes: int) -> str:
        """The newest whole lines, oldest first, also of earlier lives of the agent; at most so many bytes."""
        with self._own:
            lines = list(self._lines)
        # What is in memory was written, too, but for the last lines: earlier lives are what comes before the first of them.
        before: list[str] = []
        for suffix in (".1", ""):
            if self._path is not None:
                try:
                    text = self._path.with_name(self._path.name + suffix).read_text("utf-8", "replace")
                    before += text.splitlines()
                except OSError:
                    continue
        if lines and lines[0] in before:
            before = before[: before.index(lines[0])]
        kept: list[str] = []
        left = most_bytes
        for line in reversed([*before, *lines]):
            left -= len(line.encode()) + 1
            if left < 0:
                break
            kept.append(line)
        return "".join(f"{line}\n" for line in reversed(kept))


def structured(record: logging.LogRecord) -> str:
    """One record as one line of JSON, redacted and at most ``LINE_BYTES`` long."""
    fields: dict[str, Any] = {
        name: HIDDEN if _SECRET_NAMES.search(name) else redacted(str(value))
        for name, value in getattr(record, "fields", {}).items()
    }
    found: dict[str, Any] = {
        "at": round(record.created, 3),
        "level": record.levelname.lower(),
        "logger": record.name.removeprefix("skerry_agent."),
        "message": redacted(record.getMessage()),
        **({"fields": fields} if fields else {}),
    }
    if record.exc_info and record.exc_info[0] is not None:
        found["exception"] = redacted(logging.Formatter().formatException(record.exc_info))
    line = json.dumps(found)
    if len(line) > LINE_BYTES:
        most = LINE_BYTES // 8
        found["message"] = found["message"][:most]
        found["exception"] = found.get("exception", "")[-most:]
        found["fields"] = {name[:64]: str(value)[: most // 4] for name, value in list(fields.items())[:8]}
        found["cut"] = True
        line = json.dumps(found)
    return line
