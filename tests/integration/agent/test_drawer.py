"""Years in a drawer: a real agent comes back to a real server after ten root rotations, without a clock, with a certificate that ended.

What passes is made, not waited for: the device's certificate is replaced by one of the same key that the fleet's own CA dated years ago,
the server's certificates (its broker's among them) are made anew, the root is rotated by its keys, and the device's clock stands at 1970.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from securesystemslib.signer import CryptoSigner
from skerry_agent.control import ask
from skerry_contract import enrolment, ids
from skerry_server import ca
from tuf.api.metadata import Metadata, Root

from tests.integration.agent import skewed
from tests.integration.agent.rig import wait_for
from tests.rig_server import Operator, ServerRig

NAME = ids.device_id("drawer-1")
DAY_S = 86_400
AGENT = (sys.executable, "-m", "skerry_agent")
ROTATIONS = 10


class Agent:
    """A whole agent and its courier. Its clock is turned from a file that every process of it reads at its start."""

    def __init__(self, folder: Path, server: ServerRig, operator: Operator) -> None:
        self.folder = folder
        self.identity = folder / "state" / "identity"
        folder.mkdir()
        self.config = folder / "agent.toml"
        self.config.write_text(
            f'state_dir = "{folder / "state"}"\n[limits]\ndisk_reserve_mb = 0.0\n'
            "[timing]\njitter_s = 0.0\nbackoff_scale = 0.05\nhealth_interval_s = 0.2\nsync_s = 60\n"
        )
        clocks, start = folder / "clocks", folder / "start"
        skewed.write(clocks)
        start.mkdir()
        (start / "sitecustomize.py").write_text(
            f"from pathlib import Path\nimport skewed\nskewed.install(Path({str(clocks)!r}))\n"
        )
        path = os.pathsep.join([str(start), str(Path(skewed.__file__).parent), os.environ.get("PYTHONPATH", "")])
        self.environment = {**os.environ, "PYTHONPATH": path}
        self.process: subprocess.Popen[bytes] | None = None
        wish = {"device_id": NAME, "group": "press", "expires_s": 600}
        token = enrolment.build(
            enrolment.Enrolment(
                server_url=server.url,
                token=server.good("POST", "/api/v1/enrolment-tokens", wish)["token"],
                ca_sha256=server.good("GET", "/api/v1/info")["ca_sha256"],
                root_sha256=operator.ceremony.root_sha256,
            )
        )
        subprocess.run(
            [*AGENT, "enrol", "--config", str(self.config), "--token", token],
            check=True,
            timeout=90,
            env=self.environment,
        )

    def at_1970(self) -> None:
        skewed.write(self.folder / "clocks", wall_ns=1000 * 10**9 - time.time_ns())

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*AGENT, "run", "--config", str(self.config)], stderr=log, env=self.environment
            )
        wait_for(self.status, why="the control socket")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return ask(self.folder / "state" / "run" / "control.sock", method, path, body).body

    def status(self) -> dict[str, Any]:
        return dict(self.call("GET", "/skerry/v1/status"))

    def why(self) -> dict[str, dict[str, Any]]:
        told = self.call("GET", "/skerry/v1/why")["told"]
        return {one["about"]: one for one in told}

    def runs(self, version: str) -> bool:
        found = self.status()["running"].get("gas", {})
        return (found.get("version"), str(found.get("state"))[:9]) == (version, "confirmed")

    def wait_runs(self, version: str) -> None:
        wait_for(lambda: self.runs(version), why=lambda: f"{version}: {self.log()[-4000:]}")

    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self.identity / "device.pem").read_bytes())

    def age(self, server: ServerRig, *, ended_days: float) -> None:
        """Its certificate is one that ended so long ago, on both sides; the server must not run."""
        authority = ca.open_ca(server.data / "ca", dt.datetime.now(dt.UTC))
        key = serialization.load_pem_private_key((self.identity / "device.key").read_bytes(), None)
        began = dt.datetime.now(dt.UTC) - ca.DEVICE_LIFE - dt.timedelta(days=ended_days)
        issued = authority.issue_device(NAME, key.public_key(), began)  # type: ignore[arg-type]
        (self.identity / "device.pem").write_text(issued.certificate_pem)
        with sqlite3.connect(server.data / "server.db") as database:
            changed = database.execute(
                "UPDATE devices SET certificate_serial = ?, certificate_expires_ms = ? WHERE id = ?",
                (issued.serial, issued.expires_ms, NAME),
            )
            assert changed.rowcount == 1
        database.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerRig]:
    found = ServerRig(tmp_path / "server").start()
    settings = {"trial_s": 0.5, "sync_s": 60, "jitter_s": 0, "window_s": 5}
    found.good("PUT", "/api/v1/groups/press", {"settings": settings})
    yield found
    found.close()


@pytest.fixture
def operator(server: ServerRig, tmp_path: Path) -> Operator:
    found = Operator(server, tmp_path / "operator")
    found.install_trust()
    return found


@pytest.fixture
def agent(server: ServerRig, operator: Operator, tmp_path: Path) -> Iterator[Agent]:
    """A device that confirmed 1.0.0, and is off."""
    assign(server, operator.publish("gas", "1.0.0"))
    found = Agent(tmp_path / "device", server, operator)
    try:
        found.start()
        found.wait_runs("1.0.0")
        found.stop()
        yield found
    finally:
        found.stop()


def assign(server: ServerRig, digest: str) -> None:
    server.good("PUT", "/api/v1/groups/press/models/gas", {"stable": digest})


def pin(server: ServerRig, digest: str) -> None:
    server.good("PUT", f"/api/v1/devices/{NAME}/pins/gas", {"digest": digest, "reason": "while it was away"})


def rotate(server: ServerRig, operator: Operator) -> int:
    """Replaces the root's key ten times, as its holders would; the version at the end."""
    key = serialization.load_pem_private_key(operator.ceremony.key_path("root").read_bytes(), None)
    signer = CryptoSigner(key)
    root = Metadata[Root].from_bytes(operator.ceremony.root)
    for _ in range(ROTATIONS):
        following = CryptoSigner.generate_ed25519()
        root.signed.version += 1
        root.signed.add_key(following.public_key, "root")
        root.signed.revoke_key(signer.public_key.keyid, "root")
        root.sign(signer)
        root.sign(following, append=True)
        body = {"role": "root", "metadata": root.to_bytes().decode()}
        server.good("POST", "/api/v1/repository/metadata", body)
        signer = following
    return int(root.signed.version)


