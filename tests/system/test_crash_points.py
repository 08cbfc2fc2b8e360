"""Power is cut before every call that changes the disk, and what was not synchronised is lost: see docs/explanation/crashes.md.

A device lives through a story once, with every such call written down; then devices start on what a cut at each of them would have left.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from skerry_agent.slots import Slots
from skerry_contract import wire
from skerry_contract.window import Instant

from tests.crash import world as wl
from tests.crash.campaign import Found, Life, first_life, scratch_folder, second_life
from tests.crash.disk import WAYS, Disk, Way, fingerprint, lay_out
from tests.crash.identity import Errand
from tests.crash.kept import Kept, faults

BOUNDED = {"slots/.parts/*": 8, "slots/.parts/*.lost": 8, "rings/*-gas-*.labels": 16, "tuf/root_history/*.root.json": 2}
"""What may grow: files that came in part (the eight that grew last), books that labels may still come for, and one root for each ceremony."""
STARTS, PARTS, FINISHED = 132, 3, ("first", "update", "withdrawn")
LATER_STARTS, LATER_PARTS, SECOND_CUTS_EACH = 56, 2, 24
SECOND_CUTS = (("life", 6), ("later", 1))
"""Lives, and which of the drawn cases of each is followed by another cut: of a way back, of an activation."""
SEED = int(os.environ.get("SKERRY_CRASH_SEED", "1"))
FINISH_EVERY = int(os.environ.get("SKERRY_CRASH_FINISH_EVERY", "60"))


def need_gcc() -> None:
    if shutil.which("gcc") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("gcc is not installed")
        pytest.skip("gcc is not installed")


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    need_gcc()
    made = first_life(tmp_path_factory.mktemp("life"))
    yield made
    made.world.close()


@pytest.fixture(scope="module")
def later(life: Life) -> Life:
    return second_life(life)


def said(found: Found) -> str:
    faults = "\n".join(found.faults)
    return f"{len(found.faults)} of {found.starts} starts failed, seed {SEED}:\n{faults}"


def test_the_record_of_a_life_is_whole(life: Life) -> None:
    _is_whole(life)
    done = Counter(operation.what for operation in life.disk.operations)
    assert done["R"] > 50 and done["S"] > 200 and done["W"] > 500, done
    assert len({operation.pid for operation in life.disk.operations}) > 20


def test_the_record_of_the_later_life_is_whole(later: Life) -> None:
    _is_whole(later)


def _is_whole(life: Life) -> None:
    """The cuts below say nothing when the recorder misses a call: played back whole, the record is the device's folder."""
    disk = life.disk
    end = len(disk.operations)
    played, there = disk.files(disk.left(end, "killed")), dict(wl.tree_of(life.state_dir))
    mapped = disk.mapped(end)
    assert set(played) == set(there)
    assert [path for path in there if path not in mapped and played[path] != there[path]] == []
    assert all(path.startswith(("rings/", "run/")) for path in mapped), mapped
    # Every part of the story did something to the disk, by more than one process.
    assert all(disk.point_at(stage.end) - disk.point_at(stage.begin) > 10 for stage in life.stages)


@pytest.mark.parametrize("part", range(PARTS))
def test_after_a_cut_anywhere_one_whole_version_runs_and_the_truth_is_told(life: Life, part: int) -> None:
    each = STARTS // PARTS
    found = life.examine(life.drawn_cases(STARTS, SEED)[part * each :][:each])
    assert found.starts > each / 2
    assert not found.faults, said(found)


@pytest.mark.parametrize("part", range(LATER_PARTS))
def test_after_a_cut_anywhere_in_its_later_life_a_permitted_version_runs_and_nothing_is_forgotten(
    later: Life, part: int
) -> None:
    each = LATER_STARTS // LATER_PARTS
    found = later.examine(later.drawn_cases(LATER_STARTS, SEED)[part * each :][:each])
    assert found.starts > each / 2
    assert not found.faults, said(found)


def test_power_may_fail_again_while_a_device_comes_up_after_a_cut(life: Life, later: Life, tmp_path: Path) -> None:
    for number, (one, place) in enumerate(SECOND_CUTS):
        told = life if one == "life" else later
        case = told.drawn_cases(len(told.stages) * 2, SEED)[place]
        recovery = told.recovery(case, tmp_path / str(number))
        assert len(recovery.disk.operations) > 10
        found = recovery.examine(recovery.drawn_cases(len(WAYS), SEED))
        assert found.starts > 3
        assert not found.faults, f"after {case}: {said(found)}"


@pytest.mark.parametrize(
    ("forgotten", "way"),
    [("slots/pointers.json.new", "names"), ("slots/.", "zeros"), ("state.db-wal", "strict")],
)
def test_an_agent_that_forgot_to_synchronise_is_found_out(life: Life, forgotten: str, way: Way) -> None:
    """What the other tests look for can happen: with one call left out of the record, cuts of it are survived no longer."""
    careless = copy.copy(life)
    careless.disk = life.disk.without_syncs(lambda name: name.startswith(forgotten))
    end = next(life.disk.point_at(stage.end) for stage in life.stages if stage.name == "update")
    assert careless.examine([(end, way, 0)]).faults
    assert not life.examine([(end, way, 0)]).faults


