"""Connections: bytes in, one request at a time, bytes out, on asyncio (uvloop where there is one).

Each connection keeps the bytes it has read and not yet answered in one buffer; a request is taken off only when it is whole
and the one before it is answered. So pipelined requests are answered in order, and at any moment between two requests the
connection can be handed to another process together with its buffer (``handover``).

An idle connection is never closed: a client that is about to use it would fail. What is closed: a connection whose request
is malformed or too large (after saying so), and one whose request stays half-sent for ``partial_s`` (408).

As soon as a header block is whole the handler is asked whether its request will be refused; the body of such a one is read and dropped, and
is never kept. What is kept of all connections together, read and not yet answered, has a bound; beyond it the unfinished request of which
most is kept is turned away.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, cast

from skerry_agent.clients import Client
from skerry_agent.worker import http1, oip

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
MAX_HELD_BYTES = 2 * MAX_BODY_BYTES
SKIPPED_BYTES = 1 << 20
"""So much of a refused request's body is read and dropped, to keep its connection; one with more is closed."""
HELD_RETRY_S = 1.0
PARTIAL_S = 20.0
LINGER_S = 2.0
TURN = 16
"""Pipelined requests served before other connections get their turn."""
READ_AHEAD_BYTES = 256 * 1024
"""Read while a request is in work; more stays in the kernel."""


class Handler(Protocol):
    """What answers requests; see ``routes.Routes``."""

    def handle(self, request: http1.Request, done: Callable[[bytes], None], asker: Connection) -> bytes | None:
        """Returns the reply's bytes, or None and calls ``done`` with them later, in the loop."""

    def begin(self, head: http1.Head, asker: Connection) -> bytes | int:
        """The refusal that the header block has earned, else the most bytes that the body may have; for one that is not whole yet."""

    def space(self, refusal: bytes, done: Callable[[bytes], None], asker: Connection) -> bytes | None:
        """Holds a refusal back when the connection was refused a moment ago; returns as ``handle``."""


class Passing(Protocol):
    """See ``passing.Passing``."""

    def takes(self, connection: Connection, found: http1.Request | http1.Incomplete) -> bool:
        """Whether the request is not to be answered like any other."""


