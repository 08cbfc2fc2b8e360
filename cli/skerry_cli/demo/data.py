"""The demo's readings: batches 1 to 6 of the Gas Sensor Array Drift Dataset (see data/LICENCE.txt).

Real readings of 16 metal-oxide gas sensors over months, in batches ordered in time: the sensors age, so a model trained on
batch 1 is right less and less often. Only this package carries the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from skerry_cli.errors import Usage

BATCHES = (1, 2, 3, 4, 5, 6)
SENSORS, VALUES = 16, 8
SOURCE = "Gas Sensor Array Drift Dataset, UCI, DOI 10.24432/C5MK6M, CC BY 4.0"
_STEADY = ("dR", "dR_norm")
_TRANSIENT = ("rise_001", "rise_01", "rise_1", "decay_001", "decay_01", "decay_1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Rows of some batches, in time order.

    Attributes:
        x: float32 [n, 128], raw.
        y: uint8 [n], index into ``classes``.
        classes: names of the gases.
    """

    x: NDArray[np.float32]
    y: NDArray[np.uint8]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: NDArray[np.intp]) -> Readings:
        """The rows at these indices."""
        return Readings(x=self.x[rows], y=self.y[rows], classes=self.classes)

    def sha256(self) -> str:
        """Digest of values and labels, for a manifest's provenance."""
        return hashlib.sha256(self.x.astype("<f4").tobytes() + self.y.tobytes()).hexdigest()


def load(batches: Sequence[int]) -> Readings:
    """Reads the rows of the named batches.

    Raises:
        Usage: for a batch that is not carried.
    """
    missing = [batch for batch in batches if batch not in BATCHES]
    if missing or not batches:
        raise Usage(f"batch {missing or 'list'}: wanted some of {', '.join(map(str, BATCHES))}")
    file = resources.files("skerry_cli.demo") / "data" / "gas_drift.npz"
    with resources.as_file(file) as path, np.load(path, allow_pickle=False) as archive:
        keep = np.isin(archive["batch"], batches)
        return Readings(
            x=np.ascontiguousarray(archive["X"][keep]),
            y=archive["y"][keep],
            classes=tuple(str(name) for name in archive["classes"]),
        )


def feature_names() -> tuple[str, ...]:
    """Names of the 128 columns: sensor by sensor, two steady and six transient features each."""
    parts = (*_STEADY, *_TRANSIENT)
    return tuple(f"s{sensor:02d}_{part}" for sensor in range(1, SENSORS + 1) for part in parts)
