"""What a benchmark gives: one JSON line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A figure beside its peer's.

    Attributes:
        bench: the benchmark's name.
        value: ours, in ``unit``.
        peer: what it was measured against; empty when alone.
        peer_value: the peer's figure, in ``unit``.
        n: measurements behind ``value``.
    """

    bench: str
    value: float
    unit: str
    n: int
    peer: str = ""
    peer_value: float | None = None
    note: str = ""

    def line(self) -> str:
        ratio = self.value / self.peer_value if self.peer_value else None
        fields = {
            "bench": self.bench,
            "value": round(self.value, 3),
            "unit": self.unit,
            "peer": self.peer or None,
            "peer_value": None if self.peer_value is None else round(self.peer_value, 3),
            "ratio": None if ratio is None else round(ratio, 3),
            "n": self.n,
            "note": self.note,
        }
        return json.dumps(fields)


def scratch(root: Path = Path(__file__).parents[2]) -> Path:
    """A folder on the disk of the sources: what ``/tmp`` holds may lie in memory, and nothing written there counts."""
    folder = root / ".bench"
    folder.mkdir(exist_ok=True)
    return folder


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
