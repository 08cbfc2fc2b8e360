"""Nanoseconds per value folded into a window: bins, moments, nulls and range of 32 features with 64 bins, from the ring, beside
whylogs logging the same rows as data frames."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from skerry_agent.worker.fold import Fold, LatencyFold
from skerry_agent.worker.plan import plan_of
from skerry_contract import histogram as h

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
    latencies = gas_windows.latencies()
    peer = whylogs_peer.measure(x, latencies)
    return Result(
        bench="window_update",
        value=median(took),
        unit="ns",
        peer="whylogs 1.6.4 logging data frames of 500 rows",
        peer_value=peer["ns"],
        n=ROUNDS * gas_windows.ROWS * gas_windows.FEATURES,
        note=(
            f"per value, CPU time, latency and answers of each row included; datasketches KLL vectorised "
            f"{peer['kll_ns']:.0f} ns, ddsketch one by one {peer['ddsketch_ns']:.0f} ns, each for one sketch alone; budget 1/5. Worst error "
            f"of p50, p95, p99 of {latencies.shape[1]} latencies, {len(latencies)} times: {_worst_error(latencies):.2%}, KLL "
            f"{peer['kll_error']:.2%}, ddsketch {peer['ddsketch_error']:.2%}"
        ),
    )


def _worst_error(latencies: np.ndarray) -> float:
    worst = 0.0
    for block in latencies:
        fold = LatencyFold()
        fold.add(block)
        histogram, ordered = fold.result(), np.sort(block)
        for q in (0.5, 0.95, 0.99):
            exact = float(ordered[min(len(ordered) - 1, int(q * len(ordered)))])
            found = h.quantile(histogram, q)
            assert found is not None
            worst = max(worst, abs(found / exact - 1))
    return worst
