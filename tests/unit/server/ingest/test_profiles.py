"""Profiles hold every window that fits its bundle, in the bucket of its time, whatever order and batches they came in."""

import logging
import random

import msgspec
import numpy as np
import pytest
from skerry_contract import histogram as h
from skerry_contract import manifest as m
from skerry_contract import window as w
from skerry_server import outcomes, profiles
from skerry_server.core import profile as core
from skerry_server.core.accuracy import DeviceLabels
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from skerry_server.intake import Intake
from sqlalchemy import update

from tests import models
from tests.counted import Counted, at

BUCKET_MS = 10_000
NOW_MS = 1_700_000_000_000 - 1_700_000_000_000 % BUCKET_MS


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    digest = models.build_bundle(folder, transforms=False)
    return folder, digest


@pytest.fixture(scope="module")
def device(bundle, tmp_path_factory):
    return Counted(*bundle, tmp_path_factory.mktemp("rings"))


@pytest.fixture
def held(server, bundle):
    """The server, which holds the bundle, at ``NOW_MS`` with buckets of ten seconds."""
    folder, digest = bundle
    server.shape = core.shape_of(server.register(folder, digest))
    server.now_ms = NOW_MS
    server.intake = Intake(bucket_ms=BUCKET_MS)
    server.digest = digest
    return server


def windows(device, n, seed=0, size=40):
    found = []
    for i in range(n):
        rows, truth = models.rows(size, draw=seed * 1000 + i)
        found.append(device.window(rows, truth))
    return found


def spans(server, upto_ms=NOW_MS + 10**9):
    with reading(server.engine) as connection:
        return list(profiles.buckets(connection, server.digest, server.shape, from_ms=0, upto_ms=upto_ms))


def merged(parts):
    whole = parts[0]
    for part in parts[1:]:
        whole = w.merge(whole, part)
    return core.profile_of(whole, core.Shape(**SHAPE))[0]


SHAPE = {
    "model": "gas",
    "variants": frozenset({"onnx-fp32"}),
    "features": {f"f{i}": 7 for i in range(4)},
    "outputs": {"probabilities": 3},
    "classes": 3,
}


def test_order_batches_and_devices_do_not_change_the_sums(held, make, device):
    parts = [at(window, NOW_MS - 5000) for window in windows(device, 9)]
    order = list(enumerate(parts))
    random.Random(4).shuffle(order)
    for low, high in ((0, 1), (1, 5), (5, 9)):
        held.take(*(make.up(f"dev-{'ab'[i % 2]}", make.record(i + 1, part)) for i, part in order[low:high]))
    (span,) = spans(held)
    assert span.profile == merged(parts)
    assert (span.from_ms, span.to_ms) == (NOW_MS - BUCKET_MS, NOW_MS)
    assert span.profile.features["f0"].moments.n == span.profile.rows == 360
    (row,) = held.rows(t.profiles)
    assert (row["windows"], row["predicted"], row["matched"]) == (9, 0, 360)


def test_a_late_window_joins_the_bucket_of_its_time(held, make, device):
    old, new, late = windows(device, 3)
    held.take(make.up("dev-a", make.record(1, at(old, NOW_MS - 3_600_000)), make.record(2, at(new, NOW_MS))))
    held.now_ms += 86_400_000
    held.take(make.up("dev-b", make.record(1, at(late, NOW_MS - 3_600_000 + 10))))
    newest, oldest = spans(held)
    assert oldest.profile == merged([old, late])
    assert newest.profile == merged([new])


@pytest.mark.parametrize(
    ("end_ms", "synced"),
    [(NOW_MS - 5000, False), (NOW_MS + 3_600_000, True), (1000, True), (NOW_MS + 3_600_000, False)],
    ids=["clock not set", "clock ahead", "clock of 1970", "ahead and not set"],
)
def test_a_clock_that_cannot_be_believed_counts_as_the_time_of_receipt(held, make, device, end_ms, synced):
    (window,) = windows(device, 1)
    held.take(make.up("dev-a", make.record(1, at(window, end_ms, synced=synced))))
    (span,) = spans(held)
    assert span.from_ms == NOW_MS


def test_a_record_that_comes_twice_is_in_the_profile_once(held, make, device):
    (window,) = windows(device, 1)
    for _ in range(3):
        held.take(make.up("dev-a", make.record(1, at(window, NOW_MS))))
    (span,) = spans(held)
    assert span.profile == merged([window])


