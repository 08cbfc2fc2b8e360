"""Keys that go and come: an approver revoked in one snapshot, thieves' versions left behind, roots that a device missed."""

import datetime as dt
import json
import subprocess
import sys

import pytest
from securesystemslib.signer import CryptoSigner
from skerry_cli import catalog, keys
from skerry_contract import layout
from skerry_server import online_keys
from skerry_server.errors import Unavailable
from skerry_server.repository import Repository, RepositoryRefused
from tuf.api.metadata import Metadata

FAR = 1 << 31


@pytest.fixture
def gas(fleet, make_bundle):
    return fleet.push(make_bundle("gas", "1.0.0"))


@pytest.fixture
def two(make_fleet, make_bundle):
    """Two of three approve; ``gas`` is approved by ada and bea."""
    made = make_fleet("two", approvers=("ada", "bea", "cyd"), threshold=2)
    bundle = made.push(make_bundle("gas", "1.0.0"))
    made.install(approved_by(made, catalog.Change(add=(bundle.addition(),)), "ada", "bea"))
    made.repository.publish_group("line-1", made.document(1))
    return made, bundle


def approved_by(fleet, change, first, second, verified=None):
    made = catalog.propose(
        verified or fleet.verified(),
        change,
        source=fleet.source(),
        signer=fleet.signer(first),
        approvers=(first, second),
        now=fleet.clock(),
    )
    return catalog.cosign(
        verified or fleet.verified(),
        made.metadata,
        made.floors,
        source=fleet.source(),
        signer=fleet.signer(second),
        approver=second,
        now=fleet.clock(),
    )


def without(fleet, name):
    """Targets that name the other two approvers, threshold 2, signed by their holder."""
    kept = [fleet.signer(other).public_key for other in ("ada", "bea", "cyd") if other != name]
    return keys.next_targets(
        fleet.ceremony.targets,
        root=fleet.ceremony.root,
        signers=[fleet.signer("targets")],
        now=fleet.clock(),
        approver_keys={key.keyid: key for key in kept},
        threshold=2,
    )


def other_online_key(fleet):
    """A new online key on the server's disk, and root and targets that name it alone."""
    new = online_keys.add(fleet.folder / "keys")
    named = {new.public_key.keyid: new.public_key}
    root = keys.next_root(fleet.ceremony.root, signers=[fleet.signer("root")], now=fleet.clock(), online_keys=named)
    targets = keys.next_targets(
        fleet.ceremony.targets, root=root, signers=[fleet.signer("targets")], now=fleet.clock(), online_keys=named
    )
    fleet.repository = Repository(fleet.path, online_keys.open_all(fleet.folder / "keys"), fleet.clock)
    return root, targets, new.public_key.keyid


def test_a_revoked_approver_goes_with_a_catalog_of_the_others_in_one_snapshot(two, make_device):
    fleet, gas = two
    device = make_device(fleet, "device").enrol()
    device.manifest(gas)
    targets = without(fleet, "ada")
    before = fleet.repository.status()
    with pytest.raises(RepositoryRefused, match="1/2") as alone:
        fleet.repository.install(targets=targets)
    assert alone.value.code == "bad_signature"
    assert fleet.repository.status() == before, "refused, and nothing of it is served"

    verified = catalog.under_targets(fleet.verified(), targets)
    assert any(line.startswith("- catalog: ") for line in verified.brings), verified.brings
    made = approved_by(fleet, catalog.Change(), "bea", "cyd", verified)
    fleet.repository.install(targets=targets, catalog=made.metadata, floors_data=made.floors)
    after = fleet.repository.status()
    moved = {role: after[role]["version"] - before[role]["version"] for role in after}
    assert moved == {"root": 0, "timestamp": 1, "snapshot": 1, "targets": 1, "catalog": 1, "fleet": 0}
    device.manifest(gas)
    assert device.sync()["tuf"]["targets"] == 2

    # What the revoked key still signs counts for nothing, not even beside one that holds.
    with pytest.raises(Exception, match="not one of the approvers"):
        fleet.propose(catalog.Change(), approver="ada", others=("bea",))
    stale = Metadata.from_bytes(made.metadata)
    stale.signed.version += 1
    stale.signatures.clear()
    for name in ("ada", "bea"):
        stale.sign(fleet.signer(name), append=True)
    with pytest.raises(RepositoryRefused, match="1/2"):
        fleet.repository.install(catalog=stale.to_bytes())


def test_targets_that_were_not_signed_by_their_holder_are_no_ground_for_a_catalog(two):
    fleet, _ = two
    forged = Metadata.from_bytes(without(fleet, "ada"))
    forged.sign(fleet.online)
    with pytest.raises(Exception, match="targets"):
        catalog.under_targets(fleet.verified(), forged.to_bytes())
    with pytest.raises(Exception, match="wanted version 2"):
        catalog.under_targets(fleet.verified(), fleet.ceremony.targets)


