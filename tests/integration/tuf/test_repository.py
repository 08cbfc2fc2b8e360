"""The repository on disk: what it takes, what it refuses, what it serves, and in which order it writes."""

import datetime as dt
import json
import os
import stat
import threading
import time
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner, Key
from skerry_agent.courier import safe_updater, transport, updater
from skerry_cli import catalog, key_files, keys
from skerry_contract import layout
from skerry_server.core import expiry
from skerry_server.metadata import MetadataFolder, load_online_signer, make_online_key
from skerry_server.repository import Repository, RepositoryRefused
from tuf.api.metadata import Metadata, TargetFile

from tests import warm

KILLED = str(Path(__file__).with_name("killed_repository.py"))


@pytest.fixture
def gas(fleet, make_bundle):
    return fleet.push(make_bundle("gas", "1.0.0"))


def refused(call, *args, **more):
    with pytest.raises(RepositoryRefused) as caught:
        call(*args, **more)
    return caught.value.code


def proposal(fleet, bundle):
    return fleet.propose(catalog.Change(add=(bundle.addition(),)))


def snapshot_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def test_without_the_ceremony_nothing_is_served_and_it_says_what_is_missing(tmp_path, fleet):
    empty = Repository(tmp_path / "empty", fleet.online, fleet.clock)
    assert not empty.has_trust()
    assert empty.status() == {}
    assert empty.refresh_expiring() == ()
    assert refused(empty.publish_group, "line-1", fleet.document()) == "no_trust"
    assert refused(empty.install_targets, fleet.ceremony.targets) == "no_trust"
    assert refused(empty.install_catalog, fleet.ceremony.catalog, fleet.ceremony.floors, lambda _: None) == "no_trust"
    empty.install_root(fleet.ceremony.root)
    empty.install_targets(fleet.ceremony.targets)
    assert not empty.has_trust()
    assert not (tmp_path / "empty" / "metadata" / "timestamp.json").exists()
    empty.install_catalog(fleet.ceremony.catalog, fleet.ceremony.floors, lambda _: None)
    assert empty.has_trust()
    assert set(empty.status()) == {"root", "targets", "catalog", "fleet", "snapshot", "timestamp"}


def test_ceremony_for_another_server_is_refused(tmp_path, fleet, make_fleet):
    other = make_fleet("other")
    empty = Repository(tmp_path / "empty", fleet.online, fleet.clock)
    assert refused(empty.install_root, other.ceremony.root) == "online_key_not_trusted"
    assert not list((tmp_path / "empty" / "metadata").glob("*.json"))


def test_everything_survives_a_restart(fleet, gas):
    fleet.approve(gas, gas="0.1.0")
    fleet.repository.publish_group("line-1", fleet.document())
    again = Repository(fleet.path, load_online_signer(fleet.folder / "keys" / "online.pem"), fleet.clock)
    assert again.status() == fleet.repository.status()
    assert again.catalog_entries() == fleet.repository.catalog_entries()
    assert again.floors() == {"gas": "0.1.0"}
    assert not again.publish_group("line-1", fleet.document())


def test_posting_the_same_metadata_again_changes_nothing(fleet):
    before = snapshot_of(fleet.path)
    fleet.repository.install_root(fleet.ceremony.root)
    fleet.repository.install_targets(fleet.ceremony.targets)
    fleet.repository.install_catalog(fleet.ceremony.catalog, None, lambda _: None)
    assert snapshot_of(fleet.path) == before


def test_catalog_whose_manifest_nobody_pushed_is_refused_and_the_old_one_stays(fleet, gas):
    made = proposal(fleet, gas)
    before = snapshot_of(fleet.path)
    assert refused(fleet.repository.install_catalog, made.metadata, made.floors, lambda _: None) == "manifest_missing"
    assert refused(fleet.repository.install_catalog, made.metadata, made.floors, lambda _: b"{}") == "hash_mismatch"
    assert snapshot_of(fleet.path) == before
    assert fleet.repository.status()["catalog"]["version"] == 1
    fleet.install(made)


def test_catalog_whose_files_are_not_here_is_refused(fleet, gas):
    made = proposal(fleet, gas)
    sha256 = gas.files[1]["sha256"]
    path = fleet.path / layout.blob(sha256)
    data = path.read_bytes()
    path.unlink()
    assert refused(fleet.install, made) == "blob_missing"
    path.write_bytes(data[:-1])
    assert refused(fleet.install, made) == "size_mismatch"
    path.write_bytes(data)
    fleet.install(made)