def test_a_device_that_counts_for_other_bins_spoils_nothing_and_is_noted(held, make, device):
    good, other = windows(device, 2)
    features = dict(other.features)
    features["f0"] = w.FeatureCounts((1,) * 5, 0, 0, h.moments_of([1] * 5))
    features["made-up"] = features["f1"]
    bad = msgspec.structs.replace(other, features=features)
    ack = held.ack(make.up("dev-a", make.record(1, at(bad, NOW_MS)), make.record(2, at(good, NOW_MS))))
    # The records are held all the same: a device must not keep sending what only the profile cannot use.
    assert ack.upto == 2
    (span,) = spans(held)
    assert span.profile.features["f0"].moments.n == 40
    assert span.profile.features["f1"].moments.n == 80
    assert set(span.profile.features) == {"f0", "f1", "f2", "f3"}
    assert held.counters() == {("dev-a", "profile_unfit"): 2}


@pytest.mark.parametrize("change", ["model", "variant"])
def test_windows_under_a_name_that_the_bundle_does_not_have_make_no_row(held, make, device, change):
    (window,) = windows(device, 1)
    lied = msgspec.structs.replace(window, key=window.key._replace(**{change: "other"}))
    held.take(make.up("dev-a", make.record(1, at(lied, NOW_MS))))
    assert held.rows(t.profiles) == []
    assert held.counters() == {("dev-a", "profile_unfit"): 1}


def test_windows_of_a_bundle_that_nobody_pushed_make_no_row(held, make):
    held.take(make.up("dev-a", make.record(1)))
    assert held.rows(t.profiles) == []
    assert held.counters() == {}
    assert held.counted() == 10


def test_sums_beyond_64_bits_are_kept(held, make, device):
    # A unit that changed: every value is clipped far away, on a large fleet.
    (window,) = windows(device, 1)
    most = 1 << 39
    far = w.FeatureCounts((0,) * 6 + (most,), 0, 0, h.Moments(n=most, total=most << 20, squares=(1 << 63) - 1))
    huge = msgspec.structs.replace(window, features={"f0": far})
    # Impossible: so many values of that size have larger squares.
    held.take(make.up("dev-a", make.record(1, at(huge, NOW_MS))))
    assert held.counters() == {("dev-a", "profile_unfit"): 1}
    n = 1 << 22
    far = w.FeatureCounts((0,) * 6 + (n,), 0, 0, h.Moments(n=n, total=n << 20, squares=n << 40))
    possible = msgspec.structs.replace(window, features={"f0": far})
    for i in range(3):
        held.take(make.up("dev-a", make.record(2 + i, at(possible, NOW_MS))))
    (span,) = spans(held)
    moments = span.profile.features["f0"].moments
    assert (moments.n, moments.total, moments.squares) == (3 * n, 3 * n << 20, 3 * n << 40)
    assert moments.squares > 1 << 63


def test_claims_beyond_every_count_do_not_stop_ingest(held, make, device):
    (window,) = windows(device, 1)
    most = (1 << 40) - 1
    labels = w.Labels(confusion=(most,) * 9, matched=most)
    claim = msgspec.structs.replace(window, labels=labels, counts=w.Counts(ok=most, rows=most))
    records = [make.record(i + 1, at(claim, NOW_MS)) for i in range(40)]
    assert held.ack(make.up("dev-a", *records)).upto == 40
    (span,) = spans(held)
    assert span.profile.rows == 40 * most


def test_a_row_that_cannot_be_read_is_left_out_and_the_rest_is_there(held, make, device, caplog):
    parts = windows(device, 2)
    held.take(make.up("dev-a", make.record(1, at(parts[0], NOW_MS - BUCKET_MS)), make.record(2, at(parts[1], NOW_MS))))
    with writing(held.engine) as connection:
        broken = update(t.profiles).where(t.profiles.c.bucket_ms == NOW_MS).values(body=b"\xc1 no MessagePack")
        connection.execute(broken)
    with caplog.at_level(logging.WARNING):
        (span,) = spans(held)
    assert span.profile == merged(parts[:1])
    assert "profile not readable" in caplog.text


def test_a_bucket_under_way_is_not_read(held, make, device):
    (window,) = windows(device, 1)
    held.take(make.up("dev-a", make.record(1, at(window, NOW_MS))))
    assert spans(held, upto_ms=NOW_MS + BUCKET_MS - 1) == []
    assert len(spans(held, upto_ms=NOW_MS + BUCKET_MS)) == 1


