"""Where the files of a bundle come from beside the network: other bundles, halves of former downloads; and whether the disk has room."""

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from skerry_agent.core import admission
from skerry_agent.courier import parts
from skerry_agent.courier.acquiring import Wanted
from skerry_agent.slots import Slots
from skerry_contract import manifest as m

WEIGHTS = os.urandom(400_000)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def two(fleet, make_bundle):
    """Two versions with the same weights and, each, files of its own."""
    return [fleet.push(make_bundle("gas", version, weights=WEIGHTS)) for version in ("1.0.0", "1.1.0")]


def fetch(bundle, **more):
    return {"digest": bundle.digest, "manifest": bundle.manifest.decode(), "files": bundle.files, **more}


def slots(device):
    return device.state_dir / "slots"


def asked(fleet):
    return len([path for path in fleet.site.asked if SHA256 in path])


def in_a_slot(device, bundle):
    device.ok("fetch", **fetch(bundle))
    (slots(device) / ".staging" / bundle.digest).rename(slots(device) / bundle.digest)
    return slots(device) / bundle.digest / "model.onnx"


def test_a_file_of_another_bundle_is_shared_and_not_fetched_again(fleet, device, two):
    first, second = two
    held = in_a_slot(device, first)
    answer = device.ok("fetch", **fetch(second))
    assert answer["bytes"] == 0
    assert answer["files"] == {"otherbundles": 2}
    shared = slots(device) / ".staging" / second.digest / "model.onnx"
    assert shared.read_bytes() == WEIGHTS
    # One file on the disk, and it outlives the bundle that it came from.
    assert shared.samefile(held)
    shutil.rmtree(slots(device) / first.digest)
    assert shared.read_bytes() == WEIGHTS
    assert asked(fleet) == 1


def test_a_file_that_stands_twice_in_a_bundle_comes_once(fleet, device, make_bundle):
    bundle = fleet.push(make_bundle("gas", "1.0.0", weights=WEIGHTS, again=WEIGHTS))
    assert [file["sha256"] for file in bundle.files].count(SHA256) == 2
    answer = device.ok("fetch", **fetch(bundle))
    assert answer["files"]["samebundle"] == 1
    assert asked(fleet) == 1
    assert answer["bytes"] == len(WEIGHTS) + len(bundle.blobs[bundle.files[0]["sha256"]])


def test_no_lock_stays_behind_whatever_was_fetched(fleet, device, two):
    before = set(device.state_dir.rglob("*lock*"))
    for bundle in two:
        device.ok("fetch", **fetch(bundle))
    assert set(device.state_dir.rglob("*lock*")) == before


def test_a_shared_file_that_rotted_is_fetched_and_the_rot_does_not_spread(fleet, device, two):
    first, second = two
    held = in_a_slot(device, first)
    held.write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
    assert device.ok("fetch", **fetch(second))["bytes"] == len(WEIGHTS)
    assert (slots(device) / ".staging" / second.digest / "model.onnx").read_bytes() == WEIGHTS


def test_a_shared_file_on_another_disk_is_copied(fleet, device, two):
    first, second = two
    in_a_slot(device, first)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        assert os.stat(elsewhere).st_dev != slots(device).stat().st_dev
        shutil.move(slots(device) / first.digest, Path(elsewhere) / "slot")
        (slots(device) / first.digest).symlink_to(Path(elsewhere) / "slot")
        assert device.ok("fetch", **fetch(second))["bytes"] == 0
    assert (slots(device) / ".staging" / second.digest / "model.onnx").read_bytes() == WEIGHTS


def test_a_link_out_of_a_slot_is_no_file_to_share(fleet, device, two, tmp_path):
    first, second = two
    held = in_a_slot(device, first)
    (tmp_path / "outside").write_bytes(WEIGHTS)
    held.unlink()
    held.symlink_to(tmp_path / "outside")
    assert device.ok("fetch", **fetch(second))["files"] == {"otherbundles": 1, "resuming": 1}
    assert not (slots(device) / ".staging" / second.digest / "model.onnx").is_symlink()


def test_what_came_in_half_for_one_version_goes_on_for_the_next(fleet, device, two):
    first, second = two
    part = slots(device) / ".parts" / SHA256
    process = device.start("fetch", **fetch(first, max_kib_s=200))
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 100_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    held = part.stat().st_size
    answer = device.ok("fetch", **fetch(second))
    # The golden cases are in the unfinished bundle, the weights go on where they were.
    assert answer["files"] == {"otherbundles": 1, "resuming": 1}
    assert answer["bytes"] == len(WEIGHTS) - held
    assert device.ok("fetch", **fetch(first))["bytes"] == 0


