"""The HTTPS listener: which connections there are, so that nobody who connects keeps the others out.

uvicorn speaks HTTP over each connection; this module accepts them, and ends those that only take up a place. Rules kept here:

* There are at most ``most`` connections: fewer than the process may have descriptors, so that database, repository and
  children always find some.
* A connection without a request under way is idle. It has ``first_s`` for its TLS handshake and the head of its first
  request together, and ``idle_s`` after each answer.
* When every place is taken, the newcomer gets the place of the one that has been idle longest. Only when all have requests
  under way does it wait, in the kernel's queue.
* An answer that its reader does not take within ``stall_s`` is given up. Request bodies are timed by ``api.limits``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import uvicorn

log = logging.getLogger(__name__)

MOST_DESCRIPTORS = 1 << 20
RESERVE = 256
"""Descriptors kept for the database's pool, the broker's log, children's pipes and the repository's files."""
LEAST_CONNECTIONS = 32
_SWEEP_S = 0.25

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


def raise_descriptors() -> int:
    """Lifts the soft limit of open files to the hard one, also for children; returns how many this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def places(descriptors: int) -> int:
    """How many connections fit: each may have a file open, too, and ``RESERVE`` is left for the rest of the server.

    >>> places(1024), places(65536), places(100)
    (384, 32640, 32)
    """
    return max(LEAST_CONNECTIONS, (descriptors - RESERVE) // 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How many connections at most, and how long one may do nothing; see the module."""

    most: int
    first_s: float = 15.0
    idle_s: float = 35.0
    stall_s: float = 120.0


@dataclass(slots=True)
class _Connection:
    peer: tuple[str, int]
    since: float
    opening: asyncio.Task[None] | None = None
    transport: asyncio.Transport | None = None
    protocol: Any = None
    requests: int = 0
    under_way: int = 0

    def end(self) -> None:
        if self.opening is not None:
            self.opening.cancel()
        if self.transport is not None:
            self.transport.abort()


class _Stalled(Exception):
    """The reader of an answer does not take it."""


@dataclass(slots=True)
class _Table:
    """The connections by their peer. Used by the event loop's thread alone."""

    held: dict[tuple[str, int], _Connection] = field(default_factory=dict)

    def idle_longest(self) -> _Connection | None:
        idle = [one for one in self.held.values() if not one.under_way]
        return min(idle, key=lambda one: one.since) if idle else None


class Listener(uvicorn.Server):
    """uvicorn's server with its own way to accept. ``run(sockets=[...])`` serves on a listening socket."""

    def __init__(self, config: uvicorn.Config, patience: Patience) -> None:
        """Starts nothing yet. ``config``: without ``proxy_headers``: connections are known by their peers."""
        if config.proxy_headers:
            raise ValueError("proxy_headers: wanted False")
        config.app = self._attended(config.app)
        super().__init__(config)
        self._patience = patience
        self._table = _Table()
        self._tasks: list[asyncio.Task[None]] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._left = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.dropped = 0
        """Connections that were ended because they did nothing, or to make room."""

    def use_certificate(self, certificate: str, key: str) -> None:
        """Shows another certificate to whoever connects from now on. May be called from any thread.

        Raises:
            OSError, ValueError: the files cannot be used; the one before is still shown.
        """
        # A context of its own first: a faulty pair of files must not reach the one that is in use.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        self.config.ssl_certfile, self.config.ssl_keyfile = certificate, key
        loop, tls = self._loop, self.config.ssl
        if loop is not None and tls is not None:
            # By the loop's own thread: no handshake may meet the new certificate with the old key.
            loop.call_soon_threadsafe(tls.load_cert_chain, certificate, key)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept on the sockets."""
        await super().startup(sockets=[])
        loop = self._loop = asyncio.get_running_loop()
        for listening in sockets or []:
            listening.setblocking(False)
            self._tasks.append(loop.create_task(self._accept(listening)))
        self._tasks.append(loop.create_task(self._sweep()))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting; what has begun is finished in uvicorn's time."""
        for task in [*self._tasks, *self._opening]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._opening, return_exceptions=True)
        await super().shutdown(sockets=sockets)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                raw, address = await loop.sock_accept(listening)
            except OSError as error:
                # No descriptor left, or gone before it was taken: make room, and do not spin.
                log.warning("accept failed error=%s connections=%d", error, len(self._table.held))
                self._drop_idle_longest()
                await asyncio.sleep(_SWEEP_S)
                continue
            await self._room()
            if len(self._table.held) >= self._patience.most:
                self._drop_idle_longest()
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = (str(address[0]), int(address[1]))
            one = self._table.held[peer] = _Connection(peer, time.monotonic())
            one.opening = loop.create_task(self._open(one, raw))
            self._opening.add(one.opening)
            one.opening.add_done_callback(self._opening.discard)

    async def _room(self) -> None:
        """Returns when there is a place, or somebody idle who would lose theirs."""
        while len(self._table.held) >= self._patience.most:
            self._forget_closed()
            if len(self._table.held) < self._patience.most or self._table.idle_longest() is not None:
                return
            self._left.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), _SWEEP_S)

    async def _open(self, one: _Connection, raw: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        made: Any = None

        def protocol() -> asyncio.Protocol:
            nonlocal made
            made = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
            )
            return made  # type: ignore[no-any-return]

        tls = self.config.ssl
        patience = {} if tls is None else {"ssl_handshake_timeout": self._patience.first_s}
        try:
            transport, _ = await loop.connect_accepted_socket(protocol, raw, ssl=tls, **patience)
        except BaseException as error:
            raw.close()
            self._forget(one)
            if isinstance(error, OSError):
                return  # no TLS, or too late: nothing that we could answer to
            raise
        # Not what the call returned: that may be the protocol of TLS.
        one.transport, one.protocol, one.opening = transport, made, None

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._forget_closed()
            now = time.monotonic()
            for one in list(self._table.held.values()):
                if not one.under_way and now - one.since > self._allowed_s(one):
                    self._drop(one)

    def _allowed_s(self, one: _Connection) -> float:
        if not one.requests:
            return self._patience.first_s
        unread = one.transport is not None and one.transport.get_write_buffer_size() > 0
        return self._patience.stall_s if unread else self._patience.idle_s

    def _drop_idle_longest(self) -> None:
        found = self._table.idle_longest()
        if found is not None:
            self._drop(found)

    def _drop(self, one: _Connection) -> None:
        self.dropped += 1
        one.end()
        self._forget(one)

    def _forget_closed(self) -> None:
        for one in list(self._table.held.values()):
            if one.protocol is not None and one.protocol not in self.server_state.connections:
                self._forget(one)

    def _forget(self, one: _Connection) -> None:
        # The kernel may have given the peer's port to the next connection already.
        if self._table.held.get(one.peer) is one:
            del self._table.held[one.peer]
        self._left.set()

    def _attended(self, app: Any) -> _App:
        """The application, with its requests noted at their connections, and answers that nobody takes given up."""

        async def attended(scope: _Message, receive: _Receive, send: _Send) -> None:
            one = self._table.held.get(scope.get("client") or ("", 0)) if scope["type"] == "http" else None
            if one is None:
                await app(scope, receive, send)
                return

            async def timed(message: _Message) -> None:
                try:
                    await asyncio.wait_for(send(message), self._patience.stall_s)
                except TimeoutError:
                    self._drop(one)
                    raise _Stalled from None

            one.under_way += 1
            one.requests += 1
            try:
                await app(scope, receive, timed)
            except _Stalled:
                log.info("answer given up peer=%s stall_s=%.0f", one.peer[0], self._patience.stall_s)
            finally:
                one.under_way -= 1
                one.since = time.monotonic()
                self._left.set()

        return attended
