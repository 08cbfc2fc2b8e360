"""Windows a second that one server process commits and acknowledges: a thousand devices over mutual TLS, the embedded broker, SQLite.

Beside it a bare paho subscriber in the same place, which only counts what the same devices send to the same broker.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import paho.mqtt.client as paho
from skerry_contract import topics, wire
from skerry_contract import window as w
from skerry_server import collector
from skerry_server.broker.natsconf import Listener
from skerry_server.db import tables as t
from skerry_server.db.engine import writing
from sqlalchemy import func, insert, select

from tests.bench import gas_windows
from tests.bench.mqtt_load import Plan
from tests.bench.result import Result, scratch
from tests.integration.broker.conftest import Fleet

DEVICES = 1000
WINDOWS = 20
BLOCKS = 6


def run() -> Result:
    # Not in memory: what is measured includes the writing.
    with tempfile.TemporaryDirectory(prefix="ingest-", dir=scratch()) as folder:
        ours, peer, bodies = _measure(Path(folder))
    sync = next(f.default for f in dataclasses.fields(Listener) if f.name == "sync_interval_s")
    return Result(
        bench="ingest_sqlite",
        value=ours["rate"],
        unit="windows/s",
        peer="a bare paho subscriber that only counts",
        peer_value=peer["rate"],
        n=int(ours["windows"]),
        note=(
            f"{DEVICES} devices, one window a message ({ours['bytes'] / ours['windows']:.0f} bytes on the wire, 32 features with 64 bins, "
            f"bodies of {bodies:.0f}), TLS, QoS 1, each device waits for the server's ack before its next; ledger, roll-ups, profiles "
            f"included; broker and load on the same {os.cpu_count()} cores, of which the load took {ours['cpu_s'] / ours['seconds']:.2f} "
            f"and the peer's {peer['cpu_s'] / peer['seconds']:.2f}; NATS sync_interval {sync} s; budget >= 3,400/s and >= 0.5x"
        ),
    )


def _measure(folder: Path) -> tuple[dict[str, float], dict[str, float], float]:
    names = [f"dev-{number:04}" for number in range(DEVICES)]
    fleet = Fleet(folder)
    try:
        fleet.broker.start()
        fleet.enrol(*names)
        certificates = {name: tuple(map(str, fleet.authority.issue(name))) for name in names}
        bodies = _bodies(folder, fleet)
        plan = Plan(
            port=fleet.broker.port,
            ca=str(fleet.authority.pem),
            certificates=certificates,
            bodies=[str(path) for path in bodies],
            windows=WINDOWS,
            until="ack",
        )
        peer = _peer(fleet, dataclasses.replace(plan, until="puback"), folder)
        ours = _ours(fleet, plan, folder)
        return ours, peer, sum(path.stat().st_size for path in bodies) / len(bodies)
    finally:
        fleet.close()


def _bodies(folder: Path, fleet: Fleet) -> list[Path]:
    """Windows of a bundle that the registry holds, each of other rows."""
    x = gas_windows.readings(BLOCKS)
    device = gas_windows.counted(folder, x)
    manifest = device.bundle.manifest
    row = {
        "digest": device.bundle.digest, "model": manifest.model, "version": manifest.version, "state": "approved",
        "manifest": (folder / "b" / "manifest.json").read_bytes(), "submitter": "bench", "pushed_ms": 0,
    }  # fmt: skip
    with writing(fleet.engine) as connection:
        connection.execute(insert(t.bundles), [row])
    paths = []
    for block in range(BLOCKS):
        window = device.window(x[block * gas_windows.ROWS : (block + 1) * gas_windows.ROWS])
        now = w.Instant("b" * 32, 1, int(time.time() * 1000), True)
        path = folder / f"window-{block}"
        path.write_bytes(wire.encode(msgspec.structs.replace(window, start=now, end=now)))
        paths.append(path)
    return paths


def _load(plan: Plan, folder: Path) -> dict[str, float]:
    file = folder / f"plan-{plan.until}.json"
    file.write_text(json.dumps(dataclasses.asdict(plan)))
    command = [sys.executable, "-m", "tests.bench.mqtt_load", str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise RuntimeError("the load did not come up; what it said stands above")
        child.stdin.write("go\n")
        child.stdin.flush()
        return dict(json.loads(child.stdout.readline()))


def _ours(fleet: Fleet, plan: Plan, folder: Path) -> dict[str, float]:
    fleet.start_ingest()
    collector.settle()  # as the server does before it serves
    told = _load(plan, folder)
    (held,) = fleet.rows(select(func.sum(t.evidence.c.ok)))
    (records,) = fleet.rows(select(func.count()).select_from(t.windows))
    if held[0] != told["windows"] * gas_windows.ROWS or records[0] != told["windows"]:
        raise RuntimeError(
            f"{told['windows']} windows were acknowledged; the database holds {records[0]} and counts {held[0]} inferences"
        )
    return told | {"rate": told["windows"] / told["seconds"]}


def _peer(fleet: Fleet, plan: Plan, folder: Path) -> dict[str, float]:
    """Until the last message has arrived, however early the broker took it."""
    wanted = plan.windows * len(plan.certificates)
    heard, ended, granted, over = 0, 0.0, threading.Event(), threading.Event()

    def count(*_: object) -> None:
        nonlocal heard, ended
        heard += 1
        if heard == wanted:
            ended = time.monotonic()
            over.set()

    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311, clean_session=True)
    client.tls_set_context(fleet.endpoint().tls())
    client.on_connect = lambda c, *_: c.subscribe(topics.ALL_UP, qos=1)
    client.on_subscribe = lambda *_: granted.set()
    client.on_message = count
    client.connect("127.0.0.1", fleet.broker.port)
    client.loop_start()
    try:
        if not granted.wait(20):
            raise RuntimeError("the broker granted the counting subscriber nothing")
        told = _load(plan, folder)
        if not over.wait(300):
            raise RuntimeError(f"{heard} of {wanted} messages arrived")
        return told | {"rate": wanted / (ended - told["began"])}
    finally:
        client.disconnect()
        client.loop_stop()
