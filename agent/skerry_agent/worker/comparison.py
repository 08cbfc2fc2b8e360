"""What a bundle in shadow says beside what was answered: pairs, agreement, distance, who was right, and samples of what differs.

``Comparison`` is fed with the frames of ``tee`` by threads of the shadow's process (``shadow``); windows are cut from another. Every frame
of a pair ends in a pair or under a reason.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_runtime.runner import Runner
from skerry_runtime.tensors import Array, Tensors

from skerry_agent.worker import mapped, share, tee
from skerry_agent.worker.disagreements import Disagreements
from skerry_agent.worker.fold import LatencyFold

log = logging.getLogger(__name__)

REMEMBERED = 1 << 16
"""Answers of the candidate that a label may still be about."""
THERMAL = Path("/sys/class/thermal")
_LOOK_S = 5.0
_FARTHEST = 1 << 40
"""A million, in millionths: what is farther counts as that far, so that sums of a window stay in 64 bits."""
_frames = msgspec.msgpack.Decoder(tee.Frame)


class _Numbers:
    """A histogram under way; what was not folded yet is bounded."""

    def __init__(self) -> None:
        self._fold = LatencyFold()
        self._fresh: list[int] = []

    def add(self, value: int) -> None:
        self._fresh.append(value)
        if len(self._fresh) >= 1024:
            self._settle()

    def result(self) -> h.Exponential:
        self._settle()
        return self._fold.result()

    def _settle(self) -> None:
        if self._fresh:
            self._fold.add(np.array(self._fresh, np.int64))
            self._fresh.clear()


@dataclasses.dataclass(slots=True)
class _Tally:
    start: w.Instant
    end: w.Instant
    pairs: int = 0
    agreed: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    distance: _Numbers = dataclasses.field(default_factory=_Numbers)
    slower: _Numbers = dataclasses.field(default_factory=_Numbers)
    faster: _Numbers = dataclasses.field(default_factory=_Numbers)
    labelled: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0, 0])
    samples: dict[str, int] = dataclasses.field(default_factory=dict)

    def result(self) -> w.Shadow:
        both, ours, theirs, neither = self.labelled
        return w.Shadow(
            pairs=self.pairs,
            dropped=dict(self.dropped),
            agreed=self.agreed,
            distance=self.distance.result(),
            slower=self.slower.result(),
            faster=self.faster.result(),
            labelled=(both, ours, theirs, neither),
        )


class Comparison:
    """What the candidate says beside what was answered, counted per key. ``follow`` runs in a thread per feed, ``cut`` in another.

    Args:
        runner: of the candidate, proved.
        cpu, max_c: see ``workerwire.StartShadow``.
        samples: keeps pairs that disagree; None to keep none.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        cpu: float,
        max_c: float,
        boot_id: str,
        samples: Disagreements | None = None,
        thermal: Path = THERMAL,
    ) -> None:
        self._runner = runner
        self._manifest = runner.bundle.manifest
        self._cpu = cpu
        self._max_c = max_c
        self._boot_id = boot_id
        self._thermal = thermal
        self._samples = samples
        self._classes = next((t for t in self._manifest.outputs if t.labels and len(t.shape) == 2), None)
        self._tolerance = runner.variant.golden.tolerance
        self._datatypes = {tensor.name: tensor.datatype for tensor in self._manifest.outputs}
        self._places = np.zeros(REMEMBERED, np.uint64)
        self._predicted = np.full(REMEMBERED, -1, np.int32)
        self._tallies: dict[w.Key, _Tally] = {}
        # A predecessor that drains still shows what it answers: two feeds take turns.
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._looked_s = -math.inf
        self._hot = False
        self.stopping = threading.Event()
        self._begun_s: float | None = None

    def busy_s(self) -> float:
        """How long the inference under way has taken; 0 without one."""
        begun_s = self._begun_s
        return 0.0 if begun_s is None else time.monotonic() - begun_s

    def follow(self, file: BinaryIO) -> None:
        """Reads frames until the other side ends them, or ``stopping``."""
        key: tee.Keyed | None = None
        while not self.stopping.is_set():
            head = file.read(tee.LENGTH.size)
            if len(head) < tee.LENGTH.size:
                return
            (length,) = tee.LENGTH.unpack(head)
            if length > tee.MOST_FRAME:
                raise ValueError(f"a frame of {length} bytes; wanted at most {tee.MOST_FRAME}")
            data = file.read(length)
            if len(data) < length:
                return
            began_s = time.thread_time()
            frame = _frames.decode(data)
            if isinstance(frame, tee.Keyed):
                key = frame
            elif key is not None:
                with self._turn:
                    self._take(key, frame)
            self.stopping.wait(share.pause_s(time.thread_time() - began_s, self._cpu))

    def _take(self, keyed: tee.Keyed, frame: tee.Frame) -> None:
        key = keyed.key
        match frame:
            case tee.Shown():
                reason = self._pair(keyed, frame)
                if reason:
                    self._drop(key, reason, 1)
            case tee.Missed(n=n):
                self._drop(key, "busy", n)
            case tee.Labelled():
                self._label(key, frame)
            case _:
                pass

    def _pair(self, keyed: tee.Keyed, frame: tee.Shown) -> str:
        """Runs the candidate on what was asked. Returns why there is no pair, empty when there is one."""
        if self._is_hot():
            return "hot"
        try:
            asked, answered = tee.read(frame.inputs), tee.read(frame.outputs)
            self._begun_s = time.monotonic()
            try:
                found = self._runner.infer(asked)
            finally:
                self._begun_s = None
            if not _alike(answered, found.outputs):
                return "unlike"
            agrees = self._agrees(answered, found.outputs)
            distance = _distance(answered, found.outputs)
        except Exception as error:
            # The candidate's fault, or a request that only the other bundle takes: it is what shadows are there to find.
            log.debug("no pair: %s", error)
            return "failed"
        self._remember(frame.place, found.outputs)
        longer_ns = found.transform_ns + found.infer_ns - frame.took_ns
        with self._lock:
            tally = self._tally(keyed.key)
            tally.pairs += 1
            tally.agreed += agrees
            tally.distance.add(distance)
            (tally.slower if longer_ns > 0 else tally.faster).add(abs(longer_ns))
        if not agrees and self._samples is not None and not self.stopping.is_set():
            row = _row_apart(answered, found.outputs, self._classes.name if self._classes is not None else "")
            kept = self._samples.keep(keyed, frame.ident, self._now(), row, asked, answered, found.outputs, distance)
            with self._lock:
                samples = self._tally(keyed.key).samples
                samples[kept] = samples.get(kept, 0) + bool(kept)
        return ""

    def _agrees(self, answered: Tensors, found: Tensors) -> bool:
        if self._classes is not None:
            name = self._classes.name
            return bool((answered[name].argmax(-1) == found[name].argmax(-1)).all())
        return all(self._close(name, answered[name], found[name]) for name in answered)

    def _close(self, name: str, a: Array, b: Array) -> bool:
        tolerance = self._tolerance.get(self._datatypes.get(name, ""), 0.0)
        if a.dtype.kind == "f":
            return bool(np.isclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True).all())
        if a.dtype.kind in "iu":
            return bool((np.abs(a.astype(np.float64) - b.astype(np.float64)) <= tolerance).all())
        return bool((a == b).all())

    def _remember(self, place: int, found: Tensors) -> None:
        if self._classes is None:
            return
        output = found[self._classes.name]
        if output.shape[0] == 1:
            slot = place % REMEMBERED
            self._places[slot] = place
            self._predicted[slot] = int(output[0].argmax())

    def _label(self, key: w.Key, frame: tee.Labelled) -> None:
        slot = frame.place % REMEMBERED
        if self._predicted[slot] < 0 or int(self._places[slot]) != frame.place:
            return
        ours, theirs = frame.predicted == frame.truth, int(self._predicted[slot]) == frame.truth
        with self._lock:
            self._tally(key).labelled[(0 if theirs else 1) if ours else (2 if theirs else 3)] += 1

    def _drop(self, key: w.Key, reason: str, n: int) -> None:
        with self._lock:
            dropped = self._tally(key).dropped
            dropped[reason] = dropped.get(reason, 0) + n

    def _tally(self, key: w.Key) -> _Tally:
        now = self._now()
        found = self._tallies.get(key)
        if found is None:
            found = self._tallies[key] = _Tally(now, now)
        found.end = now
        return found

    def _now(self) -> w.Instant:
        boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return w.Instant(self._boot_id, boot_ns, time.time_ns() // 1_000_000, mapped.clock_synchronised())

    def _is_hot(self) -> bool:
        now_s = time.monotonic()
        if self._max_c > 0 and now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            hottest = hottest_c(self._thermal)
            self._hot = hottest is not None and hottest > self._max_c
        return self._hot

    def cut(self, digest: str) -> list[w.Window]:
        """The windows of everything since the last cut, one per key."""
        with self._lock:
            tallies, self._tallies = self._tallies, {}
        return [
            w.Window(
                key=key,
                start=tally.start,
                end=tally.end,
                shadows={digest: tally.result()},
                tallies={name: n for name, n in tally.samples.items() if name},
            )
            for key, tally in tallies.items()
        ]


def hottest_c(root: Path) -> float | None:
    """The hottest of the kernel's thermal zones, degrees Celsius; None where there is none."""
    found: list[float] = []
    for path in root.glob("thermal_zone*/temp"):
        try:
            found.append(int(path.read_text()) / 1000.0)
        except (OSError, ValueError):
            continue
    return max(found, default=None)


def _alike(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and a[name].dtype.kind == b[name].dtype.kind for name in a
    )


def _row_apart(a: Tensors, b: Tensors, classes: str) -> int:
    """The first row of another class, or the one whose numbers are farthest apart."""
    if classes:
        return int(np.argmax(a[classes].argmax(-1) != b[classes].argmax(-1)))
    row, widest = 0, 0.0
    for name, one in a.items():
        if one.dtype.kind not in "fiu" or one.ndim == 0 or not one.size:
            continue
        apart = np.nan_to_num(np.abs(one.astype(np.float64) - b[name].astype(np.float64)), nan=0.0)
        by_row = apart.reshape(len(apart), -1).max(axis=1)
        if by_row.max() > widest:
            row, widest = int(by_row.argmax()), float(by_row.max())
    return row


def _distance(a: Tensors, b: Tensors) -> int:
    """The greatest absolute difference of a number, in millionths; a NaN beside a number is as far as it goes."""
    widest = 0.0
    for name, one in a.items():
        if one.dtype.kind not in "fiu" or not one.size:
            continue
        other = b[name]
        with np.errstate(invalid="ignore"):
            apart = np.abs(one.astype(np.float64) - other.astype(np.float64))
        apart[np.isnan(one) & np.isnan(other) if one.dtype.kind == "f" else np.zeros(one.shape, bool)] = 0.0
        apart[one == other] = 0.0  # equal infinities
        apart[np.isnan(apart)] = math.inf
        widest = max(widest, float(apart.max()))
    return int(min(widest * 1e6, _FARTHEST))
