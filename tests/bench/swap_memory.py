"""Whether memory grows with swaps: of the supervisor and of the worker, over 200 of them, as a slope.

Generations and connections are the product's (``swapping``); keep-alive clients ask over TCP and over a unix socket meanwhile. The
first fifty swaps, in which caches fill, are left out of the slope (least squares).
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests import models
from tests.bench.result import Result
from tests.swap_clients import Clients, Unix

SWAPS, WARM = int(os.environ.get("SKERRY_BENCH_SWAPS", "200")), 0.25
ROOT = Path(__file__).parents[2]


def run() -> Result:
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        folder = Path(name)
        (folder / "slots").mkdir()
        digest = models.build_bundle(folder / "bundle")
        (folder / "bundle").rename(folder / "slots" / digest)
        command = [sys.executable, str(Path(__file__).with_name("swapping.py")), name, digest, str(SWAPS)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            port = int(process.stdout.readline())
            clients = Clients()
            for i in range(4):
                clients.add(http.client.HTTPConnection("127.0.0.1", port, timeout=60), 1.0 if i else 0.0, i)
                clients.add(Unix(folder / "s"), 1.0 if i else 0.0, 100 + i)
            assert process.stdout.readline() == "done\n"
            clients.finish()
            process.stdin.close()
            found = json.loads(process.stdout.readline())
    if clients.failures:
        raise RuntimeError(f"{len(clients.failures)} requests failed: {clients.failures[:3]}")
    slopes, ends = {}, {}
    for kind in ("supervisor", "workers"):
        sizes = np.array(found[kind][int(SWAPS * WARM) :]) / 1e3
        slopes[kind] = float(np.polyfit(np.arange(len(sizes)), sizes, 1)[0])
        ends[kind] = (found[kind][0] / 1e6, found[kind][-1] / 1e6)
    return Result(
        bench="swap_memory",
        value=slopes["supervisor"],
        unit="kB a swap",
        n=SWAPS,
        note=(
            f"slope of the supervisor's RSS over the last three quarters of {SWAPS} swaps, "
            f"{ends['supervisor'][0]:.1f} MB after the first and {ends['supervisor'][1]:.1f} MB after the last; worker "
            f"{slopes['workers']:.2f} kB a swap, {ends['workers'][0]:.1f} and {ends['workers'][1]:.1f} MB; "
            f"{sum(clients.answered.values())} answers meanwhile over TCP and a unix socket, none failed"
        ),
    )
