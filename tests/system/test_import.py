"""An update that is carried to a device without a network, everything real: exported, imported, run, and reported when the link is back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.updating_site import DEVICE, GROUP, Site

WEIGHTS = [os.urandom(300_000) for _ in range(2)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path, cuttable=True)
    try:
        found.start()
        yield found
    finally:
        found.close()


def skerry(site: Site, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    data = site.fleet.server.data
    reach = [
        "--server",
        site.fleet.server.url,
        "--token",
        data / "admin.token",
        "--ca",
        data / "ca" / "ca.pem",
        "--keys",
        site.fleet.folder / "keys",
    ]
    command = [sys.executable, "-m", "skerry_cli", *map(str, (*reach, *arguments))]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def imported(site: Site, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    config = site.fleet.device_folder(DEVICE) / "agent.toml"
    command = [sys.executable, "-m", "skerry_agent", "import", str(folder), "--config", str(config), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def events(site: Site, name: str) -> list[dict[str, Any]]:
    return [event for event in site.fleet.events(DEVICE) if event["name"] == name]


def test_an_update_travels_in_a_folder_and_the_server_hears_of_it_when_the_link_is_back(
    site: Site, tmp_path: Path
) -> None:
    site.assign(site.publish(1, {"weights.bin": WEIGHTS[0]}))
    early = tmp_path / "early"
    assert skerry(site, "export-update", early).returncode == 0
    site.cut()
    # Encrypted: the stick brings the content key, too, wrapped for this device.
    second = site.publish(2, {"weights.bin": WEIGHTS[1]}, content_key=os.urandom(32))
    site.fleet.api.put(f"/api/v1/devices/{DEVICE}/pins/gas", {"digest": second, "reason": "test"})
    came, stick = site.relay.came, tmp_path / "stick"
    site.fleet.wait("the pin to be published", lambda: exports_two(site, stick), 30.0)

    refused = skerry(site, "export-update", site.fleet.server.data)
    assert (refused.returncode, "wanted a folder that is empty" in refused.stderr) == (2, True)
    unknown = skerry(site, "export-update", tmp_path / "other", "--group", "nobody")
    assert (unknown.returncode, f"there are {GROUP}" in unknown.stderr) == (2, True)

    done = imported(site, stick)
    assert done.returncode == 0, done.stderr
    assert "gas 2.0.0 confirmed" in done.stdout
    assert site.relay.came == came, "nothing came over the network"
    # What was exported before is a rollback now, and changes nothing.
    old = imported(site, early)
    assert (old.returncode, "rollback" in old.stderr) == (3, True)
    assert not events(site, "import")

    site.mend()
    told = site.fleet.wait("the events", lambda: (found := events(site, "import")) and len(found) >= 3 and found, 60.0)
    assert [(one["code"], one["data"]["state"]) for one in told] == [
        ("", "taken"),
        ("", "ended"),
        ("rollback", "refused"),
    ]
    site.confirmed(second)
    took = site.told(second)
    assert (took["bytes"], took["carried_files"] > 0) == (0, True)


def exports_two(site: Site, stick: Path) -> bool:
    """Whether an export holds version 2; each further one costs only what is new, and leaves nothing over."""
    done = skerry(site, "export-update", stick, "--device", DEVICE, "--device", "nobody", "--json")
    told = json.loads(done.stdout)
    encrypted = [one for one in told["bundles"] if one["version"] == "2.0.0"]
    # Whoever names a device wants the stick to be for it.
    assert done.returncode == (1 if encrypted else 0), done.stderr
    assert all(one["devices"] == [DEVICE] for one in encrypted)
    assert [one["device"] for one in told["locked"]] == ["nobody"] * len(encrypted)
    held = [path for path in stick.rglob("*") if path.is_file() and path.name != "skerry-update.json"]
    assert len(held) == told["files"]
    assert sum(path.stat().st_size for path in held) == told["bytes"]
    return "2.0.0" in [one["version"] for one in told["bundles"]]
