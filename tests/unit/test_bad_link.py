"""The link of the bench ``bell_on_a_bad_link``: what it does to packets, and that it sets up nothing where its caller is."""

from __future__ import annotations

import os
import socket

import pytest

from tests.bench import bad_link


def wire(delay_s: float, loss: float) -> tuple[bad_link.Wire, socket.socket, socket.socket]:
    """With the ends that write into it and read from it."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    ends = [end for pair in pairs for end in pair]
    for end in ends:
        end.setblocking(False)
    writer, source, sink, reader = ends
    return bad_link.Wire(os.dup(source.fileno()), os.dup(sink.fileno()), delay_s, loss, 1), writer, reader


def test_a_packet_comes_when_its_delay_is_over_and_in_its_place() -> None:
    link, writer, reader = wire(0.3, 0.0)
    for at in (10.0, 10.2):
        writer.send(str(at).encode())
        link.take(at)
    assert link.give(10.29) == pytest.approx(10.3)
    with pytest.raises(BlockingIOError):
        reader.recv(10)
    assert link.give(10.31) == pytest.approx(10.5)
    assert reader.recv(10) == b"10.0"
    assert link.give(11.0) is None
    assert reader.recv(10) == b"10.2"


def test_the_share_that_is_to_be_lost_is_lost() -> None:
    link, writer, _ = wire(0.0, 0.02)
    for _ in range(100):
        for _ in range(50):
            writer.send(b"packet")
        link.take(0.0)
    assert link.seen == 5000
    # Four standard deviations.
    assert 60 <= link.dropped <= 140


def test_nothing_is_set_up_in_the_network_of_the_caller() -> None:
    with pytest.raises(RuntimeError, match="caller's own network"):
        bad_link.refuse(bad_link.namespace())
