"""The comparison that the demo's claim rests on."""

from __future__ import annotations

from typing import Any

from skerry_cli.demo.application import Counts
from skerry_cli.demo.reckoning import compare


def told(**versions: int) -> dict[str, Counts]:
    return {"d": Counts(device="d", versions={name: [n, 0] for name, n in versions.items()})}


def row(version: str, ok: int, device: str = "d", stage: int = 0) -> dict[str, Any]:
    return {"device": device, "version": version, "ok": ok, "stage": stage}


def test_equal_counts_over_several_keys_are_neither_lost_nor_twice() -> None:
    assert compare(told(a=5, b=2), [row("a", 3), row("a", 2, stage=1), row("b", 2)]) == (0, 0, [])


def test_what_the_server_lacks_is_lost() -> None:
    lost, twice, where = compare(told(a=5), [row("a", 3)])
    assert (lost, twice) == (2, 0)
    assert where == [{"device": "d", "version": "a", "answered": 5, "counted": 3}]


def test_a_loss_on_one_device_is_not_made_good_by_a_surplus_on_another() -> None:
    both = {**told(a=5), "e": Counts(device="e", versions={"a": [5, 0]})}
    assert compare(both, [row("a", 4), row("a", 6, device="e")])[:2] == (1, 1)


def test_a_count_for_a_version_that_never_answered_is_a_surplus() -> None:
    assert compare(told(a=5), [row("a", 5), row("b", 1)])[:2] == (0, 1)
