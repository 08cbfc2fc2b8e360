"""What supervisor and worker say to each other, and the channel that carries it.

The channel is an ``AF_UNIX`` ``SOCK_SEQPACKET`` socket pair: one datagram is one MessagePack map with its kind under ``t``,
and may carry one file descriptor (SCM_RIGHTS). A message too long for a datagram (a wide window, a long half-read request)
travels as a memory file whose descriptor rides on a short ``spilled`` datagram; readers never see the difference.

Both ends are on one device, of one version and one user: the channel is trusted, and a message that does not parse is a bug.

Lifecycle of a worker::

    start -> ready | failed          models loaded and proved; nothing is accepted before ``ready``
    listen                           accept; ``conn`` from the predecessor may already have come
    rekey* committed* flush*         in any order, any number
    drain -> conn* window* drained   every connection passed on, every record folded; the worker then exits by itself
    stop, EOF or SIGTERM             finish what is in flight, send what can be sent, exit

This module loads only msgspec and the standard library: the supervisor imports it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

INLINE_BYTES = 64 * 1024
"""Longer messages spill to a memory file; well below the kernel's smallest default send buffer (212,992)."""
BUFFER_BYTES = 1 << 20


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="t"):
    """Base of all messages. Fields with units carry them in their names."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a generation.

    Attributes:
        name, version, digest, variant: as the manifest and the outbox call them.
        path: folder of the bundle, complete and verified.
        arm, rollout, stage: the rest of the window key.
        ring: path of the recorder's ring file; made by the worker, must not exist.
    """

    name: str
    version: str
    digest: str
    variant: str
    path: str
    ring: str
    arm: str = "none"
    rollout: str = ""
    stage: int = 0


# --- supervisor -> worker -------------------------------------------------------------------------------------------


class Start(Message, frozen=True, kw_only=True, tag="start"):
    """Load and prove these models.

    Attributes:
        window_s: span of a window in normal use.
        fold_interval_s: when above 0, windows are cut this often instead (tests, demo).
        max_inflight: requests in work at once; more are shed with 503.
        inline_below_us: requests expected to take less are answered on the event loop's thread.
        boot_id: 32 hex digits of the kernel's boot.
    """

    generation: int
    models: tuple[Served, ...]
    window_s: float = 300.0
    fold_interval_s: float = 0.0
    health_interval_s: float = 5.0
    max_inflight: int = 64
    inline_below_us: float = 1000.0
    boot_id: str = ""


class Listen(Message, frozen=True, kw_only=True, tag="listen"):
    """Begin to accept on the listening socket."""


class Drain(Message, frozen=True, kw_only=True, tag="drain"):
    """Stop accepting, pass every connection on, finish busy ones within ``deadline_s``, fold, say ``drained``, exit."""

    deadline_s: float = 10.0


class Conn(Message, frozen=True, kw_only=True, tag="conn"):
    """A client's connection, as the datagram's descriptor; both directions.

    Attributes:
        head: bytes already read from it and not yet answered.
    """

    head: bytes = b""


class Rekey(Message, frozen=True, kw_only=True, tag="rekey"):
    """Cut the model's window now; count what follows under the new key, in the new ring. Answer: ``rekeyed``."""

    model: str
    ring: str
    arm: str = "none"
    rollout: str = ""
    stage: int = 0


class Committed(Message, frozen=True, kw_only=True, tag="committed"):
    """The store holds every window of ``ring`` below position ``upto``."""

    ring: str
    upto: int


class Recover(Message, frozen=True, kw_only=True, tag="recover"):
    """Fold what a dead worker left in ``ring`` from position ``start`` on. Answer: ``window`` if any, then ``recovered``."""

    ring: str
    start: int = msgspec.field(name="from")


class Flush(Message, frozen=True, kw_only=True, tag="flush"):
    """Cut all windows now. Answer: their ``window`` messages, then ``flushed``."""

    id: int


class Stop(Message, frozen=True, kw_only=True, tag="stop"):
    """Finish what is in flight, fold, exit. Connections are closed."""


# --- worker -> supervisor -------------------------------------------------------------------------------------------


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What the golden cases gave on this device.

    Attributes:
        max_abs_diff: greatest absolute difference of a number in any case.
        recall: per class label, over the labelled cases.
    """

    cases: int
    passed: int
    max_abs_diff: float = 0.0
    recall: dict[str, float] = {}


class Proved(msgspec.Struct, frozen=True, kw_only=True):
    """One model is loaded and proved. ``infer_us``: median time of one golden case, microseconds."""

    name: str
    proof: Proof
    load_ms: float
    infer_us: float = 0.0


class Ready(Message, frozen=True, kw_only=True, tag="ready"):
    """All models of the generation are loaded and proved."""

    pid: int
    models: tuple[Proved, ...]


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """The generation cannot serve; the worker exits. ``code`` is of the update vocabulary."""

    model: str
    code: str
    detail: str


class WindowCut(Message, frozen=True, kw_only=True, tag="window"):
    """The window of positions ``[start, upto)`` of a ring; each range is sent once.

    Attributes:
        body: ``wire.encode`` of the Window.
        inferences: answered requests in it, ``ok`` of its counts.
    """

    ring: str
    start: int = msgspec.field(name="from")
    upto: int
    body: bytes
    inferences: int = 0


class Rekeyed(Message, frozen=True, kw_only=True, tag="rekeyed"):
    """The old ring of ``model`` will get no more records; all its windows were sent."""

    model: str
    ring: str
    upto: int


class Recovered(Message, frozen=True, kw_only=True, tag="recovered"):
    """A dead worker's ring is folded up to ``upto``; once that is committed the file may go.

    Attributes:
        lost: records that were overwritten before they were committed.
        damage: why the ring could not be read; empty when it could.
    """

    ring: str
    upto: int
    lost: int = 0
    damage: str = ""


class ModelHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since ``listen``. ``p95_ms`` of answered requests is None before the first."""

    ok: int = 0
    invalid: int = 0
    failed: int = 0
    shed: int = 0
    p95_ms: float | None = None
    since_s: float = 0.0


