"""What somebody can try who owns the network, the server's disk, or the server's online key; and what the device then says."""

import datetime as dt
import json
import shutil
import time

import pytest
from securesystemslib.signer import CryptoSigner
from skerry_agent.core import lifecycle
from skerry_contract import canonical, layout
from skerry_server.core import eligibility
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from tests.integration.tuf.conftest import DeviceHere


@pytest.fixture
def gas(fleet, make_bundle):
    bundle = make_bundle("gas", "1.0.0")
    fleet.approve(bundle)
    fleet.repository.publish_group("line-1", fleet.document())
    return bundle


def meta_of(data, version):
    return MetaFile(version=version, length=len(data), hashes={"sha256": canonical.sha256(data)})


class Thief:
    """Holds the stolen online key and the server's disk: signs whatever that key can sign."""

    def __init__(self, fleet):
        self.fleet = fleet

    def snapshot(self, change):
        folder = self.fleet.path / layout.METADATA_DIR
        status = self.fleet.repository.status()
        version = status["snapshot"]["version"]
        snapshot = Metadata.from_bytes((folder / f"{version}.snapshot.json").read_bytes())
        change(snapshot.signed)
        snapshot.signed.version += 1
        snapshot.sign(self.fleet.online)
        data = snapshot.to_bytes()
        (folder / f"{snapshot.signed.version}.snapshot.json").write_bytes(data)
        self.timestamp(lambda t: setattr(t, "snapshot_meta", meta_of(data, snapshot.signed.version)))

    def timestamp(self, change):
        path = self.fleet.path / layout.METADATA_DIR / "timestamp.json"
        timestamp = Metadata.from_bytes(path.read_bytes())
        change(timestamp.signed)
        timestamp.signed.version += 1
        timestamp.sign(self.fleet.online)
        path.write_bytes(timestamp.to_bytes())

    def role(self, name, data, version):
        (self.fleet.path / layout.METADATA_DIR / f"{version}.{name}.json").write_bytes(data)
        self.snapshot(lambda s: s.meta.__setitem__(f"{name}.json", meta_of(data, version)))


def test_metadata_that_a_mirror_spoils_between_two_looks_is_no_verdict_on_the_bundle(fleet, device, gas):
    """It is honest until the device knows what to take, and then costs neither the bundle an attempt nor a rollout its candidate."""
    here = DeviceHere(fleet, device.state_dir)
    here.sync()
    honest = {path.name: path.read_bytes() for path in fleet.metadata_file("").glob("*.json")}
    timestamp = json.loads(honest["timestamp.json"])
    flipped = timestamp["signatures"][0]["sig"]
    root = json.loads(fleet.ceremony.root)
    root["signed"]["version"] = 2
    moved = json.loads(honest["timestamp.json"])
    moved["signed"]["version"] += 1
    lies = {
        "a flipped signature": {
            "timestamp.json": json.dumps(
                {**timestamp, "signatures": [{**timestamp["signatures"][0], "sig": "00" + flipped[2:]}]}
            )
        },
        "a next version that nobody signed": {"timestamp.json": json.dumps(moved)},
        "no signature": {"timestamp.json": json.dumps({**timestamp, "signatures": []})},
        "a next root that nobody signed": {"2.root.json": json.dumps(root)},
        "an error page": {"timestamp.json": "<html>busy</html>"},
        "a page in place of a root": {"2.root.json": "<html>gone</html>"},
        "nothing": {"timestamp.json": ""},
        "without end": {"timestamp.json": "[" * 20_000},
    }
    codes = {}
    for what, files in lies.items():
        for name, text in files.items():
            fleet.metadata_file(name).write_text(text)
        kind, codes[what] = here.error(
            "manifest", model="gas", version="1.0.0", digest=gas.digest, limits={"idle_attempts": 1}
        )
        assert not eligibility.is_verdict_on_bundle(codes[what]), (what, kind, codes)
        assert codes[what] not in lifecycle.ATTEMPTS, (what, kind, codes)
        for name in files:
            fleet.metadata_file(name).unlink()
        for name, data in honest.items():
            fleet.metadata_file(name).write_bytes(data)
    assert codes["a flipped signature"] == codes["a next root that nobody signed"] == "bad_signature", "people see it"
    here.manifest(gas)


