"""Trains the demo's classifier: a small neural network on standardised readings.

The scaler is not part of the network: it becomes the bundle's ``scale`` transform, so the int8 graph sees values of one
scale (with the scaler inside, static quantization would leave the activations in float).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from skerry_cli.demo import data

HIDDEN = (64, 32)
HELD_OUT = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A trained network with the rows it saw and those it did not.

    Attributes:
        network: takes standardised rows, answers probabilities over ``fitted.classes``.
        mean, scale: float32 [128], of the training rows; ``(x - mean) / scale``.
        fitted: the training rows (70 %); held_out: the rest, stratified by gas.
        batches: where both came from.
    """

    network: MLPClassifier
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    fitted: data.Readings
    held_out: data.Readings
    batches: tuple[int, ...]

    def standardise(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw rows as the network takes them, float32."""
        return ((x - self.mean) / self.scale).astype(np.float32)


def train(batches: Sequence[int], *, seed: int = 0) -> Trained:
    """Fits the network on 70 % of the named batches; takes about a second per thousand rows.

    Raises:
        Usage: for a batch that is not carried.
    """
    readings = data.load(batches)
    fit_rows, held_rows = train_test_split(
        np.arange(len(readings)), test_size=HELD_OUT, random_state=seed, stratify=readings.y
    )
    fitted, held_out = readings.take(np.sort(fit_rows)), readings.take(np.sort(held_rows))
    scaler = StandardScaler().fit(fitted.x.astype(np.float64))
    network = MLPClassifier(HIDDEN, max_iter=300, random_state=seed)
    trained = Trained(
        network=network,
        mean=scaler.mean_.astype(np.float32),
        scale=scaler.scale_.astype(np.float32),
        fitted=fitted,
        held_out=held_out,
        batches=tuple(batches),
    )
    # One thread: the matrices are small, and a fleet runs beside.
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        # 300 rounds are the recipe; that the loss still falls a little at its end is known.
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(trained.standardise(fitted.x), fitted.y)
    _widen(network, trained.standardise(fitted.x), len(fitted.classes))
    return trained


def _widen(network: MLPClassifier, rows: NDArray[np.float32], classes: int) -> None:
    """Gives the network an output for each gas that its batches lack, which it then never means: labels of that gas can be told wrong.

    The new output is as low as any logit over the training rows, so that quantization's range stays as it was.
    """
    missing = [k for k in range(classes) if k not in network.classes_]
    if not missing:
        return
    hidden = rows.astype(np.float64)
    for weights, bias in zip(network.coefs_[:-1], network.intercepts_[:-1], strict=True):
        hidden = np.maximum(hidden @ weights + bias, 0)
    lowest = float((hidden @ network.coefs_[-1] + network.intercepts_[-1]).min())
    for k in missing:
        network.coefs_[-1] = np.insert(network.coefs_[-1], k, 0.0, axis=1)
        network.intercepts_[-1] = np.insert(network.intercepts_[-1], k, lowest)
    network.classes_ = np.arange(classes, dtype=network.classes_.dtype)
    network.n_outputs_ = classes
