"""The arithmetic of the gate's buckets, and registers of distinct requests."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from skerry_agent.worker.access import Bucket
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
    bucket = Bucket(rate, burst, 0.0)
    now = passed = 0.0
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
    assert passed <= burst + rate * now + 1e-6


def test_a_pause_fills_a_bucket_up_to_its_burst_and_no_further() -> None:
    bucket = Bucket(10.0, 5, 0.0)
    for now, wanted in ((0.0, 5), (0.0, 0), (0.1, 1), (1000.0, 5)):
        got = 0
        while bucket.wait_s(now) == 0.0:
            bucket.take()
            got += 1
        assert got == wanted


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
