"""The thread behind a model: the connection to the agent, what is counted and not yet stored, and the next bundle.

It holds the model's lock only to cut, to fold and to swap. While the agent is away it tries again, less and less often, and
the model goes on with what it has. Bundles load and prove themselves in a thread of their own, so that windows keep
flowing meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from skerry_contract import window as w

from skerry_agent import __version__, appwire
from skerry_agent import workerwire as ww
from skerry_agent.errors import AgentError, Degraded
from skerry_agent.logs import kv
from skerry_agent.sdk.ledger import File, Ledger
from skerry_agent.sdk.loading import Loaded, load_and_prove
from skerry_agent.socket_path import short
from skerry_agent.worker import mapped

log = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 5.0
_GREETING_S = 10.0
_FETCH_S = 60.0
_STEADY_S = 10.0
"""A connection that lasted so long was one: the next try comes at once."""


class Owner(Protocol):
    """The model, as the thread sees it. Each call comes from this thread or from the loading one."""

    name: str

    def running(self) -> ww.Served | None:
        """What it counts as now."""

    def loaded(self, welcome: appwire.Welcome, served: ww.Served, found: Loaded) -> None:
        """Swaps to a proved bundle."""

    def rekey(self, served: ww.Served) -> None:
        """Counts under another key, in another ring."""

    def greeted(self) -> None:
        """The agent is there."""

    def failed(self, error: AgentError) -> None:
        """Nothing came of opening, or of a new bundle."""

    def committed(self, path: str, upto: int) -> None:
        """The agent's store holds a ring or book up to a position."""

    def cut(self) -> None:
        """Cuts windows of everything counted so far."""

    def fold(self) -> None:
        """Folds what waits for it."""

    def changed(self) -> None:
        """Wakes who waits in ``flush`` or ``open``."""