def test_catalog_versions_go_up_by_one(fleet, gas):
    made = proposal(fleet, gas)
    skipped = Metadata.from_bytes(made.metadata)
    skipped.signed.version = 3
    skipped.sign(fleet.signer("ada"))
    assert (
        refused(fleet.repository.install_catalog, skipped.to_bytes(), made.floors, fleet.manifest) == "version_conflict"
    )
    fleet.install(made)
    again = Metadata.from_bytes(made.metadata)
    again.signed.expires += dt.timedelta(days=1)
    again.sign(fleet.signer("ada"))
    assert (
        refused(fleet.repository.install_catalog, again.to_bytes(), made.floors, fleet.manifest) == "version_conflict"
    )


@pytest.mark.parametrize(
    "path",
    [
        "catalog/../../etc/passwd",
        "catalog/gas/1.0.0/../x",
        "catalog/gas/1.0.0/other.json",
        "catalog/gas/../manifest.json",
        "/catalog/gas/1.0.0/manifest.json",
        "catalog/GAS/1.0.0/manifest.json",
        "fleet/line-1.json",
        "catalog/gas/1.0.0/manifest.json/",
    ],
)
@pytest.mark.attack("path traversal")
def test_path_traversal_in_target_names_is_refused(fleet, gas, path):
    made = Metadata.from_bytes(proposal(fleet, gas).metadata)
    made.signed.targets[path] = TargetFile.from_data(path, gas.manifest, ["sha256"])
    made.sign(fleet.signer("ada"))
    before = snapshot_of(fleet.path)
    assert refused(fleet.repository.install_catalog, made.to_bytes(), None, fleet.manifest) == "bad_target"
    assert snapshot_of(fleet.path) == before


def test_expired_and_foreign_catalogs_are_refused(fleet, gas):
    made = proposal(fleet, gas)
    late = Metadata.from_bytes(made.metadata)
    late.signed.expires = fleet.clock() - dt.timedelta(seconds=1)
    late.sign(fleet.signer("ada"))
    assert refused(fleet.repository.install_catalog, late.to_bytes(), made.floors, fleet.manifest) == "expired"
    for signer in (fleet.online, fleet.signer("root"), CryptoSigner.generate_ed25519()):
        foreign = Metadata.from_bytes(made.metadata)
        foreign.sign(signer)
        assert (
            refused(fleet.repository.install_catalog, foreign.to_bytes(), made.floors, fleet.manifest)
            == "bad_signature"
        )


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"[" * 200_000, b'{"signed": 1, "signatures": []}'])
def test_garbage_is_named(fleet, data):
    for install in (fleet.repository.install_root, fleet.repository.install_targets):
        assert refused(install, data) == "malformed_metadata"
    assert refused(fleet.repository.install_catalog, data, None, fleet.manifest) == "malformed_metadata"


def test_metadata_of_another_role_is_refused(fleet):
    assert refused(fleet.repository.install_root, fleet.ceremony.targets) == "malformed_metadata"
    assert refused(fleet.repository.install_targets, fleet.ceremony.root) == "malformed_metadata"


def test_root_must_be_signed_by_the_one_before(fleet, make_fleet, tmp_path):
    other = make_fleet("other")
    forged = keys.next_root(other.ceremony.root, signers=[other.signer("root")], now=fleet.clock())
    assert refused(fleet.repository.install_root, forged) == "bad_signature"
    stranger = Metadata.from_bytes(fleet.ceremony.root)
    stranger.signed.version = 2
    stranger.sign(fleet.online)
    assert refused(fleet.repository.install_root, stranger.to_bytes()) == "bad_signature"


def test_targets_that_would_strand_the_catalog_are_refused(fleet):
    new = CryptoSigner.generate_ed25519().public_key
    replaced = keys.next_targets(
        fleet.ceremony.targets,
        root=fleet.ceremony.root,
        signers=[fleet.signer("targets")],
        now=fleet.clock(),
        approver_keys={new.keyid: new},
    )
    assert refused(fleet.repository.install_targets, replaced) == "bad_signature"


