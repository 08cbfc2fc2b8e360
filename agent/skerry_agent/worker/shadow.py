"""``python -m skerry_agent.worker.shadow --control-fd N``: a bundle that sees what is answered and answers nobody.

Started by the supervisor. It loads and proves the candidate as a worker would, then reads frames (``tee``) in one thread, at the
lowest priority and within a share of a core: after each inference it rests, the feed fills, and the worker at its other end
drops what does not fit. Above a temperature frames are read and dropped. Every frame of a pair ends in a pair or under a
reason. A candidate that dies or hangs takes down this process and nothing else; pairs since the last window go with it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire
from skerry_runtime.errors import BundleFault
from skerry_runtime.runner import Runner
from skerry_runtime.tensors import Array, Tensors

from skerry_agent import workerwire as ww
from skerry_agent.channel import Channel
from skerry_agent.worker import mapped, share, tee
from skerry_agent.worker.fold import LatencyFold
from skerry_agent.worker.generation import CannotServe, code_of, load_and_prove
from skerry_agent.worker.resources import rss_kb
from skerry_agent.worker.telling import Telling

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
    """

    def __init__(self, runner: Runner, *, cpu: float, max_c: float, boot_id: str, thermal: Path = THERMAL) -> None:
        self._runner = runner
        self._manifest = runner.bundle.manifest
        self._cpu = cpu
        self._max_c = max_c
        self._boot_id = boot_id
        self._thermal = thermal
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

    def follow(self, file: BinaryIO) -> None:
        """Reads frames until the other side ends them, or ``stopping``."""
        key: w.Key | None = None
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
                key = frame.key
            elif key is not None:
                with self._turn:
                    self._take(key, frame)
            self.stopping.wait(share.pause_s(time.thread_time() - began_s, self._cpu))

    def _take(self, key: w.Key, frame: tee.Frame) -> None:
        match frame:
            case tee.Shown():
                reason = self._pair(key, frame)
                if reason:
                    self._drop(key, reason, 1)
            case tee.Missed(n=n):
                self._drop(key, "busy", n)
            case tee.Labelled():
                self._label(key, frame)
            case _:
                pass

    def _pair(self, key: w.Key, frame: tee.Shown) -> str:
        """Runs the candidate on what was asked. Returns why there is no pair, empty when there is one."""
        if self._is_hot():
            return "hot"
        try:
            asked, answered = tee.read(frame.inputs), tee.read(frame.outputs)
            found = self._runner.infer(asked)
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
            tally = self._tally(key)
            tally.pairs += 1
            tally.agreed += agrees
            tally.distance.add(distance)
            (tally.slower if longer_ns > 0 else tally.faster).add(abs(longer_ns))
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
            w.Window(key=key, start=tally.start, end=tally.end, shadows={digest: tally.result()})
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


class ShadowProcess:
    """The process. Make it inside the running event loop, then await ``run``."""

    def __init__(self, control: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._status = 0
        self._start: ww.StartShadow | None = None
        self._comparison: Comparison | None = None
        self._upto = 0
        self._channel = Channel(control, self._on_message, self._stop)
        self._telling = Telling(self._loop, self._channel.send)
        self._loop.add_signal_handler(signal.SIGTERM, self._stop)
        self._loop.add_signal_handler(signal.SIGINT, lambda: None)

    async def run(self) -> int:
        """Until told to end; the process's exit status."""
        await self._over.wait()
        if self._comparison is not None:
            self._comparison.stopping.set()
        self._cut()
        self._telling.end()
        await self._channel.flushed()
        self._channel.close()
        return self._status

    def _on_message(self, message: ww.ToWorker, fd: int | None) -> None:
        match message:
            case ww.StartShadow():
                self._load(message)
            case ww.Feed() if fd is not None and self._comparison is not None:
                self._feed(self._comparison, socket.socket(fileno=fd))
                fd = None
            case ww.Flush(id=number):
                self._cut()
                self._channel.send(ww.Flushed(id=number))
            case ww.Stop():
                self._stop()
            case _:
                pass
        if fd is not None:
            os.close(fd)

    def _load(self, start: ww.StartShadow) -> None:
        began_s = time.monotonic()
        candidate = start.candidate
        try:
            runner, found, infer_us = load_and_prove(candidate)
        except (CannotServe, BundleFault, MemoryError, OSError) as error:
            self._fail(candidate.name, *code_of(error))
            return
        if runner.bundle.manifest.streams is not None:
            self._fail(candidate.name, "shadow_stateful", "its answers depend on requests that a shadow does not see")
            return
        self._start = start
        self._comparison = Comparison(runner, cpu=start.cpu, max_c=start.max_c, boot_id=start.boot_id)
        load_ms = (time.monotonic() - began_s) * 1e3
        proof = ww.Proof(cases=found.cases, passed=found.passed, max_abs_diff=found.max_abs_diff, recall=found.recall)
        proved = ww.Proved(name=candidate.name, proof=proof, load_ms=load_ms, infer_us=infer_us)
        self._channel.send(ww.Ready(pid=os.getpid(), models=(proved,)))
        self._every(start.fold_interval_s, self._cut)
        self._every(start.health_interval_s, self._report)

    def _fail(self, model: str, code: str, detail: str) -> None:
        log.error("cannot shadow model=%s code=%s detail=%s", model, code, detail)
        self._channel.send(ww.Failed(model=model, code=code, detail=detail))
        self._status = 1
        self._over.set()

    def _feed(self, comparison: Comparison, sock: socket.socket) -> None:
        sock.setblocking(True)

        def follow() -> None:
            with sock, sock.makefile("rb") as file:
                try:
                    comparison.follow(file)
                except Exception:
                    # What comes in was made by a process of ours: this is a bug, and the next feed may do better.
                    log.exception("feed given up")

        threading.Thread(target=follow, name="shadow", daemon=True).start()

    def _every(self, interval_s: float, act: object) -> None:
        assert callable(act)

        def again() -> None:
            if not self._over.is_set():
                act()
                self._loop.call_later(interval_s, again)

        self._loop.call_later(interval_s, again)

    def _cut(self) -> None:
        if self._comparison is None or self._start is None:
            return
        candidate = self._start.candidate
        for window in self._comparison.cut(candidate.digest):
            cut = ww.WindowCut(ring=candidate.ring, start=self._upto, upto=self._upto + 1, body=wire.encode(window))
            self._upto += 1
            self._channel.send(cut)

    def _report(self) -> None:
        self._channel.send(ww.Health(models={}, inflight=0, rss_mb=rss_kb() * 1024 / 1e6))

    def _stop(self) -> None:
        self._over.set()


def main() -> int:
    """Runs on the inherited descriptor; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m skerry_agent.worker.shadow", description=__doc__)
    parser.add_argument("--control-fd", type=int, required=True, help="AF_UNIX SOCK_SEQPACKET socket to the supervisor")
    options = parser.parse_args()
    logging.basicConfig(
        level=os.environ.get("SKERRY_LOG_LEVEL", "INFO"),
        stream=sys.stderr,
        format="%(asctime)s level=%(levelname)s at=%(name)s %(message)s",
    )
    os.nice(19)

    async def serve() -> int:
        return await ShadowProcess(socket.socket(fileno=options.control_fd)).run()

    return asyncio.run(serve())


if __name__ == "__main__":
    sys.exit(main())
