"""``python -m skerry_agent.worker.shadow --control-fd N``: a bundle that sees what is answered and answers nobody.

Started by the supervisor. It loads and proves the candidate as a worker would, then reads frames (``tee``) in one thread, at the
lowest priority and within a share of a core: after each inference it rests, the feed fills, and the worker at its other end
drops what does not fit. Above a temperature frames are read and dropped. What is counted is ``comparison``'s. A candidate that dies or hangs takes down this process and nothing else; pairs since the last window go with it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time

import msgspec
from skerry_contract import wire
from skerry_runtime.acceleration import Acceleration
from skerry_runtime.errors import BundleFault

from skerry_agent import workerwire as ww
from skerry_agent.channel import Channel
from skerry_agent.worker.comparison import Comparison
from skerry_agent.worker.disagreements import Disagreements
from skerry_agent.worker.generation import CannotServe, code_of, load_and_prove
from skerry_agent.worker.memory import own_mb
from skerry_agent.worker.resources import rss_kb
from skerry_agent.worker.telling import Telling

log = logging.getLogger(__name__)


class ShadowProcess:
    """The process. Make it inside the running event loop, then await ``run``."""

    def __init__(self, control: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._status = 0
        self._start: ww.StartShadow | None = None
        self._comparison: Comparison | None = None
        self._upto = 0
        self._expected_s = 0.0
        self._samples: Disagreements | None = None
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
            case ww.Sample(rules=rules):
                if self._samples is not None:
                    self._samples.follow(rules)
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
        began_s, base_mb = time.monotonic(), own_mb()
        candidate = start.candidate
        try:
            runner, found, infer_us = load_and_prove(candidate, msgspec.convert(start.acceleration, Acceleration))
        except (CannotServe, BundleFault, MemoryError, OSError) as error:
            self._fail(candidate.name, *code_of(error))
            return
        if runner.bundle.manifest.streams is not None:
            self._fail(candidate.name, "shadow_stateful", "its answers depend on requests that a shadow does not see")
            return
        self._start = start
        self._samples = samples = Disagreements(
            runner.bundle.manifest, candidate.digest, start.sampling, send=self._send_soon
        )
        self._comparison = Comparison(runner, cpu=start.cpu, max_c=start.max_c, boot_id=start.boot_id, samples=samples)
        load_ms = (time.monotonic() - began_s) * 1e3
        proof = ww.Proof(cases=found.cases, passed=found.passed, max_abs_diff=found.max_abs_diff, recall=found.recall)
        proved = ww.Proved(
            name=candidate.name, proof=proof, load_ms=load_ms, infer_us=infer_us, runs_on=runner.engine.runs_on,
            fallback=runner.fallback,
        )  # fmt: skip
        self._expected_s = infer_us / 1e6
        self._channel.send(ww.Ready(pid=os.getpid(), models=(proved,), base_mb=base_mb, own_mb=own_mb()))
        self._every(start.fold_interval_s, self._cut)
        self._every(start.health_interval_s, self._report)

    def _send_soon(self, message: ww.Message) -> None:
        """From a thread that follows a feed."""
        self._loop.call_soon_threadsafe(self._channel.send, message)

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
        busy_s = self._comparison.busy_s() if self._comparison is not None else 0.0
        self._channel.send(
            ww.Health(
                models={}, inflight=0, rss_mb=rss_kb() * 1024 / 1e6, busy_s=busy_s, expected_s=self._expected_s,
                at_s=time.monotonic(), own_mb=own_mb(),
            )
        )  # fmt: skip

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
