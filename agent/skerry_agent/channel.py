"""The channel between supervisor and worker: whole messages, in order, each with at most one file descriptor.

It is an ``AF_UNIX`` ``SOCK_SEQPACKET`` socket pair: one datagram is one MessagePack map with its kind under ``t``, and may carry
one file descriptor (SCM_RIGHTS). A message too long for a datagram (a wide window, a long half-read request) travels as a
memory file whose descriptor rides on a short ``spilled`` datagram; readers never see the difference. What the messages
mean is ``workerwire``'s.

This module loads only msgspec and the standard library: the supervisor imports it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from skerry_agent import workerwire as ww
from skerry_agent.spilling import spill, unspill

log = logging.getLogger(__name__)

INLINE_BYTES = 64 * 1024
"""Longer messages spill to a memory file; well below the kernel's smallest default send buffer (212,992)."""
BUFFER_BYTES = 1 << 20


class Spilled(ww.Message, frozen=True, kw_only=True, tag="spilled"):
    """The real message lies in the first descriptor, a memory file; its own descriptor, if any, is the second."""


_Any = (
    ww.ToWorker
    | ww.Loading
    | ww.Ready
    | ww.Failed
    | ww.WindowCut
    | ww.Sampled
    | ww.Rekeyed
    | ww.Recovered
    | ww.BookClosed
    | ww.Health
    | ww.Cut
    | ww.Took
    | ww.Drained
    | ww.Flushed
    | ww.Logged
    | Spilled
)  # fmt: skip

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

    def send(self, message: ww.Message, fd: int | None = None) -> None:
        """Sends a message, with a copy of ``fd``: the caller keeps its own and may close it at once."""
        if self._closed or self._deaf:
            return
        data = _encoder.encode(message)
        own: list[int] = []
        if len(data) > INLINE_BYTES:
            own.append(spill(data))
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
                if not fds:
                    # The kernel drops descriptors that this process may not open, and with this one a whole message, a
                    # window perhaps. To go on would be to lose it; what it says is still in the ring.
                    log.error("a message lost its descriptor; giving the channel up")
                    self._gone()
                    return
                message = _decoder.decode(unspill(fds.pop(0)))
            self._on_message(message, fds[0] if fds else None)

    def _gone(self) -> None:
        self.close()
        self._loop.call_soon(self._on_eof)
