"""Whom the MQTT session trusts when the device's clock is wrong: a certificate that is not valid yet serves, one that ended does not."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from skerry_agent.identity import Identity
from skerry_agent.link import Down, Happening, Link, Up, tls_context
from skerry_contract import ids
from skerry_server.ca import FleetCA, open_ca

from tests.integration.agent.test_link import _broker

NOW = dt.datetime.now(dt.UTC)
YEARS_10 = dt.timedelta(days=3650)


def identity(folder: Path, authority: FleetCA, port: int) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "device.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    issued = authority.issue_device(ids.device_id("dev-a"), key.public_key(), NOW)
    (folder / "device.pem").write_text(issued.certificate_pem)
    return Identity(
        device=ids.DeviceId("dev-a"), group=ids.GroupName("field"), server_url="", repository_url="",
        mqtt_host="127.0.0.1", mqtt_port=port, key=folder / "device.key", certificate=folder / "device.pem",
        fleet_ca=authority.files.ca,
    )  # fmt: skip


async def first_news(folder: Path, *, made: dt.datetime, foreign: bool = False, name: str = "127.0.0.1") -> Happening:
    """What a link hears first of a broker with a certificate of that day."""
    authority = open_ca(folder / "ca", made)
    issuer = open_ca(folder / "other", made) if foreign else authority
    issuer.issue_listener(folder / "broker", [name], made)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "broker" / "broker.pem", folder / "broker" / "broker.key")
    server = await asyncio.start_server(_broker, "127.0.0.1", 0, ssl=context)
    found = identity(folder, authority, server.sockets[0].getsockname()[1])
    news: asyncio.Future[Happening] = asyncio.get_running_loop().create_future()

    def happened(happening: Happening) -> None:
        if not news.done():
            news.set_result(happening)

    link = Link(
        found, context=lambda: tls_context(found), next_birth=lambda: 1, will=lambda _: b"gone", on_happening=happened,
        draw=lambda: 0.0,
    )  # fmt: skip
    link.start()
    try:
        return await asyncio.wait_for(news, 30)
    finally:
        await link.stop()
        server.close()


@pytest.mark.parametrize(
    "ahead", [dt.timedelta(0), dt.timedelta(days=30), 5 * YEARS_10], ids=["right", "a month", "1970"]
)
def test_a_clock_that_is_behind_hinders_no_session(tmp_path: Path, ahead: dt.timedelta) -> None:
    """Seen from a device whose clock is behind, the broker's certificate is of the future."""
    assert asyncio.run(first_news(tmp_path, made=NOW + ahead)) == Up(birth=1)


def test_a_certificate_that_ended_is_refused(tmp_path: Path) -> None:
    found = asyncio.run(first_news(tmp_path, made=NOW - YEARS_10))
    assert isinstance(found, Down)
    assert "expired" in found.detail


@pytest.mark.parametrize(("foreign", "name"), [(True, "127.0.0.1"), (False, "localhost")], ids=["CA", "name"])
def test_time_is_all_that_is_not_asked(tmp_path: Path, foreign: bool, name: str) -> None:
    found = asyncio.run(first_news(tmp_path, made=NOW + YEARS_10, foreign=foreign, name=name))
    assert isinstance(found, Down)
    assert "certificate verify failed" in found.detail
