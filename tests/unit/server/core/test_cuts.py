"""A stage holds exactly the devices planned, by the same function that devices call."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import group as g
from skerry_contract import ids
from skerry_server.core import cuts

SALTS = st.binary(min_size=16, max_size=16).map(bytes.hex)
HASHES = st.integers(0, g.EVERYONE - 1)


def fleets(max_size: int = 60) -> st.SearchStrategy[list[cuts.Eligible]]:
    names = st.lists(st.from_regex(r"[a-z0-9][a-z0-9-]{0,12}", fullmatch=True), unique=True, max_size=max_size)
    return names.flatmap(
        lambda chosen: st.tuples(
            *(
                st.builds(
                    cuts.Eligible,
                    device=st.just(ids.device_id(name)),
                    stratum=st.sampled_from(["", "arm64", "x86"]),
                    online=st.booleans(),
                )
                for name in chosen
            )
        ).map(list)
    )


def candidates(fleet: list[cuts.Eligible], salt: str, placed: dict[str, str]) -> set[str]:
    """Who is in, as a device works it out."""
    rollout = g.Rollout(id="r", stage=0, candidate=g.Target(digest="", version=""), salt=salt, cuts=placed)
    return {one.device for one in fleet if g.is_candidate(rollout, one.device, one.stratum)}


@given(fleets(), SALTS, st.integers(1, 80))
def test_a_number_of_devices_is_met_exactly(fleet: list[cuts.Eligible], salt: str, k: int) -> None:
    placed = cuts.plan_cuts(fleet, salt, devices=k, share=None, stratified=False, old={})
    assert len(candidates(fleet, salt, placed)) == min(k, len(fleet))


@given(fleets(), SALTS, st.integers(1, 80))
def test_a_number_over_strata_is_met_exactly_and_in_proportion(fleet: list[cuts.Eligible], salt: str, k: int) -> None:
    placed = cuts.plan_cuts(fleet, salt, devices=k, share=None, stratified=True, old={})
    inside = candidates(fleet, salt, placed)
    assert len(inside) == min(k, len(fleet))
    for stratum in {one.stratum for one in fleet}:
        of_it = [one for one in fleet if one.stratum == stratum]
        exact = min(k, len(fleet)) * len(of_it) / len(fleet)
        assert abs(sum(one.device in inside for one in of_it) - exact) < 1


@given(fleets(), SALTS, st.floats(0.01, 0.99), st.booleans())
def test_a_share_is_rounded_up_in_every_stratum(
    fleet: list[cuts.Eligible], salt: str, share: float, stratified: bool
) -> None:
    placed = cuts.plan_cuts(fleet, salt, devices=None, share=share, stratified=stratified, old={})
    inside = candidates(fleet, salt, placed)
    parts = [[one for one in fleet if one.stratum == s] for s in {o.stratum for o in fleet}] if stratified else [fleet]
    for part in parts:
        assert sum(one.device in inside for one in part) == cuts.share_of(len(part), share)


@given(fleets(), SALTS, st.lists(st.integers(1, 60), min_size=2, max_size=5), st.booleans())
def test_no_device_ever_leaves_a_stage_it_is_in(
    fleet: list[cuts.Eligible], salt: str, steps: list[int], stratified: bool
) -> None:
    """Also when the later stage is smaller, or devices have gone or come in between."""
    placed: dict[str, str] = {}
    inside: set[str] = set()
    for i, k in enumerate(steps):
        known = fleet[i % 2 :: 1] if i % 2 else fleet
        placed = cuts.plan_cuts(known, salt, devices=k, share=None, stratified=stratified, old=placed)
        now = candidates(fleet, salt, placed)
        assert inside <= now
        inside = now
    placed = cuts.plan_cuts([], salt, devices=None, share=1.0, stratified=stratified, old=placed)
    assert candidates(fleet, salt, placed) == {one.device for one in fleet}


@given(fleets(), SALTS)
def test_a_stratum_that_appears_later_never_falls_below_the_cut_it_was_under(
    fleet: list[cuts.Eligible], salt: str
) -> None:
    old = {g.ANY_STRATUM: str(1 << 63)}
    before = candidates(fleet, salt, old)
    placed = cuts.plan_cuts(fleet, salt, devices=1, share=None, stratified=True, old=old)
    assert before <= candidates(fleet, salt, placed)


@given(st.lists(HASHES, max_size=30), st.integers(0, 40))
def test_ties_never_make_a_stage_larger_than_planned(hashes: list[int], k: int) -> None:
    cut = cuts.place(hashes, k)
    inside = sum(value < cut for value in hashes)
    assert inside <= k
    ordered = sorted(hashes)
    tied = 0 < k < len(ordered) and ordered[k - 1] == ordered[k]
    if not tied:
        assert inside == min(k, len(hashes))
    assert 0 <= cut <= g.EVERYONE


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50), max_size=6), st.integers(0, 200))
def test_dividing_gives_everything_and_no_stratum_more_than_it_has(sizes: dict[str, int], k: int) -> None:
    found = cuts.divide(k, sizes)
    assert sum(found.values()) == min(k, sum(sizes.values()))
    assert all(0 <= found[name] <= size for name, size in sizes.items())


@given(fleets(), st.lists(SALTS, min_size=1, max_size=8), st.integers(1, 10))
def test_the_salt_chosen_has_the_fewest_offline_devices_in_the_first_stage(
    fleet: list[cuts.Eligible], salts: list[str], k: int
) -> None:
    chosen = cuts.choose_salt(fleet, salts, k)
    assert cuts.offline_in_first(fleet, chosen, k) == min(cuts.offline_in_first(fleet, salt, k) for salt in salts)


@given(fleets(), st.lists(SALTS, min_size=1, max_size=8), st.integers(1, 10))
def test_a_stratified_first_stage_is_looked_at_as_it_will_be_cut(
    fleet: list[cuts.Eligible], salts: list[str], k: int
) -> None:
    def offline(salt: str) -> int:
        placed = cuts.plan_cuts(fleet, salt, devices=k, share=None, stratified=True, old={})
        inside = candidates(fleet, salt, placed)
        return sum(not one.online for one in fleet if one.device in inside)

    chosen = cuts.choose_salt(fleet, salts, k, stratified=True)
    assert offline(chosen) == min(map(offline, salts))


def test_four_of_sixteen_devices_in_two_strata_are_three_and_one() -> None:
    fleet = [
        cuts.Eligible(device=ids.device_id(f"gas-{i:02d}"), stratum="x.tflite" if i % 4 == 2 else "x.onnx")
        for i in range(1, 17)
    ]
    placed = cuts.plan_cuts(fleet, "5a" * 16, devices=4, share=None, stratified=True, old={})
    inside = candidates(fleet, "5a" * 16, placed)
    assert sorted(one.stratum for one in fleet if one.device in inside) == ["x.onnx"] * 3 + ["x.tflite"]


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(ValueError, match="k >= 0"):
        cuts.place([1], -1)
    with pytest.raises(ValueError, match="exactly one"):
        cuts.plan_cuts([], "0" * 32, devices=1, share=0.5, stratified=False, old={})
    with pytest.raises(ValueError, match="salt"):
        cuts.choose_salt([], [], 1)
