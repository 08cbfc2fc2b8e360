"""Nanoseconds per value folded into a window: bins, moments, nulls and range of 32 features with 64 bins, from the ring, beside
whylogs logging the same rows as data frames."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from skerry_agent.worker.fold import Fold
from skerry_agent.worker.plan import plan_of

from tests.bench import gas_windows, whylogs_peer
from tests.bench.result import Result, median

ROUNDS = 200


def run() -> Result:
    x = gas_windows.readings()
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as folder:
        device = gas_windows.counted(Path(folder), x)
        device.answer(x[: gas_windows.ROWS])
        took = []
        for _ in range(ROUNDS):
            fold = Fold(plan_of(device.bundle.manifest))
            begin = time.thread_time_ns()
            fold.add_ring(device.ring, 0, gas_windows.ROWS)
            took.append((time.thread_time_ns() - begin) / (gas_windows.ROWS * gas_windows.FEATURES))
            assert fold.ok == gas_windows.ROWS
    peer = whylogs_peer.measure(x)
    return Result(
        bench="window_update",
        value=median(took),
        unit="ns",
        peer="whylogs 1.6.4 logging data frames of 500 rows",
        peer_value=peer["ns"],
        n=ROUNDS * gas_windows.ROWS * gas_windows.FEATURES,
        note=(
            f"per value, CPU time, latency and answers of each row included; datasketches KLL vectorised "
            f"{peer['kll_ns']:.0f} ns, ddsketch one by one {peer['ddsketch_ns']:.0f} ns, each for one sketch alone; budget 1/5"
        ),
    )
