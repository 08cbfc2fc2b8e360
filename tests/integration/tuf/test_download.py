"""The files of a bundle: damaged, endless, slow, cut, killed, renamed; and what is left on disk."""

import hashlib
import http.client
import os
import stat
import time

import pytest

WEIGHTS = os.urandom(600_000)


@pytest.fixture
def big(fleet, make_bundle):
    return fleet.push(make_bundle("gas", "1.0.0", weights=WEIGHTS))


def fetch(bundle, **more):
    return {"digest": bundle.digest, "manifest": bundle.manifest.decode(), "files": bundle.files, **more}


def weights_file(bundle):
    return next(file for file in bundle.files if file["path"] == "model.onnx")


def weights_digest():
    return hashlib.sha256(WEIGHTS).hexdigest()


def staging(device, bundle):
    return device.state_dir / "slots" / ".staging" / bundle.digest


def part_of(device, bundle):
    """What came of the weights so far."""
    return device.state_dir / "slots" / ".parts" / weights_file(bundle)["sha256"]


def leave_part(device, bundle, data):
    """As if that much had come before."""
    part = part_of(device, bundle)
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(data)
    return part


def head(handler, length):
    handler.send_response(200)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()


@pytest.mark.attack("arbitrary software")
def test_flipped_byte_in_a_blob_is_refused_and_nothing_of_it_stays(fleet, device, big):
    sha256 = weights_file(big)["sha256"]
    path = fleet.path / "blobs" / "sha256" / sha256[:2] / sha256
    data = bytearray(WEIGHTS)
    data[300_000] ^= 1
    path.write_bytes(data)
    assert device.error("fetch", **fetch(big)) == ("transient", "mirror_wrong")
    assert len([path for path in fleet.site.asked if sha256 in path]) == 2
    folder = staging(device, big)
    assert not (folder / "manifest.json").exists()
    assert [path.name for path in folder.iterdir() if path.is_file()] == [".manifest.json"]
    assert part_of(device, big).stat().st_size == 0


@pytest.mark.attack("endless data")
def test_endless_blob_ends_at_its_signed_size(fleet, device, big):
    def endless(handler, _data):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while True:
            handler.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")

    fleet.site.spoils[f"/repository/blobs/sha256/{weights_file(big)['sha256'][:2]}"] = endless
    assert device.error("fetch", **fetch(big)) == ("transient", "mirror_wrong")
    assert part_of(device, big).stat().st_size == 0


def test_blob_announced_with_another_size_is_refused_before_it_is_read(fleet, device, big):
    asked = []
    fleet.site.spoils["/repository/blobs/"] = lambda handler, _data: asked.append(1) or head(handler, 1 << 50) or True
    assert device.error("fetch", **fetch(big, limits={"idle_attempts": 3})) == ("transient", "mirror_wrong")
    assert len(asked) == 3


def test_an_error_page_with_status_200_is_gone_a_moment_later_and_what_came_stays(fleet, device, big):
    """A CDN's maintenance page: it says nothing about the bundle, and the other files are not fetched for it again."""
    small = next(file for file in big.files if file["path"] != "model.onnx")
    leave_part(device, big, WEIGHTS[:200_000])
    pages = []

    def page(handler, _data):
        if weights_digest() not in handler.path or len(pages) == 2:
            return False
        pages.append(handler.path)
        head(handler, 11)
        handler.wfile.write(b"maintenance")
        return True

    fleet.site.spoils["/repository/blobs/"] = page
    answer = device.ok("fetch", **fetch(big))
    assert (len(pages), answer["bytes"]) == (2, len(WEIGHTS) - 200_000 + small["size"])


@pytest.mark.parametrize("where", ["http://127.0.0.1:1/blob", "https://a..b/blob", f"https://{'a' * 64}.example/"])
def test_a_redirect_to_plain_http_or_to_no_name_speaks_of_the_mirror(fleet, device, big, where):
    def redirect(handler, _data):
        handler.send_response(302)
        handler.send_header("Location", where)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    fleet.site.spoils["/repository/blobs/"] = redirect
    assert device.error("fetch", **fetch(big, limits={"idle_attempts": 2})) == ("transient", "mirror_wrong")


