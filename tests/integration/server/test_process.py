"""The server as a process: started, stopped, killed, started again in the same folder."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from skerry_cli.errors import CliError
from skerry_contract import group as g
from skerry_contract import layout
from skerry_server import audit, groups
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, reading, writing

from tests import warm
from tests.rig_server import DeviceRig, Operator, ServerRig, csr


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return warm.run("skerry_server", arguments, timeout=60, env={**os.environ, **(environment or {})})


@pytest.fixture
def rig(tmp_path: Path) -> ServerRig:
    """A server that is initialised and not started; the test ends it."""
    return ServerRig(tmp_path / "server")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_and_soon_with_devices_connected(
    rig: ServerRig, tmp_path: Path, number: signal.Signals
) -> None:
    rig.start()
    rig.good("PUT", "/api/v1/groups/press", {})
    device = DeviceRig(rig, "dev", tmp_path)
    device.enrol()
    device.connect()
    assert rig.process is not None
    children = psutil.Process(rig.process.pid).children(recursive=True)
    assert children, "the broker is a child"
    with rig.pool() as pool:
        pool.request("GET", rig.url + "/healthz")  # a connection that stays open
        begun = time.monotonic()
        rig.process.send_signal(number)
        assert rig.process.wait(60) == 0
        assert time.monotonic() - begun < 5
    device.vanish()
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert b"Traceback" not in (rig.data / "server.log").read_bytes()


@pytest.mark.parametrize("command", ["run", "migrate"])
def test_a_folder_that_holds_no_server_is_named_and_stays_as_it_is(tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        done = run(command, "--data", str(tmp_path / folder))
        assert (done.returncode, "holds no server; run: skerry-server init" in done.stderr) == (1, True), done.stderr
        assert "Traceback" not in done.stderr
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


def test_a_killed_server_leaves_no_broker_and_comes_back_where_it_was(rig: ServerRig, tmp_path: Path) -> None:
    rig.start()
    rig.good("PUT", "/api/v1/groups/press", {})
    device = DeviceRig(rig, "dev", tmp_path)
    device.enrol()
    ready = rig.ready
    assert rig.process is not None
    children = psutil.Process(rig.process.pid).children(recursive=True)
    rig.kill()
    assert psutil.wait_procs(children, timeout=30)[1] == [], "no orphan"
    try:
        rig.start()
        assert rig.ready == ready
        kept = json.loads((rig.data / "run.json").read_text())
        assert {name: kept[name] for name in ready} == ready
        device.connect()
        assert device.ask("GET", "/device/v1/self").status == 200
        device.disconnect()
    finally:
        rig.close()


def test_a_second_server_in_the_same_folder_is_refused(rig: ServerRig) -> None:
    rig.start()
    try:
        for verb in ("run", "init"):
            found = run(verb, "--data", str(rig.data))
            assert found.returncode == 1
            assert "another server runs" in found.stderr
        assert rig.ask("GET", "/healthz").status == 200
    finally:
        rig.close()


def test_a_folder_without_a_server_is_refused_and_left_alone(tmp_path: Path) -> None:
    found = run("run", "--data", str(tmp_path / "none"))
    assert (found.returncode, found.stdout) == (1, "")
    assert "skerry-server init" in found.stderr
    assert not (tmp_path / "none").exists()


def test_a_wrong_configuration_is_told_whole_and_starts_nothing(rig: ServerRig) -> None:
    (rig.data / "server.toml").write_text('[server]\nport = "x"\ncolour = 1\n')
    found = run("run", "--data", str(rig.data), environment={"SKERRY_SERVER_LIMITS_BODY_MB": "0"})
    assert found.returncode == 2
    for named in ("server.port", "server.colour", "BODY_MB"):
        assert named in found.stderr
    assert run("dance", "--data", str(rig.data)).returncode == 2


def test_initialising_again_keeps_everything(rig: ServerRig) -> None:
    kept = ("ca/ca.pem", "ca/ca.key", "keys/online.pem", "admin.token")
    before = [(rig.data / name).read_bytes() for name in kept]
    rig.init()
    assert [(rig.data / name).read_bytes() for name in kept] == before
    (rig.data / "admin.token").unlink()
    rig.init()
    rig.start()
    try:
        names = [token["name"] for token in rig.good("GET", "/api/v1/tokens")["items"]]
        assert names == ["admin", "admin-2"]
    finally:
        rig.close()


def test_the_version_is_told() -> None:
    version = subprocess.run([sys.executable, "-m", "skerry_server", "--version"], capture_output=True, timeout=60)
    assert version.stdout.startswith(b"skerry-server ")


def test_what_was_committed_and_not_published_goes_out_at_the_next_start(rig: ServerRig, tmp_path: Path) -> None:
    """The cut lies between the transaction and the publication: the database knows, the repository and the broker do not."""
    rig.start()
    rig.good("PUT", "/api/v1/groups/press", {"settings": {"window_s": 5}})
    Operator(rig, tmp_path / "operator").install_trust()
    device = DeviceRig(rig, "dev", tmp_path)
    device.enrol()
    device.connect()
    rig.wait("the first bell", lambda: [bell for bell in device.bells if bell[0].endswith("g/press/bell")])
    rig.kill()
    device.disconnect()
    device.bells.clear()
    engine = open_engine(f"sqlite:///{rig.data / 'server.db'}")
    with writing(engine) as conn:
        groups.put(conn, name="press", settings={"window_s": 77.0}, actor="token:admin", now_ms=1)
    with reading(engine) as conn:
        bell = conn.execute(t.bells.select().where(t.bells.c.target == "g/press")).one()
    assert bell.rung_version < bell.version
    engine.dispose()
    try:
        rig.start()
        fleet = sorted(
            (rig.data / "repository" / "metadata").glob("*.fleet.json"), key=lambda p: int(p.name.split(".")[0])
        )
        listed = json.loads(fleet[-1].read_bytes())["signed"]["targets"]
        sha256 = listed["fleet/press.json"]["hashes"]["sha256"]
        data = rig.ask("GET", f"/repository/{layout.target_file('fleet/press.json', sha256)}", token="").data
        assert g.parse(data).settings.window_s == 77.0
        device.connect()
        rig.wait("the bell", lambda: ("skerry/1/g/press/bell", bell.version) in device.bells)
        device.disconnect()
    finally:
        rig.close()


def test_a_database_that_another_process_holds_is_said_and_told_apart_from_a_fault(rig: ServerRig) -> None:
    rig.start()
    try:
        assert rig.ask("GET", "/readyz", token="").status == 200
        with contextlib.closing(sqlite3.connect(rig.data / "server.db", isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            found = rig.ask("PUT", "/api/v1/groups/press", {})
            assert (found.status, found.code) == (503, "database_busy"), found.data
            assert int(found.headers["retry-after"]) > 0
            ready = rig.wait(
                "not ready", lambda: (r := rig.ask("GET", "/readyz", token="")).status == 503 and r, timeout_s=30
            )
            assert ready.json()["parts"]["database"] is False
            assert rig.ask("GET", "/api/v1/groups").status == 200, "reads go on"
            holder.execute("ROLLBACK")
        assert rig.ask("PUT", "/api/v1/groups/press", {}).status == 200
        assert rig.ask("GET", "/readyz", token="").status == 200
    finally:
        rig.close()


def test_a_device_that_died_with_the_server_is_offline_once_the_others_have_spoken(tmp_path: Path) -> None:
    rig = ServerRig(tmp_path / "server", {"ROLLOUT_SPEAK_S": "3"}).start()
    try:
        rig.good("PUT", "/api/v1/groups/press", {})
        lives, dies = (DeviceRig(rig, name, tmp_path) for name in ("dev-lives", "dev-dies"))
        for device in (lives, dies):
            device.enrol()
            device.connect()
            device.report()

        def online() -> list[str]:
            return [row["id"] for row in rig.good("GET", "/api/v1/devices?online=true")["items"]]

        rig.wait("both online", lambda: online() == ["dev-dies", "dev-lives"])
        rig.kill()
        lives.disconnect()
        dies.disconnect()
        rig.start()
        assert "dev-dies" in online(), "nobody took its will"
        lives.connect()
        lives.report()
        rig.wait("the dead one offline", lambda: online() == ["dev-lives"], timeout_s=40)
        # It was only slow: its state counts, also in the session that it had before.
        dies.connect()
        dies.report()
        rig.wait("both online again", lambda: online() == ["dev-dies", "dev-lives"])
    finally:
        rig.close()


def installations(rig: ServerRig, role: str) -> list[dict[str, Any]]:
    rows = rig.good("GET", "/api/v1/audit?limit=1000")["items"]
    assert audit.first_break(rows) is None
    return [row for row in rows if (row["action"], row["subject"]) == ("repository.install", f"metadata:{role}")]


def test_a_catalog_that_was_installed_and_not_recorded_gets_its_row_at_the_next_start(
    rig: ServerRig, tmp_path: Path
) -> None:
    """The cut lies between the repository's files and the audit row: the test holds the database, so the server waits there."""
    rig.start()
    rig.good("PUT", "/api/v1/groups/press", {})
    maker = Operator(rig, tmp_path / "operator")
    maker.install_trust()
    digest = maker.push("gas", "1.0.0")
    wanted = rig.data / "repository" / "metadata" / "2.catalog.json"

    def approve() -> None:
        with contextlib.suppress(CliError):  # the server does not live to answer
            maker.approve("gas", "1.0.0", digest)

    timestamp = rig.data / "repository" / "metadata" / "timestamp.json"
    before_it = timestamp.read_bytes()
    worker = threading.Thread(target=approve)
    holder = sqlite3.connect(rig.data / "server.db", isolation_level=None, timeout=30)
    try:
        holder.execute("BEGIN IMMEDIATE")
        worker.start()
        rig.wait("the files", lambda: timestamp.read_bytes() != before_it)
        time.sleep(0.2)
        rig.kill()
    finally:
        holder.close()
    worker.join(60)
    try:
        rig.start()
        assert rig.good("GET", "/api/v1/repository/status")["catalog"]["version"] == 2
        rows = installations(rig, "catalog")
        assert [(row["actor"], row["after"]["version"]) for row in rows] == [
            ("token:admin", 1),
            ("system:publication", 2),
        ]
        assert rows[-1]["after"]["sha256"] == hashlib.sha256(wanted.read_bytes()).hexdigest()
        assert rows[-1]["reason"].startswith("found at start")
        assert rig.good("GET", f"/api/v1/bundles/{digest}")["state"] == "approved"
        before = {role: installations(rig, role) for role in ("root", "targets", "catalog")}
        rig.stop()
        rig.start()
        assert {role: installations(rig, role) for role in before} == before, "once, however often it starts"
        # The next one is recorded as ever, by whom it was.
        maker.publish("gas", "1.1.0", seed=1)
        assert [row["actor"] for row in installations(rig, "catalog")][2:] == ["token:admin"]
    finally:
        rig.close()


