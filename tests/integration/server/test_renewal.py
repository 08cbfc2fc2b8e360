"""The server's own certificates are renewed while it runs, and nobody who is connected notices."""

from __future__ import annotations

import datetime as dt
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from skerry_server import ca

from tests.rig_server import DeviceRig, ServerRig

DAY = dt.timedelta(days=1)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ServerRig]:
    """A server that looks at its certificates often."""
    found = ServerRig(tmp_path / "server", {"SERVER_CERTIFICATE_CHECK_S": "1"}).start()
    found.good("PUT", "/api/v1/groups/press", {})
    yield found
    found.close()


def shown(host: str, port: int) -> x509.Certificate:
    """The certificate that a listener shows to a newcomer."""
    return x509.load_pem_x509_certificate(ssl.get_server_certificate((host, port), timeout=20).encode())


def age(rig: ServerRig, days_left: int) -> None:
    """Puts certificates in their places that have few days left, as after a year without a restart."""
    folder = rig.data / "ca"
    authority = ca.open_ca(folder, dt.datetime.now(dt.UTC))
    (folder / "server.pem").unlink()
    (folder / "client.pem").unlink()
    authority.ensure_own(["127.0.0.1"], dt.datetime.now(dt.UTC) - ca.SERVER_LIFE + days_left * DAY)


def test_certificates_near_their_end_are_renewed_and_shown_without_a_restart(rig: ServerRig, tmp_path: Path) -> None:
    device = DeviceRig(rig, "dev", tmp_path)
    device.enrol()
    device.connect()
    host, _, port = rig.url.removeprefix("https://").rpartition(":")
    listeners = ((host, int(port)), (rig.mqtt["host"], rig.mqtt["port"]))
    before = [shown(*where).serial_number for where in listeners]
    old = {name: (rig.data / "ca" / name).read_bytes() for name in ("server.pem", "client.pem")}
    age(rig, 50)
    rig.wait(
        "new ones shown", lambda: all(shown(*w).serial_number != s for w, s in zip(listeners, before, strict=True))
    )
    for where in listeners:
        assert shown(*where).not_valid_after_utc > dt.datetime.now(dt.UTC) + 300 * DAY
    assert all((rig.data / "ca" / name).read_bytes() != data for name, data in old.items())
    text = rig.ask("GET", "/metrics", token="").data.decode()
    left = {
        line.split('"')[1]: float(line.split()[1])
        for line in text.splitlines()
        if line.startswith("skerry_certificate_expires_seconds{")
    }
    assert set(left) == {"ca", "server", "client"}
    assert all(seconds > 300 * 86_400 for seconds in left.values())
    # The device's session stands, and records are still taken.
    assert device.client is not None and device.client.is_connected()
    seq = device.send(("event", b"no event"))
    rig.wait("the record dealt with", lambda: device.acked == seq)
    assert rig.ask("GET", "/readyz", token="").json()["parts"]["certificates"] is True
    device.disconnect()


def test_certificates_that_cannot_be_renewed_are_said_before_they_end(rig: ServerRig) -> None:
    assert rig.ask("GET", "/readyz", token="").status == 200
    folder = rig.data / "ca"
    age(rig, 5)
    assert "certificates" in rig.ask("GET", "/readyz", token="").json()["parts"]
    # Keys and certificates can no longer be put in their places.
    (folder / "server.pem").unlink()
    (folder / "server.pem").mkdir()
    ready = rig.wait("not ready", lambda: (r := rig.ask("GET", "/readyz", token="")).status == 503 and r)
    assert ready.json()["parts"]["certificates"] is False
    assert b'skerry_certificate_expires_seconds{name="ca"}' in rig.ask("GET", "/metrics", token="").data
    rig.wait("said", lambda: "certificates could not be renewed" in rig.log())
    assert rig.ask("GET", "/api/v1/groups").status == 200, "what is shown is still good"
