"""Updates that are carried here in a folder: the same checks by the same couriers, and no network at all."""

import datetime as dt
import os
import shutil
import time
from pathlib import Path

import pytest

WEIGHTS = os.urandom(3_000_000)
DAY_S = 86_400.0


@pytest.fixture
def bundle(fleet, device, make_bundle):
    """Approved and given to the group; the device was enrolled before, and saw nothing of it."""
    made = make_bundle("gas", "1.0.0", weights=WEIGHTS)
    fleet.approve(made, gas="0.9.0")
    fleet.repository.publish_group("line-1", fleet.document())
    return made


@pytest.fixture
def stick(fleet, bundle, tmp_path):
    """A copy of the repository; nobody answers at the server's address any more."""
    folder = tmp_path / "stick"
    shutil.copytree(fleet.path, folder)
    fleet.site.close()
    fleet.site.asked.clear()
    return folder


def blob(folder, bundle, name="model.onnx"):
    sha256 = next(file["sha256"] for file in bundle.files if file["path"] == name)
    return folder / "blobs" / "sha256" / sha256[:2] / sha256


def fetch(bundle, stick, **more):
    return {
        "digest": bundle.digest, "manifest": bundle.manifest.decode(), "files": bundle.files, "folder": str(stick),
        "limits": {"idle_attempts": 1}, **more,
    }  # fmt: skip


def test_a_folder_brings_a_whole_update_without_any_network(fleet, device, bundle, stick):
    synced = device.sync(folder=str(stick))
    assert '"generation":1' in synced["group_document"]
    assert synced["floors"] == {"gas": "0.9.0"}
    assert (synced["membership"], synced["self_error"], synced["catalog_error"]) == (None, None, None)
    assert device.manifest(bundle, folder=str(stick))["manifest"].encode() == bundle.manifest
    fetched = device.ok("fetch", **fetch(bundle, stick))
    assert (fetched["bytes"], fetched["files"]) == (0, {"folder": 2})
    staging = device.state_dir / "slots" / ".staging" / bundle.digest
    assert (staging / "model.onnx").read_bytes() == WEIGHTS
    assert fleet.site.asked == []
    # The folder was read, and nothing else: it may be mounted read-only.
    assert device.progress[-1]["total_done"] == device.progress[-1]["total_size"]


@pytest.mark.attack("rollback of metadata")
def test_a_folder_older_than_what_the_device_saw_is_a_rollback(fleet, device, bundle, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(fleet.path, old)
    fleet.repository.publish_group("line-1", fleet.document(2))
    device.sync()
    before = device.files()
    assert device.error("sync", group="line-1", folder=str(old)) == ("rejected", "rollback")
    said = device.ask("sync", group="line-1", folder=str(old))["error"]["detail"]
    assert f"{old} is older than what this device has seen: export the update anew" in said
    assert device.files() == before


def test_a_folder_of_another_operator_is_refused(device, make_fleet, tmp_path):
    other = make_fleet("other")
    other.repository.publish_group("line-1", other.document())
    device.sync()
    before = device.files()
    assert device.error("sync", group="line-1", folder=str(other.path)) == ("rejected", "bad_signature")
    assert device.files() == before


def test_a_folder_counts_for_some_days_after_its_date_and_the_offline_roles_never_do(device, stick):
    later = time.time() + 10 * DAY_S
    assert device.error("sync", group="line-1", folder=str(stick), now_s=later) == ("rejected", "expired")
    assert device.error("sync", group="line-1", folder=str(stick), now_s=later, age_s=2 * DAY_S) == (
        "rejected",
        "expired",
    )
    said = device.ask("sync", group="line-1", folder=str(stick), now_s=later, age_s=2 * DAY_S)["error"]["detail"]
    now = dt.datetime.fromtimestamp(later, dt.UTC)
    assert "longer ago than the 2 days that a folder may be old" in said
    assert f"it is taken to be {now:%Y-%m-%d}" in said
    assert device.sync(folder=str(stick), now_s=later, age_s=14 * DAY_S)["catalog_error"] is None
    # Ten years: no age makes an old root good.
    assert device.error(
        "sync", group="line-1", folder=str(stick), now_s=time.time() + 3650 * DAY_S, age_s=3660 * DAY_S
    ) == ("rejected", "expired")


def test_an_expired_catalog_of_a_folder_is_no_catalog(fleet, device, stick):
    from tuf.api.metadata import Metadata

    newest = max(stick.glob("metadata/*.catalog.json"), key=lambda path: int(path.name.split(".")[0]))
    ends = Metadata.from_file(str(newest)).signed.expires
    targets = Metadata.from_file(str(next(stick.glob("metadata/*.targets.json")))).signed.expires
    assert ends < targets, "the catalog goes first, or this test needs another date"
    synced = device.sync(folder=str(stick), now_s=ends.timestamp() + 60, age_s=3660 * DAY_S)
    assert synced["catalog_error"]["code"] == "expired"
    assert synced["floors"] is None
    assert synced["group_document"]


def test_a_device_without_a_clock_takes_a_folder_and_knows_the_time_of_it_afterwards(device, stick):
    assert abs(device.sync(folder=str(stick), now_s=0)["signed_at"] - time.time()) < 120


def test_what_came_in_part_goes_on(device, bundle, stick):
    part = device.state_dir / "slots" / ".parts" / blob(stick, bundle).name
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(WEIGHTS[:2_000_000])
    # A stick that was pulled, and one whose first bytes cannot be read any more: neither is needed for the rest.
    blob(stick, bundle).write_bytes(b"\0" * 2_000_000 + WEIGHTS[2_000_000:])
    assert device.ok("fetch", **fetch(bundle, stick))["files"] == {"folder": 2}


@pytest.mark.slow
def test_a_torn_part_is_copied_anew(device, bundle, stick):
    part = device.state_dir / "slots" / ".parts" / blob(stick, bundle).name
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"\0" * 2_000_000)
    assert device.ok("fetch", **fetch(bundle, stick))["files"] == {"folder": 2}
    assert (device.state_dir / "slots" / ".staging" / bundle.digest / "model.onnx").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "wrong", ["flipped", pytest.param("short", marks=pytest.mark.slow), pytest.param("gone", marks=pytest.mark.slow)]
)
def test_a_damaged_file_of_a_folder_is_said_and_never_staged(device, bundle, stick, wrong):
    path = blob(stick, bundle)
    if wrong == "flipped":
        path.write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
    elif wrong == "short":
        path.write_bytes(WEIGHTS[:-1])
    else:
        path.unlink()
    answer = device.ask("fetch", **fetch(bundle, stick))["error"]
    assert (answer["kind"], answer["code"]) == ("transient", "unreachable")
    words = {"flipped": "model.onnx is damaged", "short": f"has {len(WEIGHTS) - 1} bytes", "gone": "is not there"}
    assert words[wrong] in answer["detail"]
    assert not (device.state_dir / "slots" / ".staging" / bundle.digest / "model.onnx").exists()
    # Nothing of a bad copy stays to be gone on with.
    assert not (device.state_dir / "slots" / ".parts" / path.name).exists()