def test_a_device_enrolled_before_certificates_named_keys_is_let_in_by_its_name_until_it_renews(
    rig: ServerRig, tmp_path: Path
) -> None:
    rig.start()
    rig.good("PUT", "/api/v1/groups/press", {})
    device = DeviceRig(rig, "dev", tmp_path)
    device.enrol()
    rig.stop()
    engine = open_engine(f"sqlite:///{rig.data / 'server.db'}")
    with writing(engine) as conn:
        conn.execute(t.devices.update().values(certificate_names_key=False))
    now = dt.datetime.now(dt.UTC)
    old = _certificate_of_before(rig.data / "ca", device, now)
    engine.dispose()
    (device.folder / "device.pem").write_text(old)
    try:
        rig.start()
        device.connect()
        device.disconnect()
        renewed = device.ask("POST", "/device/v1/renew", {"csr": csr(device.key, device.id)}).json()["certificate"]
        with pytest.raises((AssertionError, OSError)):
            device.connect(timeout_s=4)
        (device.folder / "device.pem").write_text(renewed)
        device.connect()
        device.disconnect()
    finally:
        rig.close()


def _certificate_of_before(folder: Path, device: DeviceRig, now: dt.datetime) -> str:
    """As the first servers issued them: with the device's name and nothing else."""
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device.id)]))
        .issuer_name(authority.subject)
        .public_key(device.key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(device.id)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    )
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def test_a_broker_that_is_killed_comes_back_on_its_port_and_readiness_tells(rig: ServerRig, tmp_path: Path) -> None:
    rig.start()
    try:
        rig.good("PUT", "/api/v1/groups/press", {})
        device = DeviceRig(rig, "dev", tmp_path)
        device.enrol()
        assert rig.process is not None
        for child in psutil.Process(rig.process.pid).children(recursive=True):
            child.kill()
        rig.wait("not ready", lambda: rig.ask("GET", "/readyz", token="").status == 503, timeout_s=5)
        rig.wait("ready again", lambda: rig.ask("GET", "/readyz", token="").status == 200)
        device.connect()
        device.disconnect()
    finally:
        rig.close()
