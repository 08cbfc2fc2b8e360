"""From real readings to drift and accuracy: the demo's bundle, the real recorder, MQTT, ingest, the watch, the API and the tool.

The sensors of the gas data aged between batch 1 and batch 2. The bundle's reference is 134 rows of batch 1; rows of batch 1 that
are not in it must not be drift, rows of batch 2 must be.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from skerry_cli.bundle import read_bundle
from skerry_cli.demo import data, models
from skerry_cli.publishing import push
from skerry_contract import wire

from tests import trained, warm
from tests.counted import Counted
from tests.rig_server import DeviceRig, Operator, ServerRig

GROUP, MODEL, DEVICES, ROWS = "press", "gas", 8, 60


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> models.Made:
    out = tmp_path_factory.mktemp("bundle") / "v1"
    return trained.make_bundle(out, version="1.0.0", batches=(1,))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerRig]:
    """A server with buckets of one second."""
    rig = ServerRig(tmp_path_factory.mktemp("server"), {"TELEMETRY_BUCKET_S": "1"}).start()
    rig.good("PUT", f"/api/v1/groups/{GROUP}", {"settings": {"window_s": 1}})
    yield rig
    rig.close()


class Fleet:
    """Devices that answer rows of one model and send a window each."""

    def __init__(self, server: ServerRig, made: models.Made, folder: Path) -> None:
        self.server, self.made = server, made
        self.digest = made.bundle.digest
        self.rng = np.random.default_rng(3)
        self.devices = [DeviceRig(server, f"gas-{i:02d}", folder, group=GROUP) for i in range(DEVICES)]
        for device in self.devices:
            device.enrol()
        for device in self.devices:
            device.connect()
        rings = folder / "rings"
        rings.mkdir()
        self.counted = [Counted(made.bundle.folder, self.digest, rings) for _ in self.devices]
        self.sent = 0
        self.right = 0

    def serve(self, readings: data.Readings, seconds: float, *, labelled: bool) -> None:
        """For so long, every device answers rows at random and sends its window."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for device, counted in zip(self.devices, self.counted, strict=True):
                chosen = self.rng.integers(0, len(readings), ROWS)
                truth = readings.y[chosen] if labelled else None
                window = counted.window(readings.x[chosen], truth)
                device.send(("window", wire.encode(window)))
                self.sent += ROWS
                if labelled:
                    k = len(readings.classes)
                    self.right += sum(window.labels.confusion[:: k + 1])
            time.sleep(0.05)
        self.server.wait("all rows counted", lambda: self._counted() == self.sent)

    def _counted(self) -> int:
        items = self.server.good("GET", f"/api/v1/telemetry/counts?model={MODEL}&limit=1000")["items"]
        return sum(item["rows"] for item in items)

    def drift(self) -> dict[str, Any]:
        items = self.server.good("GET", f"/api/v1/drift?model={MODEL}")["items"]
        return dict(items[0]) if items else {"verdict": "", "findings": []}

    def features(self) -> set[str]:
        return {one["subject"] for one in self.drift()["findings"] if one["subject"].startswith("feature:")}

    def close(self) -> None:
        for device in self.devices:
            device.disconnect()


