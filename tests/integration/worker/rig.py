"""Plays the supervisor for worker tests: real worker processes, a real listening socket, a store that is a dict.

The rig runs its own event loop in a thread, so that tests are plain functions. It relays connections from an old worker to
a new one, commits each window as it comes (and notes when one does not begin where the ring's last one ended), and can kill.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from skerry_agent import workerwire as ww
from skerry_agent.channel import Channel, pair
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire

BOOT_ID = "0" * 32
TIMEOUT_S = 90.0
WORKER = ("-m", "skerry_agent.worker")


class Worker:
    """A worker process and what it has said."""

    def __init__(self, process: subprocess.Popen[bytes], rings: dict[str, str]) -> None:
        self.process = process
        self.rings = rings
        self.books = {str(Path(ring).with_suffix(".labels")) for ring in rings.values()}
        self.channel: Channel
        self.heard: list[Any] = []
        self.changed = threading.Condition()
        self.gone = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, kind: type, *, where: Callable[[Any], bool] = lambda _: True) -> Any:
        """The first message of a kind."""

        def found() -> Any:
            return next((m for m in self.heard if isinstance(m, kind) and where(m)), None)

        with self.changed:
            ok = self.changed.wait_for(lambda: found() is not None or self.gone, TIMEOUT_S)
            message = found()
        assert message is not None, f"no {kind.__name__} ({'timeout' if not ok else 'worker gone'}); heard {self.heard}"
        return message


class Rig:
    """A supervisor for tests. Use as a context manager. ``python``: the interpreter that runs the workers."""

    def __init__(self, folder: Path, python: str = sys.executable, *, unix: Path | None = None) -> None:
        self.folder = folder
        self.python = python
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.listeners = [self.listener]
        if unix is not None:
            self.listeners.append(socket.socket(socket.AF_UNIX))
            self.listeners[1].bind(str(unix))
            self.listeners[1].listen(256)
        self.port: int = self.listener.getsockname()[1]
        self.windows: list[tuple[ww.WindowCut, w.Window]] = []
        self.positions: dict[str, int] = defaultdict(int)
        self.gaps: list[ww.WindowCut] = []
        self.workers: list[Worker] = []
        self.successor: Worker | None = None
        self.environment = dict(os.environ)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._rings = 0

    def __enter__(self) -> Rig:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.process.wait()
            self._call(lambda worker=worker: worker.channel.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for listener in self.listeners:
            listener.close()

    # --- workers ----------------------------------------------------------------------------------------------------

    def ring_path(self) -> str:
        self._rings += 1
        return str(self.folder / f"{self._rings}.ring")

    def served(
        self, bundle: Path, *, name: str = "gas", version: str = "1.0.0", variant: str = "", **key: Any
    ) -> ww.Served:
        from skerry_contract import manifest as mf

        raw = (bundle / mf.MANIFEST_FILE).read_bytes()
        variant = variant or mf.parse(raw).variants[0].id
        return ww.Served(
            name=name,
            version=version,
            digest=mf.digest(raw),
            variant=variant,
            path=str(bundle),
            ring=self.ring_path(),
            **key,
        )

    def spawn(self, *served: ww.Served, **options: Any) -> Worker:
        """Starts a worker and sends ``start``; does not wait for ``ready``."""
        ours, theirs = pair()
        process = subprocess.Popen(
            [
                self.python,
                *WORKER,
                "--control-fd",
                str(theirs.fileno()),
                *(f"--listen-fd={s.fileno()}" for s in self.listeners),
            ],
            pass_fds=(theirs.fileno(), *(s.fileno() for s in self.listeners)),
            env=self.environment,
        )
        theirs.close()
        worker = Worker(process, {model.name: model.ring for model in served})
        self.workers.append(worker)

        def open_channel() -> None:
            worker.channel = Channel(
                ours, lambda message, fd: self._on_message(worker, message, fd), lambda: self._on_gone(worker)
            )

        self._call(open_channel)
        options = {"window_s": 3600.0, "health_interval_s": 3600.0, "boot_id": BOOT_ID, **options}
        self.send(worker, ww.Start(generation=len(self.workers), models=served, **options))
        return worker

    def start(self, *served: ww.Served, **options: Any) -> Worker:
        """Starts a worker and lets it listen."""
        worker = self.spawn(*served, **options)
        worker.wait_for(ww.Ready)
        others = sorted({str(path) for path in self.folder.glob("*.labels")} - worker.books)
        self.send(worker, ww.Listen(books=tuple(others)))
        return worker

    def send(self, worker: Worker, message: ww.Message) -> None:
        self._call(lambda: worker.channel.send(message))

    def swap(self, old: Worker, *served: ww.Served, deadline_s: float = 10.0, **options: Any) -> Worker:
        """Starts a successor, hands everything over, waits until the old worker is gone."""
        new = self.start(*served, **options)
        self.drain(old, new, deadline_s=deadline_s)
        return new

    def drain(self, old: Worker, new: Worker, *, deadline_s: float = 10.0) -> ww.Drained:
        self.successor = new
        self.send(old, ww.Drain(deadline_s=deadline_s))
        drained: ww.Drained = old.wait_for(ww.Drained)
        assert old.process.wait(TIMEOUT_S) == 0
        self.adopt_all(old, new)
        return drained

    def adopt_all(self, old: Worker, new: Worker) -> None:
        """Gives the label books of a worker that is gone to a living one."""
        with old.changed:
            assert old.changed.wait_for(lambda: old.gone, TIMEOUT_S)
        for book in sorted(old.books):
            if Path(book).exists():
                new.books.add(book)
                self.send(new, ww.AdoptBook(book=book, start=self.positions[book]))
        old.books.clear()

    def kill(self, worker: Worker) -> None:
        """SIGKILL, and everything it had said is taken in."""
        os.kill(worker.pid, signal.SIGKILL)
        worker.process.wait(TIMEOUT_S)
        with worker.changed:
            assert worker.changed.wait_for(lambda: worker.gone, TIMEOUT_S)

    def stop(self, worker: Worker) -> int:
        self.send(worker, ww.Stop())
        status = worker.process.wait(TIMEOUT_S)
        with worker.changed:
            assert worker.changed.wait_for(lambda: worker.gone, TIMEOUT_S)
        return status

    def hang_up(self, worker: Worker) -> None:
        """Closes the control channel, as a supervisor that dies does."""
        self._call(worker.channel.close)

    def flush(self, worker: Worker) -> None:
        number = uuid.uuid4().int >> 80
        self.send(worker, ww.Flush(id=number))
        worker.wait_for(ww.Flushed, where=lambda m: m.id == number)

    def recover(self, worker: Worker, ring: str) -> ww.Recovered:
        """Lets a living worker fold what a dead one left."""
        self.send(worker, ww.Recover(ring=ring, start=self.positions[ring]))
        recovered: ww.Recovered = worker.wait_for(ww.Recovered, where=lambda m: m.ring == ring)
        return recovered

    def labels(self, *, where: Callable[[w.Key], bool] = lambda _: True) -> w.Labels:
        """The sum of all committed windows' labels, without how late they came: that is ``lags``."""
        return msgspec.structs.replace(self._labels(where), lags={})

    def lags(self, *, where: Callable[[w.Key], bool] = lambda _: True) -> dict[int, h.Exponential]:
        """How late labels came, per true class."""
        return self._labels(where).lags

    def _labels(self, where: Callable[[w.Key], bool]) -> w.Labels:
        moment = w.Instant("", 0, 0, False)
        key = w.Key("", "", "", "none", "", 0)
        found = w.Window(key=key, start=moment, end=moment)
        for _, window in self.windows:
            if where(window.key):
                found = w.merge(found, msgspec.structs.replace(window, key=key, features={}, outputs={}, slices={}))
        return found.labels

    def total(self, *, where: Callable[[w.Key], bool] = lambda _: True) -> w.Counts:
        """The sum of all committed windows' counts."""
        found = w.Counts()
        for _, window in self.windows:
            if where(window.key):
                found = w.Counts(**{n: getattr(found, n) + getattr(window.counts, n) for n in found.__struct_fields__})
        return found

    # --- the loop ---------------------------------------------------------------------------------------------------

    def _call(self, act: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return act()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(TIMEOUT_S)

    def _on_message(self, worker: Worker, message: Any, fd: int | None) -> None:
        if isinstance(message, ww.Conn):
            assert fd is not None
            if self.successor is not None:
                self.successor.channel.send(message, fd)
            os.close(fd)
        if isinstance(message, ww.BookClosed):
            worker.books.discard(message.book)
            Path(message.book).unlink(missing_ok=True)
        if isinstance(message, ww.WindowCut):
            if message.start != self.positions[message.ring]:
                self.gaps.append(message)
            self.positions[message.ring] = message.upto
            self.windows.append((message, wire.decode_window(message.body)))
            worker.channel.send(ww.Committed(ring=message.ring, upto=message.upto))
        with worker.changed:
            worker.heard.append(message)
            worker.changed.notify_all()

    def _on_gone(self, worker: Worker) -> None:
        with worker.changed:
            worker.gone = True
            worker.changed.notify_all()
