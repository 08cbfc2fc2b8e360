"""Asks an agent on its control socket, as a person on the device would with ``skerry-agent status``."""

from __future__ import annotations

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any

from skerry_cli.errors import Failed


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10.0)
        self._path = path

    def connect(self) -> None:
        # A socket's path may have 107 bytes; the folder's descriptor makes any path short.
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            self.sock.connect(f"/proc/self/fd/{folder}/{self._path.name}")
        finally:
            os.close(folder)


def ask_agent(control: Path, method: str, target: str) -> dict[str, Any]:
    """One request to an agent's control socket.

    Raises:
        Failed: nobody answers there, or with an error.
    """
    connection = _UnixConnection(control)
    try:
        connection.request(method, target)
        answer = connection.getresponse()
        text = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{control}: the agent does not answer: {error}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise Failed(f"{control}: {target}: HTTP {answer.status}: {text[:200].decode(errors='replace')}")
    return dict(json.loads(text)) if text else {}
