"""An update by delta, everything real: fewer bytes over the wire, and a delta that rots on the server costs only bytes."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from skerry_cli import bundle, catalog, publishing
from skerry_cli.demo.fleet import GROUP, SETTINGS, Fleet
from skerry_cli.demo.processes import Processes

from tests import models
from tests.relay import Relay

DEVICE = "gas-1"
WEIGHTS = [os.urandom(300_000)]
for place in (50_000, 200_000):
    WEIGHTS.append(WEIGHTS[-1][:place] + os.urandom(5_000) + WEIGHTS[-1][place + 5_000 :])


class Site:
    """One server, one agent that reaches it through a relay."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = Processes(folder, leashed=True)
        self.fleet = Fleet(folder, self.processes, seed=1)

    def start(self) -> None:
        fleet = self.fleet
        fleet.start_server()
        self.relay = Relay(int(fleet.server.url.rpartition(":")[2]))
        fleet.cable_ports[DEVICE] = [self.relay.port, fleet.server.mqtt_port]
        fleet.hold_ceremony(dt.datetime.now(dt.UTC))
        fleet.api.put(f"/api/v1/groups/{GROUP}", {"settings": {**SETTINGS, "trial_s": 1.0}})
        fleet.enrol(DEVICE)
        fleet.finish_enrolment(DEVICE)

    def publish(self, number: int) -> str:
        folder = self.folder / f"bundle-{number}"
        digest = models.build_bundle(folder, version=f"{number}.0.0", further={"weights.bin": WEIGHTS[number - 1]})
        publishing.push(self.fleet.api, bundle.read_bundle(folder))
        addition = catalog.Addition(model="gas", version=f"{number}.0.0", digest=digest, submitter="test")
        self.fleet.approver.change(catalog.Change(add=(addition,)), now=dt.datetime.now(dt.UTC), folder=folder)
        return digest

    def delta_to(self, number: int) -> dict[str, Any]:
        def found() -> Any:
            items = self.fleet.api.items("/api/v1/deltas", state="ready")
            return next((item for item in items if item["to_version"] == f"{number}.0.0"), None)

        return dict(self.fleet.wait(f"the delta to {number}.0.0", found, 60.0))

    def look_at(self, row: dict[str, Any]) -> None:
        """It is served as any static file, and told of."""
        path = f"/repository/deltas/{row['from']}/{row['to']}"
        whole = self.ask(path)
        assert (whole.status, len(whole.data)) == (200, row["bytes"])
        assert "max-age=86400" in whole.headers["cache-control"]
        rest = self.ask(path, {"Range": "bytes=100-", "If-Range": whole.headers["etag"]})
        assert (rest.status, rest.data) == (206, whole.data[100:])
        assert self.ask(f"/repository/deltas/{row['to']}/{row['from']}").status == 404
        metrics = self.ask("/metrics").data.decode()
        assert f"skerry_delta_bytes {float(row['bytes'])}" in metrics
        assert 'skerry_deltas{state="ready"} 1.0' in metrics
        assert 'skerry_delta_make_seconds_count{state="ready"} 1.0' in metrics
        assert self.fleet.api.post("/api/v1/deltas/retry", {"model": "gas"}) == {"waiting": 0}
        data = self.fleet.server.data
        reach = [
            "--server",
            self.fleet.server.url,
            "--token",
            str(data / "admin.token"),
            "--ca",
            str(data / "ca" / "ca.pem"),
        ]
        listing = [sys.executable, "-m", "skerry_cli", *reach, "delta", "list", "--model", "gas", "--state", "ready"]
        told = subprocess.run([*listing, "--json"], capture_output=True, check=True, timeout=60).stdout
        assert json.loads(told)["items"] == [row]
        shown = subprocess.run(listing, capture_output=True, check=True, timeout=60, text=True).stdout
        assert str(row["bytes"]) in shown

    def ask(self, path: str, headers: dict[str, str] | None = None) -> urllib3.BaseHTTPResponse:
        ca = str(self.fleet.server.data / "ca" / "ca.pem")
        with urllib3.PoolManager(ca_certs=ca, retries=False) as pool:
            return pool.request("GET", self.fleet.server.url + path, headers=headers)

    def confirmed(self, digest: str) -> None:
        def found() -> bool:
            running = self.fleet.device(DEVICE)["running"].get("gas", {})
            return running.get("digest") == digest and str(running.get("state")).startswith("confirmed")

        self.fleet.wait("the version to be confirmed", found, 90.0)

    def update(self, digest: str) -> tuple[int, dict[str, Any]]:
        """Bytes that came through the relay, and what the device says it took."""
        before = self.relay.came
        self.fleet.api.put(f"/api/v1/devices/{DEVICE}/pins/gas", {"digest": digest, "reason": "test"})
        self.confirmed(digest)
        return self.relay.came - before, self.told(digest)

    def told(self, digest: str) -> dict[str, Any]:
        def found() -> Any:
            events = [event["data"] for event in self.fleet.events(DEVICE) if event["name"] == "update"]
            ended = [one for one in events if one.get("digest") == digest and one["state"].startswith("confirmed")]
            return ended[-1] if ended else None

        return dict(self.fleet.wait("the event", found, 30.0))["fetched"]

    def close(self) -> None:
        self.processes.stop()
        self.relay.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    try:
        found.start()
        yield found
    finally:
        found.close()


def test_an_update_by_delta_takes_fewer_bytes_and_one_that_rots_on_the_server_only_costs_them(site: Site) -> None:
    first = site.publish(1)
    site.fleet.api.put(f"/api/v1/groups/{GROUP}/models/gas", {"stable": first})
    site.confirmed(first)
    # A device without a base takes whole files.
    whole = site.told(first)
    assert whole["bytes"] == whole["size_bytes"] > len(WEIGHTS[0])
    assert (whole["delta_bytes"], whole["patched_bytes"], whole["refused"]) == (0, 0, {})

    second = site.publish(2)
    delta = site.delta_to(2)
    assert (delta["path"], delta["devices"], delta["whole_bytes"]) == ("weights.bin", 1, len(WEIGHTS[1]))
    site.look_at(delta)
    came, took = site.update(second)
    assert (took["delta_bytes"], took["patched_bytes"], took["refused"]) == (delta["bytes"], len(WEIGHTS[1]), {})
    # Metadata, the manifest and TLS among it.
    assert took["bytes"] <= came < len(WEIGHTS[1]) / 2
    print(f"bytes through the relay: {came}, of files {took['bytes']}, their size {took['size_bytes']}")

    third = site.publish(3)
    delta = site.delta_to(3)
    path = site.fleet.server.data / "repository" / "deltas" / delta["from"] / delta["to"]
    rotten = bytearray(path.read_bytes())
    rotten[len(rotten) // 2] ^= 1
    path.write_bytes(rotten)
    came, took = site.update(third)
    # From what runs, a wrong one; from the version before it, none.
    assert took["refused"] == {"delta_wrong": 1, "delta_missing": 1}
    assert took["patched_bytes"] == 0
    assert took["bytes"] == len(WEIGHTS[2]) + delta["bytes"]
    assert came >= took["bytes"]
