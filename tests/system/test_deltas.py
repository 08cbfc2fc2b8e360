"""An update by delta, everything real: fewer bytes over the wire, and a delta that rots on the server costs only bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3

from tests.updating_site import Site

WEIGHTS = [os.urandom(300_000)]
for place in (50_000, 200_000):
    WEIGHTS.append(WEIGHTS[-1][:place] + os.urandom(5_000) + WEIGHTS[-1][place + 5_000 :])


def look_at(site: Site, row: dict[str, Any]) -> None:
    """It is served as any static file, and told of."""
    path = f"/repository/deltas/{row['from']}/{row['to']}"
    whole = ask(site, path)
    assert (whole.status, len(whole.data)) == (200, row["bytes"])
    assert "max-age=86400" in whole.headers["cache-control"]
    rest = ask(site, path, {"Range": "bytes=100-", "If-Range": whole.headers["etag"]})
    assert (rest.status, rest.data) == (206, whole.data[100:])
    assert ask(site, f"/repository/deltas/{row['to']}/{row['from']}").status == 404
    metrics = ask(site, "/metrics").data.decode()
    assert f"skerry_delta_bytes {float(row['bytes'])}" in metrics
    assert 'skerry_deltas{state="ready"} 1.0' in metrics
    assert 'skerry_delta_make_seconds_count{state="ready"} 1.0' in metrics
    assert site.fleet.api.post("/api/v1/deltas/retry", {"model": "gas"}) == {"waiting": 0}
    data = site.fleet.server.data
    reach = [
        "--server",
        site.fleet.server.url,
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


def ask(site: Site, path: str, headers: dict[str, str] | None = None) -> urllib3.BaseHTTPResponse:
    ca = str(site.fleet.server.data / "ca" / "ca.pem")
    with urllib3.PoolManager(ca_certs=ca, retries=False) as pool:
        return pool.request("GET", site.fleet.server.url + path, headers=headers)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    try:
        found.start()
        yield found
    finally:
        found.close()


@pytest.mark.slow  # `test_encrypted` takes a delta by default, on the same way
def test_an_update_by_delta_takes_fewer_bytes_and_one_that_rots_on_the_server_only_costs_them(site: Site) -> None:
    first = site.publish(1, {"weights.bin": WEIGHTS[0]})
    site.assign(first)
    # A device without a base takes whole files.
    whole = site.told(first)
    assert whole["bytes"] == whole["size_bytes"] > len(WEIGHTS[0])
    assert (whole["delta_bytes"], whole["patched_bytes"], whole["refused"]) == (0, 0, {})

    second = site.publish(2, {"weights.bin": WEIGHTS[1]})
    delta = site.delta_to(2)
    assert (delta["state"], delta["path"], delta["devices"]) == ("ready", "weights.bin", 1)
    assert delta["whole_bytes"] == len(WEIGHTS[1])
    look_at(site, delta)
    came, took = site.update(second)
    assert (took["delta_bytes"], took["patched_bytes"], took["refused"]) == (delta["bytes"], len(WEIGHTS[1]), {})
    # Metadata, the manifest and TLS among it.
    assert took["bytes"] <= came < len(WEIGHTS[1]) / 2
    print(f"bytes through the relay: {came}, of files {took['bytes']}, their size {took['size_bytes']}")

    third = site.publish(3, {"weights.bin": WEIGHTS[2]})
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