def test_approvers_are_replaced_in_two_steps_while_devices_are_served(fleet, gas, device):
    fleet.approve(gas)
    device.manifest(gas)
    new = CryptoSigner.generate_ed25519()
    old_key, new_key = fleet.signer("ada").public_key, new.public_key
    how = {"root": fleet.ceremony.root, "signers": [fleet.signer("targets")], "now": fleet.clock()}
    both = keys.next_targets(
        fleet.ceremony.targets, approver_keys={old_key.keyid: old_key, new_key.keyid: new_key}, **how
    )
    fleet.repository.install_targets(both)
    device.manifest(gas)
    made = catalog.propose(
        fleet.verified(), catalog.Change(), source=fleet.source(), signer=new, approvers=("eve",), now=fleet.clock()
    )
    fleet.install(made)
    fleet.repository.install_targets(keys.next_targets(both, approver_keys={new_key.keyid: new_key}, **how))
    device.manifest(gas)
    # The old approver's key is worth nothing now.
    stale = Metadata.from_bytes(made.metadata)
    stale.signed.version += 1
    stale.sign(fleet.signer("ada"))
    assert refused(fleet.repository.install_catalog, stale.to_bytes(), None, fleet.manifest) == "bad_signature"


@pytest.mark.attack("extraneous dependencies")
def test_targets_with_other_delegations_are_refused(fleet):
    def spoiled(change):
        metadata = Metadata.from_bytes(fleet.ceremony.targets)
        metadata.signed.version = 2
        change(metadata.signed)
        metadata.sign(fleet.signer("targets"))
        return metadata.to_bytes()

    online = fleet.online.public_key.keyid

    def fleet_approves(signed):
        signed.delegations.roles["catalog"].keyids.append(online)

    for change in (
        lambda s: setattr(s.delegations.roles["catalog"], "terminating", False),
        lambda s: s.delegations.roles["fleet"].paths.append("catalog/*"),
        lambda s: s.delegations.roles.pop("fleet"),
        lambda s: s.targets.__setitem__("x", TargetFile.from_data("x", b"x", ["sha256"])),
        fleet_approves,
    ):
        assert refused(fleet.repository.install_targets, spoiled(change)) == "bad_delegations"
    stranger = CryptoSigner.generate_ed25519().public_key

    def other_online(signed):
        signed.delegations.keys[stranger.keyid] = stranger
        signed.delegations.roles["fleet"].keyids[:] = [stranger.keyid]

    assert refused(fleet.repository.install_targets, spoiled(other_online)) == "online_key_not_trusted"


def test_a_key_under_another_keys_id_is_refused_in_targets_and_root(fleet):
    mine, stranger = fleet.signer("ada").public_key, CryptoSigner.generate_ed25519().public_key
    under_another = stranger.to_dict() | {"keyval": mine.to_dict()["keyval"]}

    def twice(signed):
        # One approver, two ids: a threshold of two would be met by one person.
        signed.delegations.keys[stranger.keyid] = Key.from_dict(stranger.keyid, dict(under_another))
        signed.delegations.roles["catalog"].keyids.append(stranger.keyid)
        signed.delegations.roles["catalog"].threshold = 2

    def swapped(signed):
        signed.keys[stranger.keyid] = Key.from_dict(stranger.keyid, dict(under_another))
        signed.roles["root"].keyids.append(stranger.keyid)

    for name, change, take in (
        ("targets", twice, fleet.repository.install_targets),
        ("root", swapped, fleet.repository.install_root),
    ):
        metadata = Metadata.from_bytes(getattr(fleet.ceremony, name))
        metadata.signed.version = 2
        change(metadata.signed)
        metadata.sign(fleet.signer(name))
        before = snapshot_of(fleet.path)
        assert refused(take, metadata.to_bytes()) == "key_id_mismatch"
        assert snapshot_of(fleet.path) == before


def test_online_key_is_replaced_while_devices_are_served(fleet, gas, device):
    fleet.approve(gas)
    fleet.repository.publish_group("line-1", fleet.document())
    device.sync()
    old = fleet.online.public_key
    signer = make_online_key(fleet.folder / "keys" / "second.pem", fleet.folder / "keys" / "second.pub.json")
    new = signer.public_key
    both, alone = {old.keyid: old, new.keyid: new}, {new.keyid: new}
    root, targets = fleet.ceremony.root, fleet.ceremony.targets
    for online in (both, alone):
        root = keys.next_root(root, signers=[fleet.signer("root")], now=fleet.clock(), online_keys=online)
        targets = keys.next_targets(
            targets, root=root, signers=[fleet.signer("targets")], now=fleet.clock(), online_keys=online
        )
        fleet.repository.install_root(root)
        fleet.repository.install_targets(targets)
        assert json.loads(device.sync()["group_document"])["generation"] == 1
        fleet.repository = Repository(fleet.path, signer, fleet.clock)
        fleet.repository.refresh_expiring()
    assert device.sync()["online_keys"] == [new.keyid]


