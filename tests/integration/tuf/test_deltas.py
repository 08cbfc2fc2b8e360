"""A file made of a delta: fewer bytes; and whatever is wrong with the delta, the whole file, at a bounded price."""

import functools
import hashlib
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from skerry_agent.core import lifecycle
from skerry_agent.courier import download, patched, requests, transport, watch
from skerry_agent.courier.acquiring import Wanted
from skerry_agent.courier.meter import Meter
from skerry_contract import layout
from skerry_runtime import delta

OLD = os.urandom(120_000)
NEW = OLD[:30_000] + os.urandom(6_000) + OLD[36_000:]
OTHER = OLD[:50_000] + os.urandom(70_000)
LIMITS = requests.Limits(gap_s=1.0, pause_s=0.01)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Place:
    """A device that runs 1.0.0 and is given 2.0.0, and the repository that it asks."""

    def __init__(self, fleet, make_bundle, folder, *, old=OLD, new=NEW):
        self.fleet, self.site, self.state_dir = fleet, fleet.site, folder / "device"
        self.old, self.new = old, new
        self.base = make_bundle("gas", "1.0.0", weights=old)
        self.target = fleet.push(make_bundle("gas", "2.0.0", weights=new))
        self.slots = self.state_dir / "slots"
        slot = self.slots / self.base.digest
        (slot / "golden").mkdir(parents=True)
        (slot / "manifest.json").write_bytes(self.base.manifest)
        for file in self.base.files:
            (slot / file["path"]).write_bytes(self.base.blobs[file["sha256"]])
        (self.state_dir / "identity").mkdir()
        (self.state_dir / "identity" / "fleet-ca.pem").write_text(fleet.authority.pem)
        self.name = f"/repository/{layout.delta(sha256(old), sha256(new))}"
        self.blob = f"/repository/{layout.blob(sha256(new))}"

    def request(self, **more):
        held = [{"digest": self.base.digest, "variant": "onnx"}]
        fields = {
            "state_dir": str(self.state_dir), "server_url": self.site.url, "repository_url": self.fleet.url, "now_s": time.time(),
            "digest": self.target.digest, "manifest": self.target.manifest.decode(), "files": self.target.files,
            "variant": "onnx", "held": held, "limits": {"gap_s": LIMITS.gap_s, "pause_s": LIMITS.pause_s},
        }  # fmt: skip
        return json.dumps(fields | more).encode()

    def fetch(self, **more):
        """In this process; the answer, after a look at what is on disk."""
        answer = download.fetch(requests.parse(requests.Fetch, self.request(**more)), lambda _progress: None)
        assert (self.staging / "model.onnx").read_bytes() == self.new
        assert self.leftovers() == []
        hidden = [path.name for path in self.staging.rglob(".*")]
        assert hidden == []
        return {"delta_bytes": 0, "patched_bytes": 0, "refused": {}} | answer

    @property
    def staging(self):
        return self.slots / ".staging" / self.target.digest

    def leftovers(self):
        folder = self.slots / ".parts"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def make(self, patch=None):
        """Serves the delta, or other bytes under its name; its size."""
        path = self.fleet.path / self.name.removeprefix("/repository/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if patch is None:
            patch = made(self.old, self.new)
        path.write_bytes(patch)
        return len(patch)

    def spoil(self, how):
        self.site.spoils["/repository/deltas/"] = how


@functools.cache
def made(base, target):
    with tempfile.TemporaryDirectory() as folder:
        a, b, patch = (Path(folder) / name for name in ("a", "b", "patch"))
        a.write_bytes(base)
        b.write_bytes(target)
        delta.make(a, b, patch)
        return patch.read_bytes()


@pytest.fixture
def place(fleet, make_bundle, tmp_path):
    return Place(fleet, make_bundle, tmp_path)


def head(handler, length, status=200, **more):
    handler.send_response(status)
    for name, value in {"Content-Length": length, **more}.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()


def test_a_file_is_made_of_the_one_that_runs_and_a_delta(place):
    size = place.make()
    answer = place.fetch()
    assert size < len(NEW) / 10
    assert answer["bytes"] == answer["delta_bytes"] == size
    assert (answer["patched_bytes"], answer["refused"]) == (len(NEW), {})
    assert answer["files"] == {"otherbundles": 1, "patched": 1}
    assert place.site.asked == [place.name]


def test_a_device_without_the_base_takes_the_whole_file_and_asks_for_nothing_else(place):
    place.make()
    answer = place.fetch(held=[])
    assert answer["bytes"] == len(NEW)
    assert place.site.asked == [place.blob]


@pytest.mark.parametrize("how", ["rotted", "gone", "other variant", "manifest"])
def test_a_slot_that_is_not_what_it_should_be_is_no_base(place, how):
    place.make()
    slot = place.slots / place.base.digest
    held = [{"digest": place.base.digest, "variant": "lite" if how == "other variant" else "onnx"}]
    if how == "rotted":
        (slot / "model.onnx").write_bytes(bytes(len(OLD)))
    elif how == "gone":
        (slot / "model.onnx").unlink()
    elif how == "manifest":
        (slot / "manifest.json").write_bytes(place.base.manifest.replace(b"MIT", b"BSD"))
    answer = place.fetch(held=held)
    assert place.blob in place.site.asked
    assert place.name not in place.site.asked
    assert answer["delta_bytes"] == 0


def test_a_delta_that_is_not_there_costs_one_request_on_the_same_connection(place):
    answer = place.fetch()
    assert place.site.asked == [place.name, place.blob]
    assert len(place.site.connections) == 1
    assert (answer["bytes"], answer["refused"]) == (len(NEW), {"delta_missing": 1})


def test_what_an_older_version_had_is_the_base_when_what_runs_now_has_no_delta(place, make_bundle):
    place.make()
    other = make_bundle("gas", "1.5.0", weights=os.urandom(5000))
    slot = place.slots / other.digest
    (slot / "golden").mkdir(parents=True)
    (slot / "manifest.json").write_bytes(other.manifest)
    (slot / "model.onnx").write_bytes(other.blobs[next(f["sha256"] for f in other.files if f["path"] == "model.onnx")])
    held = [{"digest": digest, "variant": "onnx"} for digest in (other.digest, place.base.digest)]
    answer = place.fetch(held=held)
    assert (answer["patched_bytes"], answer["refused"]) == (len(NEW), {"delta_missing": 1})


def flipped(place):
    patch = bytearray(made(OLD, NEW))
    patch[len(patch) // 2] ^= 1
    place.make(bytes(patch))


def for_another_base(place):
    place.make(made(OLD[:-1] + b"?", NEW))


def to_another_file(place):
    place.make(made(OLD, OLD[:20_000] + NEW[20_000:35_000] + OLD[35_000:]))


def cut_short(place):
    patch = made(OLD, NEW)
    place.make(patch[: len(patch) // 2])


def too_large(place):
    place.make(os.urandom(len(NEW)))


def nonsense(place):
    place.make(b"<html>sign in to the hotel</html>" * 50)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (flipped, "delta_wrong"),
        (for_another_base, "delta_wrong"),
        (to_another_file, "delta_wrong"),
        (cut_short, "delta_wrong"),
        (nonsense, "delta_wrong"),
        (too_large, "delta_too_large"),
    ],
)
def test_a_delta_that_is_no_good_ends_in_the_whole_file_and_is_not_asked_for_again(place, how, code):
    how(place)
    # The blob is slow to come: the fetch ends without it, and the next one finds what this one learned.
    place.site.spoils["/repository/blobs/"] = lambda handler, _data: head(handler, 0, 503) or True
    with pytest.raises(Exception, match="503"):
        place.fetch(limits={"gap_s": 1.0, "pause_s": 0.01, "idle_attempts": 1})
    del place.site.spoils["/repository/blobs/"]
    asked = place.site.asked.count(place.name)
    answer = place.fetch()
    assert place.site.asked.count(place.name) == asked == 1
    assert answer["bytes"] == len(NEW)
    # And the run that met it says what was wrong.
    for file in place.staging.iterdir():
        if file.is_file():
            file.unlink()
    answer = place.fetch()
    assert answer["refused"] == {code: 1}
    assert answer["delta_bytes"] < len(NEW)


def test_what_deltas_of_a_file_cost_is_one_budget_over_bases_and_over_other_bundles(place, make_bundle):
    """Else a mirror has a device fetch a file's size in vain for each base, and again whenever something else came in between."""
    spoiled = [os.urandom(100_000), os.urandom(100_000)]
    for base, patch in zip((OLD, OTHER), spoiled, strict=True):
        path = place.fleet.path / layout.delta(sha256(base), sha256(NEW))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(patch)
    other = make_bundle("gas", "1.5.0", weights=OTHER)
    slot = place.slots / other.digest
    (slot / "golden").mkdir(parents=True)
    (slot / "manifest.json").write_bytes(other.manifest)
    for file in other.files:
        (slot / file["path"]).write_bytes(other.blobs[file["sha256"]])
    held = [{"digest": digest, "variant": "onnx"} for digest in (place.base.digest, other.digest)]
    third = place.fleet.push(make_bundle("gas", "3.0.0", weights=os.urandom(5000)))
    away = {"limits": {"gap_s": 1.0, "pause_s": 0.01, "idle_attempts": 1}, "held": held}
    place.site.spoils[f"/repository/blobs/sha256/{sha256(NEW)[:2]}"] = lambda handler, _data: (
        head(handler, 0, 404) or True
    )
    for _ in range(2):
        with pytest.raises(Exception, match="404"):
            place.fetch(**away)
        between = {"digest": third.digest, "manifest": third.manifest.decode(), "files": third.files, "held": held}
        download.fetch(requests.parse(requests.Fetch, place.request(**between)), lambda _progress: None)
        spent = json.loads((place.slots / ".parts" / f"{sha256(NEW)}.spent").read_bytes())
        assert spent == {"size_bytes": 100_000, "tries": 1}
    place.site.spoils.clear()
    answer = place.fetch(held=held)
    # The first cost most of the file's size; what the others announced was too much after it.
    assert (answer["bytes"], answer["refused"]) == (len(NEW), {"delta_wasted": 2})


def endless(handler, _data):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while True:
        handler.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")


def silent(handler, data):
    head(handler, len(data))
    handler.wfile.flush()
    time.sleep(2.5)
    return True


def broken_off(handler, data):
    head(handler, len(data))
    handler.wfile.write(data[:10])
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.close()
    return True


def refused(handler, _data):
    head(handler, 0, 403)
    return True


def failing(handler, _data):
    head(handler, 0, 500)
    return True


def elsewhere(handler, _data):
    head(handler, 0, 302, Location=handler.path)
    return True


def nowhere(handler, _data):
    head(handler, 0, 302, Location="https://a..b/delta")
    return True


def unlimited(handler, _data):
    head(handler, 1 << 50)
    return True


def dripping(handler, data):
    head(handler, len(data))
    for start in range(0, len(data), 10):
        handler.wfile.write(data[start : start + 10])
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    "spoil",
    [endless, silent, broken_off, refused, failing, elsewhere, nowhere, unlimited, dripping],
    ids=lambda how: how.__name__,
)
@pytest.mark.attack("endless data", "slow retrieval")
def test_a_server_that_misbehaves_with_deltas_ends_in_the_whole_file_at_a_bounded_price(place, spoil):
    size = place.make()
    place.spoil(spoil)
    began = time.monotonic()
    answer = place.fetch(limits={"gap_s": 0.5, "slow_s": 1.0, "slow_bytes": 4096, "pause_s": 0.01})
    assert time.monotonic() - began < 20
    assert answer["files"]["resuming"] == 1
    assert answer["bytes"] <= len(NEW) + size
    assert sum(answer["refused"].values()) <= 1


def test_a_server_that_is_overloaded_for_a_moment_costs_no_whole_file(place):
    """A fleet that took whole files for it would keep the overload up."""
    size = place.make()
    asked = []

    def overloaded(handler, _data):
        asked.append(time.monotonic())
        if len(asked) > 2:
            return False
        head(handler, 0, 503 if len(asked) == 1 else 429, **({"Retry-After": "1"} if len(asked) == 1 else {}))
        return True

    place.spoil(overloaded)
    answer = place.fetch(limits={"pause_s": 0.01})
    assert (answer["files"]["patched"], answer["patched_bytes"]) == (1, len(NEW))
    assert answer["bytes"] < size + 1000
    assert len(asked) == 3
    assert asked[1] - asked[0] >= 1.0


def test_a_delta_that_was_cut_is_resumed_where_it_broke(place):
    size = place.make()
    cuts = []

    def cut_once(handler, data):
        if cuts:
            return False
        cuts.append(handler.path)
        tag = f'"{sha256(data)[:16]}"'
        head(handler, len(data), ETag=tag)
        handler.wfile.write(data[:3000])
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.close()
        return True

    place.spoil(cut_once)
    answer = place.fetch()
    assert place.site.ranges == ["bytes=3000-"]
    assert answer["bytes"] == size
    assert answer["patched_bytes"] == len(NEW)


def test_what_came_of_a_delta_is_there_for_the_next_run_and_one_made_anew_begins_again(place):
    size = place.make()

    def cut(handler, data):
        if handler.headers.get("Range"):
            head(handler, 0, 500)
            return True
        head(handler, len(data), ETag=f'"{sha256(data)[:16]}"')
        handler.wfile.write(data[:3000])
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.close()
        return True

    place.spoil(cut)
    place.site.spoils["/repository/blobs/"] = lambda handler, _data: head(handler, 0, 503) or True
    with pytest.raises(Exception, match="503"):
        place.fetch(limits={"gap_s": 1.0, "pause_s": 0.01, "idle_attempts": 1})
    place.site.spoils.clear()
    (part,) = [name for name in place.leftovers() if "." not in name]
    assert (place.slots / ".parts" / part).stat().st_size == 3000
    # Of another day, under the same name.
    (place.slots / ".parts" / f"{part}.etag").write_text('"another"')
    answer = place.fetch()
    assert answer["bytes"] == size
    assert answer["patched_bytes"] == len(NEW)


def test_the_rest_of_a_whole_file_is_preferred_where_it_is_less(place):
    size = place.make()
    (place.slots / ".parts").mkdir()
    (place.slots / ".parts" / sha256(NEW)).write_bytes(NEW[: -size // 2])
    answer = place.fetch()
    assert answer["files"]["resuming"] == 1
    assert answer["bytes"] < size


@pytest.mark.parametrize("size", ["small", "large"])
def test_applying_has_its_time(place, monkeypatch, size):
    # Else the supervisor would end the courier in the middle of a large one, in order, again and again.
    assert lifecycle.DEADLINES_S["fetch"] > patched._MOST_S
    place.make()
    if size == "small":
        monkeypatch.setattr(patched, "_LEAST_S", 1e-4)
        monkeypatch.setattr(patched, "_BYTES_S", 1e12)
    else:
        monkeypatch.setattr(patched, "_MOST_S", 1e-4)
    answer = place.fetch()
    assert answer["refused"] == {"delta_slow": 1}
    assert answer["files"]["resuming"] == 1


@pytest.mark.parametrize("lacks", ["room", "memory"])
def test_a_device_that_is_short_of_something_keeps_nothing_of_the_delta(place, monkeypatch, lacks):
    place.make()
    request = requests.parse(requests.Fetch, place.request())
    web = transport.Web(server_url=place.site.url, ca_pem=place.fleet.authority.pem, now_s=time.time(), gap_s=1.0)

    def short(*_arguments, **_more):
        raise MemoryError

    if lacks == "memory":
        monkeypatch.setattr(delta, "apply", short)
    with watch.Watch(30.0) as overdue:
        meter = Meter(lambda _progress: None, overdue, max_bytes_s=0, limits=LIMITS)
        lack = "the disk is full" if lacks == "room" else ""
        source = patched.Patched(web, place.fleet.url, place.slots, request, meter, lambda _files, _bytes: lack)
        wanted = Wanted(name="model.onnx", size=len(NEW), hashes={"sha256": sha256(NEW)})
        assert source.bring(wanted, place.state_dir / "result") is False
    web.close()
    assert source.refused == {"not_enough_disk" if lacks == "room" else "not_enough_memory": 1}
    assert [name for name in place.leftovers() if not name.endswith((".delta", ".spent"))] == []
    assert not (place.state_dir / "result").exists()


def test_no_delta_of_an_encrypted_bundle_is_asked_for_where_none_could_be_opened(place):
    place.make()
    request = requests.parse(requests.Fetch, place.request())
    web = transport.Web(server_url=place.site.url, ca_pem=place.fleet.authority.pem, now_s=time.time(), gap_s=1.0)
    with watch.Watch(30.0) as overdue:
        meter = Meter(lambda _progress: None, overdue, max_bytes_s=0, limits=LIMITS)
        source = patched.Patched(
            web, place.fleet.url, place.slots, request, meter, lambda _files, _bytes: "", content_key=b"k" * 32
        )
        wanted = Wanted(name="model.onnx", size=len(NEW), hashes={"sha256": sha256(NEW)})
        assert source.bring(wanted, place.state_dir / "result") is False
        assert meter.received == 0
    web.close()
    assert source.told() == {"delta_bytes": 0, "patched_bytes": 0, "refused": {"no_memory_folder": 1}}


def tries(place):
    for path in (place.slots / ".parts").glob("*.spent"):
        return json.loads(path.read_bytes()).get("tries", 0)
    return 0


def in_the_middle(place, device, nth, how):
    """A courier that is ended while it applies a delta for the nth time."""
    process = device.start("fetch", **json.loads(place.request()))
    deadline = time.monotonic() + 60
    while tries(place) < nth:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(how)
    process.communicate()
    assert not (place.staging / "model.onnx").exists()


def test_a_courier_that_is_ended_in_order_while_it_applies_a_delta_loses_no_try(place, make_device):
    place.make()
    device = make_device(place.fleet, "device")
    in_the_middle(place, device, 1, signal.SIGTERM)
    assert tries(place) == 0


def test_a_fetch_of_another_bundle_beside_it_takes_nothing_away_of_a_delta_that_is_applied(
    place, make_bundle, make_device, monkeypatch
):
    """As a shadow of another model comes while an update does."""
    size = place.make()
    other = place.fleet.push(make_bundle("air", "3.0.0", weights=os.urandom(5000)))
    device = make_device(place.fleet, "device")
    between = {"digest": other.digest, "manifest": other.manifest.decode(), "files": other.files, "held": []}
    whole, apply = [], delta.apply

    def beside(base, patch, target, **wanted):
        (target.parent / f".{target.name}.patching").write_bytes(b"half of it")
        process = device.start("fetch", **json.loads(place.request(**between)))
        whole.append(process.communicate(timeout=60)[0])
        assert (target.parent / f".{target.name}.patching").exists()
        apply(base, patch, target, **wanted)

    monkeypatch.setattr(delta, "apply", beside)
    answer = place.fetch()
    assert b'"ok"' in whole[0]
    assert (answer["bytes"], answer["refused"]) == (size, {})
    assert place.leftovers() == []


def test_a_delta_that_never_gets_to_its_end_before_the_courier_is_ended_in_order_is_given_up(place, monkeypatch):
    """Windows that are shorter than applying takes, say, or a network that changes every minute."""
    place.make()
    begun = 0

    def ended(*_arguments, **_more):
        nonlocal begun
        begun += 1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(delta, "apply", ended)
    for _ in range(patched.MOST_ENDED + patched.MOST_TRIES):
        with pytest.raises(SystemExit):
            place.fetch()
    answer = place.fetch()
    assert answer["refused"] == {"delta_crashed": 1}
    assert (answer["bytes"], begun) == (len(NEW), patched.MOST_ENDED + patched.MOST_TRIES)


def test_kill_9_while_a_delta_is_applied_goes_on_without_the_network_and_a_third_time_takes_the_whole_file(
    place, make_device
):
    size = place.make()
    device = make_device(place.fleet, "device")

    def killed(nth):
        in_the_middle(place, device, nth, signal.SIGKILL)

    killed(1)
    # As power that fails between a write and its rename leaves it.
    (state,) = (place.slots / ".parts").glob("*.delta")
    state.with_name(f".{state.name}.new").write_bytes(b"{")
    (place.slots / ".parts" / f".{state.name.removesuffix('delta')}patched.patching").write_bytes(b"half")
    asked = len(place.site.asked)
    answer = place.fetch()
    assert (answer["bytes"], answer["patched_bytes"]) == (0, len(NEW))
    assert len(place.site.asked) == asked
    for path in ("model.onnx", "manifest.json"):
        (place.staging / path).unlink()
    killed(1)
    killed(2)
    answer = place.fetch()
    assert answer["refused"] == {"delta_crashed": 1}
    assert (answer["bytes"], answer["delta_bytes"]) == (len(NEW), 0)
    assert place.site.asked.count(place.name) == 2
    assert size < len(NEW) / 10
