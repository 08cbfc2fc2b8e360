"""What the supervisor and an application with a model of its own (``sdk``) say to each other, over a unix socket.

One ``SOCK_SEQPACKET`` datagram is one MessagePack map with its kind under ``t``, and may carry file descriptors. A message too long for
a datagram lies in a memory file whose descriptor rides on a short ``spilled`` datagram. The peer may be another user's: whatever does not
parse, is too long or is no regular file raises ``Malformed``, and nothing here waits.

Lifecycle of a connection::

    hello -> welcome | sorry         sorry says why, and the connection ends
    keep* -> held*                   rings of an earlier connection: their descriptors prove that they are its own
    follow -> grant* | nothing*      what is confirmed now, again whenever that or its window key changes
    fetch* -> file*                  files of a granted bundle, for who may not open them
    window* -> committed*            with ring position, as from a worker
    done*, book_closed*              nothing more will come of a ring, of a label book
    lock* -> locked*                 and unlock: holds updates back
    refused*                         a granted bundle did not load or prove itself

This module loads only msgspec and the standard library: the supervisor imports it.
"""

from __future__ import annotations

import os
import socket
from typing import TypeVar

import msgspec

from skerry_agent import workerwire as ww
from skerry_agent.spilling import spill, unspill

PROTOCOL = 1
INLINE_BYTES = 64 * 1024
"""Longer messages spill; well below the kernel's smallest default send buffer (212,992)."""
MOST_BYTES = 4 << 20
"""A message may have so many: windows of a thousand features have less."""
_MOST_DESCRIPTORS = 3


class Malformed(Exception):
    """The peer sent what no peer sends."""


class Hello(ww.Message, frozen=True, kw_only=True, tag="hello"):
    """First of an application. ``protocol``: of this module; ``agent``: version of its ``skerry-agent`` package."""

    protocol: int
    agent: str


class Follow(ww.Message, frozen=True, kw_only=True, tag="follow"):
    """Wants ``model``. ``ring``: in which it counts already; empty for none."""

    model: str
    ring: str = ""


class Keep(ww.Message, frozen=True, kw_only=True, tag="keep"):
    """Goes on with files of an earlier connection, whose descriptors come along. Answer: ``held``.

    Attributes:
        ring: what the files belong to.
        parts: the ring itself, its label book, or both.
        key: model, bundle, variant, arm, rollout, stage.
        version: of the bundle.
    """

    ring: str
    parts: tuple[str, ...]
    key: tuple[str, str, str, str, str, int]
    version: str


class Fetch(ww.Message, frozen=True, kw_only=True, tag="fetch"):
    """Wants a file of a granted bundle as a descriptor. Answer: ``file``."""

    digest: str
    path: str


class Refused(ww.Message, frozen=True, kw_only=True, tag="refused"):
    """A granted bundle does not run in this application; what ran before goes on. ``code`` is of the update vocabulary."""

    model: str
    digest: str
    ring: str
    code: str
    detail: str


class Done(ww.Message, frozen=True, kw_only=True, tag="done"):
    """Nothing more will be written into ``ring``, all of whose windows up to ``upto`` are committed."""

    ring: str
    upto: int


class Lock(ww.Message, frozen=True, kw_only=True, tag="lock"):
    """Holds updates back for so many seconds. Answer: ``locked``. Only where ``welcome.locks`` says so."""

    owner: str
    reason: str
    for_s: float


class Unlock(ww.Message, frozen=True, kw_only=True, tag="unlock"):
    """Ends the owner's lock. Answer: ``locked``."""

    owner: str


class Welcome(ww.Message, frozen=True, kw_only=True, tag="welcome"):
    """The supervisor's settings; see ``workerwire.Start``."""

    agent: str
    boot_id: str
    window_s: float
    fold_interval_s: float
    label_age_s: float
    label_predictions: int
    label_books: int
    otlp_endpoint: str = ""
    trace_share: float = 0.0
    device: str = ""
    locks: bool = False


