"""Failed requests in 50 swaps under keep-alive clients that never retry, over TCP and over a unix socket.

On each transport four clients idle at random between requests, up to ``IDLE_S`` (30 with ``SKERRY_BENCH_IDLE_S=30``, which takes
as long as the swaps do but asks less), and two ask without a pause, so that swaps also meet requests in work. How long those two
wait for their answers is told apart: while a worker starts beside the serving one, while connections are handed over, and otherwise.
"""

from __future__ import annotations

import http.client
import os
import tempfile
import time
from pathlib import Path

from tests import models
from tests.bench.result import Result, percentile
from tests.integration.worker.rig import Rig
from tests.swap_clients import Clients, Unix

SWAPS, IDLING, BUSY = 50, 4, 2
IDLE_S = float(os.environ.get("SKERRY_BENCH_IDLE_S", "3"))
QUIET_S = 0.5
"""Between two swaps, so that there are answers that no swap was near."""


def run() -> Result:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        versions = ("1.0.0", "1.1.0")
        for version in versions:
            models.build_bundle(folder / version, version=version)
        starts: list[tuple[float, float]] = []
        drains: list[tuple[float, float]] = []
        with Rig(folder, unix=folder / "s") as rig:
            worker = rig.start(rig.served(folder / "1.0.0"), fold_interval_s=0.2)
            clients = Clients()
            for i in range(IDLING + BUSY):
                idle_s = IDLE_S if i < IDLING else 0.0
                clients.add(http.client.HTTPConnection("127.0.0.1", rig.port, timeout=60), idle_s, i)
                clients.add(Unix(folder / "s"), idle_s, 100 + i)
            begin = time.monotonic()
            try:
                for i in range(SWAPS):
                    version = versions[(i + 1) % 2]
                    began = time.monotonic()
                    new = rig.start(rig.served(folder / version, version=version), fold_interval_s=0.2)
                    proved = time.monotonic()
                    rig.drain(worker, new)
                    starts.append((began, proved))
                    drains.append((proved, time.monotonic()))
                    worker = new
                    time.sleep(QUIET_S)
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
    handed, _ = clients.during(drains)
    starting, _ = clients.during(starts)
    _, quiet = clients.during(sorted(starts + drains))
    p99 = {name: percentile(took, 0.99) * 1e3 for name, took in (("h", handed), ("s", starting), ("q", quiet))}
    return Result(
        bench="swap_failures",
        value=float(len(clients.failures)),
        unit="failed requests",
        n=answered,
        note=(
            f"{SWAPS} swaps in {took_s:.0f} s; {clients.answered['tcp']} answers over TCP and {clients.answered['unix']} "
            f"over a unix socket; on each {IDLING} keep-alive clients that idle 0 to {IDLE_S:g} s and {BUSY} that do not, "
            f"none ever retries; {counted - answered} counted and not answered; p99 of those that do not idle: "
            f"{p99['h']:.1f} ms during a hand-over (n={len(handed)}), {p99['s']:.1f} ms while the next worker starts "
            f"(n={len(starting)}), {p99['q']:.1f} ms otherwise (n={len(quiet)}); budget 0"
        ),
    )
