"""What the page shows of many versions over a long time, and what it costs when many watch."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from skerry_contract import histogram as h
from skerry_server import attributions
from skerry_server.console import overview, routes
from skerry_server.db import migrations
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from sqlalchemy import Engine, insert

from tests import models

NOW_MS = 1_800_000_000_000
HOUR_MS = 3_600_000


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = open_engine(sqlite_url(tmp_path / "server.db"))
    migrations.migrate(made)
    yield made
    made.dispose()


def bundle(conn, folder: Path, version: str) -> str:
    models.build_bundle(folder / version, version=version)
    raw = (folder / version / "manifest.json").read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    row = {"digest": digest, "model": "gas", "version": version, "state": "approved", "manifest": raw}
    conn.execute(insert(t.bundles).values(**row, submitter="x", pushed_ms=0))
    return digest


def counted(conn, digest: str, at_ms: int, confusion: list[int] | None = None) -> None:
    zero = ("predicted", "estimated", "matched", "late", "unknown", "duplicate", "conflicting")
    row = {"bundle": digest, "variant": "v", "bucket_ms": at_ms, "model": "gas", "span_ms": 300_000, "windows": 1}
    packed = msgspec.msgpack.encode(confusion) if confusion else b""
    values = {**row, **dict.fromkeys(zero, 0), "rows": 1000, "confusion": packed, "updated_ms": at_ms, "body": b""}
    conn.execute(insert(t.profiles).values(**values))


def evaluated(conn, digest: str) -> None:
    row = {"bundle": digest, "model": "gas", "at_ms": 0, "verdict": "DRIFT", "reason": "r", "n": 1, "spans": 3}
    conn.execute(insert(t.drift_evaluations).values(**row, subjects=1, evaluation={}))


def gathered(engine: Engine) -> overview.Overview:
    with reading(engine) as conn:
        return overview.gather(conn, name="x", parts={}, now_ms=NOW_MS)


def drawn(found: overview.Overview) -> str:
    return routes._environment.get_template("live.html").render(o=found)


def test_the_versions_that_are_served_and_the_newest_are_drawn_and_the_page_says_how_many_are_not(
    engine: Engine, tmp_path: Path
) -> None:
    with writing(engine) as conn:
        digests = [bundle(conn, tmp_path, f"1.{i}.0") for i in range(25)]
        for digest in digests:
            counted(conn, digest, NOW_MS - HOUR_MS)
            evaluated(conn, digest)
        conn.execute(insert(t.groups).values(name="field", created_ms=0, settings={}))
        conn.execute(insert(t.group_models).values(group="field", model="gas", stable=digests[1]))
    found = gathered(engine)
    wanted = [f"1.{i}.0" for i in (*range(24, 5, -1), 1)]
    assert [one["version"] for one in found.accuracy] == wanted
    assert [one["version"] for one in found.drift] == wanted
    assert (found.accuracy_left_out, found.drift_left_out) == (5, 5)
    assert drawn(found).count("5 more versions are not drawn") == 2


def test_accuracy_is_of_the_last_day_and_the_page_says_so(engine: Engine, tmp_path: Path) -> None:
    with writing(engine) as conn:
        digest = bundle(conn, tmp_path, "1.0.0")
        k = len(next(iter(models_labels(tmp_path / "1.0.0"))))
        right = [0] * (k * k)
        right[0] = 30_000
        half = [0] * (k * k)
        half[0], half[1] = 500, 500
        counted(conn, digest, NOW_MS - 25 * HOUR_MS, right)
        counted(conn, digest, NOW_MS - HOUR_MS, half)
        old = bundle(conn, tmp_path, "0.9.0")
        counted(conn, old, NOW_MS - 30 * HOUR_MS, right)
    found = gathered(engine)
    (shown,) = found.accuracy
    assert shown["measured"]["accuracy"]["value"] == 0.5
    assert "of the last 24 hours" in drawn(found)
    assert "not drawn" not in drawn(found)


def test_a_finding_says_how_much_the_model_leaned_on_its_feature_of_late(engine: Engine, tmp_path: Path) -> None:
    now = {"psi_corrected": 1.0, "js": 0.5, "shift_sd": 2.0}
    with writing(engine) as conn:
        digest = bundle(conn, tmp_path, "1.0.0")
        counted(conn, digest, NOW_MS - HOUR_MS)
        evaluated(conn, digest)
        for subject in ("feature:f0", "feature:f1", "output:p"):
            row = {"model": "gas", "bundle": digest, "subject": subject, "since_ms": 0, "opened_ms": 0, "updated_ms": 0}
            conn.execute(insert(t.drift_findings).values(**row, numbers={"now": now}))
        assert "Attribution" not in drawn(gathered_in(conn))
        explained(conn, digest, NOW_MS - HOUR_MS, {"f0": 3, "f1": 1})
        explained(conn, digest, NOW_MS - 30 * HOUR_MS, {"f1": 1000})
        page = drawn(gathered_in(conn))
    assert '<th class="n">Attribution</th>' in page
    assert "2.00% of the last day's answers explained" in page
    shown = [
        page.split(f"<td>{subject}</td>")[1].split('attribution">')[1].split("<")[0]
        for subject in ("feature:f0", "feature:f1", "output:p")
    ]
    assert shown == ["75.00%", "25.00%", "-"]


def explained(conn, digest: str, at_ms: int, totals: dict[str, int]) -> None:
    body = attributions.encode({name: h.Moments(n=20, total=n, squares=n * n) for name, n in totals.items()})
    row = {"bundle": digest, "variant": "v", "bucket_ms": at_ms, "chosen": 20, "rows": 20, "dropped": 0, "body": body}
    conn.execute(insert(t.explanations).values(**row))


def test_a_coverage_above_one_is_explained_on_the_page(engine: Engine, tmp_path: Path) -> None:
    with writing(engine) as conn:
        digest = bundle(conn, tmp_path, "1.0.0")
        k = len(next(iter(models_labels(tmp_path / "1.0.0"))))
        counted(conn, digest, NOW_MS - HOUR_MS, [1000, *[0] * (k * k - 1)])
        assert "more labels than answers" not in drawn(gathered_in(conn))
        counted(conn, digest, NOW_MS - 2 * HOUR_MS, [2000, *[0] * (k * k - 1)])
        assert "more labels than answers" in drawn(gathered_in(conn))


def gathered_in(conn) -> overview.Overview:
    return overview.gather(conn, name="x", parts={}, now_ms=NOW_MS)


def models_labels(folder: Path) -> list[tuple[str, ...]]:
    from skerry_contract import manifest as m

    return [tensor.labels for tensor in m.parse((folder / "manifest.json").read_bytes()).outputs if tensor.labels]


def test_many_who_watch_cost_as_much_as_one(engine: Engine) -> None:
    empty = gathered(engine)
    shared = overview.Shared()
    reads = []

    def read() -> overview.Overview:
        reads.append(1)
        time.sleep(0.05)
        return empty

    watching = [threading.Thread(target=shared.get, args=(read, NOW_MS + 10)) for _ in range(8)]
    for one in watching:
        one.start()
    for one in watching:
        one.join()
    assert len(reads) == 1
    # Old news is read again, by one; so is what seems to come from the future, after the clock was put back.
    shared.get(read, NOW_MS + overview.SHARED_MS)
    assert len(reads) == 2
    shared.get(read, NOW_MS - 1)
    assert len(reads) == 3


@pytest.mark.parametrize(("took_s", "hold_ms"), [(0.01, 2_000), (0.9, 9_000), (300.0, 60_000)])
def test_a_reading_is_held_for_ten_times_as_long_as_it_took_and_a_minute_at_most(
    engine: Engine, took_s: float, hold_ms: int
) -> None:
    shared, empty, clock_s = overview.Shared(), gathered(engine), [50.0]
    reads = []

    def read() -> overview.Overview:
        reads.append(1)
        clock_s[0] += took_s
        return empty

    for now_ms, n in ((NOW_MS, 1), (NOW_MS + hold_ms - 1, 1), (NOW_MS + hold_ms, 2)):
        shared.get(read, now_ms, lambda: clock_s[0])
        assert len(reads) == n


def test_a_failed_reading_is_not_kept(engine: Engine) -> None:
    shared, empty = overview.Shared(), gathered(engine)

    def fail() -> overview.Overview:
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        shared.get(fail, NOW_MS)
    other = dataclasses.replace(empty, name="well again")
    assert shared.get(lambda: other, NOW_MS).name == "well again"


def test_a_device_with_a_thousand_models_floods_neither_table_nor_tiles_and_the_page_says_what_is_left_out(
    engine: Engine,
) -> None:
    def stored(name: str, models: int) -> dict[str, object]:
        one = {"digest": "", "version": "1.0.0", "variant": "cpu", "state": "confirmed"}
        update = {"model": "m", "code": "x" * 50_000}
        known = {"status": "enrolled", "enrolled_ms": 0, "public_key_sha256": "", "public_key_pem": "", "online": True}
        more = {"certificate_expires_ms": 0, "certificate_serial": name, "seen_ms": NOW_MS, "group": "field"}
        running = {f"m{i:04}": one for i in range(models)}
        return {"id": name, "running": running, "state": {"update": update}} | known | more

    with writing(engine) as conn:
        conn.execute(insert(t.groups).values(name="field", created_ms=0, settings={}))
        # As an older release took it.
        conn.execute(insert(t.devices), [stored("flood", 1400), stored("tame", 1)])
    found = gathered(engine)
    assert (len(found.running), found.running_left_out) == (40, 1360)
    assert (found.running[0].model, found.running[0].devices) == ("m0000", 2)
    assert [(len(tile.models), tile.models_left_out) for tile in found.tiles] == [(8, 1392), (1, 0)]
    page = drawn(found)
    assert len(page) < 20_000
    assert "1\N{THIN SPACE}360 more versions are not drawn" in page
    assert "and 1\N{THIN SPACE}392 more models" in page


def test_a_detail_without_end_is_drawn_by_its_beginning(engine: Engine) -> None:
    row = {"device": "d", "received_ms": NOW_MS, "at_ms": NOW_MS, "name": "update", "code": "hash_mismatch"}
    with writing(engine) as conn:
        conn.execute(insert(t.events), [row | {"data": {"detail": detail}} for detail in ("x" * 60_000, {"a": 1})])
    page = drawn(gathered(engine))
    assert "x" * 999 + "…" in page
    assert "x" * 1000 not in page


def test_a_role_that_will_expire_stands_on_the_page_with_what_to_do(engine: Engine) -> None:
    day_ms = 86_400_000
    with writing(engine) as conn:
        for role, days in (("timestamp", 1), ("catalog", 59), ("root", 200)):
            values = {"role": role, "version": 3, "expires_ms": NOW_MS + days * day_ms, "bytes": b""}
            conn.execute(insert(t.roles).values(**values))
    found = gathered(engine)
    assert [(alert.role, alert.code) for alert in found.alerts] == [("catalog", "metadata_expires")]
    page = drawn(found)
    assert "catalog version 3 expires in 59 days" in page
    assert "skerry approve --renew" in page
