"""Asks a running agent over its control socket, from another process. Loads no event loop: ``skerry-agent status`` is to be quick."""

from __future__ import annotations

import json
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from skerry_agent.socket_path import short

PATIENCE_S = 10.0


class Answer(NamedTuple):
    """What a handler gives back. ``body``: bytes as they are, else a value that JSON can say."""

    status: int
    body: Any


def control_socket(config: Path, environment: Mapping[str, str]) -> Path | None:
    """Where the agent of a configuration file listens, read as quickly as can be; None where only a full reading can tell."""
    try:
        found = (
            environment.get("SKERRY_AGENT_STATE_DIR") or tomllib.loads(config.read_text(encoding="utf-8"))["state_dir"]
        )
    except (OSError, ValueError, KeyError):
        return None
    return Path(found) / "run" / "control.sock" if isinstance(found, str) else None


def ask(
    path: Path, method: str, target: str, body: dict[str, Any] | None = None, *, timeout_s: float = PATIENCE_S
) -> Answer:
    """Asks a running agent, from another process.

    Returns:
        Status, and the decoded JSON or the bytes.

    Raises:
        OSError: nobody listens there; ``TimeoutError`` when who does gives no answer.
    """
    payload = json.dumps(body).encode() if body is not None else b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        with short(path) as address:
            sock.connect(address)
        sock.sendall(
            f"{method} {target} HTTP/1.1\r\nHost: agent\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload
        )
        data = b""
        while chunk := sock.recv(65536):
            data += chunk
    head, _, content = data.partition(b"\r\n\r\n")
    if not head:
        raise ConnectionError("the agent closed the connection")
    status = int(head.split(b" ", 2)[1])
    is_json = b"application/json" in head
    return Answer(status, json.loads(content) if is_json else content)
