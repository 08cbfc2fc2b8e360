"""What a classifier saw and did on held-out rows, in the integers that devices count too.

Edges are quantiles of the training rows, so every bin starts equally full; centre and scale are the training mean and
standard deviation; counts, moments, calibration and errors come from the held-out rows, which training never saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skerry_contract import histogram as h
from sklearn.isotonic import IsotonicRegression

from skerry_cli.demo.data import Readings, feature_names

BINS = 16
CONFIDENCE_CENTRE, CONFIDENCE_SCALE = 0.0, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One watched column: inner edges, centre and scale, all exactly representable in float32."""

    name: str
    index: int
    edges: tuple[float, ...]
    centre: float
    scale: float


def columns(fitted: Readings) -> tuple[Column, ...]:
    """Edges, centre and scale of every column from the training rows."""
    names = feature_names()
    shares = np.arange(1, BINS) / BINS
    found = []
    for index, name in enumerate(names):
        values = fitted.x[:, index].astype(np.float64)
        # Rounded to float32 before use: a device compares float32 readings, and a bin must not depend on who compares.
        edges = np.unique(np.quantile(values, shares).astype(np.float32))
        spread = float(np.float32(values.std())) or 1.0
        found.append(
            Column(
                name=name,
                index=index,
                edges=tuple(float(edge) for edge in edges),
                centre=float(np.float32(values.mean())),
                scale=spread,
            )
        )
    return tuple(found)


def features(watched: tuple[Column, ...], tensor: str) -> list[dict[str, Any]]:
    """The manifest's ``features``. No range is set: an aged sensor is drift to be watched, not a request to be refused."""
    return [
        {
            "name": column.name,
            "input": tensor,
            "column": column.index,
            "edges": column.edges,
            "centre": column.centre,
            "scale": column.scale,
        }
        for column in watched
    ]


def reference(
    held_out: Readings, answers: NDArray[np.float32], watched: tuple[Column, ...], output: str
) -> dict[str, Any]:
    """The manifest's ``reference``.

    Args:
        held_out: rows with labels.
        answers: the quantized model's probabilities of them, float32 [n, classes].
        watched: as ``columns`` gave it.
        output: name of the probability output.
    """
    predicted, confidence = answers.argmax(axis=1), answers.max(axis=1)
    right = predicted == held_out.y
    classes = len(held_out.classes)
    error = {
        name: round(float(1.0 - right[held_out.y == k].mean()), 6)
        for k, name in enumerate(held_out.classes)
        if (held_out.y == k).any()
    }
    return {
        "n": len(held_out),
        "features": {column.name: _column(held_out.x[:, column.index], column) for column in watched},
        "outputs": {
            output: {
                "counts": [int(count) for count in np.bincount(predicted, minlength=classes)],
                "moments": _moments(confidence, CONFIDENCE_CENTRE, CONFIDENCE_SCALE),
            }
        },
        "calibration": calibration(confidence, right),
        "validated_error": error,
        "accuracy": round(float(right.mean()), 6),
    }


def calibration(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> dict[str, Any]:
    """Isotonic map from confidence to the share that was right, as corners of a line: ``{"method", "x", "y"}``.

    Reference: Zadrozny and Elkan, "Transforming classifier scores into accurate multiclass probability estimates", 2002.
    """
    fit = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(confidence, right.astype(float))
    # Corners must ascend strictly; two that rounding brings together become the later one.
    corners = dict(zip(np.round(fit.X_thresholds_, 6).tolist(), np.round(fit.y_thresholds_, 6).tolist(), strict=True))
    return {"method": "isotonic", "x": list(corners), "y": list(corners.values())}


def _column(values: NDArray[np.float32], column: Column) -> dict[str, Any]:
    counts = [0] * (len(column.edges) + 1)
    for value in values:
        counts[h.edge_bin(column.edges, float(value))] += 1
    return {"counts": counts, "moments": _moments(values, column.centre, column.scale)}


def _moments(values: NDArray[np.float32], centre: float, scale: float) -> list[int]:
    moments = h.moments_of(h.quantize(float(value), centre, scale) for value in values)
    return [moments.n, moments.total, moments.squares]
