"""What windows hold beside counts changes nothing of the evidence, merged or not, and harms no ingest."""

from __future__ import annotations

import msgspec
import pytest
from skerry_contract import window as w
from skerry_contract import wire
from skerry_server.db import tables as t
from skerry_server.intake import Intake

from tests.golden import values


def evidence(server):
    skipped = {"first_ms", "last_ms", "entered_seq", "entered_boot", "entered_ns", "entered_epoch"}
    return [{name: value for name, value in row.items() if name not in skipped} for row in server.rows(t.evidence)]


def stripped(window: w.Window) -> w.Window:
    empty = {name: type(getattr(window, name))() for name in w.LATER_FIELDS}
    return msgspec.structs.replace(window, resources={}, **empty)


@pytest.mark.parametrize("how", ["merged", "reversed", "stripped"])
def test_evidence_is_the_same_whether_windows_come_singly_merged_or_without_what_is_new(server, make, how):
    first = values.LATER_WINDOW
    windows = [first, msgspec.structs.replace(first, tallies={"explain.rows": 3}, resources={"device_readings_n": 2})]
    for device, bodies in (
        ("dev-a", windows),
        (
            "dev-b",
            {
                "merged": [w.merge(*windows)],
                "reversed": windows[::-1],
                "stripped": [stripped(one) for one in windows],
            }[how],
        ),
    ):
        records = [make.record(seq, body) for seq, body in enumerate(bodies, 1)]
        assert server.ack(make.up(device, *records), device=device).upto == len(bodies)
    assert server.rows(t.quarantine) == []
    by_device = {row.pop("device"): row for row in evidence(server)}
    assert by_device["dev-a"] == by_device["dev-b"]
    assert by_device["dev-a"]["ok"] == 2 * first.counts.ok > 0
    # The windows themselves are kept as they came.
    kept = [wire.decode_window(row["body"]) for row in server.rows(t.windows) if row["device"] == "dev-a"]
    assert kept == windows


def test_of_samples_only_the_newest_are_kept(server, make):
    server.intake = Intake(most_samples=3)

    def sample(seq):
        body = wire.Sample(at=make.at(), key=make.window().key, id=f"gas-{seq}", why="share")
        return make.record(seq, body, kind="sample")

    for seqs in ((1, 2), (3, 4, 5), (6,)):
        assert server.ack(make.up("dev-a", *map(sample, seqs))).upto == seqs[-1]
    kept = [wire.decode(wire.Sample, row["body"]).id for row in server.rows(t.samples)]
    assert kept == ["gas-4", "gas-5", "gas-6"]