def test_two_couriers_that_want_the_same_file_fetch_it_once(fleet, device, two):
    running = [device.start("fetch", **fetch(bundle, max_kib_s=300)) for bundle in two]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert b'"ok"' in out, (out, err)
    assert asked(fleet) == 1


@pytest.mark.parametrize("reserve", [{"reserve_bytes": 1 << 62}, {"reserve_files": 1 << 62}])
def test_a_disk_without_room_is_said_before_the_first_byte(fleet, device, two, reserve):
    folder = slots(device) / ".parts"
    folder.mkdir(parents=True)
    (folder / SHA256).write_bytes(WEIGHTS[:1000])
    (folder / ("0" * 64)).write_bytes(b"of a file that nobody wants now")
    if "reserve_files" in reserve and os.statvfs(folder).f_files == 0:
        pytest.skip("this file system does not count its files")
    answer = device.ask("fetch", **fetch(two[0], **reserve))["error"]
    assert (answer["kind"], answer["code"]) == ("degraded", "not_enough_disk")
    assert "are kept for others" in answer["detail"]
    assert fleet.site.asked.count(f"/repository/blobs/sha256/{SHA256[:2]}/{SHA256}") == 0
    # What is of no use now has made way; what is wanted has not.
    assert [path.name for path in folder.iterdir()] == [SHA256]


@pytest.fixture
def room_for_one(device):
    """Slots on a disk with room for one copy of some weights of 1.2 MB, and hardly more."""
    if os.geteuid() != 0:
        if os.environ.get("CI") == "true":
            pytest.fail("mounting a file system needs root")
        pytest.skip("mounting a file system needs root")
    slots(device).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1260k", "none", str(slots(device))], check=True)
    yield device
    subprocess.run(["umount", "-l", str(slots(device))], check=True)


def admitted(device, bundle):
    """What the supervisor would say of it now, by the same books."""
    held, manifest = Slots(slots(device)), m.parse(bundle.manifest)
    facts = admission.Device(
        runtimes={"onnx": "99.0.0"}, arch="x86_64", memory_free_mb=9000, agent="99.0.0",
        disk_free_mb=shutil.disk_usage(slots(device)).free / 1e6,
    )  # fmt: skip
    memory = admission.Memory(
        present_bytes=held.present_bytes(bundle.digest, manifest.files()),
        idle_bytes=held.idle_bytes(manifest.files()),
    )
    return admission.admit(manifest, facts, memory)


def test_a_download_that_was_cut_goes_on_where_there_is_room_for_one_copy(fleet, room_for_one, make_bundle):
    device, bundle = room_for_one, fleet.push(make_bundle("gas", "1.0.0", weights=WEIGHTS * 3))
    weights = next(file for file in bundle.files if file["path"] == "model.onnx")["sha256"]
    assert isinstance(admitted(device, bundle), admission.Admit)

    def cut(handler, data):
        if weights not in handler.path:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:960_000])
        handler.close_connection = True
        return True

    fleet.site.spoils["/repository/blobs/"] = cut
    assert device.error("fetch", **fetch(bundle, limits={"attempts": 1})) == ("transient", "unreachable")
    assert (slots(device) / ".parts" / weights).stat().st_size == 960_000
    fleet.site.spoils.clear()
    assert isinstance(admitted(device, bundle), admission.Admit)
    assert device.ok("fetch", **fetch(bundle))["bytes"] < 300_000


def test_what_came_in_part_of_another_bundle_makes_way(fleet, room_for_one, make_bundle):
    device, bundle = room_for_one, fleet.push(make_bundle("gas", "1.0.0", weights=WEIGHTS * 3))
    folder = slots(device) / ".parts"
    folder.mkdir()
    (folder / ("0" * 64)).write_bytes(bytes(960_000))
    assert isinstance(admitted(device, bundle), admission.Admit)
    device.ok("fetch", **fetch(bundle))
    assert not (folder / ("0" * 64)).exists()


def test_the_reserve_does_not_keep_a_device_from_what_it_has(fleet, device, two):
    in_a_slot(device, two[0])
    assert device.ok("fetch", **fetch(two[1], reserve_bytes=1 << 62))["bytes"] == 0


def test_halves_that_nobody_wants_are_few(tmp_path):
    names = [f"{n:064x}" for n in range(20)]
    for age, name in enumerate(names):
        for side in ("", ".etag", ".lost"):
            (tmp_path / (name + side)).write_text("1")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    wanted = Wanted(name="x", size=10, hashes={"sha256": names[19]})
    with parts.held(tmp_path, Wanted(name="y", size=10, hashes={"sha256": names[18]})):
        parts.tidy(tmp_path, [wanted.key], keep=3)
    left = {path.name.partition(".")[0] for path in tmp_path.iterdir()}
    # The newest three, the wanted one, and the one that is being fetched.
    assert left == {*names[:3], names[18], names[19]}