class Server:
    """All connections of a worker, and the listening sockets.

    Attributes:
        connections: open ones.
        on_boundary: called with a connection whenever it has answered a request, or was just made; ``handover`` sets it.
        passing: whether a request is another worker's; None while there are none.
        neighbours: what answers the questions of other workers.
        work: moves with whatever clients do: connections accepted, and everything that was read from one.
        held: bytes read and not yet answered, of all connections; peak: the most of it since it was last set to 0.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_held_bytes: int = MAX_HELD_BYTES,
        partial_s: float = PARTIAL_S,
    ) -> None:
        self.handler = handler
        self.max_body_bytes = max_body_bytes
        self._max_held_bytes = max_held_bytes
        self.connections: set[Connection] = set()
        self.partial: dict[Connection, float] = {}
        self.on_boundary: Callable[[Connection], None] | None = None
        self.passing: Passing | None = None
        self.neighbours: Handler | None = None
        self.work = self.held = self.peak = 0
        self._partial_s = partial_s
        self._loop = asyncio.get_running_loop()
        self._listeners: list[socket.socket] = []
        self._accepting = True
        self._joining: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def empty(self) -> bool:
        """Whether no connection is open or being set up."""
        return not self.connections and not self._joining

    def listen(self, listener: socket.socket) -> None:
        """Begins to accept, unless told not to. The socket is shared with other processes; each connection goes to one of them."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._accept_again(listener)
        if self._sweeper is None:
            self._sweep()

    def accept(self, on: bool) -> None:
        """Takes new connections, or leaves them to the other processes."""
        self._accepting = on
        for listener in self._listeners:
            self._loop.remove_reader(listener.fileno())
            self._accept_again(listener)

    def stop_accepting(self) -> None:
        """Gives up the own copies of the listening sockets; what waits in their backlogs is the other processes'."""
        for listener in self._listeners:
            self._loop.remove_reader(listener.fileno())
            listener.close()
        self._listeners.clear()

    def adopt(
        self,
        sock: socket.socket,
        head: bytes = b"",
        *,
        settled: bool = False,
        waited: str = "",
        retry_s: int = 0,
        own: bool = False,
    ) -> None:
        """Serves an accepted connection, of which ``head`` was already read. The rest: see ``Connection``."""
        sock.setblocking(False)
        task = self._loop.create_task(self._connect(sock, head, settled, waited, retry_s, own))
        # Counted from here on: a connection between accept and its first callback must not be forgotten by a drain.
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    def close(self) -> None:
        """Stops accepting and closes every connection, after what was written to it."""
        self.stop_accepting()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections):
            connection.close()

    async def _connect(
        self, sock: socket.socket, head: bytes, settled: bool, waited: str, retry_s: int, own: bool
    ) -> None:
        try:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                lambda: Connection(self, head, settled, waited, retry_s, own), sock
            )
        except OSError as error:
            # The client was gone before it began.
            log.debug("connection not set up error=%s", error)
            sock.close()

    def hold(self, more: int) -> None:
        """Counts what connections keep."""
        self.held += more
        self.peak = max(self.peak, self.held)
        while more > 0 and self.held > self._max_held_bytes and self.partial:
            heaviest = max(self.partial, key=lambda connection: connection.held)
            if not heaviest.held:
                return
            heaviest.refuse(
                http1.Refused(503, "too much is being sent already; come again later", http1.retry_after(HELD_RETRY_S))
            )

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(64):
            if listener not in self._listeners:
                return
            try:
                sock, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors or memory: the backlog waits, and so do we, instead of spinning on it.
                log.warning("cannot accept error=%s", error)
                self._loop.remove_reader(listener.fileno())
                self._loop.call_later(0.2, self._accept_again, listener)
                return
            self.adopt(sock)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners and self._accepting:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection, since in list(self.partial.items()):
            if now - since > self._partial_s:
                connection.refuse(http1.Refused(408, f"the request was not complete within {self._partial_s:g} s"))
        self._sweeper = self._loop.call_later(min(1.0, self._partial_s / 4), self._sweep)


