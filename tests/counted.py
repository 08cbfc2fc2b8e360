"""Windows as a device makes them: rows through the real runner, the real ring and recorder, and the real fold."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from skerry_agent.worker.plan import plan_of
from skerry_agent.worker.recorder import Recorder
from skerry_agent.worker.ring import Ring
from skerry_contract import window as w
from skerry_contract import wire
from skerry_runtime.bundle import open_bundle
from skerry_runtime.runner import load

_numbers = itertools.count()


class Counted:
    """One model on one device, without the processes around it."""

    def __init__(self, bundle: Path, digest: str, scratch: Path, *, arm: str = "none", rollout: str = "") -> None:
        self.bundle = open_bundle(bundle, digest=digest)
        variant = self.bundle.manifest.variants[0]
        self._infer = load(self.bundle, variant).infer
        self._cuts: list[bytes] = []
        key = w.Key(self.bundle.manifest.model, digest, variant.id, arm, rollout, 0)
        self._recorder = Recorder(
            key,
            plan_of(self.bundle.manifest),
            ring=str(scratch / f"ring-{next(_numbers)}"),
            boot_id="0" * 32,
            send=lambda cut: self._cuts.append(cut.body),
            later=lambda act: act(),
        )

    @property
    def ring(self) -> Ring:
        """What is recorded and not yet overwritten."""
        return self._recorder.ring

    def answer(self, rows: np.ndarray) -> np.ndarray:
        """Asks once per row; returns the predicted classes."""
        found = []
        (name,) = (tensor.name for tensor in self.bundle.manifest.inputs)
        for row in np.ascontiguousarray(rows, np.float32):
            feeds: dict[str, Any] = {name: row[None]}
            begin = time.monotonic_ns()
            result = self._infer(feeds)
            now = time.monotonic_ns()
            self._recorder.ok(feeds, result.outputs, 1, now - begin, 0, result.transform_ns, result.infer_ns, now)
            found.append(int(next(iter(result.outputs.values())).argmax()))
        return np.array(found)

    def explain(self, attributions: dict[str, list[float]], *, dropped: int = 0) -> None:
        """Counts rows as explained: by feature, an attribution for each of them. They come with the next window."""
        columns = np.array(list(attributions.values()), np.float64).T
        self._recorder.tally("explain.chosen", len(columns) + dropped)
        self._recorder.tally("explain.dropped", dropped)
        self._recorder.explained(tuple(attributions), columns, 1.0)

    def window(self, rows: np.ndarray, truth: np.ndarray | None = None) -> w.Window:
        """Answers the rows and cuts the window; with ``truth`` it carries their labels as well."""
        predicted = self.answer(rows)
        self._cuts.clear()
        self._recorder.cut()
        (body,) = self._cuts
        window = wire.decode_window(body)
        if truth is None:
            return window
        k = len(next(tensor.labels for tensor in self.bundle.manifest.outputs if tensor.labels))
        matrix = np.bincount(truth.astype(int) * k + predicted, minlength=k * k)
        labels = w.Labels(confusion=tuple(matrix.tolist()), matched=len(truth))
        return msgspec.structs.replace(window, labels=labels)


def at(window: w.Window, end_ms: int, *, synced: bool = True) -> w.Window:
    """The window as if it had ended then by the device's wall clock."""
    end = w.Instant(window.end.boot_id, window.end.boot_ns, end_ms, synced)
    start = w.Instant(window.start.boot_id, window.start.boot_ns, end_ms - 500, synced)
    return msgspec.structs.replace(window, start=start, end=end)
