"""Keep-alive clients that never retry, over TCP and over a unix socket, and what they saw: failures, and how long each answer took."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests import models


class Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


class Clients:
    """Threads that ask in a loop on a connection each.

    Attributes:
        answered: answers by transport.
        failures: what went wrong, one line each.
        took: (when it began, seconds until the answer) of each answer of a client that does not idle; monotonic clock.
    """

    def __init__(self) -> None:
        self.over = threading.Event()
        self.answered = {"tcp": 0, "unix": 0}
        self.failures: list[str] = []
        self.took: list[tuple[float, float]] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def add(self, connection: http.client.HTTPConnection, idle_s: float, seed: int) -> None:
        """A client that waits up to ``idle_s`` between two requests; 0: a millisecond."""
        kind = "unix" if isinstance(connection, Unix) else "tcp"
        thread = threading.Thread(target=self._ask, args=(kind, connection, idle_s, random.Random(seed)))
        self._threads.append(thread)
        thread.start()

    def _ask(self, kind: str, connection: http.client.HTTPConnection, idle_s: float, rng: random.Random) -> None:
        x, _ = models.rows(1)
        tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": x[0].tolist()}
        number = 0
        while not self.over.is_set():
            number += 1
            body = json.dumps({"id": f"{kind}{number}", "inputs": [tensor]})
            began = time.monotonic()
            try:
                connection.request("POST", "/v2/models/gas/infer", body)
                response = connection.getresponse()
                answer = json.loads(response.read())
                if response.status != 200 or answer["id"] != f"{kind}{number}":
                    raise http.client.HTTPException(f"{response.status} {answer}")
                with self._lock:
                    self.answered[kind] += 1
                    if not idle_s:
                        self.took.append((began, time.monotonic() - began))
            except (OSError, http.client.HTTPException, ValueError) as error:
                with self._lock:
                    self.failures.append(f"{kind}: {type(error).__name__}: {error}")
                connection.close()
            self.over.wait(rng.uniform(0.0, idle_s) if idle_s else 0.001)
        connection.close()

    def finish(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join()

    def during(self, spans: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
        """Seconds that answers took: of those under way in one of the spans (sorted, monotonic), and of the others."""
        inside, outside = [], []
        for began, took_s in self.took:
            met = any(low <= began + took_s and began <= high for low, high in spans)
            (inside if met else outside).append(took_s)
        return inside, outside
