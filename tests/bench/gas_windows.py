"""What the window benchmarks count: real gas readings, 32 features with 64 bins each, through a real model and recorder."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
from skerry_agent.readings import Readings
from skerry_cli.demo import data
from skerry_contract import histogram as h
from skerry_contract import window as w

from tests import models
from tests.counted import Counted

FEATURES, BINS, ROWS, CLASSES = 32, 64, 500, 6


def readings(blocks: int = 6) -> np.ndarray:
    """``blocks`` times 500 rows of batches 1 to 5, drawn at random: float32[blocks * 500, 32], every fourth column."""
    x = data.load((1, 2, 3, 4, 5)).x[:, ::4]
    rows = np.random.default_rng(1).permutation(len(x))[: blocks * ROWS]
    return np.ascontiguousarray(x[rows])


def counted(folder: Path, x: np.ndarray) -> Counted:
    """A device with a model whose 64 bins per feature are equally full on ``x``."""
    features, columns = [], {}
    for i in range(FEATURES):
        values = x[:, i].astype(np.float64)
        edges = np.unique(np.quantile(values, np.arange(1, BINS) / BINS).astype(np.float32)).astype(np.float64)
        centre, scale = float(values.mean()), float(values.std())
        features.append(
            {"name": f"f{i}", "input": "x", "column": i, "edges": edges.tolist(), "centre": centre, "scale": scale}
        )
        counts = np.bincount(np.searchsorted(edges, values, "right"), minlength=len(edges) + 1)
        columns[f"f{i}"] = {"counts": counts.tolist()}
    changes = {"features": features, "reference": {"n": len(x), "features": columns}}
    digest = models.build_bundle(folder / "b", n_features=FEATURES, classes=CLASSES, n_golden=CLASSES, changes=changes)
    return Counted(folder / "b", digest, folder)


def of_a_device(window: w.Window, folder: Path) -> list[tuple[str, w.Window]]:
    """The window as devices have it, in steps that add up: (what came in, window).

    ``counted`` neither queues nor transforms, reads no meters, has no labels, and explains nothing. Of what comes in the
    meters are this machine's; latencies, labels and attributions are drawn at random, labels of every class.
    """
    rng = np.random.default_rng(3)

    def spread(median_ns: float) -> h.Exponential:
        return h.exponential_of(int(v) for v in rng.lognormal(np.log(median_ns), 0.5, ROWS))

    latency = w.Latency(total=spread(3e5), queue=spread(4e4), transform=spread(2e4), infer=spread(1e5))
    found = [("queue and transforms", msgspec.structs.replace(window, latency=latency))]
    readings = Readings(folder, interval_s=1.0, clock_s=time.monotonic)
    readings.read()
    readings.read()
    resources = {**window.resources, **readings.held()}
    found.append(("readings of the device", msgspec.structs.replace(found[-1][1], resources=resources)))
    outputs = {
        name: msgspec.structs.replace(one, estimated=tuple(int(n * 0.9 * 2**20) + 7 for n in one.counts))
        for name, one in window.outputs.items()
    }
    labels = w.Labels(
        confusion=tuple(rng.integers(1, 30, CLASSES * CLASSES).tolist()),
        matched=400,
        lags={k: h.exponential_of(int(v) for v in rng.lognormal(8.0, 1.0, 60)) for k in range(CLASSES)},
    )
    late = msgspec.structs.replace(found[-1][1], outputs=outputs, labels=labels)
    found.append(("estimated accuracy and labels", late))
    attributions = {
        f"f{i}": h.Moments(n=25, total=int(rng.integers(1, 99_999)), squares=int(rng.integers(1, 10**8)))
        for i in range(FEATURES)
    }
    tallies = {**window.tallies, "explain.chosen": 25, "explain.rows": 25}
    explained = msgspec.structs.replace(late, attributions=attributions, tallies=tallies)
    return [*found, (f"attributions of {FEATURES} features", explained)]


def latencies(blocks: int = 20, values: int = 5000) -> np.ndarray:
    """Made-up latencies in whole nanoseconds, int64[blocks, values]: log-normal about 100 us with a tail of ten times that."""
    rng = np.random.default_rng(2)
    usual = rng.lognormal(np.log(1e5), 0.3, (blocks, values))
    slow = rng.random((blocks, values)) < 0.03
    return np.rint(np.where(slow, usual * 10, usual)).astype(np.int64)
