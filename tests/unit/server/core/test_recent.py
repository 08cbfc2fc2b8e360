"""What is kept is bounded by what it weighs: many small things stay, few large ones do."""

from __future__ import annotations

import threading

from skerry_server.core import judge_assignments
from skerry_server.core.judge_values import Design, Guardrail, Unit
from skerry_server.core.recent import Recent


def test_what_was_asked_for_last_stays_as_long_as_it_is_light_enough_together() -> None:
    made: list[int] = []

    def make(key: int) -> str:
        made.append(key)
        return "x" * key

    recent = Recent(make, lambda _key, value: len(value), most_bytes=100)
    for key in (10, 20, 30, 10, 20, 30):
        assert recent(key) == "x" * key
    assert (made, recent.weight) == ([10, 20, 30], 60)
    recent(10)
    recent(50)
    # 10 + 20 + 30 + 50 are too much: the one not asked for longest goes, and no more than that.
    assert recent.weight == 90
    made.clear()
    for key in (10, 30, 50, 20):
        recent(key)
    assert made == [20]


def test_what_is_too_heavy_alone_is_kept_alone() -> None:
    recent = Recent(lambda key: key, lambda _key, value: value, most_bytes=10)
    assert [recent(key) for key in (3, 500, 500)] == [3, 500, 500]
    assert recent.weight == 500
    recent(4)
    assert recent.weight == 4


def test_many_threads_get_what_is_right_and_leave_no_more_than_the_bound() -> None:
    recent = Recent(lambda key: key, lambda _key, _value: 1, most_bytes=5)
    wrong: list[int] = []
    threads = [
        threading.Thread(target=lambda: wrong.extend(n for n in range(2000) if recent(n % 9) != n % 9))
        for _ in range(4)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert (wrong, recent.weight) == ([], 5)


def design(name: str, devices: int) -> Design:
    units = tuple(Unit(device=f"d{i:04}", candidate=i % 2 == 0) for i in range(devices))
    rails = (Guardrail(name="failures", kind="rate", alpha=0.01, margin=2.0),)
    return Design(rollout=name, stage=0, units=units, guardrails=rails)


def test_a_dozen_rollouts_under_judgement_do_not_push_each_other_out() -> None:
    first = [judge_assignments.assignments(design(f"r{i}", 40)) for i in range(12)]
    again = [judge_assignments.assignments(design(f"r{i}", 40)) for i in range(12)]
    assert all(one is two for one, two in zip(first, again, strict=True))


def test_large_designs_take_no_more_than_the_memory_that_is_theirs() -> None:
    large = design("large", 400)
    before = judge_assignments.assignments.weight
    found = judge_assignments.assignments(large)
    assert judge_assignments.assignments.weight - before >= found.members.nbytes == 2000 * 200 * 4