CRASH = """
import os, sys
from pathlib import Path
import datetime as dt
from skerry_server import online_keys
from skerry_server.repository import Repository

folder, keys, at, *files = sys.argv[1:]
repository = Repository(Path(folder), online_keys.open_all(Path(keys)), lambda: dt.datetime.now(dt.UTC))
root, targets = (Path(file).read_bytes() for file in files)
left = int(at)

def hook(event, args):
    global left
    writes = event in ("os.rename", "os.remove", "os.mkdir") or (
        event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    )
    if writes:
        left -= 1
        if left < 0:
            os._exit(9)

sys.addaudithook(hook)
repository.install(root=root, targets=targets)
"""


@pytest.mark.slow
def test_kill_at_every_write_of_a_rotation_ends_in_one_that_devices_follow(fleet, gas, device, tmp_path):
    """Another holder of targets and another online key at once: before the first write the old chain, after a start the new one."""
    fleet.approve(gas)
    fleet.repository.publish_group("line-1", fleet.document(1))
    device.sync()
    new = online_keys.add(fleet.folder / "keys")
    holder = CryptoSigner.generate_ed25519()
    named, holds = {new.public_key.keyid: new.public_key}, {holder.public_key.keyid: holder.public_key}
    root = keys.next_root(
        fleet.ceremony.root, signers=[fleet.signer("root")], now=fleet.clock(), online_keys=named, targets_keys=holds
    )
    targets = keys.next_targets(
        fleet.ceremony.targets, root=root, signers=[holder], now=fleet.clock(), online_keys=named
    )
    files = [tmp_path / "root", tmp_path / "targets"]
    for file, data in zip(files, (root, targets), strict=True):
        file.write_bytes(data)
    point = 0
    while True:
        command = [sys.executable, "-c", CRASH, fleet.path, fleet.folder / "keys", str(point), *files]
        ended = subprocess.run(command, capture_output=True, timeout=60)
        assert ended.returncode in (0, 9), ended.stderr.decode()
        again = Repository(fleet.path, online_keys.open_all(fleet.folder / "keys"), fleet.clock)
        again.refresh_expiring()
        assert json.loads(device.sync()["group_document"])["generation"] == 1
        if ended.returncode == 0:
            break
        point += 1
    assert point >= 8
    assert device.sync()["online_keys"] == [new.public_key.keyid]


class Unplugged(CryptoSigner):
    """A token that was pulled out: its public key is known, and it does not sign."""

    def sign(self, payload):
        raise OSError("CKR_DEVICE_REMOVED")


def test_a_key_that_does_not_sign_leaves_all_that_is_served_as_it_is(fleet, gas, device):
    fleet.approve(gas)
    fleet.repository.publish_group("line-1", fleet.document(1))
    device.sync()
    root, targets, _ = other_online_key(fleet)
    folder = fleet.path / layout.METADATA_DIR
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pulled = [Unplugged(signer._private_key) for signer in online_keys.open_all(fleet.folder / "keys")]
    with pytest.raises(Unavailable, match="does not sign fleet: CKR_DEVICE_REMOVED") as refused:
        Repository(fleet.path, pulled, fleet.clock).install(root=root, targets=targets)
    assert (refused.value.code, refused.value.status) == ("online_key_unavailable", 503)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    fleet.repository.install(root=root, targets=targets)
    # Nothing is signed between the new root and the timestamp that goes with it.
    written = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in written[-2:]] == ["2.root.json", "timestamp.json"]
    assert device.sync()["tuf"]["root"] == 2


@pytest.mark.attack("fast-forwarded versions")
def test_versions_that_a_thief_ran_ahead_are_left_behind_with_his_key(fleet, gas, device):
    fleet.approve(gas)
    fleet.repository.publish_group("line-1", fleet.document(1))
    honest = device.sync()["tuf"]
    # The thief has the online key and the disk: versions that nobody reaches, and a time far ahead.
    stolen = {path: path.read_bytes() for path in fleet.path.rglob("*") if path.is_file()}
    fleet.clock.ahead = dt.timedelta(hours=12)
    fleet.repository.raise_versions({"timestamp": FAR, "snapshot": FAR, "fleet": FAR})
    assert device.sync()["tuf"]["timestamp"] == FAR + 1
    fleet.clock.ahead = dt.timedelta()
    for path in [path for path in fleet.path.rglob("*") if path.is_file()]:
        path.unlink()
    for path, data in stolen.items():
        path.write_bytes(data)
    fleet.repository.publish_group("line-1", fleet.document(2))
    assert device.error("sync", group="line-1") == ("rejected", "rollback")

    root, targets, keyid = other_online_key(fleet)
    fleet.repository.install(root=root, targets=targets)
    synced = device.sync()
    assert json.loads(synced["group_document"])["generation"] == 2
    assert synced["online_keys"] == [keyid]
    assert honest["timestamp"] < synced["tuf"]["timestamp"] < FAR
    assert device.sync()["tuf"] == synced["tuf"]
    device.manifest(gas)
    # And what the thief still signs is nobody's word.
    thief = Repository(fleet.path, fleet.online, fleet.clock)
    with pytest.raises(RepositoryRefused, match="cannot sign"):
        thief.publish_group("line-1", fleet.document(3))


