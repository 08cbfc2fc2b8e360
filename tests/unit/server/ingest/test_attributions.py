"""What devices explained adds up exactly per bundle and variant, in any order, and what cannot be changes nothing."""

from __future__ import annotations

import random

import msgspec
import pytest
from skerry_contract import histogram as h
from skerry_contract import manifest as m
from skerry_contract import window as w
from skerry_server import attributions
from skerry_server.core import profile as core
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from skerry_server.intake import Intake
from sqlalchemy import update

from tests import models
from tests.counted import at

BUCKET_MS = 10_000
NOW_MS = 1_700_000_000_000 - 1_700_000_000_000 % BUCKET_MS
FEATURES = ("f0", "f1", "f2")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    return folder, models.build_bundle(folder, transforms=False)


@pytest.fixture
def held(server, bundle):
    """The server, which holds the bundle, at ``NOW_MS`` with buckets of ten seconds."""
    folder, server.digest = bundle
    server.manifest = server.register(folder, server.digest)
    (server.variant, *_) = (variant.id for variant in server.manifest.variants)
    server.now_ms = NOW_MS
    server.intake = Intake(bucket_ms=BUCKET_MS)
    return server


def explained(held, make, rows, *, end_ms=NOW_MS, chosen=None, dropped=0, answered=100, variant=None):
    """A window in which rows were explained; ``rows``: one attribution per feature each, as a device quantizes them."""
    moments = {
        name: h.moments_of(h.quantize(abs(row[i]), 0.0, 1.0) for row in rows) for i, name in enumerate(FEATURES) if rows
    }
    tallies = {"explain.chosen": len(rows) + dropped if chosen is None else chosen, "explain.dropped": dropped}
    window = msgspec.structs.replace(
        make.window(ok=answered, bundle=held.digest),
        tallies={**tallies, "explain.rows": len(rows)},
        attributions=moments,
    )
    window = msgspec.structs.replace(window, key=window.key._replace(variant=variant or held.variant))
    return at(window, end_ms)


def read(held, from_ms=0, upto_ms=1 << 53, model="gas", after=None, limit=10):
    with reading(held.engine) as connection:
        return attributions.page(connection, model=model, from_ms=from_ms, upto_ms=upto_ms, after=after, limit=limit)


def one(held, **span):
    (item,) = read(held, **span)
    (variant,) = item["variants"]
    return variant


def test_any_partition_order_and_merging_on_the_way_gives_the_mean_of_all_rows(held, make):
    rng = random.Random(5)
    rows = [[rng.uniform(-0.9, 0.9) * (3 - i) for i in range(3)] for _ in range(60)]
    parts = [explained(held, make, rows[i : i + 5], end_ms=NOW_MS - 5000 - 20_000 * (i % 3)) for i in range(0, 60, 5)]
    # Two were merged in a device's outbox, two come twice, and the rest in any order and batches.
    parts[0:2] = [w.merge(parts[0], parts[1])]
    records = [(f"dev-{'ab'[i % 2]}", make.record(i + 1, part)) for i, part in enumerate(parts)]
    rng.shuffle(records)
    for low, high in ((0, 1), (1, 6), (4, 11)):
        held.take(*(make.up(device, record) for device, record in records[low:high]))
    found = one(held)
    assert (found["answered"], found["chosen"], found["explained"], found["dropped"]) == (1200, 60, 60, 0)
    assert found["coverage"] == 60 / 1200
    wanted = {
        name: sum(h.quantize(abs(row[i]), 0.0, 1.0) for row in rows) / 60 / 4096 for i, name in enumerate(FEATURES)
    }
    assert {f["feature"]: f["mean"] for f in found["features"]} == wanted
    assert [f["feature"] for f in found["features"]] == ["f0", "f1", "f2"]
    assert sum(f["share"] for f in found["features"]) == pytest.approx(1)
    assert len(held.rows(t.explanations)) == 3
    squares = h.moments_of(h.quantize(abs(row[0]), 0.0, 1.0) for row in rows)
    stored = core.total_explained(
        core.Explained(attributions=attributions.decode(row["body"])) for row in held.rows(t.explanations)
    )
    assert stored.attributions["f0"] == squares


def test_only_the_buckets_asked_for_count_and_answers_are_of_the_same(held, make):
    day = 86_400_000
    held.now_ms = NOW_MS + 2 * day
    held.take(
        make.up(
            "dev-a",
            make.record(1, explained(held, make, [[0.5, 0.25, 0.0]], end_ms=NOW_MS)),
            make.record(2, explained(held, make, [[0.25, 0.5, 0.0]] * 3, end_ms=NOW_MS + day, answered=50)),
        )
    )
    assert (one(held)["explained"], one(held)["answered"]) == (4, 150)
    later = one(held, from_ms=NOW_MS + day - BUCKET_MS)
    assert (later["explained"], later["answered"], later["coverage"]) == (3, 50, 0.06)
    assert [f["feature"] for f in later["features"]] == ["f1", "f0", "f2"]
    assert one(held, upto_ms=NOW_MS + day)["explained"] == 1
    assert read(held, from_ms=NOW_MS + 2 * day) == []


def test_windows_that_explain_nothing_make_no_row_and_the_bundle_is_not_listed(held, make):
    held.take(make.up("dev-a", make.record(1, explained(held, make, []))))
    assert held.rows(t.explanations) == []
    assert read(held) == []
    assert held.counters() == {}


