"""A real server taken back by a backup: its versions jump above what devices hold, and what only people can bring back is said."""

from __future__ import annotations

import datetime as dt
import shutil
import time
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from skerry_agent.courier import safe_updater, transport, updater
from skerry_cli import key_files, keys, restoring
from skerry_contract import layout
from tuf.api import exceptions as tuf_errors

from tests.rig_server import DeviceRig, Operator, ServerRig


class Courier:
    """The courier's updater with a cache on disk."""

    def __init__(self, server: ServerRig, root: bytes, folder: Path) -> None:
        self.server, self.root, self.folder = server, root, folder

    def refresh(self) -> dict[str, int]:
        now_s = time.time()
        web = transport.Web(server_url=self.server.url, ca_pem=self.server.ca_file.read_text(), now_s=now_s, gap_s=10)
        fresh = updater.DeviceUpdater(
            self.folder,
            f"{self.server.url}/repository",
            fetcher=safe_updater.Fetcher(web),
            bootstrap=self.root,
            now_s=now_s,
        )
        try:
            fresh.refresh()
            fresh.document(layout.group_target("press"), 1 << 20)
            fresh.document(layout.FLOORS_TARGET, 1 << 20)
            return fresh.versions()
        finally:
            web.close()


def other_targets_key(maker: Operator) -> None:
    """Root 2 and targets 2 change the targets key, in one snapshot; root 3 renews root."""
    now = dt.datetime.now(dt.UTC)
    signer = key_files.load_signer(maker.ceremony.key_path("root"), None)
    holder = CryptoSigner.generate_ed25519()
    holds = {holder.public_key.keyid: holder.public_key}
    second = keys.next_root(maker.ceremony.root, signers=[signer], now=now, targets_keys=holds)
    targets = keys.next_targets(maker.ceremony.targets, root=second, signers=[holder], now=now)
    maker.api.post("/api/v1/repository/set", {"root": second.decode(), "targets": targets.decode()})
    third = keys.next_root(second, signers=[signer], now=now)
    maker.api.post("/api/v1/repository/metadata", {"role": "root", "metadata": third.decode()})


def status(server: ServerRig) -> dict[str, int]:
    return {role: one["version"] for role, one in server.good("GET", "/api/v1/repository/status").items()}


@pytest.mark.attack("server restored from a backup")
def test_versions_jump_above_what_devices_report_and_the_catalog_is_handed_in_again(
    lone_rig: ServerRig, lone_maker: Operator, tmp_path: Path
) -> None:
    rig, maker = lone_rig, lone_maker
    maker.publish("gas", "1.0.0")
    device = DeviceRig(rig, "press-7", tmp_path / "device")
    device.enrol()
    courier = Courier(rig, maker.ceremony.root, tmp_path / "tuf")
    assert rig.stop() == 0
    shutil.copytree(rig.data, tmp_path / "backup", symlinks=True)

    # What the backup does not know: another bundle in the catalog, publications, and a device that has seen it all.
    rig.start()
    other_targets_key(maker)
    maker.publish("gas", "1.1.0")
    for number in range(5):
        rig.good("PUT", "/api/v1/groups/press", {"settings": {"window_s": 10 + number}})
        rig.wait("published", lambda n=number: status(rig)["fleet"] >= 2 + n)
    held = rig.wait("all is out", courier.refresh)
    assert held["catalog"] == 3
    rig.kill()
    shutil.rmtree(rig.data)
    shutil.copytree(tmp_path / "backup", rig.data, symlinks=True)
    rig.start()
    with pytest.raises(tuf_errors.BadVersionNumberError):
        courier.refresh()

    device.connect()
    device.report(tuf=held)
    above = rig.wait("the jump", lambda: (s := status(rig)) and s["timestamp"] > held["timestamp"] and s)
    assert all(above[role] > held[role] for role in ("timestamp", "snapshot", "fleet"))
    (jump,) = [
        row for row in rig.good("GET", "/api/v1/audit?limit=1000")["items"] if row["action"] == "repository.jump"
    ]
    assert "press-7" in jump["reason"]

    # The catalog is its signers' to bring back: it is said, on every channel, and nothing is guessed.
    alerts = {alert["role"]: alert for alert in rig.good("GET", "/api/v1/repository/alerts")["items"]}
    assert {alert["code"] for alert in alerts.values()} == {"devices_hold_newer"}
    assert sorted(alerts) == ["catalog", "root", "targets"]
    alert = alerts["catalog"]
    assert "press-7" in alert["text"] and "skerry restore" in alert["do"]
    metrics = rig.ask("GET", "/metrics", token="").data.decode()
    assert 'skerry_metadata_alert{code="devices_hold_newer",role="catalog"} 1.0' in metrics
    with pytest.raises(tuf_errors.BadVersionNumberError):
        courier.refresh()
    # The bundle's files went with the backup's time: they are pushed again, then the signed catalog is handed in.
    maker.push("gas", "1.1.0")
    done = restoring.restore(maker.api, maker.folder / "cache")
    # The root on the way held with neither the targets before nor those after it.
    assert done.roles == {"root": (1, 3), "targets": (1, 2), "catalog": (2, 3)}
    assert courier.refresh()["catalog"] == 3
    rig.wait("no alert", lambda: rig.good("GET", "/api/v1/repository/alerts")["items"] == [])
    subject = "repository:alert:catalog:devices_hold_newer"

    def said() -> list[str]:
        rows = rig.good("GET", "/api/v1/audit?limit=1000")["items"]
        return [row["action"] for row in rows if row["subject"] == subject]

    rig.wait("opened and closed in the audit", lambda: said() == ["alert.open", "alert.close"])


def test_a_device_that_lies_about_versions_moves_nothing_and_is_named(
    server: ServerRig, operator: Operator, tmp_path: Path
) -> None:
    liar = DeviceRig(server, "liar", tmp_path / "device")
    liar.enrol()
    liar.connect()
    before = status(server)
    liar.report(tuf={"timestamp": 1 << 60, "catalog": 99, "nonsense": 7})
    found = server.wait("the alerts", lambda: server.good("GET", "/api/v1/repository/alerts")["items"])
    assert {(alert["role"], alert["code"]) for alert in found} == {
        ("timestamp", "devices_hold_newer"),
        ("catalog", "devices_hold_newer"),
    }
    assert all("liar" in alert["text"] for alert in found)
    assert status(server) == before
    liar.report(tuf=before)
    server.wait("no alert", lambda: server.good("GET", "/api/v1/repository/alerts")["items"] == [])


def test_a_catalog_that_will_expire_is_an_alert_until_it_is_renewed(lone_rig: ServerRig, tmp_path: Path) -> None:
    rig = lone_rig
    operator = Operator(rig, tmp_path / "operator")
    born = dt.datetime.now(dt.UTC) - dt.timedelta(days=130)
    online = key_files.read_online_keys((rig.data / "keys" / "online.pub.json").read_text())
    operator.ceremony = keys.hold_ceremony(tmp_path / "old", online_keys=online, password=None, now=born)
    operator.install_trust()
    (alert,) = rig.wait("the alert", lambda: rig.good("GET", "/api/v1/repository/alerts")["items"])
    assert (alert["code"], alert["role"]) == ("metadata_expires", "catalog")
    assert "expires in 49 days" in alert["text"] or "expires in 50 days" in alert["text"]
    assert "skerry approve --renew" in alert["do"]
    rig.wait("the log", lambda: "alert role=catalog code=metadata_expires" in rig.log())
    operator.publish("gas", "1.0.0")
    rig.wait("no alert", lambda: rig.good("GET", "/api/v1/repository/alerts")["items"] == [])