def test_why_an_update_ended_counts_from_the_moment_it_is_stored(life: Life) -> None:
    """A bundle that failed, or that a person gave up, is not taken up again because power was cut right behind its end."""
    found = life.examine([(point, "strict", SEED) for point in life.ends()])
    assert found.starts >= 10
    assert not found.faults, said(found)


def test_a_long_life_leaves_no_more_files_than_a_short_one(life: Life) -> None:
    """Whatever every life leaves is no part of the comparison with a life that was not cut: here it is counted, update by update."""
    short, long = (_sorts(life, name) for name in ("update", "restarted"))
    more = {sort: (short[sort], n) for sort, n in long.items() if n > max(short[sort], BOUNDED.get(sort, 0))}
    assert not more, f"files of a sort after 2 updates and after {len(life.world.bundles)}: {more}"


@pytest.mark.parametrize("name", ["unproved", "crashed"])
def test_a_bundle_that_is_given_up_leaves_no_slot(life: Life, name: str) -> None:
    stage = next(stage for stage in life.stages if stage.name == name)
    names = set(_files_after(life, name))
    digest = life.world.bundles[stage.offered].digest
    assert [path for path in names if digest in path and path.startswith("slots/")] == []
    assert len({path.split("/")[1] for path in names if re.match(r"slots/[0-9a-f]{64}/", path)}) == 2


def _files_after(life: Life, name: str) -> dict[str, bytes | str | None]:
    end = next(stage.end for stage in life.stages if stage.name == name)
    return life.disk.files(life.disk.left(life.disk.point_at(end), "killed"))


def _sorts(life: Life, name: str) -> Counter[str]:
    """How many files of each sort: names without digests and what counts up."""
    files = _files_after(life, name)
    return Counter(re.sub(r"[0-9a-f]{16,}|\d+", "*", path) for path, held in files.items() if held is not None)


BEFORE = Kept(
    update={"digest": "a" * 64, "version": "2.0.0", "state": "revert", "code": "cancelled", "at_boot": False},
    failures={"a" * 64: {"cancelled": 1}, "b" * 64: {"hash_mismatch": 2}},
    waits={"a" * 64: "cancelled"}, locks=frozenset({"welder"}), obeyed={"cancel": 7}, floors={"gas": "1.10.0"},
    forced={"gas": "1.9.0"}, activates="c" * 64, way_back="d" * 64,
)  # fmt: skip
AT_REST = {**BEFORE.update, "state": "idle"}
READY = {**AT_REST, "digest": "c" * 64, "state": "ready", "code": ""}


def _event(**data: str) -> wire.Event:
    return wire.Event(at=Instant("b", 1, 1, False), name="update", code="", data=data)


@pytest.mark.parametrize(
    ("now", "told", "said"),
    [
        ({}, (), ""),
        ({"failures": {"a" * 64: {"cancelled": 1}}}, (), "forgotten: {'hash_mismatch': (2, 0)}"),
        ({"failures": {}}, (), "that does not count"),
        ({"waits": {}}, (), "does not wait"),
        ({"update": {**AT_REST, "state": "fetch"}}, (), "taken up again"),
        ({}, (_event(digest="a" * 64, version="2.0.0", state="fetch"),), "taken up again"),
        ({"failures": {**BEFORE.failures, "b" * 64: {"hash_mismatch": 4}}}, (), "more attempts"),
        ({"locks": frozenset()}, (), "locks are gone: ['welder']"),
        ({"obeyed": {}}, (), "orders that were obeyed are forgotten"),
        ({"floors": {"gas": "1.9.9"}}, (), "floors fell"),
        ({"forced": {}}, (), "forced fell"),
        ({"way_back": "", "confirmed": frozenset({"e" * 64})}, (), ""),
        ({"way_back": "", "confirmed": frozenset({"d" * 64})}, (), "a way back"),
        ({"activates": "", "update": READY}, (), "the order to begin"),
        ({"activates": "", "update": READY}, (_event(digest="c" * 64, version="2.0.0", state="trial"),), ""),
    ],
)
def test_what_is_forgotten_over_a_cut_is_found(now: dict[str, Any], told: tuple[wire.Event, ...], said: str) -> None:
    found = faults(BEFORE, replace(BEFORE, **{"update": AT_REST, **now}), told, pardoned=False, released=())
    assert said in "; ".join(found)
    assert bool(found) == bool(said)


def test_after_a_cut_the_update_comes_to_its_end_and_nothing_is_left_behind(life: Life) -> None:
    drawn = life.drawn_cases(len(life.stages), SEED)
    found = life.finish([case for case in drawn if _stage(life, case[0]) in FINISHED])
    assert found.starts == len(FINISHED)
    assert not found.faults, said(found)


