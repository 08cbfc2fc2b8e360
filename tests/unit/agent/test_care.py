"""A bundle in shadow that hangs or grows must end."""

from __future__ import annotations

from skerry_agent.core.care import Care
from skerry_agent.core.liveness import Limits

LIMITS = Limits(silent_s=10.0, inference_s=60.0, interval_s=2.0)


def begun() -> Care:
    care = Care(needs_mb=50, slack_mb=64)
    care.begin(100.0, base_mb=30, ready_mb=60)
    return care


def test_one_that_reports_and_stays_within_its_memory_goes_on() -> None:
    care = begun()
    for second in range(200):
        if second % 2 == 0:
            care.hear(100.0 + second, own_mb=143, busy_s=59.0, expected_s=0.1)
        assert not care.look(100.5 + second, LIMITS)
    assert care.code == ""


def test_one_that_is_stuck_in_an_inference_hangs() -> None:
    care = begun()
    care.hear(101.0, own_mb=60, busy_s=61.0, expected_s=0.1)
    assert care.look(101.5, LIMITS)
    assert (care.code, care.detail) == ("worker_hung", "one inference has taken 61.0 s, at most 60 s")
    assert not care.look(102.0, LIMITS), "told once"
    slow = begun()
    slow.hear(101.0, own_mb=60, busy_s=61.0, expected_s=7.0)
    assert not slow.look(101.5, LIMITS)


def test_one_that_says_nothing_any_more_hangs_and_a_sleep_of_the_device_is_no_silence() -> None:
    care = begun()
    assert not care.look(10_000.0, LIMITS)
    for i in range(1, 17):
        assert not care.look(10_000.0 + 0.5 * i, LIMITS)
    assert care.look(10_008.5, LIMITS)
    assert care.code == "worker_hung"


def test_one_that_grows_beyond_what_it_declares_is_ended() -> None:
    care = begun()
    care.hear(101.0, own_mb=145, busy_s=0.0, expected_s=0.1)
    assert care.look(101.5, LIMITS)
    assert (care.code, care.detail) == ("worker_leaked", "145 MB of its own, at most 144 MB")
