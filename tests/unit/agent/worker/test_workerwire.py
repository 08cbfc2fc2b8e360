"""The channel between supervisor and worker on a real socket pair: order, size, descriptors, and peers that go away."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from skerry_agent import workerwire as ww
from skerry_agent.channel import INLINE_BYTES, Channel, pair


class End:
    """One end of a channel, and what it heard."""

    def __init__(self, sock: Any) -> None:
        self.heard: list[Any] = []
        self.fds: list[int | None] = []
        self.eof = 0
        self.channel = Channel(sock, self._take, self._end)

    def _take(self, message: Any, fd: int | None) -> None:
        self.heard.append(message)
        self.fds.append(fd)

    def _end(self) -> None:
        self.eof += 1


def descriptors() -> set[tuple[str, str]]:
    """What is open in this process: number and what lies behind it, so that a number used again is not taken for the old one."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:
            continue  # the one that listed the folder
    return found


def talk(act: Callable[[End, End], Awaitable[None]]) -> None:
    async def run() -> None:
        a, b = (End(sock) for sock in pair())
        try:
            await asyncio.wait_for(act(a, b), 60)
        finally:
            a.channel.close()
            b.channel.close()

    # What earlier tests left behind may be closed in between, by the collector or by a thread: not so twice.
    for last in (False, True):
        gc.collect()
        before = descriptors()
        asyncio.run(run())
        after = descriptors()
        if after == before or last:
            break
    assert after - before == set(), "a descriptor leaked"
    assert before - after == set(), "a descriptor of somebody else was closed"


async def until(what: Callable[[], bool]) -> None:
    while not what():
        await asyncio.sleep(0.001)


def test_a_long_message_that_lost_its_descriptor_ends_the_channel_and_nothing_after_it_is_read() -> None:
    async def run() -> None:
        ours, theirs = pair()
        end = End(ours)
        # What is left of a spilled message when the receiver may open no more descriptors, and a message behind it.
        theirs.send(b"\x81\xa1t\xa7spilled")
        theirs.send(b"\x82\xa1t\xa7flushed\xa2id\x01")
        await asyncio.wait_for(until(lambda: end.eof == 1), 20)
        assert end.heard == []
        assert end.channel.closed
        # The peer hears of it: a reset for what was not read, then the end.
        with pytest.raises(ConnectionResetError):
            theirs.recv(10)
        assert theirs.recv(10) == b""
        theirs.close()

    asyncio.run(run())


def test_messages_of_every_size_arrive_whole_and_in_order() -> None:
    async def act(a: End, b: End) -> None:
        sizes = [0, 1, INLINE_BYTES - 100, INLINE_BYTES, INLINE_BYTES + 1, 5_000_000, 3, 200_000] * 8
        sent = [ww.WindowCut(ring="r", start=i, upto=i + 1, body=os.urandom(n)) for i, n in enumerate(sizes)]
        for message in sent:
            a.channel.send(message)
        await until(lambda: len(b.heard) == len(sent))
        assert b.heard == sent
        assert set(b.fds) == {None}

    talk(act)


def test_a_slow_reader_loses_nothing_and_the_sender_keeps_no_descriptor() -> None:
    async def act(a: End, b: End) -> None:
        asyncio.get_running_loop().remove_reader(b.channel._sock.fileno())
        pipes = []
        for i in range(400):
            read, write = os.pipe()
            a.channel.send(ww.Conn(head=b"%d" % i + b"x" * (100_000 if i % 50 == 0 else 30_000)), write)
            os.close(write)
            pipes.append(read)
        assert a.channel.pending > 0
        asyncio.get_running_loop().add_reader(b.channel._sock.fileno(), b.channel._readable)
        await until(lambda: len(b.heard) == 400)
        await a.channel.flushed()
        for i, (message, fd, read) in enumerate(zip(b.heard, b.fds, pipes, strict=True)):
            assert message.head.startswith(b"%dx" % i)
            assert fd is not None
            # Each descriptor is the one that was sent with its message.
            os.write(fd, b"%d" % i)
            assert os.read(read, 10) == b"%d" % i
            os.close(fd)
            os.close(read)

    talk(act)


def test_what_a_peer_said_before_it_went_is_heard_even_when_it_left_ours_unread() -> None:
    async def act(a: End, b: End) -> None:
        # The kernel answers an unread message of ours with ECONNRESET ahead of the peer's own last words.
        asyncio.get_running_loop().remove_reader(b.channel._sock.fileno())
        for i in range(5):
            a.channel.send(ww.Committed(ring="r", upto=i))
            b.channel.send(ww.WindowCut(ring="r", start=i, upto=i + 1, body=b""))
        b.channel.send(ww.Drained())
        b.channel.close()
        a.channel.send(ww.Committed(ring="r", upto=9))
        await until(lambda: a.eof == 1)
        assert [m.start for m in a.heard[:-1]] == [0, 1, 2, 3, 4]
        assert a.heard[-1] == ww.Drained()
        assert a.channel.closed
        a.channel.send(ww.Stop())

    talk(act)


def test_the_close_of_a_peer_is_told_once() -> None:
    async def act(a: End, b: End) -> None:
        b.channel.close()
        b.channel.close()
        await until(lambda: a.eof > 0)
        await asyncio.sleep(0.02)
        assert (a.eof, b.eof) == (1, 0)

    talk(act)