def test_a_damaged_file_of_a_folder_comes_over_the_network_where_there_is_one(fleet, device, bundle, tmp_path):
    shutil.copytree(fleet.path, tmp_path / "stick")
    blob(tmp_path / "stick", bundle).write_bytes(b"\0" * len(WEIGHTS))
    assert device.ok("fetch", **fetch(bundle, tmp_path / "stick"))["files"] == {"folder": 1, "resuming": 1}


def test_a_manifest_comes_over_the_network_where_the_folder_is_behind_it(fleet, device, bundle, make_bundle, tmp_path):
    shutil.copytree(fleet.path, tmp_path / "stick")
    newer = make_bundle("gas", "2.0.0")
    fleet.approve(newer)
    assert device.manifest(newer, folder=str(tmp_path / "stick"))["manifest"].encode() == newer.manifest
    fleet.site.close()
    kind, code = device.error(
        "manifest", model="gas", version="2.0.0", digest=newer.digest, folder=str(tmp_path / "stick")
    )
    assert (kind, code) == ("transient", "unreachable")


def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("what only this device may read")
    return path


def linked_file(path: Path, elsewhere: Path) -> None:
    path.unlink()
    path.symlink_to(elsewhere)


def linked_folder(path: Path, elsewhere: Path) -> None:
    path.parent.rename(elsewhere.with_name("moved"))
    path.parent.symlink_to(elsewhere.with_name("moved"))


def pipe(path: Path, _elsewhere: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [linked_file, linked_folder, pipe])
@pytest.mark.attack("symlink")
def test_links_and_pipes_in_a_folder_are_not_followed(device, bundle, stick, tmp_path, spoil):
    began = time.monotonic()
    metadata = stick / "metadata" / "timestamp.json"
    good = metadata.read_bytes()
    spoil(metadata, secret(tmp_path))
    kind, code = device.error("sync", group="line-1", folder=str(stick))
    assert (kind, code) == ("rejected", "folder_unsafe")
    if spoil is not linked_folder:
        metadata.unlink()
        metadata.write_bytes(good)
        spoil(blob(stick, bundle), secret(tmp_path))
        said = device.ask("fetch", **fetch(bundle, stick))["error"]["detail"]
        assert "a link, or no folder" in said or "wanted a plain file" in said
    assert time.monotonic() - began < 60


def test_a_folder_that_lacks_something_or_cannot_be_read_says_what(device, stick, tmp_path):
    answer = device.ask("sync", group="line-1", folder=str(tmp_path / "nowhere"))["error"]
    assert answer["code"] == "folder_incomplete"
    for path in stick.glob("metadata/*.fleet.json"):
        path.unlink()
    answer = device.ask("sync", group="line-1", folder=str(stick))["error"]
    assert (answer["kind"], answer["code"]) == ("rejected", "folder_incomplete")
    assert "fleet.json" in answer["detail"]


def test_a_folder_for_another_group_says_for_which_it_should_be_made(device, stick):
    for path in stick.glob("targets/fleet/*"):
        path.unlink()
    answer = device.ask("sync", group="line-1", folder=str(stick))["error"]
    assert (answer["kind"], answer["code"]) == ("rejected", "folder_incomplete")
    assert "brings nothing for this device's group: export it with --group line-1" in answer["detail"]


@pytest.mark.attack("endless data")
def test_an_endless_file_of_a_folder_is_cut_off(device, stick):
    with (stick / "metadata" / "timestamp.json").open("r+b") as file:
        file.truncate(8 << 30)
    assert device.error("sync", group="line-1", folder=str(stick)) == ("rejected", "size_mismatch")