class Connection(asyncio.Protocol):
    """One client's connection.

    Attributes:
        busy: a request is in work.
        settled: its first request was passed to this process and goes no further; retry_s: it is to be turned away, see ``passing``.
        waited: see ``workerwire.Conn``; kinds: what is to be recorded of the next request.
        known, refused_s: see ``access.Asker``.
        held: bytes kept of what is not answered yet, as last told to the server.
        own: another worker asks on it, and no client.
    """

    __slots__ = (
        "_begun",
        "_buffer",
        "_continued",
        "_cutter",
        "_eof",
        "_handler",
        "_head",
        "_keep_alive",
        "_paused",
        "_refused",
        "_server",
        "_skip",
        "_skipped",
        "_transport",
        "_working",
        "_writable",
        "busy",
        "held",
        "kinds",
        "known",
        "own",
        "refused_s",
        "retry_s",
        "settled",
        "waited",
    )  # fmt: skip

    _transport: asyncio.Transport

    def __init__(
        self,
        server: Server,
        head: bytes = b"",
        settled: bool = False,
        waited: str = "",
        retry_s: int = 0,
        own: bool = False,
    ) -> None:
        self._server = server
        self._handler = server.neighbours if own and server.neighbours is not None else server.handler
        self.own = own
        self._head = head
        self._cutter = http1.Cutter(server.max_body_bytes)
        self._buffer: bytes | bytearray = b""
        self.busy = False
        self.settled, self.waited, self.retry_s = settled, waited, retry_s
        self.kinds = 0
        self.known: tuple[http1.Head, int, Client] | None = None
        self.refused_s = -1.0
        self._writable = True
        self._paused = self._refused = self._continued = self._begun = self._eof = False
        self._skip = self._working = self.held = 0
        self._skipped = b""
        self._keep_alive = True

    # --- asyncio ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        server = self._server
        server.connections.add(self)
        server.work += 1
        if self._head:
            self.data_received(self._head)
            self._head = b""
        elif server.on_boundary is not None:
            server.on_boundary(self)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._server.work += 1
        if self._skip:
            data = self._skip_some(data)
            if not data:
                return
        if self._refused:
            return
        if not self._buffer:
            self._buffer = data
        else:
            if not isinstance(self._buffer, bytearray):
                self._buffer = bytearray(self._buffer)
            self._buffer += data
        if self.busy or not self._writable:
            self._hold()
            if len(self._buffer) > READ_AHEAD_BYTES and not self._paused:
                self._paused = True
                self._transport.pause_reading()
            return
        self._serve()

    def eof_received(self) -> bool:
        """See asyncio. A client may end its sending and still wait for the reply."""
        self._eof = True
        return self.busy or not self._writable

    def connection_lost(self, _error: Exception | None) -> None:
        """See asyncio."""
        self._server.connections.discard(self)
        self._server.partial.pop(self, None)
        self._buffer = b""
        self._hold()

    def pause_writing(self) -> None:
        """See asyncio. A client that does not read its replies gets no more of them."""
        self._writable = False

    def resume_writing(self) -> None:
        """See asyncio."""
        self._writable = True
        if not self.busy:
            self._proceed()

    # --- requests ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        server = self._server
        if server.on_boundary is not None and self._buffer:
            # Leaving: what has not begun is the successor's, who knows what happened since.
            server.on_boundary(self)
            return
        for _ in range(TURN):
            buffer = self._buffer
            if buffer[:2] == b"\r\n":
                # RFC 9112, 2.2: empty lines before a request are ignored. All at once: dropping copies what is behind them.
                empty = 2
                while buffer[empty : empty + 2] == b"\r\n":
                    empty += 2
                self._drop(empty)
                continue
            if not buffer:
                server.partial.pop(self, None)
                break
            try:
                found = self._cutter.cut(buffer)
            except http1.Refused as error:
                self.refuse(error)
                return
            if server.passing is not None and server.passing.takes(self, found):
                return
            if isinstance(found, http1.Incomplete):
                if not self._wait_for_more(found):
                    return
                break
            if self.kinds:
                found, self.kinds = replace(found, head=replace(found.head, kinds=self.kinds)), 0
            self._drop(found.size)
            self._continued = self._begun = False
            if self.held:
                self._hold()
            if server.partial:
                server.partial.pop(self, None)
            self._keep_alive = found.head.keep_alive
            self.busy = True
            try:
                reply = self._handler.handle(found, self._done, self)
            except http1.Refused as error:
                self.busy = False
                self.refuse(error)
                return
            except Exception:
                log.exception("request failed method=%s", found.head.method)
                self._keep_alive = False
                reply = http1.reply(500, oip.error_body("the worker failed; its log says more"), close=True)
            if reply is None:
                self._working = len(found.body)
                self._hold()
                return
            self.busy = False
            self._transport.write(reply)
            if not self._keep_alive:
                self.close()
                return
            if not self._writable:
                return
        else:
            if self._buffer:
                self.busy = True
                asyncio.get_running_loop().call_soon(self._next_turn)
                return
        if self._eof:
            self.close()
        elif server.on_boundary is not None:
            server.on_boundary(self)

    def _next_turn(self) -> None:
        self.busy = False
        self._proceed()

    def answer(self, request: http1.Request, reply: bytes) -> None:
        """Answers the first request without its handler."""
        self._drop(request.size)
        self._server.partial.pop(self, None)
        self._keep_alive = request.head.keep_alive
        self.busy = True
        self._done(reply)

    def _done(self, reply: bytes) -> None:
        self.busy = False
        self._working = 0
        if self.held:
            self._hold()
        if self._transport.is_closing():
            return
        self._transport.write(reply)
        if not self._keep_alive:
            self.close()
        elif self._writable:
            self._proceed()

    def _proceed(self) -> None:
        if self._transport.is_closing() or self._refused:
            return
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._serve()

    def _drop(self, size: int) -> None:
        if isinstance(self._buffer, bytearray):
            del self._buffer[:size]
        else:
            self._buffer = self._buffer[size:]

    def _hold(self) -> None:
        size = len(self._buffer) + self._cutter.joined + self._working
        more, self.held = size - self.held, size
        self._server.hold(more)

    def _wait_for_more(self, found: http1.Incomplete) -> bool:
        """Whether the rest of the request is awaited."""
        # The clock runs from the first byte: a client that trickles gains nothing.
        self._server.partial.setdefault(self, time.monotonic())
        if found.head is not None and not self._begun:
            self._begun = True
            verdict = self._handler.begin(found.head, self)
            if isinstance(verdict, bytes):
                self._turn_away(verdict, found.head, found.wanted)
                return False
            self._cutter.most = verdict
        self._hold()
        if self._refused:
            return False
        if found.head is not None and found.head.expects and not self._continued:
            self._continued = True
            self._transport.write(http1.CONTINUE)
        return True

    def _turn_away(self, refusal: bytes, head: http1.Head, wanted: int) -> None:
        """Answers a request of which the body is not whole, and keeps nothing of it."""
        left = wanted - len(self._buffer)
        if not head.keep_alive or head.expects or not 0 < left <= SKIPPED_BYTES:
            self._end(http1.closing(refusal))
            return
        self._skip, self._skipped = left, refusal
        self._cutter = http1.Cutter(self._server.max_body_bytes)
        self._buffer = b""
        self._hold()

    def _skip_some(self, data: bytes) -> bytes:
        """Drops what belongs to a refused request, and answers it when it is whole. What is behind it."""
        left = data[self._skip :]
        self._skip = max(0, self._skip - len(data))
        if self._skip:
            return b""
        self._server.partial.pop(self, None)
        self._begun = False
        self._keep_alive = self.busy = True
        refusal, self._skipped = self._skipped, b""
        self._buffer = left
        reply = self._handler.space(refusal, self._done, self)
        if reply is not None:
            self._done(reply)
        elif left:
            self._hold()
        return b""

    def refuse(self, error: http1.Refused) -> None:
        """Says what is wrong and closes, leaving the client time to read it."""
        self._end(http1.reply(error.status, oip.error_body(error.message), close=True, extra=error.extra))

    def _end(self, reply: bytes) -> None:
        """Says a last thing and closes, leaving the client time to read it."""
        self._server.partial.pop(self, None)
        if self._refused or self._transport.is_closing():
            return
        self._refused = True
        self._skip = 0
        self._buffer = b""
        self._cutter = http1.Cutter(self._server.max_body_bytes)
        self._hold()
        self._transport.write(reply)
        # Closing at once with unread bytes would make the kernel reset the connection and the reply be lost.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self.close)

    def close(self) -> None:
        """Closes after what was written has been sent."""
        if not self._transport.is_closing():
            self._transport.close()

    # --- hand-over --------------------------------------------------------------------------------------------------

    @property
    def at_boundary(self) -> bool:
        """Whether the connection can be handed over now: nothing in work, nothing left to write."""
        return (
            not self.busy
            and not self._skip
            and not self._refused
            and not self._transport.is_closing()
            and self._transport.get_write_buffer_size() == 0
        )

    @property
    def unsent(self) -> bool:
        """Whether some of a reply still waits for the client to read."""
        return not self._transport.is_closing() and self._transport.get_write_buffer_size() > 0

    @property
    def leaving(self) -> bool:
        """Whether it is closing by itself."""
        return self._refused or self._transport.is_closing()

    def fileno(self) -> int:
        """The socket's descriptor."""
        descriptor: int = self._transport.get_extra_info("socket").fileno()
        return descriptor

    def peer(self) -> tuple[int, int] | None:
        """User and group id of the process at the other end of a unix socket; None on any other."""
        sock = self._transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            return None
        _pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        # Unsigned in the kernel.
        return uid & 0xFFFFFFFF, gid & 0xFFFFFFFF

    def unanswered(self) -> bytes:
        """Bytes read and not yet answered."""
        return bytes(self._buffer)

    def abandon(self) -> None:
        """Drops the own copy of the socket without a word to the client: it belongs to another process now."""
        self._server.connections.discard(self)
        self._server.partial.pop(self, None)
        self._refused = True
        self._buffer = b""
        self._hold()
        # abort() closes the descriptor only; close() or write_eof() would end the connection for the new owner too.
        self._transport.abort()
