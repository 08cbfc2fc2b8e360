"""The MQTT session under an application that publishes at the same time as messages come in."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from skerry_agent.config import Identity
from skerry_agent.link import Happening, Link, Up
from skerry_contract import ids, topics

_MESSAGES = 300


async def _broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As much of MQTT 3.1.1 as one session needs; every publish is acknowledged."""
    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
        while True:
            kind = (await reader.readexactly(1))[0] >> 4
            length, shift = 0, 0
            while True:
                byte = (await reader.readexactly(1))[0]
                length |= (byte & 0x7F) << shift
                shift += 7
                if not byte & 0x80:
                    break
            body = await reader.readexactly(length)
            if kind == 1:
                writer.write(bytes((0x20, 2, 0, 0)))
            elif kind == 8:
                wanted = body[2:].count(b"\x01")
                writer.write(bytes((0x90, 2 + wanted)) + body[:2] + bytes((1,)) * wanted)
            elif kind == 3:
                start = 2 + int.from_bytes(body[:2], "big")
                writer.write(bytes((0x40, 2)) + body[start : start + 2])
            elif kind == 14:
                return


def test_only_the_network_thread_touches_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads inside one TLS connection corrupt the heap: Python lets go of its lock while OpenSSL reads and writes."""
    wrote: set[str] = set()
    real = mqtt.Client.loop_write

    def noted(client: mqtt.Client) -> Any:
        wrote.add(threading.current_thread().name)
        return real(client)

    monkeypatch.setattr(mqtt.Client, "loop_write", noted)
    assert asyncio.run(_publish()) == _MESSAGES
    assert wrote == {"mqtt-1"}


async def _publish() -> int:
    server = await asyncio.start_server(_broker, "127.0.0.1", 0)
    nowhere = Path("nowhere")
    identity = Identity(
        device=ids.DeviceId("dev-a"),
        group=ids.GroupName("field"),
        server_url="",
        repository_url="",
        mqtt_host="127.0.0.1",
        mqtt_port=server.sockets[0].getsockname()[1],
        key=nowhere,
        certificate=nowhere,
        fleet_ca=nowhere,
    )
    up = asyncio.Event()

    def happened(happening: Happening) -> None:
        if isinstance(happening, Up):
            up.set()

    link = Link(
        identity, context=None, next_birth=lambda: 1, will=lambda _: b"gone", on_happening=happened, draw=lambda: 0.0
    )
    link.start()
    try:
        await asyncio.wait_for(up.wait(), 20)
        sent = 0
        for _ in range(_MESSAGES):
            sent += link.publish(topics.up(identity.device), b"x" * 500)
            await asyncio.sleep(0)
        return sent
    finally:
        await link.stop()
        server.close()