class Health(Message, frozen=True, kw_only=True, tag="health"):
    """Sent every ``health_interval_s`` and once before ``drained``."""

    models: dict[str, ModelHealth]
    inflight: int
    rss_mb: float


class Drained(Message, frozen=True, kw_only=True, tag="drained"):
    """No connection and no uncut record is left. ``unpassed``: connections that had to be closed at the deadline."""

    unpassed: int = 0


class Flushed(Message, frozen=True, kw_only=True, tag="flushed"):
    """All windows that existed when ``flush`` came have been sent."""

    id: int


class Spilled(Message, frozen=True, kw_only=True, tag="spilled"):
    """The real message lies in the first descriptor, a memory file; its own descriptor, if any, is the second."""


ToWorker = Start | Listen | Drain | Conn | Rekey | Committed | Recover | Flush | Stop
ToSupervisor = Ready | Failed | WindowCut | Rekeyed | Recovered | Health | Conn | Drained | Flushed
_Any = ToWorker | Ready | Failed | WindowCut | Rekeyed | Recovered | Health | Drained | Flushed | Spilled

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Any] = msgspec.msgpack.Decoder(_Any)


def pair() -> tuple[socket.socket, socket.socket]:
    """A channel's two sockets: (supervisor's, worker's). The worker's end is inheritable only through ``pass_fds``."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        # The kernel caps this at net.core.wmem_max; what does not fit waits in the channel's queue.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return ours, theirs


class Channel:
    """One end, on the running event loop.

    Messages leave in the order of ``send``; when the peer is slow they wait in memory. Handlers run in the loop.

    Args:
        sock: one socket of ``pair``; the channel owns it from now on.
        on_message: gets each message and its descriptor (or None), which it then owns.
        on_eof: called once when the peer is gone.
    """

    def __init__(
        self, sock: socket.socket, on_message: Callable[[Any, int | None], None], on_eof: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_eof = on_eof
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._closed = self._deaf = False
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def pending(self) -> int:
        """Messages not yet in the kernel's hands."""
        return len(self._queue)

    @property
    def closed(self) -> bool:
        """Whether the peer is gone or ``close`` was called; sends are then dropped."""
        return self._closed

    def send(self, message: Message, fd: int | None = None) -> None:
        """Sends a message, with a copy of ``fd``: the caller keeps its own and may close it at once."""
        if self._closed or self._deaf:
            return
        data = _encoder.encode(message)
        own: list[int] = []
        if len(data) > INLINE_BYTES:
            own.append(_spill(data))
            data = _encoder.encode(Spilled())
        fds = own if fd is None else [*own, fd]
        if not self._queue and self._transmit(data, fds):
            for copy in own:
                os.close(copy)
            return
        # Queued descriptors must outlive the caller's.
        copies = own if fd is None else [*own, os.dup(fd)]
        self._queue.append((data, tuple(copies)))
        self._loop.add_writer(self._sock.fileno(), self._writable)

    async def flushed(self) -> None:
        """Waits until everything sent is in the kernel's hands, or the peer is gone."""
        while self._queue and not self._closed:
            await asyncio.sleep(0.001)

    def close(self) -> None:
        """Drops what is queued and closes the socket. Idempotent; ``on_eof`` is not called."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        while self._queue:
            for fd in self._queue.popleft()[1]:
                os.close(fd)
        self._sock.close()

    def _transmit(self, data: bytes, fds: list[int] | tuple[int, ...]) -> bool:
        try:
            if fds:
                socket.send_fds(self._sock, [data], list(fds))
            else:
                self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionError:
            # The peer is gone, but what it said before may still be unread: only the reader's end of file closes.
            self._deaf = True
        except OSError as error:
            # More descriptors are under way than the limit allows, until the peer has read some.
            if error.errno not in (errno.ETOOMANYREFS, errno.ENOBUFS):
                raise
            return False
        return True

    def _writable(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            if not self._deaf and not self._transmit(data, fds):
                return
            self._queue.popleft()
            for fd in fds:
                os.close(fd)
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        # Bounded, so that a flood of messages cannot starve the requests.
        for _ in range(64):
            if self._closed:
                return
            try:
                data, fds, _flags, _address = socket.recv_fds(self._sock, BUFFER_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                # The peer closed with something of ours unread: the kernel says so once, ahead of the peer's own messages.
                continue
            if not data:
                self._gone()
                return
            message = _decoder.decode(data)
            if isinstance(message, Spilled):
                message = _decoder.decode(_unspill(fds.pop(0)))
            self._on_message(message, fds[0] if fds else None)

    def _gone(self) -> None:
        self.close()
        self._loop.call_soon(self._on_eof)


def _spill(data: bytes) -> int:
    fd = os.memfd_create("skerry-message", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def _unspill(fd: int) -> bytes:
    with open(fd, "rb") as file:
        file.seek(0)
        return file.read()
