"""Addresses that a server keeps over its restarts, so that devices find it again: what it had last, if that is still free."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any


def last_run(path: Path) -> dict[str, Any]:
    """What the last run wrote there, empty when nothing that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def listen(host: str, port: int, last: int) -> socket.socket:
    """A listening socket on the port asked for; on 0 that of the last run, else a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for wanted in [port] if port else [last, 0]:
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, wanted))
            found.listen(512)
            return found
        except OSError:
            found.close()
            if wanted == port:
                raise
    raise AssertionError("0 always binds or raises")


def if_free(host: str, port: int) -> int:
    """The port when it can be bound now, else 0."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return 0
        return port