class Connection:
    """See the module. ``ledger`` and ``files`` are the thread's; ``wake`` and ``post`` are for everybody."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path = path
        self.ledger = Ledger()
        self.away = True
        self.welcome: appwire.Welcome | None = None
        self.descriptors: set[int] = set()
        self._owner = owner
        self._sock: socket.socket | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._waking = threading.Lock()
        self._posted: deque[Callable[[], None]] = deque()
        self._out: deque[ww.Message] = deque()
        self._over = False
        self._failures = 0
        self._try_at_s = 0.0
        self._greet_by_s = 0.0
        self._since_s = 0.0
        self._cut_at_s = 0.0
        self._pending: ww.Served | None = None
        self._loading: threading.Thread | None = None
        self._files: queue.Queue[tuple[str, str, int]] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=f"skerry-{owner.name}", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def wake(self) -> None:
        """Makes the thread look at once; once it has ended, nothing."""
        # Under a lock, since the number of a closed descriptor may be somebody else's.
        with self._waking, contextlib.suppress(OSError):
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def post(self, act: Callable[[], None]) -> None:
        """Runs something in the thread, soon."""
        self._posted.append(act)
        self.wake()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; what could not be sent is in the rings."""
        self._over = True
        self.wake()
        self._thread.join(timeout_s)

    def abandon(self) -> None:
        """In the child of a fork: gives up what is the parent's, and leaves its locks alone."""
        self._waking = threading.Lock()
        wake, self._wake = self._wake, -1
        sock, self._sock = self._sock, None
        mine = [wake, *(file.abandon() for file in self.ledger.files.values())]
        if sock is not None:
            mine.append(sock.detach())
        for fd in mine:
            with contextlib.suppress(OSError):
                os.close(fd)

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._over:
                try:
                    self._turn()
                except Exception as error:
                    # The model answers on; what nobody foresaw is as if the agent had gone away.
                    log.exception("connection failed")
                    self._lost(Degraded("internal", f"{type(error).__name__}: {error}"))
            self._transmit()
        except Exception:
            log.exception("connection thread ended")
        finally:
            if self._sock is not None:
                self._sock.close()
            for path in list(self.ledger.files):
                self.ledger.forget(path)
            with self._waking:
                wake, self._wake = self._wake, -1
                os.close(wake)

    def _turn(self) -> None:
        now_s = time.monotonic()
        if self._sock is None and now_s >= self._try_at_s:
            self._connect()
        self._wait(now_s)
        while self._posted:
            self._posted.popleft()()
        now_s = time.monotonic()
        if self.welcome is not None and now_s >= self._cut_at_s:
            self._cut_at_s = now_s + (self.welcome.fold_interval_s or self.welcome.window_s)
            self._owner.cut()
        if self._sock is not None and self.away and now_s > self._greet_by_s:
            self._lost(Degraded("agent_silent", f"{self.path}: no greeting within {_GREETING_S:g} s"))
        self._transmit()

    def _wait(self, now_s: float) -> None:
        due = [self._cut_at_s if self.welcome is not None else now_s + 60.0]
        if self._sock is None:
            due.append(self._try_at_s)
        elif self.away:
            due.append(self._greet_by_s)
        watched = select.poll()
        watched.register(self._wake, select.POLLIN)
        if self._sock is not None:
            stuck = bool(self._out) or any(
                not one.sent for f in self.ledger.files.values() if f.ready for one in f.waiting
            )
            watched.register(self._sock, select.POLLIN | (select.POLLOUT if stuck and not self.away else 0))
        ready = watched.poll(max(0.0, min(due) - now_s) * 1000 + 1)
        for fd, _ in ready:
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            else:
                self._read()

    def _connect(self) -> None:
        sock: socket.socket | None = None
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with short(self.path) as address:
                sock.connect(address)
        except OSError as error:
            if sock is not None:
                sock.close()
            advice = "run the agent, or name its apps.socket: sdk.open(model, socket=...) or SKERRY_APPS_SOCKET"
            self._lost(Degraded("not_running", f"no agent answers at {self.path}: {error.strerror}", advice=advice))
            return
        sock.setblocking(False)
        self._sock = sock
        self._since_s = time.monotonic()
        self._greet_by_s = self._since_s + _GREETING_S
        with contextlib.suppress(OSError):
            appwire.send(sock, appwire.Hello(protocol=appwire.PROTOCOL, agent=__version__))

    def _lost(self, error: AgentError) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            if not self.away and time.monotonic() - self._since_s > _STEADY_S:
                self._failures = 0
            if not self.away:
                log.warning("agent away", extra=kv(model=self._owner.name, detail=error.detail))
        self.away = True
        self._out.clear()
        for file in self.ledger.files.values():
            file.ready = False
        self._failures += 1
        self._try_at_s = time.monotonic() + min(_FIRST_WAIT_S * 2 ** min(self._failures, 10), _LONGEST_WAIT_S)
        # A file that a bundle waits for does not come any more.
        self._files.put(("", "", -1))
        self._owner.failed(error)

    def _read(self) -> None:
        for _ in range(64):
            if self._sock is None:
                return
            try:
                found = appwire.receive_at_application(self._sock)
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue
            except (OSError, appwire.Malformed) as error:
                self._lost(Degraded("agent_away", str(error)))
                return
            if found is None:
                self._lost(Degraded("agent_away", "the agent hung up"))
                return
            self._take(*found)

    def _take(self, message: ww.Message, fds: list[int]) -> None:
        try:
            match message:
                case appwire.Welcome():
                    self._welcomed(message)
                case appwire.Sorry(code=code, detail=detail):
                    self._lost(Degraded(code, detail))
                case appwire.Held():
                    self._held(message)
                case appwire.Grant():
                    self._granted(message, fds)
                case appwire.Nothing(code=code, detail=detail):
                    self._owner.failed(Degraded(code, detail))
                case appwire.File(digest=digest, path=path):
                    self._files.put((digest, path, fds.pop() if fds else -1))
                case ww.Committed(ring=ring, upto=upto):
                    file = self.ledger.files.get(ring)
                    if file is not None:
                        file.committed(upto)
                    self._owner.committed(ring, upto)
                    self._owner.changed()
        finally:
            for fd in fds:
                os.close(fd)

    def _welcomed(self, message: appwire.Welcome) -> None:
        self.away = False
        self.welcome = message
        self._owner.greeted()
        for ring in dict.fromkeys(file.ring for file in self.ledger.files.values()):
            parts = [file for file in self.ledger.files.values() if file.ring == ring]
            keep = appwire.Keep(
                ring=ring,
                parts=tuple(f.path for f in parts),
                key=cast("tuple[str, str, str, str, str, int]", tuple(parts[0].key)),
                version=parts[0].version,
            )
            self._say(keep, tuple(file.descriptor for file in parts))
        now = self._pending or self._owner.running()
        self._say(appwire.Follow(model=self._owner.name, ring=now.ring if now is not None else ""))

    def _say(self, message: ww.Message, fds: tuple[int, ...] = ()) -> None:
        # Few and short: the kernel takes them, or the agent does not read and the connection is as good as gone.
        if self._sock is None:
            return
        try:
            if not appwire.send(self._sock, message, fds):
                self._lost(Degraded("agent_away", "the agent does not read"))
        except OSError as error:
            self._lost(Degraded("agent_away", str(error)))

    def _held(self, message: appwire.Held) -> None:
        parts = [file for file in self.ledger.files.values() if file.ring == message.ring]
        if message.ok:
            for file, upto in zip(parts, message.upto, strict=True):
                file.unsend(upto)
                file.ready = True
                self._owner.committed(file.path, upto)
            return
        # The agent folded them when it could not know of us, or they are gone: nothing in them is ours to send any more.
        log.warning("ring given up", extra=kv(model=self._owner.name, ring=Path(message.ring).name))
        for file in parts:
            self.ledger.forget(file.path)
        now = self._pending or self._owner.running()
        if now is not None and now.ring == message.ring:
            self._say(appwire.Follow(model=self._owner.name))

    # --- bundles -----------------------------------------------------------------------------------------------------

    def _granted(self, grant: appwire.Grant, fds: list[int]) -> None:
        """Takes what it uses out of ``fds``."""
        served = grant.served
        key = w.Key(served.name, served.digest, served.variant, served.arm, served.rollout, served.stage)
        for path in [path for path in (served.ring, grant.book) if path]:
            # Without a descriptor to spare the connection ends, and with it the grant.
            own = os.dup(fds[0])
            mapped.given[path] = fds.pop(0)
            self.ledger.files[path] = File(ring=served.ring, path=path, descriptor=own, key=key, version=served.version)
        if self._pending is not None:
            self._drop(self._pending)
        self._pending = None
        now = self._owner.running()
        if now is not None and (now.digest, now.variant) == (served.digest, served.variant):
            self._owner.rekey(served)
            return
        self._pending = served
        if self._loading is None:
            self._load(served)

    def _drop(self, served: ww.Served) -> None:
        """Gives back the empty ring of a bundle that did not come to run."""
        for path in [file.path for file in self.ledger.files.values() if file.ring == served.ring]:
            fd = mapped.given.pop(path, -1)
            if fd >= 0:
                os.close(fd)
            self.ledger.forget(path)
            self._say(appwire.Done(ring=path, upto=0))

    def _load(self, served: ww.Served) -> None:
        def load() -> None:
            try:
                found: Loaded | AgentError = load_and_prove(served, self._fetch)
            except AgentError as error:
                found = error
            except Exception as error:
                found = Degraded("runtime_crashed", f"{type(error).__name__}: {error}")
            self.post(lambda: self._came(served, found))

        self._loading = threading.Thread(target=load, name=f"skerry-load-{served.name}", daemon=True)
        self._loading.start()

    def _fetch(self, digest: str, path: str) -> int:
        self.post(lambda: self._say(appwire.Fetch(digest=digest, path=path)))
        end_s = time.monotonic() + _FETCH_S
        while time.monotonic() < end_s:
            with contextlib.suppress(queue.Empty):
                found = self._files.get(timeout=1.0)
                if found[:2] == (digest, path) and found[2] >= 0:
                    return found[2]
                if found[2] >= 0:
                    os.close(found[2])
                if found[0] in ("", digest):
                    break
        raise OSError(f"{path}: the agent does not give it")

    def _came(self, served: ww.Served, found: Loaded | AgentError) -> None:
        self._loading = None
        if self._pending is not served:
            # Another one was confirmed meanwhile.
            if self._pending is not None:
                self._load(self._pending)
            return
        self._pending = None
        if isinstance(found, Loaded) and self.welcome is not None:
            try:
                self._owner.loaded(self.welcome, served, found)
                return
            except OSError as error:
                found = Degraded("not_enough_disk", f"{served.ring}: {error.strerror}")
        if isinstance(found, AgentError):
            log.error("bundle does not run here", extra=kv(model=served.name, digest=served.digest, code=found.code))
            self._say(
                appwire.Refused(
                    model=served.name, digest=served.digest, ring=served.ring, code=found.code, detail=found.detail[:2000]
                )
            )  # fmt: skip
            self._drop(served)
            self._owner.failed(found)

    # --- windows -----------------------------------------------------------------------------------------------------

    def _transmit(self) -> None:
        self.ledger.sort_in()
        if self._sock is None or self.away:
            return
        for file in list(self.ledger.files.values()):
            if not file.ready:
                continue
            for one in list(file.waiting):
                if one.sent:
                    continue
                if not file.room:
                    break
                try:
                    if not appwire.send(self._sock, one.message):
                        return
                except OSError as error:
                    self._lost(Degraded("agent_away", str(error)))
                    return
                one.sent = True
                if isinstance(one.message, ww.BookClosed):
                    self.ledger.forget(file.path)
            if file.upto is not None and not file.waiting and file.path == file.ring:
                self._say(appwire.Done(ring=file.path, upto=file.upto))
                self.ledger.forget(file.path)
                self._owner.changed()
