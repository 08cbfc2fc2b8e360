"""Failed requests in 50 swaps under keep-alive clients that never retry, over TCP and over a unix socket.

On each transport four clients idle at random between requests, up to ``IDLE_S`` (30 with ``SKERRY_BENCH_IDLE_S=30``, which takes
as long as the swaps do but asks less), and two ask without a pause, so that swaps also meet requests in work.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import tempfile
import threading
import time
from pathlib import Path

from tests import models
from tests.bench.result import Result
from tests.integration.worker.rig import Rig

SWAPS, IDLING, BUSY = 50, 4, 2
IDLE_S = float(os.environ.get("SKERRY_BENCH_IDLE_S", "3"))


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


class _Clients:
    def __init__(self) -> None:
        self.over = threading.Event()
        self.answered = {"tcp": 0, "unix": 0}
        self.failures: list[str] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def add(self, kind: str, connection: http.client.HTTPConnection, idle_s: float, seed: int) -> None:
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
            try:
                connection.request("POST", "/v2/models/gas/infer", body)
                response = connection.getresponse()
                answer = json.loads(response.read())
                if response.status != 200 or answer["id"] != f"{kind}{number}":
                    raise http.client.HTTPException(f"{response.status} {answer}")
                with self._lock:
                    self.answered[kind] += 1
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


def run() -> Result:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        versions = ("1.0.0", "1.1.0")
        for version in versions:
            models.build_bundle(folder / version, version=version)
        with Rig(folder, unix=folder / "s") as rig:
            worker = rig.start(rig.served(folder / "1.0.0"), fold_interval_s=0.2)
            clients = _Clients()
            for i in range(IDLING + BUSY):
                idle_s = IDLE_S if i < IDLING else 0.0
                clients.add("tcp", http.client.HTTPConnection("127.0.0.1", rig.port, timeout=60), idle_s, i)
                clients.add("unix", _Unix(folder / "s"), idle_s, 100 + i)
            begin = time.monotonic()
            try:
                for i in range(SWAPS):
                    version = versions[(i + 1) % 2]
                    worker = rig.swap(worker, rig.served(folder / version, version=version), fold_interval_s=0.2)
            finally:
                clients.finish()
            took_s = time.monotonic() - begin
            rig.flush(worker)
            counted = rig.total().ok
    answered = sum(clients.answered.values())
    for failure in clients.failures[:5]:
        print(failure)
    if counted < answered:
        raise RuntimeError(f"{answered} answered, {counted} counted")
    return Result(
        bench="swap_failures",
        value=float(len(clients.failures)),
        unit="failed requests",
        n=answered,
        note=(
            f"{SWAPS} swaps in {took_s:.0f} s; {clients.answered['tcp']} answers over TCP and {clients.answered['unix']} "
            f"over a unix socket; on each {IDLING} keep-alive clients that idle 0 to {IDLE_S:g} s and {BUSY} that do not, "
            f"none ever retries; {counted - answered} counted and not answered; budget 0"
        ),
    )
