"""One inference over local HTTP in JSON, telemetry on, one keep-alive client, beside MLServer serving the same file; LitServe
in the note."""

from __future__ import annotations

import http.client
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from tests import models
from tests.bench.http_client import Client
from tests.bench.litserve_peer import LitServe
from tests.bench.mlserver_peer import MLServer
from tests.bench.result import Result, percentile
from tests.integration.worker.rig import Rig

FEATURES, CLASSES = 30, 6
BLOCK, ROUNDS, USUAL = 250, 20, 2000


def run() -> Result:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.build_bundle(folder / "b", n_features=FEATURES, classes=CLASSES, n_golden=CLASSES)
        x, _ = models.rows(1, FEATURES, CLASSES)
        tensor = {"name": "x", "shape": [1, FEATURES], "datatype": "FP32", "data": x.ravel().tolist()}
        body = json.dumps({"inputs": [tensor]}).encode()
        rows = json.dumps({"x": x.ravel().tolist()}).encode()
        with (
            Rig(folder) as rig,
            MLServer(folder / "mlserver", folder / "b" / "model.onnx") as peer,
            LitServe(folder / "litserve", folder / "b" / "model.onnx") as second,
        ):
            worker = rig.start(rig.served(folder / "b"), fold_interval_s=5.0)
            with (
                Client(rig.port, "/v2/models/gas/infer", body) as ours,
                Client(peer.port, "/v2/models/gas/infer", body) as theirs,
                Client(second.port, "/predict", rows) as lit,
            ):
                _same(_data(ours.ask()), _data(theirs.ask()), json.loads(lit.ask())["data"])
                mine: list[float] = []
                other: list[float] = []
                third: list[float] = []
                for i in range(ROUNDS + 2):
                    a, b, c = ours.block(BLOCK), theirs.block(BLOCK), lit.block(BLOCK)
                    if i >= 2:  # warm on all sides
                        mine += a
                        other += b
                        third += c
                usual = [_usual(port, body) for port in (rig.port, peer.port)]
            rig.flush(worker)
            counted = rig.total().ok
            asked = 1 + BLOCK * (ROUNDS + 2) + USUAL
            if counted != asked:
                raise RuntimeError(f"telemetry is off: {asked} asked, {counted} counted")
    return Result(
        bench="http_json",
        value=percentile(mine, 0.5),
        unit="ms",
        peer="MLServer 1.7.1, one process",
        peer_value=percentile(other, 0.5),
        n=len(mine),
        note=(
            f"p50, {FEATURES}-feature MLP, one keep-alive client of raw sockets; p99 {percentile(mine, 0.99):.3f} "
            f"against {percentile(other, 0.99):.3f}; LitServe 0.2.19 p50 {percentile(third, 0.5):.3f}, p99 {percentile(third, 0.99):.3f}; with Python's http.client, whose own cost is in both, p50 "
            f"{usual[0]:.3f} against {usual[1]:.3f}, ratio {usual[0] / usual[1]:.3f}; budget ratio 0.45"
        ),
    )


def _usual(port: int, body: bytes) -> float:
    """p50 in milliseconds of what an application commonly uses."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    took = []
    for _ in range(USUAL):
        begin = time.perf_counter()
        connection.request("POST", "/v2/models/gas/infer", body, {"Content-Type": "application/json"})
        connection.getresponse().read()
        took.append((time.perf_counter() - begin) * 1e3)
    connection.close()
    return percentile(took, 0.5)


def _data(answer: bytes) -> list[float]:
    return list(json.loads(answer)["outputs"][0]["data"])


def _same(first: list[float], *others: list[float]) -> None:
    for other in others:
        np.testing.assert_allclose(first, other, rtol=1e-5)