def test_group_documents_must_be_canonical_and_of_their_group(fleet):
    publish = fleet.repository.publish_group
    for name, data in (
        ("line-1", b"{}"),
        ("line-1", fleet.document() + b"\n"),
        ("line-2", fleet.document()),
        ("../x", fleet.document(name="line-1")),
    ):
        assert refused(publish, name, data) == "bad_document"


def test_publishing_many_groups_signs_once(fleet):
    before = fleet.repository.status()
    assert fleet.repository.publish_groups({f"g-{n}": fleet.document(name=f"g-{n}") for n in range(50)})
    after = fleet.repository.status()
    assert after["timestamp"]["version"] == before["timestamp"]["version"] + 1
    assert after["fleet"]["version"] == before["fleet"]["version"] + 1


def test_refresh_signs_what_is_past_half_its_life_and_nothing_else(fleet):
    assert fleet.repository.refresh_expiring() == ()
    fleet.clock.ahead = dt.timedelta(hours=13)
    assert fleet.repository.refresh_expiring() == ("timestamp",)
    assert fleet.repository.refresh_expiring() == ()
    fleet.clock.ahead = dt.timedelta(days=4)
    assert fleet.repository.refresh_expiring() == ("fleet", "snapshot", "timestamp")


def test_signing_time_never_goes_back_when_the_servers_clock_does(fleet, device):
    first = device.sync()["signed_at"]
    fleet.clock.ahead = dt.timedelta(hours=-5)
    fleet.repository.publish_group("line-1", fleet.document())
    assert device.sync()["signed_at"] >= first


@pytest.mark.parametrize("days", [5, 30, 400])
@pytest.mark.attack("clock poisoning")
def test_a_clock_that_ran_ahead_once_stops_no_device(fleet, device, days):
    device.sync()
    fleet.clock.ahead = dt.timedelta(days=days)
    assert "timestamp" in fleet.repository.refresh_expiring()
    ahead = device.sync(now_s=0)
    fleet.clock.ahead = dt.timedelta()
    fleet.repository.refresh_expiring()
    fleet.repository.publish_group("line-1", fleet.document(2))
    known = {"lower_bound_s": ahead["signed_at"], "lower_bound_keys": ahead["online_keys"]}
    for bound in ({}, known):
        assert json.loads(device.sync(**bound)["group_document"])["generation"] == 2
    # What a reference of time sees; nothing that people signed for half a year has ended by it.
    assert 0 <= ahead["signed_at"] - fleet.clock().timestamp() < 8 * 86400
    roles = {role: (held["version"], held["expires_ms"]) for role, held in fleet.repository.status().items()}
    alerts = expiry.alerts(roles, {}, int(fleet.clock().timestamp() * 1000))
    assert {"signed_time_ahead"} == {alert.code for alert in alerts}


def test_a_server_that_was_off_for_long_catches_up(fleet, tmp_path):
    spent = [0.0]
    path = fleet.path / "metadata"
    folder = MetadataFolder(path, [fleet.online], fleet.clock, monotonic_s=lambda: spent[0])

    def lag_days():
        folder.publish(folder.load(), only_due=False)
        said = json.loads((path / "timestamp.json").read_bytes())["signed"]["x-skerry-signed-at"]
        return (fleet.clock().timestamp() - said) / 86400

    fleet.clock.ahead = dt.timedelta(days=60)
    assert lag_days() == pytest.approx(53, abs=0.1)
    lags = {}
    for day in range(1, 61):
        spent[0] = day * 86400.0
        fleet.clock.ahead = dt.timedelta(days=60 + day)
        lags[day] = lag_days()
    assert lags[20] == pytest.approx(33, abs=0.1)
    assert lags[60] == pytest.approx(0, abs=0.1)


@pytest.mark.attack("server restored from a backup")
def test_restored_backup_jumps_above_what_devices_hold(fleet, device, tmp_path):
    import shutil

    shutil.copytree(fleet.path, tmp_path / "backup")
    for generation in range(1, 6):
        fleet.repository.publish_group("line-1", fleet.document(generation))
    held = device.sync()["tuf"]
    shutil.rmtree(fleet.path)
    shutil.copytree(tmp_path / "backup", fleet.path)
    fleet.repository.publish_group("line-1", fleet.document(9))
    assert device.error("sync", group="line-1") == ("rejected", "rollback")
    fleet.repository.raise_versions({role: held[role] for role in ("timestamp", "snapshot", "fleet")})
    assert json.loads(device.sync()["group_document"])["generation"] == 9
    assert refused(fleet.repository.raise_versions, {"catalog": 7}) == "offline_role"