def test_a_link_that_is_paid_by_volume_takes_a_wrong_file_once_in_a_run(fleet, device, big):
    asked = []
    fleet.site.spoils[f"/repository/blobs/sha256/{weights_digest()[:2]}"] = lambda handler, data: (
        asked.append(1) or head(handler, len(data)) or handler.wfile.write(bytes(len(data))) or True
    )
    assert device.error("fetch", **fetch(big, metered=True)) == ("transient", "mirror_wrong")
    assert len(asked) == 1


def test_wrong_bytes_in_run_after_run_stay_a_word_about_the_mirror(fleet, device, big):
    """Not ``download_wasted`` in the end, of which a device has three attempts."""
    fleet.site.spoils[f"/repository/blobs/sha256/{weights_digest()[:2]}"] = lambda handler, data: (
        head(handler, len(data)) or handler.wfile.write(bytes(len(data))) or True
    )
    said = {device.error("fetch", **fetch(big)) for _ in range(4)}
    assert said == {("transient", "mirror_wrong")}
    fleet.site.spoils.clear()
    assert device.ok("fetch", **fetch(big))["files"] == {"here": 1, "resuming": 1}


@pytest.mark.attack("slow retrieval")
def test_slow_blob_is_given_up_in_bounded_time_and_what_came_is_kept(fleet, device, big):
    def dripping(handler, data):
        head(handler, len(data))
        for start in range(0, len(data), 10):
            handler.wfile.write(data[start : start + 10])
            time.sleep(0.1)
        return True

    fleet.site.spoils["/repository/blobs/"] = dripping
    began = time.monotonic()
    limits = {"slow_s": 1.0, "slow_bytes": 4096, "attempts": 3}
    assert device.error("fetch", **fetch(big, limits=limits)) == ("transient", "timeout")
    assert time.monotonic() - began < 15


@pytest.mark.attack("slow retrieval")
def test_silent_connections_are_bounded(fleet, device, big):
    tries = []
    fleet.site.spoils["/repository/blobs/"] = lambda _h, _d: tries.append(1) or fleet.site.over.wait(2) or True
    answer = device.error("fetch", **fetch(big, limits={"gap_s": 0.3, "idle_attempts": 3}))
    assert answer == ("transient", "timeout")
    assert len(tries) == 3


def test_cut_connection_is_resumed_where_it_broke(fleet, device, big):
    cuts = []

    def cut_twice(handler, data):
        if len(data) < 1000 or len(cuts) >= 2:
            return False
        wanted = handler.headers.get("Range")
        if wanted is None:
            head(handler, len(data))
            handler.wfile.write(data[:200_000])
        else:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            handler.send_header("Content-Length", str(len(data) - start))
            handler.end_headers()
            handler.wfile.write(data[start : start + 100_000])
        handler.wfile.flush()
        cuts.append(wanted)
        handler.close_connection = True
        handler.connection.close()
        return True

    fleet.site.spoils["/repository/blobs/"] = cut_twice
    answer = device.ok("fetch", **fetch(big))
    assert cuts[0] is None
    assert cuts[1] is not None
    # Nothing came twice.
    assert answer["bytes"] == sum(file["size"] for file in big.files)
    assert (staging(device, big) / "model.onnx").read_bytes() == WEIGHTS


def test_kill_9_in_the_middle_is_resumed_by_the_next_courier(fleet, device, big):
    part = part_of(device, big)
    process = device.start("fetch", **fetch(big, max_kib_s=200))
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > 100_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    held = part.stat().st_size
    assert 0 < held < len(WEIGHTS)
    assert not (staging(device, big) / "manifest.json").exists()
    answer = device.ok("fetch", **fetch(big))
    assert answer["bytes"] == len(WEIGHTS) - held
    assert fleet.site.ranges == [f"bytes={held}-"]
    assert (staging(device, big) / "model.onnx").read_bytes() == WEIGHTS


