"""The arithmetic of the gate's buckets, and registers of distinct requests."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from skerry_agent.worker.buckets import SLOTS, Bucket, Buckets
from skerry_agent.worker.distinct import Distinct
from skerry_contract import histogram as h


@given(
    st.floats(0.1, 1000),
    st.integers(1, 50),
    st.lists(st.floats(0, 2), min_size=1, max_size=200),
)
def test_a_bucket_passes_at_most_its_burst_and_its_rate_and_what_waits_as_told_passes(
    rate: float, burst: int, pauses: list[float]
) -> None:
    bucket = Bucket(rate, burst)
    begin = now = 1.0
    passed = 0
    for pause in pauses:
        now += pause
        wait = bucket.wait_s(now)
        assert wait <= 1 / rate + 1e-9
        if wait == 0.0:
            bucket.take()
            passed += 1
        else:
            # Not a moment before, and then for certain.
            assert bucket.wait_s(now + wait * 0.999 - 1e-9) > 0
            now += wait * (1 + 1e-9) + 1e-9
            assert bucket.wait_s(now) == 0.0
    assert passed <= burst + rate * (now - begin) + 1e-6


def test_a_pause_fills_a_bucket_up_to_its_burst_and_no_further() -> None:
    bucket = Bucket(10.0, 5)
    for now, wanted in ((1.0, 5), (1.0, 0), (1.1, 1), (1000.0, 5)):
        got = 0
        while bucket.wait_s(now) == 0.0:
            bucket.take()
            got += 1
        assert got == wanted


def drained(bucket: Bucket, now_s: float) -> int:
    got = 0
    while bucket.wait_s(now_s) == 0.0:
        bucket.take()
        got += 1
    return got


def test_workers_draw_from_one_bucket_and_a_successor_finds_it_as_it_was(tmp_path: Path) -> None:
    path = str(tmp_path / "limits")
    one, other = Buckets(path), Buckets(path)
    assert drained(one.bucket("camera", 10.0, 5), 100.0) == 5
    assert drained(other.bucket("camera", 10.0, 5), 100.0) == 0
    assert drained(other.bucket("logger", 10.0, 3), 100.0) == 3
    assert drained(Buckets(path).bucket("camera", 10.0, 5), 100.35) == 3
    # Another limit for the same client, by whom its file was read again.
    assert drained(one.bucket("camera", 100.0, 2), 200.0) == 2


def test_a_worker_whose_clock_was_read_a_moment_earlier_takes_nothing_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "limits")
    one, other = (Buckets(path).bucket("camera", 10.0, 5) for _ in range(2))
    assert drained(one, 100.0) == 5
    assert drained(other, 99.999) == 0
    assert drained(one, 100.15) == 1


def test_what_an_earlier_boot_or_a_scribble_left_binds_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "limits")
    assert drained(Buckets(path).bucket("camera", 10.0, 5), 1e6) == 5
    assert drained(Buckets(path).bucket("camera", 10.0, 5), 3.0) == 5
    (tmp_path / "limits").write_bytes(b"\xff" * 4096)
    # Every slot is somebody's now: a bucket of its own, full.
    assert drained(Buckets(path).bucket("camera", 10.0, 5), 4.0) == 5


def test_more_clients_than_there_are_slots_have_buckets_of_their_own(tmp_path: Path) -> None:
    buckets = Buckets(str(tmp_path / "limits"))
    for i in range(SLOTS + 20):
        bucket = buckets.bucket(f"client-{i}", 1.0, 2)
        assert (drained(bucket, 10.0), drained(bucket, 10.0)) == (2, 0)


def test_without_a_place_for_the_file_a_worker_bounds_alone(tmp_path: Path) -> None:
    assert drained(Buckets(str(tmp_path / "none" / "limits")).bucket("camera", 1.0, 2), 10.0) == 2


_TAKER = """
import sys, time
from skerry_agent.worker.buckets import Buckets
buckets = Buckets(sys.argv[1])
bucket = buckets.bucket("camera", 500.0, 20)
taken, begin = 0, time.monotonic()
print("up", flush=True)
sys.stdin.readline()
end = time.monotonic() + 1.0
while time.monotonic() < end:
    with buckets.held():
        if bucket.wait_s(time.monotonic()) == 0.0:
            bucket.take()
            taken += 1
print(taken)
"""


def test_processes_that_ask_as_fast_as_they_can_get_no_more_than_one_limit(tmp_path: Path) -> None:
    path = str(tmp_path / "limits")
    takers = [
        subprocess.Popen([sys.executable, "-c", _TAKER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for taker in takers:
        assert taker.stdout is not None
        taker.stdout.readline()
    begin = time.monotonic()
    outputs = []
    for taker in takers:
        assert taker.stdin is not None
        taker.stdin.write("go\n")
        taker.stdin.flush()
    for taker in takers:
        outputs.append(int(taker.communicate(timeout=30)[0]))
    took_s = time.monotonic() - begin
    # Without the lock, two may take the same token now and then; with it none does.
    assert 100 <= sum(outputs) <= 20 + 500 * took_s + 1, (outputs, took_s)


def test_each_different_row_counts_once_whatever_request_it_came_in() -> None:
    rows = np.arange(3000, dtype="f4").reshape(1000, 3)
    alone, batched, again = Distinct(["x"]), Distinct(["x"]), Distinct(["x"])
    for row in rows:
        alone.add({"x": row[None]}, 1)
        again.add({"x": rows[:1]}, 1)
    batched.add({"x": rows}, 1000)
    registers = alone.take()
    assert registers == batched.take()
    assert abs(h.distinct_estimate(registers) - 1000) < 0.2 * 1000
    assert round(h.distinct_estimate(again.take())) == 1
    # What was taken begins anew.
    assert alone.take() == b""


def test_texts_count_by_their_content_in_bytes_or_not() -> None:
    def of(*values: object) -> bytes:
        counted = Distinct(["t"])
        array = np.empty((1, len(values)), np.object_)
        array[0, :] = values
        counted.add({"t": array}, 1)
        return counted.take()

    assert of("a", "bc") == of(b"a", b"bc")
    assert of("a", "bc") != of("ab", "c")