def test_rows_that_were_chosen_and_dropped_are_told_before_any_is_explained(held, make):
    held.take(make.up("dev-a", make.record(1, explained(held, make, [], chosen=7, dropped=5))))
    found = one(held)
    assert (found["chosen"], found["explained"], found["dropped"], found["features"]) == (7, 0, 5, [])
    assert found["coverage"] == 0


LIES = {
    "a feature that the bundle has not": lambda a: {**a, "made-up": a["f0"]},
    "more values than rows": lambda a: {**a, "f0": h.Moments(n=3, total=3, squares=3)},
    "below zero": lambda a: {**a, "f0": h.Moments(n=2, total=-2, squares=4)},
    "no sum of squares": lambda a: {**a, "f0": h.Moments(n=2, total=2000, squares=3)},
    "rows and no values": lambda a: {},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_device_that_claims_what_cannot_be_changes_nothing_and_is_noted(held, make, lie):
    good = explained(held, make, [[0.5, 0.25, 0.125]] * 2)
    bad = msgspec.structs.replace(good, attributions=lie(good.attributions))
    ack = held.ack(make.up("dev-a", make.record(1, good), make.record(2, bad)))
    assert ack.upto == 2
    assert (one(held)["explained"], one(held)["chosen"]) == (2, 2)
    assert one(held)["answered"] == 200
    assert held.counters() == {("dev-a", "profile_unfit"): 1}


def test_values_without_any_explained_row_change_nothing(held, make):
    good = explained(held, make, [[0.5, 0.25, 0.125]] * 2)
    bad = msgspec.structs.replace(good, tallies={})
    held.take(make.up("dev-a", make.record(1, bad)))
    assert read(held) == []
    assert held.counters() == {("dev-a", "profile_unfit"): 1}


def test_claims_beyond_64_bits_do_not_stop_ingest(held, make):
    n = (1 << 40) - 1
    most = h.Moments(n=n, total=n, squares=(1 << 63) - 1)
    good = explained(held, make, [[0.5, 0.25, 0.125]])
    claim = msgspec.structs.replace(
        good, tallies=dict.fromkeys(("explain.chosen", "explain.rows", "explain.dropped"), n), attributions={"f0": most}
    )
    assert held.ack(make.up("dev-a", *(make.record(i + 1, claim) for i in range(20)))).upto == 20
    assert held.ack(make.up("dev-b", *(make.record(i + 1, claim) for i in range(20))), device="dev-b").upto == 20
    assert one(held)["explained"] == 40 * n
    assert one(held)["features"] == [{"feature": "f0", "mean": 1 / 4096, "share": 1.0}]


def test_variants_stand_apart(held, make):
    held.manifest = other_variant(held)
    held.intake = Intake(bucket_ms=BUCKET_MS)
    held.take(
        make.up(
            "dev-a",
            make.record(1, explained(held, make, [[0.5, 0.25, 0.0]])),
            make.record(2, explained(held, make, [[0.0, 0.25, 0.5]] * 2, variant="other")),
        )
    )
    (item,) = read(held)
    first, second = sorted(item["variants"], key=lambda found: found["explained"])
    assert (first["variant"], first["features"][0]["feature"]) == (held.variant, "f0")
    assert (second["variant"], second["features"][0]["feature"]) == ("other", "f2")
    assert attributions.foremost(item["variants"]) == second
    assert attributions.foremost([]) is None


def other_variant(held):
    """The registered bundle gets a second variant."""
    (first, *_) = held.manifest.variants
    manifest = msgspec.structs.replace(held.manifest, variants=(first, msgspec.structs.replace(first, id="other")))
    with writing(held.engine) as connection:
        changed = update(t.bundles).where(t.bundles.c.digest == held.digest)
        connection.execute(changed.values(manifest=m.encode(manifest)))
    return manifest


def test_a_row_that_cannot_be_read_is_left_out(held, make, caplog):
    parts = [explained(held, make, [[0.5, 0.25, 0.0]], end_ms=NOW_MS - i * BUCKET_MS) for i in range(2)]
    held.take(make.up("dev-a", *(make.record(i + 1, part) for i, part in enumerate(parts))))
    with writing(held.engine) as connection:
        connection.execute(
            update(t.explanations).where(t.explanations.c.bucket_ms == NOW_MS).values(body=b"\xc1 no MessagePack")
        )
    assert one(held)["explained"] == 1
    assert "explanations not readable" in caplog.text


def test_a_page_ends_where_it_is_told_and_goes_on_behind_it(held, make):
    held.take(make.up("dev-a", make.record(1, explained(held, make, [[0.5, 0.25, 0.0]]))))
    (item,) = read(held, model=None)
    assert (item["model"], item["bundle"], item["unit"]) == ("gas", held.digest, "probability")
    assert read(held, after=("gas", held.digest)) == []
    assert read(held, model="other") == []


def test_an_answer_that_is_no_probability_has_a_scale_of_its_own(held):
    plain = [msgspec.structs.replace(tensor, labels=()) for tensor in held.manifest.outputs]
    regression: m.Manifest = msgspec.structs.replace(held.manifest, outputs=tuple(plain))
    assert attributions.unit_of(regression) == "scale"
