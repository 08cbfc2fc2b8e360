"""Seconds from the operator's command (the bell rings) to the device's confirmed new version, everything real on loopback.

One server with its broker, one agent, one application at 50 requests a second; no jitter; a trial of 100 inferences, which at
that rate alone takes 2 seconds. The bundle brings 2 MB to download: a small classifier and a file of random bytes beside it.
The device is pinned to two versions in turn; after the first round both lie in its slots, so each round uses a new version.
There is no peer: no other system in reach updates a model this way.
"""

from __future__ import annotations

import datetime as dt
import http.client
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from skerry_cli import bundle, catalog, publishing
from skerry_cli.demo.fleet import GROUP, SETTINGS, Fleet
from skerry_cli.demo.processes import Processes

from tests import models
from tests.bench.result import Result, median

ROUNDS = 5
RATE = 50.0
MODEL_BYTES = 2_000_000
DEVICE = "bench-1"


def run() -> Result:
    took, failures = measure(ROUNDS)
    return Result(
        bench="bell_to_confirmed",
        value=median(took),
        unit="s",
        n=len(took),
        note=(
            f"min {min(took):.2f}, max {max(took):.2f}; {MODEL_BYTES / 1e6:g} MB, {RATE:g} requests/s, trial of 100 inferences "
            f"(2 s of it); {failures} failed requests"
        ),
    )


def measure(
    rounds: int,
    between: Callable[[Sequence[int]], AbstractContextManager[Sequence[int]]] | None = None,
    most_s: float = 60.0,
) -> tuple[list[float], int]:
    """Seconds of each round, and failed requests of the application.

    Args:
        between: makes of the server's HTTPS and MQTT ports those by which the device reaches them.
        most_s: a round may take.
    """
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as folder:
        processes = Processes(Path(folder), leashed=True)
        fleet = Fleet(Path(folder), processes, seed=1)
        try:
            fleet.start_server()
            ports = [int(fleet.server.url.rpartition(":")[2]), fleet.server.mqtt_port]
            with nullcontext(()) if between is None else between(ports) as reached:
                if reached:
                    fleet.cable_ports[DEVICE] = list(reached)
                return _measure(fleet, rounds, most_s)
        finally:
            processes.stop()


def _measure(fleet: Fleet, rounds: int, most_s: float) -> tuple[list[float], int]:
    fleet.hold_ceremony(dt.datetime.now(dt.UTC))
    fleet.api.put(f"/api/v1/groups/{GROUP}", {"settings": {**SETTINGS, "trial_inferences": 100, "trial_s": 60.0}})
    fleet.enrol(DEVICE)
    fleet.finish_enrolment(DEVICE)
    first = _publish(fleet, 0)
    fleet.api.put(f"/api/v1/groups/{GROUP}/models/gas", {"stable": first})
    fleet.wait("the first version to serve", lambda: "gas" in _running(fleet), 60.0 + most_s)
    stop = threading.Event()
    failures: list[str] = []
    asking = threading.Thread(target=_ask, args=(fleet, stop, failures), daemon=True)
    asking.start()
    fleet.wait("the first version to be confirmed", lambda: _confirmed(fleet, first), 60.0)
    took: list[float] = []
    for number in range(1, rounds + 1):
        digest = _publish(fleet, number)
        time.sleep(1.0)
        began = time.monotonic()
        fleet.api.put(f"/api/v1/devices/{DEVICE}/pins/gas", {"digest": digest, "reason": "benchmark"})
        fleet.wait(f"version {number}", lambda digest=digest: _confirmed(fleet, digest), most_s, every_s=0.02)
        took.append(time.monotonic() - began)
    stop.set()
    asking.join()
    return took, len(failures)


def _publish(fleet: Fleet, number: int) -> str:
    folder = fleet.folder / f"bundle-{number}"
    models.build_bundle(folder, version=f"1.{number}.0", seed=0, padding=MODEL_BYTES + number)
    made = bundle.read_bundle(folder)
    publishing.push(fleet.api, made)
    addition = catalog.Addition(model="gas", version=made.manifest.version, digest=made.digest, submitter="bench")
    fleet.approver.change(catalog.Change(add=(addition,)), now=dt.datetime.now(dt.UTC), folder=folder)
    return made.digest


def _confirmed(fleet: Fleet, digest: str) -> bool:
    running = _running(fleet).get("gas", {})
    return running.get("digest") == digest and str(running.get("state", "")).startswith("confirmed")


def _running(fleet: Fleet) -> dict[str, Any]:
    return dict(fleet.status(DEVICE)["running"])


def _ask(fleet: Fleet, stop: threading.Event, failures: list[str]) -> None:
    address = json.loads((fleet.device_folder(DEVICE) / "state" / "run" / "serving.json").read_bytes())
    connection = http.client.HTTPConnection(address["host"], address["port"], timeout=10.0)
    values = [float(v) for v in models.rows(1)[0][0]]
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, len(values)], "datatype": "FP32", "data": values}]})
    due = time.monotonic()
    while not stop.is_set():
        try:
            connection.request("POST", "/v2/models/gas/infer", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                failures.append(f"HTTP {answer.status} {text[:100]!r}")
        except (OSError, http.client.HTTPException) as error:
            failures.append(repr(error))
            connection.close()
        due = max(due + 1.0 / RATE, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
