"""Pairs of a bundle in shadow add up over devices and windows, and made-up candidates make no rows."""

from __future__ import annotations

import time

import msgspec
import pytest
from scipy.stats import binomtest
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_server import shadowing
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing


def registered(server, make):
    for version, digest in (("1.0.0", make.BUNDLE), ("1.1.0", make.CANDIDATE)):
        row = {"model": "gas", "version": version, "state": "approved", "submitter": "t", "pushed_ms": 0}
        server.insert(t.bundles, digest=digest, manifest=b"{}", **row)


def window(make, candidate, **fields):
    shadow = w.Shadow(**{"pairs": 10, "agreed": 7, **fields})
    return msgspec.structs.replace(make.window(ok=10), shadows={candidate: shadow})


def compared(server):
    with reading(server.engine) as connection:
        return shadowing.comparisons(connection, "gas", after=None, limit=10)


def test_pairs_of_all_devices_and_windows_add_up(server, make):
    registered(server, make)
    for i, device in enumerate(("dev-a", "dev-a", "dev-b")):
        body = window(
            make,
            make.CANDIDATE,
            distance=h.exponential_of([1000] * 10),
            slower=h.exponential_of([2_000_000] * 4),
            faster=h.exponential_of([500_000] * 6),
            dropped={"busy": 2},
            labelled=(1, 0, 2, 1),
        )
        server.take(make.up(device, make.record(i + 1, body)))
    (found,) = compared(server)
    assert (found["candidate"], found["bundle"], found["devices"]) == (make.CANDIDATE, make.BUNDLE, 2)
    assert (found["pairs"], found["agreement"], found["dropped"]) == (30, 0.7, {"busy": 6})
    assert found["distance"]["p50"] == pytest.approx(0.001, rel=0.02)
    assert found["latency_ms"]["slower"]["n"] == 12
    assert found["latency_ms"]["slower"]["p50"] == pytest.approx(2.0, rel=0.02)
    labelled = found["labelled"]
    assert (labelled["n"], labelled["only_answer_right"], labelled["only_candidate_right"]) == (12, 0, 6)
    assert labelled["p"] == pytest.approx(2 / 64)


def test_a_record_that_comes_twice_counts_once(server, make):
    registered(server, make)
    record = make.record(1, window(make, make.CANDIDATE))
    server.take(make.up("dev-a", record))
    server.take(make.up("dev-a", record))
    assert compared(server)[0]["pairs"] == 10


def test_a_candidate_that_nobody_registered_makes_no_row_and_is_counted(server, make):
    server.take(make.up("dev-a", make.record(1, window(make, "f" * 64))))
    assert compared(server) == []
    assert server.counters()["dev-a", "shadow_unknown"] == 1


def test_what_a_device_claims_stops_where_a_database_does(server, make):
    registered(server, make)
    for seq in range(1, 4):
        most = (1 << 40) - 1
        body = window(make, make.CANDIDATE, pairs=most, agreed=most, slower=h.Exponential(total=(1 << 63) - 1))
        server.take(make.up("dev-a", make.record(seq, body)))
    assert compared(server)[0]["pairs"] == 3 * ((1 << 40) - 1)


def test_one_device_hides_neither_the_distances_nor_the_reasons_of_the_others(server, make):
    registered(server, make)
    fine = h.exponential_of([1000] * 10)
    server.take(make.up("dev-a", make.record(1, window(make, make.CANDIDATE, distance=fine, dropped={"busy": 2}))))
    coarse = window(make, make.CANDIDATE, distance=h.rescale(fine, -10))
    server.take(make.up("dev-b", make.record(1, coarse)))
    made_up = window(make, make.CANDIDATE, dropped={f"a{i:03d}": 1 for i in range(100)})
    server.take(make.up("dev-b", make.record(2, made_up)))
    (found,) = compared(server)
    assert found["distance"]["p50"] == pytest.approx(0.001, rel=0.02)
    assert found["dropped"]["busy"] == 2
    assert server.counters() == {("dev-b", "shadow_unfit"): 1}
    assert all(len(row["body"]) < 2000 for row in server.rows(t.shadows))


def test_a_batch_of_made_up_candidates_is_left_out_in_no_time(server, make):
    registered(server, make)
    fleet = {f"{i:064x}": w.Shadow(pairs=1) for i in range(8)}
    items = [
        paired
        for i in range(2000)
        for paired in shadowing.paired(
            f"dev-{i}", msgspec.structs.replace(make.window(ok=1, bundle=make.BUNDLE), shadows=fleet)
        )
    ]
    with writing(server.engine) as connection:
        began = time.process_time()
        strange = shadowing.fold(connection, items, 0)
        took_s = time.process_time() - began
    assert len(strange) == 16_000
    assert took_s < 2
    assert server.rows(t.shadows) == []


@pytest.mark.parametrize(("ours", "theirs"), [(0, 1), (3, 3), (1, 9), (40, 12), (480, 519)])
def test_the_exact_test_is_the_binomial_one(ours, theirs):
    assert shadowing.mcnemar(ours, theirs) == pytest.approx(binomtest(ours, ours + theirs).pvalue)


def test_the_test_of_many_pairs_is_near_the_exact_one():
    assert shadowing.mcnemar(600, 520) == pytest.approx(binomtest(600, 1120).pvalue, rel=0.02)