def test_outcomes_add_labels_per_device_and_class(held, make, device):
    confusions = {"dev-a": (5, 1, 0, 0, 4, 0, 0, 0, 2), "dev-b": (1, 0, 0, 3, 0, 0, 0, 0, 0)}
    (window,) = windows(device, 1)
    for seq, end_ms in ((1, NOW_MS - BUCKET_MS), (2, NOW_MS)):
        for name, confusion in confusions.items():
            labels = w.Labels(confusion=confusion, matched=sum(confusion), late=2, unknown=1)
            part = msgspec.structs.replace(window, labels=labels)
            held.take(make.up(name, make.record(seq, at(part, end_ms))))
    with reading(held.engine) as connection:
        whole = outcomes.counted(connection, held.digest, from_ms=0, upto_ms=NOW_MS + 1)
        half = outcomes.counted(connection, held.digest, from_ms=NOW_MS, upto_ms=NOW_MS + 1)
        none = outcomes.counted(connection, held.digest, from_ms=NOW_MS + BUCKET_MS, upto_ms=NOW_MS + 10**9)
    assert whole.confusion == tuple(2 * n for n in (6, 1, 0, 3, 4, 0, 0, 0, 2))
    assert whole.devices == [DeviceLabels(24, 2), DeviceLabels(8, 6)]
    assert (whole.rows, whole.labels["matched"], whole.labels["late"], whole.labels["unknown"]) == (160, 32, 8, 4)
    assert half.devices == [DeviceLabels(12, 1), DeviceLabels(4, 3)]
    assert (half.rows, half.from_ms, half.to_ms) == (80, NOW_MS, NOW_MS + BUCKET_MS)
    assert (none.rows, none.confusion, none.devices, none.from_ms) == (0, (), [], None)


def test_outcomes_add_how_long_labels_took_per_class_exactly(held, make, device):
    confusion = (5, 1, 0, 0, 4, 0, 0, 0, 2)
    took = {0: [0, 3, 3, 60, 7200, 90], 1: [5], 2: [86_400, 1]}
    lags = {of_class: h.exponential_of(seconds) for of_class, seconds in took.items()}
    (window,) = windows(device, 1)
    for seq, end_ms in ((1, NOW_MS - BUCKET_MS), (2, NOW_MS), (3, NOW_MS)):
        for name in ("dev-a", "dev-b"):
            labels = w.Labels(confusion=confusion, matched=12, lags=lags if seq < 3 else {})
            part = msgspec.structs.replace(window, labels=labels)
            held.take(make.up(name, make.record(seq, at(part, end_ms))))
    with reading(held.engine) as connection:
        whole = outcomes.counted(connection, held.digest, from_ms=0, upto_ms=NOW_MS + 1)
        half = outcomes.counted(connection, held.digest, from_ms=NOW_MS, upto_ms=NOW_MS + 1)
        none = outcomes.counted(connection, held.digest, from_ms=NOW_MS + BUCKET_MS, upto_ms=NOW_MS + 10**9)
    assert whole.lags == {of_class: h.exponential_of(seconds * 4) for of_class, seconds in took.items()}
    assert half.lags == {of_class: h.exponential_of(seconds * 2) for of_class, seconds in took.items()}
    assert none.lags == {}
    assert whole.labels["matched"] == 72


@pytest.mark.parametrize(
    "lags",
    [
        {3: h.exponential_of([1])},
        {1: h.exponential_of([1] * 5)},
        {0: h.exponential_of([1 << 40])},
        {0: h.rescale(h.exponential_of([1, 9]), 0)},
    ],
    ids=["no such class", "more than labels", "older than devices", "too coarse"],
)
def test_lags_that_nobody_can_have_counted_take_their_labels_along_and_nothing_else(held, make, device, lags):
    (window,) = windows(device, 1)
    labels = w.Labels(confusion=(5, 1, 0, 0, 4, 0, 0, 0, 2), matched=12, lags=lags)
    held.take(make.up("dev-a", make.record(1, at(msgspec.structs.replace(window, labels=labels), NOW_MS))))
    with reading(held.engine) as connection:
        found = outcomes.counted(connection, held.digest, from_ms=0, upto_ms=NOW_MS + 1)
    assert (found.rows, found.confusion, found.lags) == (window.counts.rows, (), {})