def test_a_time_from_a_key_that_stood_beside_another_goes_when_root_names_the_other_alone(fleet, gas, device):
    """Root named old and new together; what the stolen old one said is its word alone."""
    fleet.approve(gas)
    old, new = fleet.online.public_key, online_keys.add(fleet.folder / "keys").public_key
    root, targets = fleet.ceremony.root, fleet.ceremony.targets

    def rotate(*named):
        nonlocal root, targets
        by_id = {key.keyid: key for key in named}
        root = keys.next_root(root, signers=[fleet.signer("root")], now=fleet.clock(), online_keys=by_id)
        targets = keys.next_targets(
            targets, root=root, signers=[fleet.signer("targets")], now=fleet.clock(), online_keys=by_id
        )
        fleet.repository = Repository(fleet.path, online_keys.open_all(fleet.folder / "keys"), fleet.clock)
        fleet.repository.install(root=root, targets=targets)

    rotate(old, new)
    timestamp = fleet.path / "metadata" / "timestamp.json"
    honest = timestamp.read_bytes()
    far = Metadata.from_bytes(honest)
    far.signed.version += 1
    far.signed.unrecognized_fields[layout.SIGNED_AT_FIELD] = int(fleet.clock().timestamp()) + 6 * 86400
    far.signed.expires = fleet.clock() + dt.timedelta(days=3000)
    far.sign(fleet.online)
    timestamp.write_bytes(far.to_bytes())
    poisoned = device.sync()
    assert (poisoned["signed_by"], set(poisoned["online_keys"])) == ([old.keyid], {old.keyid, new.keyid})
    timestamp.write_bytes(honest)
    fleet.clock.ahead = dt.timedelta(hours=1)
    rotate(new)
    fleet.repository.publish_group("line-1", fleet.document(3))
    bound = {"lower_bound_s": poisoned["signed_at"] + 30 * 86400, "now_s": fleet.clock().timestamp()}
    synced = device.sync(**bound, lower_bound_keys=poisoned["signed_by"])
    assert json.loads(synced["group_document"])["generation"] == 3
    assert synced["signed_by"] == [new.keyid]
    kept = [old.keyid, new.keyid]
    assert device.error("sync", group="line-1", **bound, lower_bound_keys=kept) == ("rejected", "expired")


@pytest.mark.attack("fast-forwarded versions", "clock poisoning")
def test_a_time_that_was_signed_far_ahead_on_this_very_disk_goes_with_its_key(fleet, gas, device):
    fleet.approve(gas)
    fleet.clock.ahead = dt.timedelta(days=400)
    timestamp = fleet.path / "metadata" / "timestamp.json"
    far = Metadata.from_bytes(timestamp.read_bytes())
    far.signed.unrecognized_fields[layout.SIGNED_AT_FIELD] = int(fleet.clock().timestamp())
    far.signed.expires = fleet.clock() + dt.timedelta(days=1)
    far.sign(fleet.online)
    timestamp.write_bytes(far.to_bytes())
    fleet.clock.ahead = dt.timedelta()
    fleet.repository.publish_group("line-1", fleet.document(1))
    assert device.error("sync", group="line-1") == ("rejected", "expired")
    root, targets, _ = other_online_key(fleet)
    fleet.repository.install(root=root, targets=targets)
    fleet.repository.publish_group("line-1", fleet.document(2))
    synced = device.sync()
    assert json.loads(synced["group_document"])["generation"] == 2
    assert abs(synced["signed_at"] - fleet.clock().timestamp()) < 60


def test_a_device_that_missed_ten_roots_follows_them_all_at_once(fleet, gas, device):
    """Each with another root key, another online key, and signed by the one before and by itself."""
    fleet.approve(gas)
    fleet.repository.publish_group("line-1", fleet.document(1))
    device.sync()
    root, targets, holder = fleet.ceremony.root, fleet.ceremony.targets, fleet.signer("root")
    for _ in range(10):
        new, after = online_keys.add(fleet.folder / "keys"), CryptoSigner.generate_ed25519()
        named = {new.public_key.keyid: new.public_key}
        holds = {after.public_key.keyid: after.public_key}
        root = keys.next_root(root, signers=[holder, after], now=fleet.clock(), online_keys=named, root_keys=holds)
        targets = keys.next_targets(
            targets, root=root, signers=[fleet.signer("targets")], now=fleet.clock(), online_keys=named
        )
        fleet.repository = Repository(fleet.path, online_keys.open_all(fleet.folder / "keys"), fleet.clock)
        fleet.repository.install(root=root, targets=targets)
        holder = after
    fleet.repository.publish_group("line-1", fleet.document(2))
    synced = device.sync()
    assert (synced["tuf"]["root"], synced["tuf"]["targets"]) == (11, 11)
    assert json.loads(synced["group_document"])["generation"] == 2
    device.manifest(gas)
    # An operator whose root is as old is led there, too.
    assert fleet.verified().targets.version == 11
