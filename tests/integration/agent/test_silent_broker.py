"""A broker that is alive and takes nothing (its disk is full, say): what is sent stays bounded, and sessions end."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from skerry_contract import topics, wire

from tests.integration.agent.rig import DEVICE, Device, wait_for
from tests.integration.agent.test_outbox_life import prefill


class SilentBroker:
    """Answers CONNECT, SUBSCRIBE and PINGREQ, says that the server is online, and never acknowledges a PUBLISH.

    Attributes:
        sessions: of each, how often each payload came on the device's topic of records.
    """

    def __init__(self) -> None:
        self.sessions: list[Counter[bytes]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        seen: Counter[bytes] = Counter()
        self.sessions.append(seen)
        with connection, connection.makefile("rb") as stream:
            while first := stream.read(1):
                length = shift = 0
                while True:
                    (byte,) = stream.read(1)
                    length |= (byte & 0x7F) << shift
                    shift += 7
                    if not byte & 0x80:
                        break
                body = stream.read(length)
                kind = first[0] >> 4
                if kind == 1:
                    connection.sendall(b"\x20\x02\x00\x00")
                elif kind == 3:
                    (size,) = struct.unpack_from(">H", body)
                    if body[2 : 2 + size].decode() == topics.up(DEVICE):
                        seen[body[2 + size + 2 :]] += 1
                elif kind == 8:
                    granted = bytes(_filters(body[2:]))
                    connection.sendall(bytes((0x90, 2 + len(granted))) + body[:2] + granted)
                    topic = topics.SERVER_STATE.encode()
                    said = wire.encode(wire.ServerState(status="online", birth=1))
                    said = struct.pack(">H", len(topic)) + topic + said
                    connection.sendall(bytes((0x31, len(said))) + said)
                elif kind == 12:
                    connection.sendall(b"\xd0\x00")


def _filters(body: bytes) -> Iterator[int]:
    while body:
        end = 3 + int.from_bytes(body[:2], "big")
        yield 0
        body = body[end:]


@pytest.fixture
def silent() -> Iterator[SilentBroker]:
    found = SilentBroker()
    yield found
    found.close()


def test_a_broker_that_takes_nothing_gets_no_copies_and_loses_its_session(silent: SilentBroker, tmp_path: Path) -> None:
    (tmp_path / "device").mkdir()
    device = Device(tmp_path / "device", silent.port, ack_s=0.5)
    try:
        prefill(device, 1_000_000)
        device.start()
        wait_for(lambda: len(silent.sessions) >= 3, why=lambda: device.log()[-2000:], timeout_s=60.0)
        ended = silent.sessions[:2]
        assert all(ended)
        # Patience of half a second ends ten times in a session of five seconds.
        assert all(set(seen.values()) == {1} for seen in ended), "nothing is sent twice before the first copy was taken"
        assert all(len(seen) <= 8 for seen in ended)
        assert "broker acknowledges nothing" in device.log()
    finally:
        device.close()