@pytest.mark.attack("freeze")
def test_what_ended_by_the_timestamps_own_time_is_refused_in_the_same_look_by_a_device_that_knows_no_time(
    fleet, device, gas
):
    here = DeviceHere(fleet, device.state_dir)
    later = fleet.clock() + dt.timedelta(days=8)

    def signed_later(timestamp):
        timestamp.unrecognized_fields[layout.SIGNED_AT_FIELD] = int(later.timestamp())
        timestamp.expires = later + dt.timedelta(days=1)

    Thief(fleet).timestamp(signed_later)
    assert here.error("sync", group="line-1", now_s=1.0) == ("rejected", "expired")


@pytest.mark.attack("arbitrary software")
def test_flipped_byte_in_a_manifest(fleet, device, gas):
    path = next(fleet.path.glob("targets/catalog/gas/1.0.0/*.manifest.json"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    answer = device.error("manifest", model="gas", version="1.0.0", digest=gas.digest, limits={"idle_attempts": 2})
    # What it must be is signed: a word about whoever served it, and none about the bundle.
    assert answer == ("transient", "mirror_wrong")


@pytest.mark.parametrize("name", ["/repository/targets/catalog/gas/", "/repository/metadata/timestamp.json"])
def test_an_error_page_in_place_of_a_manifest_is_asked_again_after_a_pause(fleet, device, gas, name):
    asked = []

    def page(handler, _data):
        asked.append(time.monotonic())
        if len(asked) == 3:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", "11")
        handler.end_headers()
        handler.wfile.write(b"maintenance")
        return True

    fleet.site.spoils[name] = page
    wanted = {"model": "gas", "version": "1.0.0", "digest": gas.digest}
    assert device.ok("manifest", **wanted)["manifest"] == gas.manifest.decode()
    assert len(asked) == 3
    asked.clear()
    assert device.error("manifest", **wanted, limits={"idle_attempts": 2}) == ("transient", "mirror_wrong")
    assert len(asked) == 2


def test_flipped_byte_in_the_group_document(fleet, device, gas):
    path = next(fleet.path.glob("targets/fleet/*.line-1.json"))
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    fleet.site.membership["orders"] = {"cancel": 7}
    assert device.error("sync", group="line-1") == ("rejected", "hash_mismatch")
    # What the server orders is known all the same.
    assert [said["membership"]["orders"] for said in device.progress] == [{"cancel": 7}]


@pytest.mark.parametrize(
    ("said", "after_s"), [("120", 120.0), ("86400", 600.0), ("Thu, 01 Jan 1970 00:00:00 GMT", None)]
)
def test_a_repository_that_is_overloaded_says_when_to_come_again(fleet, device, gas, said, after_s):
    def overloaded(handler, _data):
        handler.send_response(503)
        handler.send_header("Retry-After", said)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    fleet.site.spoils["/repository/metadata/timestamp.json"] = overloaded
    answer = device.ask("sync", group="line-1")["error"]
    assert (answer["kind"], answer["code"], answer.get("after_s")) == ("transient", "unreachable", after_s)


@pytest.mark.attack("arbitrary software")
def test_unlisted_bundle_and_other_digest_are_not_in_the_catalog(device, gas, make_bundle):
    assert device.error("manifest", model="gas", version="2.0.0", digest=gas.digest) == ("rejected", "not_in_catalog")
    assert device.error("manifest", model="gas", version="1.0.0", digest="0" * 64) == ("rejected", "not_in_catalog")


@pytest.mark.attack("arbitrary software")
def test_stolen_online_key_cannot_sign_a_catalog(fleet, device, gas, make_bundle):
    device.sync()
    evil = make_bundle("gas", "6.6.6")
    path = layout.manifest_target("gas", "6.6.6")
    current = Metadata.from_bytes(fleet.metadata_file("2.catalog.json").read_bytes())
    current.signed.version = 3
    current.signed.targets[path] = TargetFile.from_data(path, evil.manifest, ["sha256"])
    for signer in (fleet.online, CryptoSigner.generate_ed25519()):
        current.sign(signer)
        Thief(fleet).role("catalog", current.to_bytes(), 3)
        answer = device.error("manifest", model="gas", version="6.6.6", digest=evil.digest)
        assert answer == ("rejected", "bad_signature")
        synced = device.sync()
        assert synced["floors"] is None
        assert synced["catalog_error"]["code"] == "bad_signature"


@pytest.mark.attack("arbitrary software")
def test_stolen_online_key_cannot_list_a_bundle_in_fleet(fleet, device, gas, make_bundle):
    evil = make_bundle("gas", "6.6.6")
    path = layout.manifest_target("gas", "6.6.6")
    version = fleet.repository.status()["fleet"]["version"]

    def add(signed):
        signed.version += 1
        signed.targets[path] = TargetFile.from_data(path, evil.manifest, ["sha256"])

    data = fleet.resign(f"{version}.fleet.json", fleet.online, add)
    Thief(fleet).role("fleet", data, version + 1)
    device.sync()
    assert device.error("manifest", model="gas", version="6.6.6", digest=evil.digest) == ("rejected", "not_in_catalog")


@pytest.mark.attack("wrong-group document")
def test_stolen_online_key_cannot_give_a_group_the_document_of_another(fleet, device, gas):
    other = fleet.document(7, "line-2")
    path = layout.group_target("line-1")
    file = fleet.path / layout.target_file(path, canonical.sha256(other))
    file.write_bytes(other)
    version = fleet.repository.status()["fleet"]["version"]

    def swap(signed):
        signed.version += 1
        signed.targets[path] = TargetFile.from_data(path, other, ["sha256"])

    data = fleet.resign(f"{version}.fleet.json", fleet.online, swap)
    Thief(fleet).role("fleet", data, version + 1)
    answer = device.ask("sync", group="line-1")["error"]
    assert (answer["kind"], answer["code"]) == ("rejected", "malformed")
    assert "the document is of group line-2" in answer["detail"]


@pytest.mark.attack("rollback of metadata")
def test_stolen_online_key_cannot_bring_back_an_old_catalog(fleet, device, gas, make_bundle):
    fleet.approve(make_bundle("gas", "1.1.0"))
    device.sync()
    Thief(fleet).role("catalog", fleet.metadata_file("2.catalog.json").read_bytes(), 2)
    assert device.error("manifest", model="gas", version="1.0.0", digest=gas.digest) == ("rejected", "rollback")


@pytest.mark.attack("rollback of metadata")
def test_catalog_below_the_version_seen_is_refused_even_when_tuf_forgot_its_snapshot(fleet, device, gas, make_bundle):
    fleet.approve(make_bundle("gas", "1.1.0"))
    device.sync()
    for forgotten in ("snapshot.json", "timestamp.json"):
        (device.state_dir / "tuf" / forgotten).unlink()
    Thief(fleet).role("catalog", fleet.metadata_file("2.catalog.json").read_bytes(), 2)
    for _ in range(2):  # the refusal must not overwrite what it is judged by
        assert device.error("manifest", model="gas", version="1.0.0", digest=gas.digest) == ("rejected", "rollback")


@pytest.mark.attack("rollback of metadata")
def test_rollback_of_the_timestamp(fleet, device, gas):
    old = fleet.metadata_file("timestamp.json").read_bytes()
    fleet.repository.publish_group("line-1", fleet.document(2))
    device.sync()
    fleet.metadata_file("timestamp.json").write_bytes(old)
    assert device.error("sync", group="line-1") == ("rejected", "rollback")


@pytest.mark.attack("rollback of metadata")
def test_rollback_of_the_snapshot(fleet, device, gas):
    fleet.repository.publish_group("line-1", fleet.document(2))
    device.sync()
    now = fleet.repository.status()["snapshot"]["version"]
    old = fleet.metadata_file(f"{now - 1}.snapshot.json").read_bytes()
    Thief(fleet).timestamp(lambda t: setattr(t, "snapshot_meta", meta_of(old, now - 1)))
    assert device.error("sync", group="line-1") == ("rejected", "rollback")


@pytest.mark.attack("freeze")
def test_expired_timestamp(fleet, device, gas):
    late = time.time() + 1.5 * 86400
    assert device.error("sync", group="line-1", now_s=late) == ("rejected", "expired")


@pytest.mark.attack("emergency return")
def test_expired_catalog_stops_new_bundles_but_not_the_group_document(fleet, device, gas):
    later = dt.timedelta(days=200)
    fleet.clock.ahead = later
    fleet.repository.refresh_expiring()
    now_s = time.time() + later.total_seconds()
    answer = device.error("manifest", model="gas", version="1.0.0", digest=gas.digest, now_s=now_s)
    assert answer == ("rejected", "expired")
    synced = device.ok("sync", group="line-1", now_s=now_s)
    assert json.loads(synced["group_document"])["group"] == "line-1"
    assert synced["floors"] is None
    assert synced["catalog_error"]["code"] == "expired"


@pytest.mark.attack("freeze", "clock poisoning")
def test_freeze_is_seen_by_the_signed_lower_bound_when_the_wall_clock_is_wrong(fleet, device, gas):
    frozen = shutil.copytree(fleet.path / "metadata", fleet.folder / "frozen")
    fleet.clock.ahead = dt.timedelta(days=2)
    fleet.repository.refresh_expiring()
    ahead_s = time.time() + 2 * 86400
    fresh = device.sync(now_s=ahead_s)
    assert fresh["signed_at"] == pytest.approx(ahead_s, abs=60)
    # Now the attacker shows yesterday's files to a device that lost its cache and whose clock starts at 1970.
    shutil.rmtree(device.state_dir / "tuf")
    shutil.rmtree(fleet.path / "metadata")
    shutil.copytree(frozen, fleet.path / "metadata")
    refusal = device.ask("sync", group="line-1", now_s=0, lower_bound_s=fresh["signed_at"])["error"]
    assert (refusal["kind"], refusal["code"]) == ("rejected", "expired")
    day = dt.datetime.fromtimestamp(fresh["signed_at"], dt.UTC)
    assert f"it is taken to be {day:%Y-%m-%d %H:%M} UTC, by a signed timestamp" in refusal["detail"]
    assert device.ask("sync", group="line-1", now_s=0)["ok"]["signed_at"] < fresh["signed_at"]


@pytest.mark.attack("clock poisoning")
def test_lower_bound_is_void_once_root_drops_the_key_that_gave_it(fleet, device, gas):
    far = time.time() + 30 * 86400
    keys = [fleet.online.public_key.keyid]
    assert device.error("sync", group="line-1", lower_bound_s=far, lower_bound_keys=keys) == ("rejected", "expired")
    for poisoned in (far, time.time() + 50 * 365 * 86400):
        assert device.sync(lower_bound_s=poisoned, lower_bound_keys=["0" * 64])["online_keys"] == keys


@pytest.mark.attack("endless data")
def test_endless_metadata_ends_at_its_limit(fleet, device, gas):
    def endless(handler, _data):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        while True:
            handler.wfile.write(piece)

    fleet.site.spoils["/repository/metadata/timestamp.json"] = endless
    assert device.error("sync", group="line-1") == ("rejected", "size_mismatch")


@pytest.mark.attack("slow retrieval")
def test_slow_metadata_ends_at_the_errands_time(fleet, device, gas):
    def dripping(handler, data):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for byte in data:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.2)
        return True

    fleet.site.spoils["/repository/metadata/timestamp.json"] = dripping
    began = time.monotonic()
    assert device.error("sync", group="line-1", limits={"errand_s": 2.0}) == ("transient", "timeout")
    assert time.monotonic() - began < 8


@pytest.mark.attack("slow retrieval")
def test_silent_peer_ends_at_the_gap(fleet, device, gas):
    fleet.site.spoils["/repository/metadata/timestamp.json"] = lambda _h, _d: fleet.site.over.wait(30) or True
    assert device.error("sync", group="line-1", limits={"gap_s": 0.5}) == ("transient", "timeout")


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 10_000, b"null", b'{"signed":{},"signatures":[]}', b"\xff\xfe"])
def test_garbage_metadata_is_named(fleet, device, gas, text):
    fleet.metadata_file("timestamp.json").write_bytes(text)
    assert device.error("sync", group="line-1") == ("rejected", "malformed_metadata")


