"""whylogs, in its own environment and process: the peer of the window benchmarks. Also datasketches' KLL and ddsketch."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.peer_environment import interpreter

_MEASURE = """
import json, logging, statistics, sys, time, zlib
import numpy as np, pandas as pd
import whylogs as why
from datasketches import kll_floats_sketch
from ddsketch import DDSketch

logging.disable(logging.CRITICAL)
x = np.load(sys.argv[1])
names = [f"f{i}" for i in range(x.shape[1])]
blocks = [x[i : i + 500] for i in range(0, len(x), 500)]
frames = [pd.DataFrame(block, columns=names) for block in blocks]
clock = time.perf_counter_ns
why.log(frames[0])  # imports and caches
sizes, packed, took = [], [], []
for frame in frames:
    begin = clock()
    found = why.log(frame)
    took.append((clock() - begin) / frame.size)
    data = found.view().serialize()
    sizes.append(len(data))
    packed.append(len(zlib.compress(data, 9)))


def per_value(act, columns):
    begin = clock()
    for column in columns:
        act(column)
    return (clock() - begin) / sum(map(len, columns))


columns = [np.ascontiguousarray(column) for column in x.T]
kll = kll_floats_sketch(200)
sketch = DDSketch()


def one_by_one(values):
    for value in values:
        sketch.add(value)


latencies = np.load(sys.argv[2])
errors = {"kll": [], "ddsketch": []}
for block in latencies:
    one, other = kll_floats_sketch(200), DDSketch()
    one.update(block.astype(np.float32))
    for value in block.tolist():
        other.add(value)
    ordered = np.sort(block)
    for q in (0.5, 0.95, 0.99):
        exact = float(ordered[min(len(ordered) - 1, int(q * len(ordered)))])
        errors["kll"].append(abs(one.get_quantile(q) / exact - 1))
        errors["ddsketch"].append(abs(other.get_quantile_value(q) / exact - 1))

print(json.dumps({
    "kll_error": max(errors["kll"]), "ddsketch_error": max(errors["ddsketch"]),
    "bytes": statistics.median(sizes), "packed": statistics.median(packed), "ns": statistics.median(took),
    "kll_ns": min(per_value(kll.update, columns) for _ in range(5)),
    "ddsketch_ns": per_value(one_by_one, [column.tolist() for column in columns]),
}))
"""


def measure(x: np.ndarray, latencies: np.ndarray) -> dict[str, Any]:
    """whylogs over blocks of 500 rows: median bytes, the same under zlib -9, and ns per value; KLL and ddsketch in ns per value.

    Args:
        latencies: [blocks, values], of whose p50, p95 and p99 KLL and ddsketch tell the worst relative error.
    """
    python = interpreter("whylogs")
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as folder:
        np.save(Path(folder) / "x.npy", x)
        np.save(Path(folder) / "latencies.npy", latencies)
        command = [str(python), "-c", _MEASURE, str(Path(folder) / "x.npy"), str(Path(folder) / "latencies.npy")]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    return dict(json.loads(done.stdout))
