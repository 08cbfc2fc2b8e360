"""Log lines: a message in words, then ``key=value``; one JSON object per line when asked. No secrets, no raw features."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any


def kv(**fields: Any) -> dict[str, Any]:
    """Fields of a log call: ``log.info("refused", extra=kv(code=..., bundle=...))``."""
    return {"fields": fields}


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        parts = [f"{stamp} {record.levelname.lower()} {record.getMessage()}"]
        for name, value in getattr(record, "fields", {}).items():
            text = str(value)
            parts.append(
                f"{name}={json.dumps(text)}" if not text or any(c in text for c in ' "=\n') else f"{name}={text}"
            )
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "at": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def keep(record: logging.LogRecord) -> None:
    """Gives a line that was said elsewhere (a worker prints its own) to the rings, at the level that the log has."""
    root = logging.getLogger("skerry_agent")
    if record.levelno >= root.level:
        for handler in root.handlers:
            if not isinstance(handler, logging.StreamHandler):
                handler.handle(record)


def configure(*, as_json: bool, level: str = "info", ring: logging.Handler | None = None) -> None:
    """Sends the agent's log to standard error, and to ``ring``; without one the ring that was given before goes on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else _Plain())
    root = logging.getLogger("skerry_agent")
    rings = [ring] if ring is not None else [old for old in root.handlers if not isinstance(old, logging.StreamHandler)]
    root.handlers[:] = [handler, *rings]
    root.setLevel(level.upper())
    root.propagate = False