@pytest.mark.attack("clock poisoning")
def test_timestamp_without_its_signing_time_is_refused(fleet, device, gas):
    for wrong in (None, "yesterday", True, -1, 1 << 62):
        Thief(fleet).timestamp(lambda t, wrong=wrong: t.unrecognized_fields.__setitem__(layout.SIGNED_AT_FIELD, wrong))
        assert device.error("sync", group="line-1") == ("rejected", "malformed_metadata")


@pytest.mark.parametrize("group", ["../../catalog/floors", "line-1/../../x", "%2e%2e", "", "a" * 64])
@pytest.mark.attack("path traversal")
def test_group_names_that_would_leave_their_folder_never_become_a_path(fleet, device, gas, group):
    fleet.site.devices.clear()  # so that the request's group counts
    asked = len(fleet.site.asked)
    answer = device.ask("sync", group=group)
    assert answer["error"]["kind"] == "rejected"
    assert not any("targets" in path for path in fleet.site.asked[asked:])


@pytest.mark.parametrize(
    ("model", "version"), [("../fleet", "1.0.0"), ("gas", "../../1.0.0"), ("gas", "1.0"), ("", "")]
)
@pytest.mark.attack("path traversal")
def test_bundle_names_that_would_leave_their_folder_never_become_a_path(device, gas, model, version):
    assert device.error("manifest", model=model, version=version, digest=gas.digest) == ("rejected", "bad_request")