def renewals(server: ServerRig) -> list[dict[str, Any]]:
    rows = server.good("GET", "/api/v1/audit?limit=1000")["items"]
    return [row["after"] for row in rows if row["action"] == "device.renew"]


def online(server: ServerRig) -> bool:
    return bool(server.good("GET", f"/api/v1/devices/{NAME}")["online"])


@pytest.mark.slow
def test_after_years_without_clock_certificate_or_root_the_device_comes_back_by_itself(
    agent: Agent, server: ServerRig, operator: Operator
) -> None:
    version = rotate(server, operator)
    pin(server, operator.publish("gas", "2.0.0", seed=1))
    server.stop()
    agent.age(server, ended_days=365)
    for own in (server.data / "ca").glob("server.*"):
        # The broker shows another certificate, with another key, of the same CA.
        own.unlink()
    server.start()
    agent.at_1970()
    agent.start()
    # What it has answers at once, whatever else.
    wait_for(lambda: agent.status()["running"], why="something serves")
    agent.wait_runs("2.0.0")
    assert agent.status()["tuf"]["root"] == version == ROTATIONS + 1
    wait_for(lambda: agent.status()["link"]["connected"], why=lambda: f"the link: {agent.log()[-4000:]}")
    server.wait("its word", lambda: online(server))
    assert agent.certificate.not_valid_after_utc > dt.datetime.now(dt.UTC) + dt.timedelta(days=300)
    (renewal,) = renewals(server)
    assert 364 < renewal["ended_ms_ago"] / 1000 / DAY_S < 366
    assert not renewal["by_order"]
    assert "certificate" not in agent.why()


@pytest.mark.slow
def test_beyond_the_days_of_grace_the_device_says_what_it_needs_and_an_operators_word_brings_it_back(
    agent: Agent, server: ServerRig, operator: Operator
) -> None:
    server.stop()
    agent.age(server, ended_days=800)
    server.start()
    agent.at_1970()
    agent.start()
    agent.wait_runs("1.0.0")
    told = wait_for(lambda: agent.why().get("server"), why=lambda: f"{agent.why()} {agent.log()[-4000:]}")
    assert told["code"] == "certificate_expired"
    assert "skerry device renew" in told["do"]
    assert renewals(server) == []
    whole = server.good("GET", f"/api/v1/devices/{NAME}/why")
    (model,) = whole["models"]
    assert f"skerry device renew {NAME}" in model["do"], model
    # What it may run it takes all the same; it is only not heard.
    pin(server, operator.publish("gas", "2.0.0", seed=1))
    agent.call("POST", "/skerry/v1/sync", {})
    agent.wait_runs("2.0.0")
    assert not online(server)
    server.good("POST", f"/api/v1/devices/{NAME}/renew", {"reason": "found in a drawer"})
    agent.call("POST", "/skerry/v1/sync", {})
    wait_for(lambda: agent.status()["link"]["connected"], why=lambda: f"the link: {agent.log()[-4000:]}")
    server.wait("its word", lambda: online(server))
    (renewal,) = renewals(server)
    assert renewal["by_order"]
    orders = server.wait(
        "the order",
        lambda: [one for one in server.good("GET", f"/api/v1/devices/{NAME}/why")["orders"] if one["obeyed_ms"]],
    )
    assert json.loads(json.dumps(orders))[0]["kind"] == "renew"
