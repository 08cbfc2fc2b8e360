"""Shows a share of what is answered to a bundle in shadow: frames on a socket that never makes an answer wait.

What is shown is taken note of after the record is written, and made into bytes once the reply is on its way. When the other
side is slow, what does not fit is dropped and counted, and the count goes along with the next frame that does. Frames are in
order, so a new key or a label means what it meant when it was sent.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
from skerry_contract import window as w
from skerry_runtime import tensors
from skerry_runtime.tensors import Tensors

from skerry_agent.worker import share
from skerry_agent.worker.recorder import Recorder

log = logging.getLogger(__name__)

MOST_WAITING = 64
"""Requests that were answered and are not bytes yet."""
MOST_FRAMES, MOST_BYTES = 32, 1 << 18
"""Not yet in the kernel's hands: a shadow that is behind shall not be shown what was asked minutes ago. One longer frame may go."""
LENGTH = struct.Struct("<I")
MOST_FRAME = 256 << 20


class _Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="t"):
    pass


class Wired(msgspec.Struct, frozen=True, array_like=True):
    """A tensor: datatype, shape, and its bytes as the binary extension has them."""

    datatype: str
    shape: tuple[int, ...]
    data: bytes


class Keyed(_Frame, frozen=True, kw_only=True, tag="key"):
    """What follows was answered under this key, by a bundle that marks these features ``pii``: name, input, column."""

    key: w.Key
    personal: tuple[tuple[str, str, int], ...] = ()


class Shown(_Frame, frozen=True, kw_only=True, tag="pair"):
    """One answered request. ``took_ns``: of transforms and runtime; ``ident``: of its prediction."""

    place: int
    ident: str = ""
    inputs: dict[str, Wired]
    outputs: dict[str, Wired]
    took_ns: int


class Labelled(_Frame, frozen=True, kw_only=True, tag="label"):
    """The class of a prediction became known; ``predicted`` is what was answered."""

    place: int
    truth: int
    predicted: int


class Missed(_Frame, frozen=True, kw_only=True, tag="missed"):
    """Requests of the share that were not shown, since the shadow was behind."""

    n: int


Frame = Keyed | Shown | Labelled | Missed
_encoder = msgspec.msgpack.Encoder()


class Loop(Protocol):
    """What is needed of the event loop."""

    def call_soon(self, callback: Callable[..., object], *args: object) -> object:
        """See asyncio."""

    def add_writer(self, fd: int, callback: Callable[..., object], *args: object) -> object:
        """See asyncio."""

    def remove_writer(self, fd: int) -> object:
        """See asyncio."""


class Tee:
    """The way to one shadow. Not thread-safe: every call comes from the event loop's thread.

    Args:
        sock: a stream; owned from now on.
        part: of the requests, from 0 to 1.
        recorder: of the model, whose key and positions name what is shown.

    Attributes:
        closed: the other side is gone, or ``close`` was called.
    """

    def __init__(self, sock: socket.socket, part: float, recorder: Recorder, loop: Loop) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._below = share.threshold(part)
        self._recorder = recorder
        self._loop = loop
        self._key: w.Key | None = None
        self._personal = tuple((f.name, f.input, f.column) for f in recorder.plan.features if f.pii)
        self._waiting: deque[tuple[w.Key, int, str, Tensors, Tensors, int]] = deque()
        self._out: deque[bytes] = deque()
        self._out_bytes = 0
        self._missed = 0
        self._soon = self._writing = False
        self.closed = False

    def offer(self, inputs: Tensors, outputs: Tensors, took_ns: int, position: int) -> None:
        """Takes note of an answered request, when it is one of the share. ``position``: its first slot in the ring."""
        if self.closed or not share.chosen(position, self._below):
            return
        if len(self._waiting) >= MOST_WAITING:
            self._missed += 1
            return
        recorder = self._recorder
        place = share.place(recorder.book.header.token if recorder.book is not None else "", position)
        self._waiting.append((recorder.key, place, f"{recorder.prefix}{position:x}", inputs, outputs, took_ns))
        self._wake()

    def label(self, token: str, position: int, truth: int, predicted: int) -> None:
        """Passes on a label that was matched, when its prediction was one of the share."""
        if self.closed or not share.chosen(position, self._below):
            return
        if self._out_bytes < 4 * MOST_BYTES:
            self._push(Labelled(place=share.place(token, position), truth=truth, predicted=predicted))
            self._wake()

    def close(self) -> None:
        """Ends it; what the kernel has is still read. Idempotent."""
        if self.closed:
            return
        self.closed = True
        if self._writing:
            self._loop.remove_writer(self._sock.fileno())
        self._waiting.clear()
        self._out.clear()
        self._sock.close()

    def _wake(self) -> None:
        if not self._soon:
            self._soon = True
            # After the reply at hand.
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._soon = False
        while self._waiting and not self.closed:
            key, place, ident, inputs, outputs, took_ns = self._waiting.popleft()
            if self._full:
                self._missed += 1
                continue
            if key != self._key:
                self._key = key
                self._push(Keyed(key=key, personal=self._personal))
            self._say_missed()
            shown = Shown(place=place, ident=ident, inputs=_wired(inputs), outputs=_wired(outputs), took_ns=took_ns)
            self._push(shown)
        self._write()

    @property
    def _full(self) -> bool:
        return len(self._out) >= MOST_FRAMES or self._out_bytes >= MOST_BYTES

    def _say_missed(self) -> None:
        if self._missed and self._key is not None:
            self._push(Missed(n=self._missed))
            self._missed = 0

    def _push(self, frame: Frame) -> None:
        data = _encoder.encode(frame)
        self._out.append(LENGTH.pack(len(data)) + data)
        self._out_bytes += len(data) + LENGTH.size

    def _write(self) -> None:
        while self._out and not self.closed:
            data = self._out[0]
            try:
                n = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                log.info("shadow gone: %s", error)
                self.close()
                return
            self._out_bytes -= n
            if n < len(data):
                self._out[0] = data[n:]
                break
            self._out.popleft()
        if self.closed:
            return
        if not self._out and self._missed:
            # Nothing may follow for long.
            self._say_missed()
        if self._out and not self._writing:
            self._writing = True
            self._loop.add_writer(self._sock.fileno(), self._write)
        elif not self._out and self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock.fileno())


def _wired(values: Tensors) -> dict[str, Wired]:
    return {
        name: Wired(tensors.datatype_of(array), tuple(array.shape), tensors.to_binary(array))
        for name, array in values.items()
    }


def read(values: dict[str, Wired]) -> Tensors:
    """The arrays of a frame. Raises ``BadInput`` for bytes that do not fill their shape."""
    return {name: tensors.from_binary(name, one.datatype, one.shape, one.data) for name, one in values.items()}
