"""Requests a second over local HTTP with 8 keep-alive clients, JSON, telemetry on, beside LitServe and MLServer with the same file.

The clients are one process of their own with a thread each: it asks all servers in turns, so that what it costs is the same for all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import models
from tests.bench.litserve_peer import LitServe
from tests.bench.mlserver_peer import MLServer
from tests.bench.result import Result, median
from tests.integration.worker.rig import Rig

FEATURES, CLASSES = 30, 6
CLIENTS, ROUNDS, SECONDS = 8, 7, 1.5


def run() -> Result:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        models.build_bundle(folder / "b", n_features=FEATURES, classes=CLASSES, n_golden=CLASSES)
        x, _ = models.rows(1, FEATURES, CLASSES)
        values = x.ravel().tolist()
        tensor = {"name": "x", "shape": [1, FEATURES], "datatype": "FP32", "data": values}
        (folder / "oip.json").write_text(json.dumps({"inputs": [tensor]}))
        (folder / "lit.json").write_text(json.dumps({"x": values}))
        model = folder / "b" / "model.onnx"
        with Rig(folder) as rig, LitServe(folder / "l", model) as lit, MLServer(folder / "m", model) as mlserver:
            worker = rig.start(rig.served(folder / "b"), fold_interval_s=5.0)
            loads = (
                _Load(rig.port, "/v2/models/gas/infer", folder / "oip.json"),
                _Load(lit.port, "/predict", folder / "lit.json"),
                _Load(mlserver.port, "/v2/models/gas/infer", folder / "oip.json"),
            )
            rates = [[load.ask(SECONDS) for load in loads] for _ in range(ROUNDS + 1)][1:]  # the first turn warms all
            asked, *_ = [load.close() for load in loads]
            rig.flush(worker)
            if rig.total().ok != asked:
                raise RuntimeError(f"telemetry is off: {asked} asked, {rig.total().ok} counted")
    rate = [median([turn[i]["rate"] for turn in rates]) for i in range(3)]
    p99 = [median([turn[i]["p99_ms"] for turn in rates]) for i in range(3)]
    return Result(
        bench="http_clients",
        value=rate[0],
        unit="requests/s",
        peer="LitServe 0.2.19, one worker",
        peer_value=rate[1],
        n=int(sum(turn[0]["rate"] * SECONDS for turn in rates)),
        note=(
            f"{CLIENTS} keep-alive clients, one row of {FEATURES} features in JSON, median of {ROUNDS} turns of {SECONDS:g} s; p99 "
            f"{p99[0]:.2f} ms against {p99[1]:.2f}; MLServer 1.7.1, one process, {rate[2]:.0f} requests/s, p99 {p99[2]:.2f} ms; "
            "clients and servers share the machine's cores"
        ),
    )


class _Load:
    """The clients of one server."""

    def __init__(self, port: int, path: str, body: Path) -> None:
        command = [sys.executable, "-m", "tests.bench.http_load", str(port), path, str(body), str(CLIENTS)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._asked = 0

    def ask(self, seconds: float) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        told: dict[str, float] = json.loads(self._process.stdout.readline())
        self._asked += int(told["n"])
        return told

    def close(self) -> int:
        """Ends the clients; how many requests they made."""
        self._process.communicate()
        return self._asked
