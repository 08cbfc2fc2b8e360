"""Many devices in one process: each keeps an MQTT session over mutual TLS and sends its next window once the last one was dealt with.

``python -m tests.bench.mqtt_load PLAN``, where PLAN is JSON (see ``Plan``). Prints ``ready`` once every session is up, begins at a line on
standard input, and prints one JSON line at the end. It is no client for anything else: it knows the few packets it needs.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import uvloop
from skerry_contract import topics, wire

_EPOCH = "e" * 32
_AT_ONCE = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to send.

    Attributes:
        bodies: files, each one encoded window; a device takes them in turn.
        until: ``ack``: the next window goes out when the server's acknowledgement names the last one; ``puback``: when the broker has it.
        windows: per device.
    """

    port: int
    ca: str
    certificates: dict[str, tuple[str, str]]
    bodies: list[str]
    windows: int
    until: Literal["ack", "puback"]


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">H", len(data)) + data


def _packet(kind: int, body: bytes) -> bytes:
    length, size = len(body), bytearray()
    while True:
        length, digit = length >> 7, length & 127
        size.append(digit | (0x80 if length else 0))
        if not length:
            return bytes([kind]) + bytes(size) + body


class _Device(asyncio.Protocol):
    def __init__(self, name: str, messages: list[bytes], until: str) -> None:
        self.name, self.until = name, until
        self.messages = messages
        self.subscribed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sent = 0
        self._buffer = bytearray()
        self._ack_topic = topics.ack(name)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's TLS transport is one by what it does, not by class.
        self._transport = cast(asyncio.Transport, transport)
        connect = _text("MQTT") + bytes([4, 2]) + struct.pack(">H", 300) + _text(self.name)
        self._transport.write(_packet(0x10, connect))

    def connection_lost(self, error: Exception | None) -> None:
        for waiter in (self.subscribed, self.done):
            if not waiter.done():
                waiter.set_exception(error or ConnectionError(f"{self.name}: closed by the broker"))

    def send_next(self) -> None:
        """The window after the last one that was dealt with."""
        if self._sent == len(self.messages):
            self.done.set_result(None)
            return
        self._sent += 1
        self._transport.write(self.messages[self._sent - 1])

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= 2:
            length, shift, at = 0, 0, 1
            while True:
                if at == len(self._buffer):
                    return
                length |= (self._buffer[at] & 127) << shift
                shift, at = shift + 7, at + 1
                if not self._buffer[at - 1] & 0x80:
                    break
            if len(self._buffer) < at + length:
                return
            kind, body = self._buffer[0] >> 4, bytes(self._buffer[at : at + length])
            del self._buffer[: at + length]
            self._take(kind, body)

    def _take(self, kind: int, body: bytes) -> None:
        if kind == 2:
            self._transport.write(_packet(0x82, struct.pack(">H", 1) + _text(self._ack_topic) + bytes([0])))
        elif kind == 9:
            self.subscribed.set_result(None)
        elif kind == 4 and self.until == "puback":
            self.send_next()
        elif kind == 3 and self.until == "ack":
            (size,) = struct.unpack_from(">H", body)
            if wire.decode(wire.Ack, body[2 + size :]).upto >= self._sent:
                self.send_next()


def _messages(name: str, bodies: list[bytes], windows: int, first: int) -> list[bytes]:
    found = []
    for seq in range(1, windows + 1):
        record = wire.Record(seq=seq, kind="window", body=bodies[(first + seq) % len(bodies)])
        payload = wire.encode_batch(wire.Batch(epoch=_EPOCH, records=(record,)))
        found.append(_packet(0x32, _text(topics.up(name)) + struct.pack(">H", seq) + payload))
    return found


async def _run(plan: Plan, bodies: list[bytes]) -> None:
    loop = asyncio.get_running_loop()
    gate = asyncio.Semaphore(_AT_ONCE)

    async def connect(number: int, name: str) -> _Device:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(plan.ca)
        context.load_cert_chain(*plan.certificates[name])
        async with gate:
            device = _Device(name, _messages(name, bodies, plan.windows, number), plan.until)
            await loop.create_connection(
                lambda: device, "127.0.0.1", plan.port, ssl=context, server_hostname="localhost"
            )
            await device.subscribed
        return device

    devices = await asyncio.gather(*(connect(i, name) for i, name in enumerate(plan.certificates)))
    sent_bytes = sum(len(message) for device in devices for message in device.messages)
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    begin, cpu = time.monotonic(), time.process_time()
    for device in devices:
        device.send_next()
    await asyncio.gather(*(device.done for device in devices))
    took = time.monotonic() - begin
    # The clock is the machine's, so whoever counts at the other end can measure from the same moment.
    told = {
        "began": begin,
        "seconds": took,
        "cpu_s": time.process_time() - cpu,
        "windows": plan.windows * len(devices),
        "bytes": sent_bytes,
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text()))
    uvloop.run(_run(plan, [Path(path).read_bytes() for path in plan.bodies]))
