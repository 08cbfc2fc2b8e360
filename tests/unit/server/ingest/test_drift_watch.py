"""From windows to findings: opened once, closed once, each with its audit row, whatever else lies in the database."""

import logging

import msgspec
import numpy as np
import pytest
from skerry_contract import window as w
from skerry_server import audit, findings
from skerry_server.config import Drift
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from skerry_server.intake import Intake
from skerry_server.watch import DriftWatch
from sqlalchemy import delete, insert, update

from tests import models
from tests.counted import Counted, at

BUCKET_MS = 10_000
NOW_MS = 1_700_000_000_000 - 1_700_000_000_000 % BUCKET_MS
ROWS = 100


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    return folder, models.build_bundle(folder)


@pytest.fixture(scope="module")
def device(bundle, tmp_path_factory):
    return Counted(*bundle, tmp_path_factory.mktemp("rings"))


class Fleet:
    """One device whose windows fill one bucket after the other, and the watch that looks after each."""

    def __init__(self, server, make, device, digest):
        self.server, self.make, self.device, self.digest = server, make, device, digest
        self.seq = 0
        server.now_ms = NOW_MS
        server.intake = Intake(bucket_ms=BUCKET_MS)
        self.restart()

    def restart(self, min_rows=ROWS):
        settings = Drift(min_rows=min_rows)
        self.watch = DriftWatch(self.server.engine, settings, BUCKET_MS / 1000, lambda: self.server.now_ms)

    def bucket(self, shift=0.0, *, end_ms=None, look=True):
        """A bucket of rows; returns how many findings the look after it changed."""
        self.seq += 1
        rows, truth = models.rows(ROWS, draw=self.seq)
        rows[:, 0] += shift
        window = at(self.device.window(rows, truth), end_ms or self.server.now_ms + 1)
        self.server.take(self.make.up("dev-a", self.make.record(self.seq, window)))
        self.server.now_ms += BUCKET_MS - 1000
        return self.watch.tick() if look else None

    def findings(self, *, closed=True):
        with reading(self.server.engine) as connection:
            return findings.findings(connection, [self.digest], closed=closed)

    def open(self):
        return {one["subject"] for one in self.findings(closed=False)}

    def audited(self):
        with reading(self.server.engine) as connection:
            rows = audit.rows(connection, after=0, limit=1000)
            assert audit.first_break(rows) is None
            return [(row["action"], row["subject"].split("/")[-1]) for row in rows]


@pytest.fixture
def fleet(server, make, device, bundle):
    folder, digest = bundle
    server.register(folder, digest)
    server.insert(t.group_models, group="g", model="gas", stable=digest)
    return Fleet(server, make, device, digest)


def test_a_device_that_claims_rows_and_counts_nothing_of_them_hides_no_drift(fleet):
    fleet.restart(min_rows=2 * ROWS)
    made_up = msgspec.structs.replace(
        fleet.device.window(*models.rows(ROWS, draw=99)), counts=w.Counts(ok=10**6, rows=10**6), features={}, outputs={}
    )
    for seq in range(1, 11):
        window = at(made_up, fleet.server.now_ms + 1)
        fleet.server.take(fleet.make.up("dev-b", fleet.make.record(seq, window)))
        fleet.bucket(shift=50.0)
    assert fleet.open()


def test_drift_opens_when_it_persists_and_closes_when_it_is_gone_with_an_audit_row_each(fleet):
    assert [fleet.bucket() for _ in range(4)] == [0] * 4
    began_ms = fleet.server.now_ms
    changed = [fleet.bucket(shift=3.0) for _ in range(4)]
    # f0 and, as the model says something else now, its answers.
    assert changed == [0, 0, 2, 0]
    assert fleet.open() == {"feature:f0", "output:probabilities"}
    one = next(one for one in fleet.findings() if one["subject"] == "feature:f0")
    assert began_ms - BUCKET_MS < one["since_ms"] <= began_ms < one["opened_ms"]
    assert one["numbers"]["now"]["psi_corrected"] > 0.1
    assert "mean: +" in " ".join(one["numbers"]["reasons"])
    changed = [fleet.bucket() for _ in range(4)]
    assert changed == [0, 0, 2, 0]
    assert fleet.open() == set()
    assert all("calm in each of the last 3 spans" in one["closed_because"] for one in fleet.findings())
    assert sorted(fleet.audited()) == sorted(
        (action, subject)
        for action in ("drift.open", "drift.close")
        for subject in ("feature:f0", "output:probabilities")
    )


def test_a_restart_opens_nothing_twice_and_keeps_what_is_open(fleet):
    for _ in range(4):
        fleet.bucket(shift=3.0)
    before = fleet.findings()
    fleet.restart()
    assert fleet.watch.tick() == 0
    assert [one["id"] for one in fleet.findings()] == [one["id"] for one in before]


