"""The comparison that the demo's claim rests on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from skerry_cli.demo.application import Counts
from skerry_cli.demo.reckoning import End, compare, compare_labels, invariants
from skerry_cli.demo.run import SECOND


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


FIRST = "1.0.0"


def well() -> End:
    """Two devices, of which one took the first bundle without having heard a bell; 10 answers of each version, 8 of them labelled."""
    devices = ("d", "e")
    told = {
        device: Counts(
            device=device, attempts=20, answered=20, versions={FIRST: [10, 9], SECOND: [10, 10]}, labels={"matched": 16},
            matched={FIRST: 8, SECOND: 8}, label_retries=1, done=True,
        )
        for device in devices
    }  # fmt: skip
    items = [
        {"device": device, "version": version, "variant": f"v-{device}", "ok": ok, "labelled": labelled, "stage": stage}
        for device in devices
        for version, ok, labelled, stage in ((FIRST, 10, 8, 0), (SECOND, 6, 5, 0), (SECOND, 4, 3, 1))
    ]
    variants = {device: f"v-{device}" for device in devices}
    return End(
        told=told, items=items, failures=[], versions=dict.fromkeys(devices, SECOND), variants=variants,
        wanted_variants=dict(variants), refused=4, wanted_refusals=4, confirmed_after_bells=3,
    )  # fmt: skip


def moved_label(end: End) -> None:
    end.items[0]["labelled"] -= 1
    end.items[3]["labelled"] += 1


def label_of_another_version(end: End) -> None:
    end.items[0]["labelled"] -= 1
    end.items[1]["labelled"] += 1


def unmatched(outcome: str) -> Callable[[End], None]:
    def change(end: End) -> None:
        end.told["d"].labels[outcome] = 1

    return change


def moved_answer(end: End) -> None:
    end.items[0]["ok"] -= 1
    end.items[3]["ok"] += 1


def silent(end: End) -> None:
    end.told["d"] = Counts(device="d", done=True)
    del end.items[:3]
    end.items.append({"device": "d", "version": FIRST, "variant": "v-d", "ok": 0, "labelled": 0, "stage": 0})


def replaced(**changes: Any) -> Callable[[End], End]:
    return lambda end: dataclasses.replace(end, **changes)


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (lambda end: None, []),
        (lambda end: setattr(end.told["d"], "done", False), ["every application ended"]),
        (silent, ["every application got answers"]),
        (lambda end: end.items[0].update(ok=9), ["no inference is lost"]),
        (lambda end: end.items[0].update(ok=11), ["no inference is counted twice"]),
        (moved_answer, ["no inference is lost", "no inference is counted twice"]),
        (replaced(failures=["HTTP 503"]), ["no request fails"]),
        (unmatched("unknown"), ["every label finds its answer"]),
        (unmatched("late"), ["every label finds its answer"]),
        (unmatched("duplicate"), ["every label finds its answer"]),
        (unmatched("conflicting"), ["every label finds its answer"]),
        (lambda end: end.items[0].update(labelled=7), ["every matched label is counted once"]),
        (lambda end: end.items[0].update(labelled=9), ["every matched label is counted once"]),
        (moved_label, ["every matched label is counted once"]),
        (label_of_another_version, ["every matched label is counted once"]),
        (lambda end: end.versions.update(e=FIRST), ["every device ends on"]),
        (replaced(refused=3), ["4 bad bundles were refused"]),
        (replaced(confirmed_after_bells=2), ["every device online confirmed"]),
        (lambda end: end.variants.update(e="v-d"), ["every device runs the variant"]),
        (lambda end: end.items[0].update(variant="v-e"), ["every answer is counted under that variant"]),
    ],
)
def test_each_invariant_of_the_demo_can_break(change: Callable[[End], End | None], broken: list[str]) -> None:
    end = well()
    end = change(end) or end
    said = [words for holds, words in invariants(end) if not holds]
    assert len(said) == len(broken), said
    assert all(words.startswith(start) for words, start in zip(said, broken, strict=True)), said


def test_labels_are_compared_where_their_answers_were_given() -> None:
    end = well()
    assert compare_labels(end.told, end.items) == []
    moved_label(end)
    assert compare_labels(end.told, end.items) == [
        {"device": "d", "version": FIRST, "matched": 8, "counted": 7},
        {"device": "e", "version": FIRST, "matched": 8, "counted": 9},
    ]