def test_a_new_root_is_followed_and_remembered_without_replacing_the_operators(fleet, device, gas):
    from skerry_cli import keys

    before = (device.state_dir / "identity" / "root.json").read_bytes()
    second = keys.next_root(fleet.ceremony.root, signers=[fleet.signer("root")], now=fleet.clock())
    fleet.repository.install_root(second)
    assert device.sync()["tuf"]["root"] == 2
    assert (device.state_dir / "identity" / "root.json").read_bytes() == before
    assert (device.state_dir / "tuf" / "root.json").read_bytes() == second
    # A forged third root is not followed.
    forged = Metadata.from_bytes(second)
    forged.signed.version = 3
    forged.sign(fleet.online)
    fleet.metadata_file("3.root.json").write_bytes(forged.to_bytes())
    assert device.error("sync", group="line-1") == ("rejected", "bad_signature")


def test_a_poisoned_cache_is_verified_again_from_the_operators_root(fleet, device, gas, make_fleet, make_device):
    other = make_fleet("other")
    other.repository.publish_group("line-1", other.document(99))
    stranger = make_device(other, "stranger").enrol()
    stranger.sync()
    device.sync()
    shutil.rmtree(device.state_dir / "tuf")
    shutil.copytree(stranger.state_dir / "tuf", device.state_dir / "tuf", symlinks=True)
    assert json.loads(device.sync()["group_document"])["generation"] == 1


def test_two_couriers_at_once_take_turns(fleet, device, gas):
    running = [device.start("sync", group="line-1") for _ in range(4)]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert "ok" in json.loads(out.splitlines()[-1]), (out, err)


def test_unreachable_repository_is_transient(fleet, device, gas):
    fleet.site.close()
    assert device.error("sync", group="line-1") == ("transient", "unreachable")


def test_server_with_another_ca_is_not_talked_to(fleet, device, gas, make_fleet):
    other = make_fleet("impostor")
    answer = device.error("sync", group="line-1", server_url=other.site.url, repository_url=other.url)
    assert answer == ("transient", "unreachable")
    assert other.site.asked == []


def test_server_with_an_expired_certificate_is_not_talked_to(fleet, device, gas):
    asked = len(fleet.site.asked)
    assert device.error("sync", group="line-1", now_s=time.time() + 400 * 86400) == ("transient", "unreachable")
    assert len(fleet.site.asked) == asked


def test_plain_http_is_refused(fleet, device, gas):
    answer = device.error("sync", group="line-1", repository_url="http://127.0.0.1:1/repository")
    assert answer == ("rejected", "bad_url")
