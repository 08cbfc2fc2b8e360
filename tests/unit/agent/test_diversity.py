"""How different the requests of each client are: merged over reports, a day at a time, bounded, told once."""

from __future__ import annotations

from typing import Any, cast

from skerry_agent import diversity as d
from skerry_agent.clock import Clock
from skerry_contract import histogram as h


class At:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now_s = 5.0

    def boot_s(self) -> float:
        return self.now_s


def registers(first: int, n: int) -> bytes:
    return h.distinct_of((i * 0x9E3779B97F4A7C15) & (1 << 64) - 1 for i in range(first, first + n))


def make(most: int) -> tuple[d.Diversity, At, list[tuple[str, str, dict[str, Any]]]]:
    at, told = At(), []
    return d.Diversity(cast(Clock, at), most=lambda: most, on_event=lambda *event: told.append(event)), at, told


def test_reports_of_several_workers_add_up_to_what_one_would_have_counted() -> None:
    found, _, _ = make(0)
    found.take({"app": registers(0, 300)})
    found.take({"app": registers(200, 300), "other app": registers(0, 3)})
    assert found.counts() == {"app": round(h.distinct_estimate(registers(0, 500))), "other app": 3}


def test_a_client_is_told_once_a_day_and_a_new_day_begins_with_nothing() -> None:
    found, at, told = make(100)
    found.take({"app": registers(0, 50)})
    assert told == []
    found.take({"app": registers(50, 150)})
    found.take({"app": registers(300, 150)})
    ((name, code, data),) = told
    assert (name, code, data["client"], data["most"]) == ("access", "requests_too_different", "app", 100)
    at.now_s += d.DAY_S
    found.take({"app": registers(0, 20)})
    assert len(told) == 1 and found.counts()["app"] < 30
    found.take({"app": registers(0, 200)})
    assert len(told) == 2


def test_clients_beyond_the_bound_are_counted_together() -> None:
    found, _, _ = make(0)
    found.take({f"c{i}": registers(i, 1) for i in range(d.MOST + 50)})
    assert len(found.counts()) == d.MOST + 1
    assert 35 < found.counts()[d.REST] < 65
