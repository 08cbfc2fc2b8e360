"""A peer's server in its own environment and process: started in a folder, awaited at an address, ended."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

START_S = 60.0


class PeerServer:
    """A running server. Use as a context manager.

    Args:
        folder: where it runs, with its log.
        ready: address that answers once it serves.
        python_path: where it finds its own modules.

    Attributes:
        pid: of its process.
    """

    def __init__(self, folder: Path, command: Sequence[str], ready: str, *, python_path: str) -> None:
        self._folder = folder
        self._ready = ready
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": python_path},
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(self._ready, timeout=1):
                    return self
            except OSError:
                time.sleep(0.1)
        self.__exit__()
        raise RuntimeError(f"{type(self).__name__} did not start: {(self._folder / 'log').read_text()[-2000:]}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    found = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return found