@pytest.fixture(scope="module")
def fleet(server: ServerRig, made: models.Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    operator = Operator(server, tmp_path_factory.mktemp("operator"))
    operator.install_trust()
    push(operator.api, read_bundle(made.bundle.folder))
    operator.approve(MODEL, "1.0.0", made.bundle.digest)
    server.good("PUT", f"/api/v1/groups/{GROUP}/models/{MODEL}", {"stable": made.bundle.digest})
    found = Fleet(server, made, tmp_path_factory.mktemp("devices"))
    yield found
    found.close()


def skerry(server: ServerRig, *arguments: str) -> str:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SKERRY_")},
        "SKERRY_SERVER": server.url,
        "SKERRY_TOKEN": server.token,
        "SKERRY_CA": str(server.ca_file),
    }
    done = warm.run("skerry_cli", arguments, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_batch_1_is_no_drift_batch_2_is_and_labels_say_what_it_costs(server: ServerRig, fleet: Fleet) -> None:
    first, second = data.load([1]), data.load([2])
    reference = {row.tobytes() for row in fleet.made.trained.held_out.x}
    other = first.take(np.flatnonzero([row.tobytes() not in reference for row in first.x]))
    assert len(other) + len(fleet.made.trained.held_out) == len(first)

    fleet.serve(other, 7.0, labelled=True)
    steady = server.wait("a verdict", lambda: fleet.drift() if fleet.drift()["verdict"] == "STEADY" else None)
    assert steady["findings"] == []
    assert steady["subjects"] == 129
    switch_ms = round(time.time() * 1000)
    calm_right, calm_sent = fleet.right, fleet.sent

    fleet.serve(second, 9.0, labelled=True)
    found = server.wait("drift", lambda: fleet.drift() if fleet.drift()["verdict"] == "DRIFT" else None)
    # Most of the 128 features moved: this is what ageing and another mix of gases do.
    opened = fleet.features()
    assert len(opened) > 40
    worst = max(found["findings"], key=lambda one: one["numbers"]["now"]["psi_corrected"] or 0)
    assert worst["numbers"]["now"]["psi_corrected"] > 1
    assert switch_ms - 2000 < worst["since_ms"] < switch_ms + 6000
    assert worst["opened_ms"] >= worst["since_ms"]

    audited = {
        row["subject"]: row
        for after in (0, 1000)
        for row in server.good("GET", f"/api/v1/audit?limit=1000&after={after}")["items"]
        if row["action"] == "drift.open"
    }
    assert {subject.split("/")[-1] for subject in audited} >= opened
    assert all(row["actor"] == "system:drift" and row["reason"] for row in audited.values())

    # Labels: what the fleet got right of each batch, and its confidence, which does not notice.
    (calm,) = server.good("GET", f"/api/v1/accuracy?model={MODEL}&until_ms={switch_ms - 1000}")["items"]
    (later,) = server.good("GET", f"/api/v1/accuracy?model={MODEL}&since_ms={switch_ms + 1000}")["items"]
    (whole,) = server.good("GET", f"/api/v1/accuracy?model={MODEL}")["items"]
    share = whole["measured"]["accuracy"]
    assert (share["n"], share["right"]) == (fleet.sent, fleet.right)
    assert (whole["measured"]["coverage"], share["devices"], share["shown"]) == (1.0, DEVICES, "by_device")
    assert calm["measured"]["accuracy"]["value"] == pytest.approx(calm_right / calm_sent, abs=0.02)
    assert calm["measured"]["accuracy"]["value"] > 0.9
    assert later["measured"]["accuracy"]["by_device"][1] < calm["measured"]["accuracy"]["by_device"][0]
    # The sum of the device's calibrated confidence, within the rows of the buckets on either side of the switch.
    assert calm["estimate"]["estimate"] > 0.9
    assert "estimate" in later["estimate"]["method"]

    told = skerry(server, "drift", "--model", MODEL)
    assert "gas 1.0.0: DRIFT" in told and "since 20" in told and "sd of the reference" in told
    numbers = skerry(server, "drift", "--bundle", fleet.digest)
    assert worst["subject"] in numbers and "psi_corrected" in numbers
    told = skerry(server, "accuracy", "--model", MODEL)
    assert "measured: " in told and "by device, 8 devices" in told and "estimate: " in told and "without labels" in told
    listed = msgspec.json.decode(skerry(server, "drift", "--json"))
    assert {one["subject"] for one in listed["items"][0]["findings"]} >= fleet.features()
    assert msgspec.json.decode(skerry(server, "accuracy", "--json"))["items"][0]["bundle"] == fleet.digest


def test_what_devices_explained_is_added_up_and_stands_beside_drift(server: ServerRig, fleet: Fleet) -> None:
    readings = data.load([2])
    before_ms = round(time.time() * 1000) - 1000
    names = [feature.name for feature in fleet.made.bundle.manifest.features][:2]
    server.wait("a look", lambda: fleet.drift()["verdict"])
    for i, (device, counted) in enumerate(zip(fleet.devices, fleet.counted, strict=True)):
        counted.explain({names[0]: [0.5, -0.25], names[1]: [0.125 * (i % 2), 0.0]}, dropped=1)
        device.send(("window", wire.encode(counted.window(readings.x[:20]))))

    def told() -> dict[str, Any] | None:
        items = server.good("GET", f"/api/v1/attributions?model={MODEL}&since_ms={before_ms}")["items"]
        return items[0] if items and items[0]["variants"][0]["explained"] == 2 * DEVICES else None

    item = server.wait("all that was explained", told)
    (one,) = item["variants"]
    assert (item["bundle"], item["unit"]) == (fleet.digest, "probability")
    assert (one["chosen"], one["dropped"]) == (3 * DEVICES, DEVICES)
    assert one["coverage"] == one["explained"] / one["answered"]
    assert [(f["feature"], f["mean"]) for f in one["features"]] == [(names[0], 0.375), (names[1], 0.03125)]

    said = skerry(server, "attributions", "--model", MODEL)
    assert f"{2 * DEVICES} of " in said and f"of {3 * DEVICES} chosen, {DEVICES} were dropped and 0 are to come" in said
    assert names[0] in said and "92.3%" in said and "7.7%" in said
    assert (
        msgspec.json.decode(skerry(server, "attributions", "--since-ms", "0", "--json"))["items"][0]["unit"]
        == "probability"
    )
    assert "No answer was explained" in skerry(server, "attributions", "--until-ms", "1000")
    looked_at = skerry(server, "drift", "--bundle", fleet.digest)
    assert "attribution" in looked_at and "92.3%" in looked_at


def test_a_bundle_that_was_never_looked_at_is_not_found_and_a_viewer_may_read(server: ServerRig, fleet: Fleet) -> None:
    token = server.good("POST", "/api/v1/tokens", {"name": "looker", "role": "viewer"})["token"]
    assert server.ask("GET", "/api/v1/drift", token=token).status == 200
    assert server.ask("GET", "/api/v1/accuracy", token=token).status == 200
    assert server.ask("GET", "/api/v1/attributions", token=token).status == 200
    for path in ("drift", f"drift/{fleet.digest}", "accuracy", "attributions"):
        assert server.ask("GET", f"/api/v1/{path}", token="").status == 401
    missing = server.ask("GET", f"/api/v1/drift/{'0' * 64}", token=token)
    assert (missing.status, missing.code) == (404, "not_found")
    assert server.ask("GET", "/api/v1/drift/not-a-digest", token=token).status == 422
    assert server.ask("GET", "/api/v1/accuracy?since_ms=-1", token=token).status == 422
    assert server.ask("GET", "/api/v1/attributions?after=x", token=token).status == 422
    for path in ("drift", "accuracy", "attributions"):
        nobody = server.ask("GET", f"/api/v1/{path}?model=none", token=token)
        assert (nobody.status, nobody.code) == (404, "not_found")