def test_part_that_a_power_cut_left_with_a_hole_is_fetched_again(fleet, device, big):
    leave_part(device, big, WEIGHTS[:100_000] + bytes(50_000))
    answer = device.ok("fetch", **fetch(big))
    assert answer["bytes"] > len(WEIGHTS)
    assert (staging(device, big) / "model.onnx").read_bytes() == WEIGHTS


@pytest.mark.parametrize("held", [WEIGHTS, bytes(len(WEIGHTS)), WEIGHTS + b"more"])
def test_part_of_full_size_or_more_is_judged_by_its_hash(fleet, device, big, held):
    leave_part(device, big, held)
    device.ok("fetch", **fetch(big))
    assert (staging(device, big) / "model.onnx").read_bytes() == WEIGHTS


def test_file_that_changed_behind_its_name_starts_over(fleet, device, big):
    part = leave_part(device, big, b"of an older file" * 1000)
    part.with_name(part.name + ".etag").write_text('"another"')
    answer = device.ok("fetch", **fetch(big))
    assert answer["bytes"] == sum(file["size"] for file in big.files)


def test_fetching_again_brings_nothing_and_a_damaged_file_is_replaced(fleet, device, big):
    device.ok("fetch", **fetch(big))
    assert device.ok("fetch", **fetch(big)) == {"bytes": 0, "files": {"here": 2}}
    path = staging(device, big) / "model.onnx"
    path.write_bytes(WEIGHTS[:-1] + b"!")
    assert device.ok("fetch", **fetch(big))["bytes"] == len(WEIGHTS)
    assert path.read_bytes() == WEIGHTS


def test_rate_limit_holds_on_average(device, big):
    began = time.monotonic()
    device.ok("fetch", **fetch(big, max_kib_s=300))
    assert time.monotonic() - began > 0.75 * len(WEIGHTS) / (300 * 1024) - 0.25


def test_missing_blob_is_named_as_such_and_not_asked_for_again_and_again(fleet, device, big):
    sha256 = weights_file(big)["sha256"]
    (fleet.path / "blobs" / "sha256" / sha256[:2] / sha256).unlink()
    assert device.error("fetch", **fetch(big)) == ("transient", "blob_missing")
    assert len([path for path in fleet.site.asked if sha256 in path]) == 2


