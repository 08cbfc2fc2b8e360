"""A courier killed before each of its writes to disk: the next one finds something it can go on from."""

import json
import os
from pathlib import Path

from tests import warm

KILLED = str(Path(__file__).with_name("killed_courier.py"))


def kill_at_every_write(device, verb, after, **fields):
    """Runs the verb again and again, each run killed one write later, until one runs through. Returns how many were killed."""
    points = 0
    while True:
        arguments, given = [str(points), verb, str(device.state_dir)], device.request(**fields).decode()
        ended = warm.run(KILLED, arguments, env=os.environ, given=given, timeout=60)
        assert ended.returncode in (0, 9), ended.stderr
        after()
        if ended.returncode == 0:
            assert "ok" in json.loads(ended.stdout.splitlines()[-1])
            return points
        points += 1


def test_sync(fleet, device, make_bundle):
    from skerry_cli import keys

    device.sync()
    fleet.approve(make_bundle("gas", "1.0.0"), gas="1.0.0")
    fleet.repository.publish_group("line-1", fleet.document())
    fleet.repository.install_root(
        keys.next_root(fleet.ceremony.root, signers=[fleet.signer("root")], now=fleet.clock())
    )
    root = (device.state_dir / "identity" / "root.json").read_bytes()

    def whole():
        # The moment without root.json that tuf's own updater has.
        assert json.loads((device.state_dir / "tuf" / "root.json").read_bytes())["signed"]["_type"] == "root"
        for path in (device.state_dir / "tuf").glob("*.json"):
            json.loads(path.read_bytes())
        assert (device.state_dir / "identity" / "root.json").read_bytes() == root

    assert kill_at_every_write(device, "sync", whole, group="line-1") > 5
    assert device.sync()["floors"] == {"gas": "1.0.0"}


def test_fetch(fleet, device, make_bundle):
    bundle = fleet.push(make_bundle("gas", "1.0.0"))
    staging = device.state_dir / "slots" / ".staging" / bundle.digest

    def whole():
        for file in bundle.files:
            path = staging / file["path"]
            assert not path.exists() or path.read_bytes() == bundle.blobs[file["sha256"]]
        if (staging / "manifest.json").exists():
            assert all((staging / file["path"]).exists() for file in bundle.files)

    fields = {"digest": bundle.digest, "manifest": bundle.manifest.decode(), "files": bundle.files}
    assert kill_at_every_write(device, "fetch", whole, **fields) > 5
    assert device.ok("fetch", **fields)["bytes"] == 0


def test_enrol(fleet, blank):
    identity = blank.state_dir / "identity"
    blank.state_dir.mkdir()
    keys_seen = set()

    def whole():
        if (identity / "device.key").exists():
            keys_seen.add((identity / "device.key").read_bytes())
        if (identity / "enrolled.json").exists():
            json.loads((identity / "enrolled.json").read_bytes())
            for name in ("root.json", "device.key", "device.pem", "fleet-ca.pem"):
                assert (identity / name).exists()

    assert kill_at_every_write(blank, "enrol", whole, token=fleet.token()) > 5
    assert len(keys_seen) == 1
    fleet.repository.publish_group("line-1", fleet.document())
    assert blank.sync()["group_document"]
