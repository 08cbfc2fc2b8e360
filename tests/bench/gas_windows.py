"""What the window benchmarks count: real gas readings, 32 features with 64 bins each, through a real model and recorder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from skerry_cli.demo import data

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


def latencies(blocks: int = 20, values: int = 5000) -> np.ndarray:
    """Made-up latencies in whole nanoseconds, int64[blocks, values]: log-normal about 100 us with a tail of ten times that."""
    rng = np.random.default_rng(2)
    usual = rng.lognormal(np.log(1e5), 0.3, (blocks, values))
    slow = rng.random((blocks, values)) < 0.03
    return np.rint(np.where(slow, usual * 10, usual)).astype(np.int64)