class Locked(ww.Message, frozen=True, kw_only=True, tag="locked"):
    """What became of ``lock`` or ``unlock``; with ``ok`` false ``code`` and ``detail`` say why nothing."""

    ok: bool
    code: str = ""
    detail: str = ""


class Sorry(ww.Message, frozen=True, kw_only=True, tag="sorry"):
    """Why there is no connection."""

    code: str
    detail: str


class Grant(ww.Message, frozen=True, kw_only=True, tag="grant"):
    """Run this bundle and count in this ring; descriptors: the ring's file, and the label book's where one is wanted."""

    served: ww.Served
    book: str = ""


class Nothing(ww.Message, frozen=True, kw_only=True, tag="nothing"):
    """There is nothing to run of ``model`` now, and why."""

    model: str
    code: str
    detail: str


class Held(ww.Message, frozen=True, kw_only=True, tag="held"):
    """The store holds the parts of ``keep`` below these positions; with ``ok`` false they may not be gone on with."""

    ring: str
    upto: tuple[int, ...] = ()
    ok: bool = True


class File(ww.Message, frozen=True, kw_only=True, tag="file"):
    """A file as a descriptor; without one when it is not there."""

    digest: str
    path: str


class Spilled(ww.Message, frozen=True, kw_only=True, tag="spilled"):
    """The real message lies in the first descriptor."""


ToSupervisor = Hello | Follow | Keep | Fetch | Refused | Done | Lock | Unlock | ww.WindowCut | ww.BookClosed | Spilled
ToApplication = Welcome | Sorry | Grant | Nothing | Held | File | Locked | ww.Committed | Spilled

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()
_to_supervisor: msgspec.msgpack.Decoder[ToSupervisor] = msgspec.msgpack.Decoder(ToSupervisor)
_to_application: msgspec.msgpack.Decoder[ToApplication] = msgspec.msgpack.Decoder(ToApplication)


def send(sock: socket.socket, message: ww.Message, descriptors: tuple[int, ...] = ()) -> bool:
    """Sends one message; False when the peer must read first. The caller keeps its descriptors.

    Raises:
        OSError: the peer is gone.
    """
    data = _encoder.encode(message)
    own: list[int] = []
    try:
        if len(data) > INLINE_BYTES:
            own.append(spill(data))
            data = _encoder.encode(Spilled())
        given = [*own, *descriptors]
        if given:
            socket.send_fds(sock, [data], given)
        else:
            sock.send(data)
        return True
    except (BlockingIOError, InterruptedError):
        return False
    finally:
        for fd in own:
            os.close(fd)


def receive_at_supervisor(sock: socket.socket) -> tuple[ToSupervisor, list[int]] | None:
    """The next message of an application and its descriptors, which are the caller's; None at the end.

    Raises:
        BlockingIOError: there is none now.
        OSError: the peer is gone.
        Malformed: it is none.
    """
    return _receive(sock, _to_supervisor)


def receive_at_application(sock: socket.socket) -> tuple[ToApplication, list[int]] | None:
    """As ``receive_at_supervisor``, the other way."""
    return _receive(sock, _to_application)


def _receive(sock: socket.socket, decoder: msgspec.msgpack.Decoder[M]) -> tuple[M, list[int]] | None:
    data, fds, flags, _ = socket.recv_fds(sock, INLINE_BYTES + 1024, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    try:
        if not data:
            _close(fds)
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise Malformed("a message is too long, or its descriptors are too many")
        message = decoder.decode(data)
        if isinstance(message, Spilled):
            if not fds:
                raise Malformed("a spilled message without its descriptor")
            message = decoder.decode(_unspilled(fds.pop(0)))
            if isinstance(message, Spilled):
                raise Malformed("a spilled message within another")
        return message, fds
    except (msgspec.DecodeError, RecursionError) as error:
        _close(fds)
        raise Malformed(str(error)) from None
    except BaseException:
        _close(fds)
        raise


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _unspilled(fd: int) -> bytes:
    try:
        return unspill(fd, MOST_BYTES)
    except ValueError as error:
        raise Malformed(f"a spilled message: {error}") from None
    except OSError as error:
        raise Malformed(f"a spilled message: {error.strerror}") from None
