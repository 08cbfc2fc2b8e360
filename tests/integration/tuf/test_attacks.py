"""Attacks by name, against the real repository by the courier's own code: what a mirror, or whoever holds the online key, may still try."""

import json
import os
import shutil
import time

import pytest
from skerry_contract import canonical, group, layout
from skerry_runtime.delta import container, making
from skerry_runtime.delta.container import Coding, Packed, Role
from skerry_runtime.delta.packing import squeeze
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, TargetFile, Targets

from tests.integration.tuf.conftest import Bundle, Device, DeviceHere, Fleet
from tests.integration.tuf.test_metadata_attacks import Thief, meta_of

OLD, NEW = os.urandom(60_000), os.urandom(60_000)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """One for the module: its clock, its keys and what was approved stay."""
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    made.gas = Bundle("gas", "1.0.0", weights=OLD)
    made.approve(made.gas)
    made.repository.publish_group("line-1", made.document(1))
    yield made
    made.site.close()


@pytest.fixture(scope="module")
def enrolled(fleet, tmp_path_factory):
    return Device(fleet, tmp_path_factory.mktemp("device") / "state").enrol()


@pytest.fixture
def device(fleet, enrolled, tmp_path):
    """A copy of the device as it was enrolled; afterwards the repository is the honest one again."""
    state = shutil.copytree(enrolled.state_dir, tmp_path / "state", symlinks=True)
    honest = shutil.copytree(fleet.path, tmp_path / "honest")
    yield DeviceHere(fleet, state)
    fleet.site.folder = fleet.path
    fleet.site.spoils.clear()
    shutil.rmtree(fleet.path)
    shutil.copytree(honest, fleet.path)


def versions(fleet):
    return {role: held["version"] for role, held in fleet.repository.status().items()}


def named(digest_of, path):
    return layout.target_file(path, canonical.sha256(digest_of))


@pytest.mark.attack("mix and match")
def test_a_mirror_that_mixes_files_of_two_honest_moments_is_refused(fleet, device, tmp_path):
    first, before = fleet.document(1), versions(fleet)
    newer = Bundle("gas", "1.1.0", weights=NEW)
    fleet.approve(newer)
    second = fleet.document(2)
    fleet.repository.publish_group("line-1", second)
    after = versions(fleet)
    older_manifest = layout.manifest_target("gas", "1.0.0")
    newer_manifest = layout.manifest_target("gas", "1.1.0")
    group_target = layout.group_target("line-1")
    mixes = {
        "snapshot": (f"metadata/{after['snapshot']}.snapshot.json", f"metadata/{before['snapshot']}.snapshot.json"),
        "fleet": (f"metadata/{after['fleet']}.fleet.json", f"metadata/{before['fleet']}.fleet.json"),
        "document": (named(second, group_target), named(first, group_target)),
        "catalog": (f"metadata/{after['catalog']}.catalog.json", f"metadata/{before['catalog']}.catalog.json"),
        "manifest": (named(newer.manifest, newer_manifest), named(fleet.gas.manifest, older_manifest)),
    }
    for what, (place, other) in mixes.items():
        mirror = shutil.copytree(fleet.path, tmp_path / what)
        shutil.copyfile(fleet.path / other, mirror / place)
        fleet.site.folder = mirror
        if what == "manifest":
            refused = device.error("manifest", model="gas", version="1.1.0", digest=newer.digest)
        elif what == "catalog":
            synced = device.sync()
            refused = ("rejected", synced["catalog_error"]["code"])
            assert synced["floors"] is None
        else:
            refused = device.error("sync", group="line-1")
        wanted = ("transient", "mirror_wrong") if what == "manifest" else ("rejected", "hash_mismatch")
        assert refused == wanted, what
    # All that was honest, as it was then: a device that has seen more takes none of it.
    fleet.site.folder = fleet.path
    assert json.loads(device.sync()["group_document"])["generation"] == 2
    timestamp = Metadata.from_file(str(fleet.metadata_file("timestamp.json")))
    timestamp.signed.snapshot_meta.version = before["snapshot"]
    mirror = shutil.copytree(fleet.path, tmp_path / "all")
    (mirror / "metadata" / "timestamp.json").write_bytes(timestamp.to_bytes())
    fleet.site.folder = mirror
    assert device.error("sync", group="line-1") == ("rejected", "bad_signature")


