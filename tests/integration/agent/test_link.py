"""The MQTT session under an application that publishes at the same time as messages come in."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from skerry_agent.identity import Identity
from skerry_agent.link import Down, Happening, Link, Up
from skerry_contract import ids, topics

_MESSAGES = 300


def _wanted(filters: bytes) -> Iterator[int]:
    """The QoS of each filter of a SUBSCRIBE."""
    while filters:
        end = 2 + int.from_bytes(filters[:2], "big")
        yield filters[end]
        filters = filters[end + 1 :]


async def _broker(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, grant: Callable[[int], int] = lambda qos: qos
) -> None:
    """As much of MQTT 3.1.1 as one session needs; every publish is acknowledged. ``grant``: what a wanted QoS is answered with."""
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
                granted = bytes(grant(qos) for qos in _wanted(body[2:]))
                writer.write(bytes((0x90, 2 + len(granted))) + body[:2] + granted)
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


def test_it_asks_for_nothing_that_makes_a_broker_keep_a_queue_and_a_refusal_ends_the_session() -> None:
    """NATS makes a consumer for each filter with QoS 1, a thousand at most: the 201st device would hear nothing."""
    asked: list[int] = []

    async def grown(refused: int) -> list[Happening]:
        def grant(qos: int) -> int:
            asked.append(qos)
            return 0x80 if len(asked) == refused else qos

        server = await asyncio.start_server(functools.partial(_broker, grant=grant), "127.0.0.1", 0)
        seen: list[Happening] = []
        link = _link(server, seen.append)
        link.start()
        try:
            for _ in range(200):
                if len(asked) >= 5 and (not refused or len(seen) > 1):
                    break
                await asyncio.sleep(0.05)
        finally:
            await link.stop()
            server.close()
        return seen

    assert asyncio.run(grown(0)) == [Up(birth=1)]
    assert asked == [0] * 5
    asked.clear()
    _, down, *_ = asyncio.run(grown(3))
    assert isinstance(down, Down)
    assert (down.cause, "subscription" in down.detail) == ("refused", True)


def _link(
    server: asyncio.Server,
    happened: Callable[[Happening], None],
    *,
    next_birth: Callable[[], int] = lambda: 1,
    will: Callable[[int], bytes] = lambda _: b"gone",
    backoff_scale: float = 1.0,
) -> Link:
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
    return Link(
        identity,
        context=None,
        next_birth=next_birth,
        will=will,
        on_happening=happened,
        draw=lambda: 0.0,
        backoff_scale=backoff_scale,
    )


async def _publish() -> int:
    server = await asyncio.start_server(_broker, "127.0.0.1", 0)
    up = asyncio.Event()

    def happened(happening: Happening) -> None:
        if isinstance(happening, Up):
            up.set()

    link = _link(server, happened)
    link.start()
    try:
        await asyncio.wait_for(up.wait(), 20)
        sent = 0
        for _ in range(_MESSAGES):
            sent += link.publish(topics.up(ids.DeviceId("dev-a")), b"x" * 500)
            await asyncio.sleep(0)
        return sent
    finally:
        await link.stop()
        server.close()


def test_a_session_that_cannot_even_begin_is_tried_again() -> None:
    births = iter((1 << 70, 2))

    def will(birth: int) -> bytes:
        return birth.to_bytes(8, "big")

    async def news() -> list[Happening]:
        server = await asyncio.start_server(_broker, "127.0.0.1", 0)
        seen: list[Happening] = []
        link = _link(server, seen.append, next_birth=lambda: next(births), will=will, backoff_scale=0.01)
        link.start()
        try:
            for _ in range(200):
                if len(seen) > 1:
                    break
                await asyncio.sleep(0.05)
        finally:
            await link.stop()
            server.close()
        return seen

    down, up = asyncio.run(news())
    assert isinstance(down, Down)
    assert "OverflowError" in down.detail
    assert up == Up(birth=2)