def test_labels_without_answers_move_no_accuracy_that_is_shown(held, make, device):
    (window,) = windows(device, 1)
    with reading(held.engine) as connection:
        manifest = profiles.manifest_of(connection, held.digest)

    def labelled(confusion, rows):
        counts = w.Counts(ok=rows, rows=rows)
        return msgspec.structs.replace(window, counts=counts, labels=w.Labels(confusion=confusion))

    def shown():
        with reading(held.engine) as connection:
            return outcomes.of_bundle(connection, held.digest, manifest, from_ms=0, upto_ms=NOW_MS + 10**6)["measured"]

    for name in ("dev-a", "dev-b"):
        held.take(make.up(name, make.record(1, at(labelled((950, 50, 0, 0, 0, 0, 0, 0, 0), 2000), NOW_MS))))
    honest = shown()
    assert (honest["accuracy"]["value"], honest["coverage"], honest["notes"]) == (0.95, 0.5, ())
    assert len(honest["classes"]) == 3
    # More than a row of the evidence holds, and one of it with ten answers to it.
    lies = [make.record(seq, at(labelled((0, 1 << 32, *[0] * 7), 0), NOW_MS)) for seq in range(1, 301)]
    held.insert(t.devices, **make.device_row("dev-c"))
    held.take(make.up("dev-c", *lies))
    lied = shown()
    assert {name: lied[name] for name in ("accuracy", "labelled", "coverage")} == {
        name: honest[name] for name in ("accuracy", "labelled", "coverage")
    }
    assert (lied["held_back"], lied["classes"]) == (300 << 32, ())
    assert "labels do not count" in lied["notes"][0]
    held.take(make.up("dev-c", make.record(301, at(labelled((0,) * 9, 10), NOW_MS))))
    assert (shown()["labelled"], shown()["accuracy"]["right"]) == (2010, 1900)


def test_labels_that_overtake_their_answers_count_in_full_when_those_are_here(held, make, device):
    (window,) = windows(device, 1)
    labels = w.Labels(confusion=(30, 10, 0, 0, 0, 0, 0, 0, 0))
    window = msgspec.structs.replace(window, labels=w.Labels())
    late = msgspec.structs.replace(window, counts=w.Counts(), features={}, outputs={}, labels=labels)

    def devices():
        with reading(held.engine) as connection:
            found = outcomes.counted(connection, held.digest, from_ms=0, upto_ms=NOW_MS + 10**6)
        return found.devices, found.held_back

    held.take(make.up("dev-a", make.record(2, at(late, NOW_MS))))
    assert devices() == ([DeviceLabels(0, 0)], DeviceLabels(40, 10))
    held.take(make.up("dev-a", make.record(1, at(window, NOW_MS))))
    assert devices() == ([DeviceLabels(40, 10)], DeviceLabels(0, 0))


def test_the_estimate_comes_from_calibrated_confidence(held, make, tmp_path):
    calibration = {"method": "isotonic", "x": [0.0, 1.0], "y": [0.25, 0.25]}
    plain = models.build_bundle(tmp_path / "plain")
    reference = msgspec.to_builtins(m.parse((tmp_path / "plain" / m.MANIFEST_FILE).read_bytes()).reference)
    changes = {"reference": reference | {"calibration": calibration}, "version": "1.1.0"}
    digest = models.build_bundle(tmp_path / "b", changes=changes)
    assert digest != plain
    data = (tmp_path / "b" / m.MANIFEST_FILE).read_bytes()
    held.insert(
        t.bundles,
        digest=digest,
        model="gas",
        version="1.1.0",
        state="approved",
        manifest=data,
        submitter="t",
        pushed_ms=0,
    )
    (window,) = windows(Counted(tmp_path / "b", digest, tmp_path), 1)
    held.take(make.up("dev-a", make.record(1, at(window, NOW_MS))))
    with reading(held.engine) as connection:
        found = outcomes.counted(connection, digest, from_ms=0, upto_ms=NOW_MS + 1)
    assert (found.predicted, found.estimated / 2**20) == (40, pytest.approx(10.0))


def test_what_is_stored_is_read_back_exactly():
    rng = np.random.default_rng(5)
    for _ in range(20):
        counts = tuple(int(n) for n in rng.integers(0, 2**53, 16))
        moments = h.Moments(
            n=sum(counts), total=-int(rng.integers(1, 2**62)) << 40, squares=int(rng.integers(2**62)) << 50
        )
        profile = core.Profile(
            features={"x": w.FeatureCounts(counts, 3, 4, moments)},
            outputs={"y": w.OutputCounts(counts, moments, counts), "z": w.OutputCounts(counts, moments)},
        )
        assert profiles.decode(profiles.encode(profile)) == profile