@pytest.mark.attack("extraneous dependencies")
def test_what_was_signed_brings_nothing_along_that_was_not(fleet, device):
    """The thief has the online key: he delegates what is the catalog's, lists roles that nobody asked for, and has a document ask for more."""
    thief, evil = Thief(fleet), Bundle("gas", "6.6.6", weights=b"evil" * 100)
    path = layout.manifest_target("gas", "6.6.6")
    place = fleet.path / named(evil.manifest, path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(evil.manifest)
    for sha256, data in evil.blobs.items():
        fleet.repository.put_blob([data], sha256)
    extra = Metadata(Targets(targets={path: TargetFile.from_data(path, evil.manifest, ["sha256"])}))
    extra.sign(fleet.online)
    data = extra.to_bytes()
    document = group.encode(
        group.GroupDocument(
            schema=1,
            group="line-1",
            generation=9,
            models={
                "gas": group.ModelPlan(
                    stable=group.Target(digest=fleet.gas.digest, version="1.0.0"),
                    via=(group.Target(digest=evil.digest, version="6.6.6"),),
                )
            },
        )
    )
    asked_for = layout.group_target("line-1")
    (fleet.path / named(document, asked_for)).write_bytes(document)
    version = versions(fleet)["fleet"]

    def grow(signed):
        signed.version += 1
        key = fleet.online.public_key
        everything = DelegatedRole("extra", [key.keyid], 1, True, paths=["*", "catalog/*", "catalog/*/*/*"])
        signed.delegations = Delegations({key.keyid: key}, {"extra": everything})
        signed.targets[asked_for] = TargetFile.from_data(asked_for, document, ["sha256"])

    fleets = fleet.resign(f"{version}.fleet.json", fleet.online, grow)
    (fleet.path / "metadata" / "1.extra.json").write_bytes(data)
    thief.snapshot(lambda s: s.meta.__setitem__("extra.json", meta_of(data, 1)))
    thief.role("fleet", fleets, version + 1)
    asked = len(fleet.site.asked)
    synced = device.sync()
    assert json.loads(synced["group_document"])["models"]["gas"]["via"][0]["version"] == "6.6.6"
    assert device.error("manifest", model="gas", version="6.6.6", digest=evil.digest) == ("rejected", "not_in_catalog")
    assert not [one for one in fleet.site.asked[asked:] if "extra" in one or "6.6.6" in one]
    # Of a bundle that was approved no file comes but those that its manifest names.
    manifest = device.manifest(fleet.gas)["manifest"]
    further = {"path": "extra.so", "sha256": next(iter(evil.blobs)), "size": len(next(iter(evil.blobs.values())))}
    wanted = {"digest": fleet.gas.digest, "manifest": manifest, "files": [*fleet.gas.files, further]}
    assert device.error("fetch", **wanted) == ("rejected", "bad_request")
    assert not list(device.state_dir.rglob("extra.so"))


def list_manifest(fleet, model, version, data):
    """A careless approver signs a catalog that lists these bytes as a manifest; the server is stolen and publishes it."""
    path = layout.manifest_target(model, version)
    place = fleet.path / named(data, path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    now = versions(fleet)["catalog"]

    def add(signed):
        signed.version += 1
        signed.targets[path] = TargetFile.from_data(path, data, ["sha256"])

    Thief(fleet).role("catalog", fleet.resign(f"{now}.catalog.json", fleet.signer("ada"), add), now + 1)
    return canonical.sha256(data)


@pytest.mark.attack("oversized manifest")
def test_a_manifest_beyond_its_bound_is_not_even_asked_for(fleet, device):
    value = json.loads(fleet.gas.manifest) | {"version": "1.2.0", "pad": "x" * (1 << 20)}
    digest = list_manifest(fleet, "gas", "1.2.0", canonical.encode(value))
    answer = device.ask("manifest", model="gas", version="1.2.0", digest=digest)["error"]
    assert (answer["kind"], answer["code"]) == ("rejected", "malformed_manifest")
    assert "wanted at most 1048576" in answer["detail"]
    assert not [one for one in fleet.site.asked if "1.2.0" in one]


@pytest.mark.attack("duplicate JSON key")
def test_a_document_that_two_readers_would_understand_differently_is_refused(fleet, device):
    timestamp = fleet.metadata_file("timestamp.json")
    honest = timestamp.read_text()
    signed = json.loads(honest)["signed"]
    later = json.dumps({**signed, "version": signed["version"] + 7})
    for first, second in ((later, json.dumps(signed)), (json.dumps(signed), later)):
        # Whichever a reader takes: tuf takes the last.
        timestamp.write_text(honest.replace("{", f'{{"signed": {first}, "signed": {second}, ', 1))
        answer = device.ask("sync", group="line-1")["error"]
        assert (answer["kind"], answer["code"]) == ("rejected", "malformed_metadata")
        assert "stands twice" in answer["detail"]
    timestamp.write_text(honest)
    # The server refuses to publish such a one, whoever signed it.
    catalog = fleet.metadata_file(f"{versions(fleet)['catalog']}.catalog.json").read_text()
    with pytest.raises(Exception, match="stands twice"):
        fleet.repository.install(catalog=catalog.replace('"signed"', '"signed":{},"signed"', 1).encode())
    # Documents of our own have one form only.
    doubled = fleet.gas.manifest.replace(b'"version":"1.0.0"', b'"version":"0.9.0","version":"1.3.0"')
    digest = list_manifest(fleet, "gas", "1.3.0", doubled)
    assert device.error("manifest", model="gas", version="1.3.0", digest=digest) == ("rejected", "malformed_manifest")


@pytest.fixture
def updating(fleet, device):
    """The device runs 1.0.0, and 2.0.0 is approved: what it fetches."""
    target = Bundle("gas", "2.0.0", weights=NEW)
    fleet.approve(target)
    slot = device.state_dir / "slots" / fleet.gas.digest
    (slot / "golden").mkdir(parents=True)
    (slot / "manifest.json").write_bytes(fleet.gas.manifest)
    for file in fleet.gas.files:
        (slot / file["path"]).write_bytes(fleet.gas.blobs[file["sha256"]])
    held = [{"digest": fleet.gas.digest, "variant": "onnx"}]
    wanted = {
        "digest": target.digest, "manifest": target.manifest.decode(), "files": target.files, "variant": "onnx", "held": held,
    }  # fmt: skip
    return slot, wanted


@pytest.mark.attack("decompression bomb")
def test_a_delta_that_unpacks_without_end_ends_in_the_whole_file(fleet, device, updating):
    _, wanted = updating
    plan = making.Plan()
    plan.literal(NEW)
    control, _, *_ = plan.streams()
    bomb = Packed(
        role=Role.LITERALS, coding=Coding.LZMA, size_bytes=len(NEW), data=squeeze(bytes(24 << 20), 0, 0, 0, 16),
        properties=container.lzma_properties(0, 0, 0, 16),
    )  # fmt: skip
    base = bytes.fromhex(canonical.sha256(OLD))
    patch = container.write(base, len(OLD), len(NEW), [control, bomb])
    assert len(patch) < len(NEW)
    place = fleet.path / layout.delta(canonical.sha256(OLD), canonical.sha256(NEW))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(patch)
    began = time.monotonic()
    answer = device.ok("fetch", **wanted)
    assert answer["refused"] == {"delta_wrong": 1}
    assert answer["files"]["resuming"] >= 1
    assert time.monotonic() - began < 30
    staged = device.state_dir / "slots" / ".staging" / wanted["digest"]
    assert (staged / "model.onnx").read_bytes() == NEW
    assert sum(file.stat().st_size for file in device.state_dir.rglob("*") if file.is_file()) < 1 << 20


@pytest.mark.attack("symlink")
def test_links_where_a_courier_reads_and_writes_are_not_followed(fleet, device, updating, tmp_path):
    slot, wanted = updating
    outside = tmp_path / "outside"
    outside.write_bytes(NEW)
    # A file of a slot that is a link to the right content; the place of what comes in part, and of what is staged, links to a precious file.
    (slot / "model.onnx").unlink()
    (slot / "model.onnx").symlink_to(outside)
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    sha256 = canonical.sha256(NEW)
    parts, staged = device.state_dir / "slots" / ".parts", device.state_dir / "slots" / ".staging" / wanted["digest"]
    for place in (parts / sha256, parts / f"{sha256}.etag", parts / f"{sha256}.lost", staged / "model.onnx"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(precious)
    assert device.ok("fetch", **wanted)["bytes"] == len(NEW)
    assert precious.read_bytes() == b"precious"
    assert not (staged / "model.onnx").is_symlink()
    assert (staged / "model.onnx").read_bytes() == NEW
    assert not parts.exists() or list(parts.iterdir()) == []