def test_old_versions_are_deleted_but_not_what_is_served(fleet, device):
    for generation in range(1, 45):
        fleet.repository.publish_group("line-1", fleet.document(generation))
    fleet.repository.refresh_expiring()
    folder = fleet.path / "metadata"
    assert len(list(folder.glob("*.snapshot.json"))) == 32
    assert len(list(folder.glob("*.fleet.json"))) == 32
    assert len(list((fleet.path / "targets" / "fleet").iterdir())) == 32
    assert json.loads(device.sync()["group_document"])["generation"] == 44


def test_blob_appears_only_whole_and_right(fleet, tmp_path):
    import hashlib

    data = os.urandom(100_000)
    sha256 = hashlib.sha256(data).hexdigest()
    assert refused(fleet.repository.put_blob, [data[:-1]], sha256) == "hash_mismatch"
    assert refused(fleet.repository.put_blob, [data[:50_000], data[50_000:]], sha256, 99_999) == "too_large"

    def cut():
        yield data[:10]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        fleet.repository.put_blob(cut(), sha256)
    assert fleet.repository.blob_size(sha256) is None
    assert [path.name for path in (fleet.path / layout.blob(sha256)).parent.iterdir()] == []
    assert fleet.repository.put_blob([data[:50_000], data[50_000:]], sha256) == len(data)
    assert fleet.repository.blob_size(sha256) == len(data)


def test_online_key_is_private_and_never_replaced(tmp_path):
    private, public = tmp_path / "keys" / "online.pem", tmp_path / "keys" / "online.pub.json"
    first = make_online_key(private, public)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    public.unlink()
    assert make_online_key(private, public).public_key == first.public_key
    assert list(key_files.read_online_keys(public.read_bytes())) == [first.public_key.keyid]


def test_damaged_repository_is_named(fleet):
    version = fleet.repository.status()["fleet"]["version"]
    fleet.metadata_file(f"{version}.fleet.json").unlink()
    assert refused(fleet.repository.publish_group, "line-1", fleet.document()) == "repository_damaged"


def test_devices_read_a_consistent_repository_while_it_is_written(fleet, tmp_path):
    ended = threading.Event()

    def write():
        generation = 0
        while not ended.is_set():
            generation += 1
            fleet.repository.publish_group("line-1", fleet.document(generation))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [generation_of(fleet, tmp_path / f"reader-{n % 3}") for n in range(30)]
    finally:
        ended.set()
        writer.join()
    for reader in range(3):
        own = seen[reader::3]
        assert own == sorted(own)


def generation_of(fleet, cache):
    """What a device with this cache reads now, in this process."""
    web = transport.Web(server_url=fleet.site.url, ca_pem=fleet.authority.pem, now_s=time.time(), gap_s=5)
    fresh = updater.DeviceUpdater(
        cache, fleet.url, fetcher=safe_updater.Fetcher(web), bootstrap=fleet.ceremony.root, now_s=time.time()
    )
    fresh.refresh()
    document = fresh.document(layout.group_target("line-1"), 1 << 20)
    web.close()
    return 0 if document is None else json.loads(document)["generation"]


@pytest.mark.parametrize("operation", ["group", "catalog"])
def test_kill_at_every_write_leaves_a_repository_that_devices_follow(fleet, gas, tmp_path, operation):
    fleet.repository.publish_group("line-1", fleet.document(1))
    files = [tmp_path / name for name in ("one", "two", "three")]
    if operation == "group":
        files[0].write_bytes(fleet.document(2))
    else:
        made = proposal(fleet, gas)
        for file, data in zip(files, (made.metadata, made.floors, gas.manifest), strict=True):
            file.write_bytes(data)
    points = 0
    while True:
        arguments = [fleet.path, fleet.folder / "keys" / "online.pem", points, operation, *files]
        ended = warm.run(KILLED, [str(one) for one in arguments], env=os.environ, timeout=60)
        assert ended.returncode in (0, 9), ended.stderr
        assert generation_of(fleet, tmp_path / "device") in (1, 2)
        if ended.returncode == 0:
            break
        points += 1
    assert points >= 6
    again = Repository(fleet.path, fleet.online, fleet.clock)
    assert generation_of(fleet, tmp_path / "device") == (2 if operation == "group" else 1)
    assert len(again.catalog_entries()) == (0 if operation == "group" else 1)
    assert not [path for path in fleet.path.rglob(".new-*") if "blobs" not in path.parts]