def test_looking_again_without_news_changes_nothing(fleet):
    for _ in range(4):
        fleet.bucket(shift=3.0)
    before = fleet.audited()
    assert [fleet.watch.tick() for _ in range(3)] == [0, 0, 0]
    assert fleet.audited() == before


def test_silence_closes_nothing_and_the_end_of_service_closes_all(fleet):
    for _ in range(4):
        fleet.bucket(shift=3.0)
    fleet.server.now_ms += 30 * 86_400_000
    assert fleet.watch.tick() == 0
    assert fleet.open() == {"feature:f0", "output:probabilities"}
    with writing(fleet.server.engine) as connection:
        connection.execute(delete(t.group_models))
    assert fleet.watch.tick() == 2
    assert {one["closed_because"] for one in fleet.findings()} == {findings.NOT_SERVED}
    with reading(fleet.server.engine) as connection:
        (item,) = findings.evaluations_page(connection, model="gas", after=None, limit=10)
    assert (item["verdict"], item["reason"], item["findings"]) == ("NO_DATA", findings.NOT_SERVED, [])


def test_windows_that_come_late_are_looked_at_in_their_time(fleet):
    begin = fleet.server.now_ms
    for _ in range(5):
        fleet.bucket(look=False)
    assert fleet.watch.tick() == 0
    # A device was away while its sensor drifted: as many rows again, in the buckets of their time.
    for i in range(3):
        fleet.bucket(shift=6.0, end_ms=begin + i * BUCKET_MS + 1, look=False)
    fleet.watch.tick()
    with reading(fleet.server.engine) as connection:
        found = findings.evaluation_of(connection, fleet.digest)
    # The newest spans are calm, so nothing opens; the older ones are seen as they were.
    x0 = next(one for one in found["evaluation"]["subjects"] if one["subject"] == "feature:f0")
    assert (x0["spans_drifted"], x0["now"]["state"], fleet.open()) == (3, "calm", set())


def test_a_bad_profile_and_a_bad_bundle_do_not_stop_the_others(fleet, caplog):
    for _ in range(3):
        fleet.bucket(shift=3.0, look=False)
    bad = "ee" * 32
    fleet.server.insert(
        t.bundles, digest=bad, model="bad", version="1.0.0", state="approved", manifest=b"{", submitter="t", pushed_ms=0
    )
    with writing(fleet.server.engine) as connection:
        rows = [dict(row) for row in fleet.server.rows(t.profiles)]
        connection.execute(insert(t.profiles), [row | {"bundle": bad} for row in rows])
        # An unreadable row among the good ones: a bucket that counts for nothing.
        connection.execute(insert(t.profiles), [rows[0] | {"bucket_ms": NOW_MS - BUCKET_MS, "body": b"\x00"}])
        connection.execute(
            insert(t.drift_findings),
            [
                {
                    "model": "bad",
                    "bundle": bad,
                    "subject": "feature:x",
                    "since_ms": 1,
                    "opened_ms": 1,
                    "updated_ms": 1,
                    "numbers": {},
                }
            ],
        )
    with caplog.at_level(logging.WARNING):
        # Two open of the good bundle; the finding of a bundle that cannot be read and that nobody serves ends.
        assert fleet.watch.tick() == 3
    assert fleet.open() == {"feature:f0", "output:probabilities"}
    assert "manifest not readable" in caplog.text
    assert "profile not readable" in caplog.text


def test_a_look_that_fails_is_logged_and_the_next_one_works(fleet, caplog):
    for _ in range(3):
        fleet.bucket(shift=3.0, look=False)
    with writing(fleet.server.engine) as connection:
        connection.execute(update(t.profiles).values(span_ms="no number"))
    with caplog.at_level(logging.ERROR):
        assert fleet.watch.tick() == 0
    assert "drift look failed" in caplog.text
    with writing(fleet.server.engine) as connection:
        connection.execute(update(t.profiles).values(span_ms=BUCKET_MS))
    assert fleet.watch.tick() == 2


def test_numbers_are_stored_as_json_that_reads_back(fleet):
    for _ in range(3):
        fleet.bucket(shift=float(np.float32(5.0)))
    with reading(fleet.server.engine) as connection:
        (item,) = findings.evaluations_page(connection, model="gas", after=None, limit=10)
        assert findings.evaluations_page(connection, model="other", after=None, limit=10) == []
        assert findings.evaluations_page(connection, model=None, after=("gas", fleet.digest), limit=10) == []
    assert (item["verdict"], item["version"], item["subjects"], item["n"]) == ("DRIFT", "1.0.0", 5, ROWS)
    assert {one["subject"] for one in item["findings"]} == {"feature:f0", "output:probabilities"}