def test_refused_blob_is_asked_for_a_few_times(fleet, device, big):
    tries = []

    def refuse(handler, _data):
        handler.send_response(status)
        tries.append(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    fleet.site.spoils["/repository/blobs/"] = refuse
    for status in (403, 429, 500, 503):
        answer = device.error("fetch", **fetch(big, limits={"idle_attempts": 3}))
        assert answer == ("transient", "unreachable")
        assert tries[-4:].count(status) == 3


def test_server_that_breaks_off_and_never_resumes_is_given_up_over_all_starts(fleet, device, big):
    """The download that begins again and again for ever, in no run long enough to be noticed."""
    sent = []

    def never_resumes(handler, data):
        if len(data) < 1000:
            return False
        head(handler, len(data))
        handler.wfile.write(data[:400_000])
        handler.wfile.flush()
        sent.append(400_000)
        handler.close_connection = True
        handler.connection.close()
        return True

    fleet.site.spoils["/repository/blobs/"] = never_resumes
    said = []
    while not said or said[-1] == "unreachable":
        said.append(device.error("fetch", **fetch(big, limits={"attempts": 2}))[1])
        assert len(said) <= 6
    assert said[-1] == "download_wasted"
    assert len(said) > 2
    assert sum(sent) < 6 * len(WEIGHTS)
    # Tried again on purpose, it has the whole allowance again; and a server that resumes ends it.
    assert device.error("fetch", **fetch(big, limits={"attempts": 2}))[1] == "unreachable"
    fleet.site.spoils.clear()
    assert device.ok("fetch", **fetch(big))["bytes"] < len(WEIGHTS)
    assert sorted(path.name for path in part_of(device, big).parent.iterdir()) == []


def test_a_resumed_download_names_the_validator_it_began_under(fleet, device, big):
    asked = []
    fleet.site.spoils["/repository/blobs/"] = lambda handler, data: asked.append(handler.headers.get("If-Range"))
    tag = f'"{weights_digest()[:16]}"'
    for held, wanted in ((tag, tag), ('W/"weak"', None)):
        part = leave_part(device, big, WEIGHTS[:200_000])
        if not held.startswith("W"):
            part.with_name(part.name + ".etag").write_text(held)
        asked.clear()
        assert device.ok("fetch", **fetch(big))["bytes"] < len(WEIGHTS)
        assert wanted in asked
        (staging(device, big) / "model.onnx").unlink()


def test_another_range_than_the_wanted_one_is_never_taken(fleet, device, big):
    ranges = []
    leave_part(device, big, WEIGHTS[:200_000])

    def wrong(handler, data):
        if handler.headers.get("Range") is None:
            return False
        handler.send_response(206)
        handler.send_header("Content-Range", ranges[-1])
        handler.send_header("Content-Length", str(len(data) - 200_000))
        handler.end_headers()
        handler.wfile.write(data[200_000:])
        return True

    fleet.site.spoils["/repository/blobs/"] = wrong
    for answer, code in (
        ("bytes 7-599999/600000", "unreachable"),
        ("bytes 200000-599999/900000", "mirror_wrong"),
        ("lines 200000-599999/600000", "unreachable"),
        ("", "unreachable"),
    ):
        ranges.append(answer)
        assert device.error("fetch", **fetch(big, limits={"idle_attempts": 2}))[1] == code
        assert part_of(device, big).stat().st_size == 200_000


def test_manifest_of_another_digest_is_refused(device, big, make_bundle):
    other = make_bundle("gas", "1.0.1")
    wrong = fetch(big, manifest=other.manifest.decode())
    assert device.error("fetch", **wrong) == ("rejected", "hash_mismatch")


@pytest.mark.parametrize("path", ["../escape", "/etc/escape", "a/../../escape", ".hidden", "", "a//b", "a\\b"])
@pytest.mark.attack("path traversal")
def test_paths_that_would_leave_the_slot_are_refused(device, big, path):
    before = device.files()
    wrong = fetch(big, files=[{**weights_file(big), "path": path}])
    assert device.error("fetch", **wrong) == ("rejected", "bad_request")
    assert device.files() == before


@pytest.mark.attack("extraneous dependencies")
def test_files_that_the_manifest_does_not_name_are_refused(device, big):
    wrong = fetch(big, files=[{**weights_file(big), "sha256": "0" * 64}])
    assert device.error("fetch", **wrong) == ("rejected", "bad_request")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a device that is always full")
def test_full_disk_is_degraded_and_said_so(device, big):
    part = part_of(device, big)
    part.parent.mkdir(parents=True)
    os.mknod(part, stat.S_IFCHR | 0o600, os.stat("/dev/full").st_rdev)
    assert device.error("fetch", **fetch(big)) == ("degraded", "not_enough_disk")


def test_redirect_to_a_cdn_is_followed_and_a_loop_is_not(fleet, device, big):
    def redirect(handler, _data):
        if "moved" in handler.path:
            return False
        handler.send_response(307)
        handler.send_header("Location", f"{handler.path}?moved=1")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    fleet.site.spoils["/repository/blobs/"] = redirect
    device.ok("fetch", **fetch(big))

    def loop(handler, _data):
        handler.send_response(307)
        handler.send_header("Location", handler.path)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    fleet.site.spoils["/repository/blobs/"] = loop
    (staging(device, big) / "model.onnx").unlink()
    assert device.error("fetch", **fetch(big)) == ("transient", "unreachable")


def test_the_test_site_really_serves_ranges(fleet, big):
    """Without this, the resume tests could pass on whole downloads."""
    import ssl

    sha256 = weights_file(big)["sha256"]
    context = ssl.create_default_context(cafile=str(fleet.authority.files.ca))
    connection = http.client.HTTPSConnection("127.0.0.1", fleet.site.server.server_address[1], context=context)
    connection.request("GET", f"/repository/blobs/sha256/{sha256[:2]}/{sha256}", headers={"Range": "bytes=10-"})
    response = connection.getresponse()
    assert (response.status, response.read()) == (206, WEIGHTS[10:])