def test_cases_are_drawn_in_every_way_for_every_part_of_the_story(life: Life) -> None:
    drawn = life.drawn_cases(STARTS, SEED)
    ways: dict[str, set[Way]] = {}
    for point, way, _ in drawn:
        ways.setdefault(_stage(life, point), set()).add(way)
    assert all(found == set(WAYS) for found in ways.values()), ways
    # Of those that go on to the end, too, most are power cuts.
    first = {way for point, way, _ in drawn[: len(life.stages)] if _stage(life, point) in FINISHED}
    assert "strict" in first
    assert len(first) == len(FINISHED)


def _stage(life: Life, point: int) -> str:
    return next(stage.name for stage in life.stages if point <= life.disk.point_at(stage.end))


@pytest.mark.parametrize("verb", ["enrol", "renew"])
def test_after_a_cut_in_its_making_an_identity_is_there_or_none_is_and_the_errand_runs_again(
    tmp_path: Path, verb: str
) -> None:
    need_gcc()
    errand = Errand(tmp_path, verb)
    try:
        starts, faults = errand.examine(1 if verb == "renew" or "SKERRY_CRASH_ALL" in os.environ else 3)
    finally:
        errand.close()
    assert starts > 4
    assert not faults, "\n".join(faults)


TWO_VARIANTS = """
import sys
from pathlib import Path
from skerry_agent.slots import Slots
from tests.unit.agent.test_slots import put_variant
below, made = map(Path, sys.argv[1:])
slots = Slots(below / "slots")
first = put_variant(slots, made, "a")
slots.stage(first.digest)
slots.confirm("gas", first)
(below / "confirmed").touch()
slots.stage(put_variant(slots, made, "b").digest)
"""


def test_the_variant_that_runs_is_whole_at_every_moment_while_another_of_its_bundle_comes(tmp_path: Path) -> None:
    need_gcc()
    below, record = tmp_path / "below", tmp_path / "record"
    below.mkdir()
    disk = Disk(below)
    preloaded = {"LD_PRELOAD": str(wl.recorder(tmp_path)), "SKERRY_BELOW": str(below), "SKERRY_RECORD": str(record)}
    command = [sys.executable, "-c", TWO_VARIANTS, str(below), str(tmp_path / "made")]
    subprocess.run(command, check=True, timeout=120, cwd=wl.ROOT, env={**os.environ, **preloaded})
    disk.take(record.read_bytes())
    assert disk.files(disk.left(len(disk.operations), "killed")) == dict(wl.tree_of(below))
    begin = next(at for at, done in enumerate(disk.operations) if done.told == "create confirmed")
    ends, seen = set(), set()
    with scratch_folder() as scratch:
        for point in range(begin, len(disk.operations) + 1):
            for way in WAYS:
                files = disk.files(disk.left(point, way))
                if fingerprint(files) in seen:
                    continue
                seen.add(fingerprint(files))
                lay_out(files, scratch / "cut")
                slots = Slots(scratch / "cut" / "slots")
                found, complaints = slots.boot()
                assert not complaints, (point, way, disk.operations[point].told, complaints)
                assert slots.fault(found["gas"]) == "", (point, way)
                ends.add(slots.whole(found["gas"].digest, "b"))
                shutil.rmtree(scratch / "cut")
    assert len(seen) > 20
    assert ends == {False, True}


@pytest.mark.slow
@pytest.mark.skipif("SKERRY_CRASH_ALL" not in os.environ, reason="takes hours: `make crash` runs it")
def test_after_a_cut_at_every_point_in_every_way(life: Life, tmp_path: Path) -> None:
    """``make crash``. All points in all ways; every ``FINISH_EVERY``-th point with real workers to the end of its stage."""
    _everywhere(life, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif("SKERRY_CRASH_ALL" not in os.environ, reason="takes hours: `make crash` runs it")
def test_after_a_cut_at_every_point_of_its_later_life_in_every_way(later: Life, tmp_path: Path) -> None:
    _everywhere(later, tmp_path)


def _everywhere(life: Life, tmp_path: Path) -> None:
    found = life.examine(life.all_cases(seeds=(SEED, SEED + 1)), beside=os.cpu_count() or 1, told=print)
    print(f"{found.points} points, {found.cases} cuts, {found.starts} starts, {len(found.faults)} failed", flush=True)
    assert not found.faults, said(found)
    cases = [
        (point, WAYS[point // FINISH_EVERY % len(WAYS)], SEED)
        for point in range(1, len(life.disk.operations) + 1, FINISH_EVERY)
    ]
    ended = life.finish(cases, told=print)
    assert not ended.faults, said(ended)
    again = Found()
    for number, case in enumerate(cases):
        recovery = life.recovery(case, tmp_path / str(number))
        found = recovery.examine(recovery.drawn_cases(SECOND_CUTS_EACH, SEED), told=print)
        again.starts, again.faults = again.starts + found.starts, again.faults + found.faults
    print(f"{again.starts} starts after a second cut, {len(again.faults)} failed", flush=True)
    assert not again.faults, said(again)
