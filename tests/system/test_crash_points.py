"""Power is cut before every call that changes the disk, and what was not synchronised is lost: see docs/explanation/crashes.md.

A device lives through a story once, with every such call written down; then devices start on what a cut at each of them would have left.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from skerry_agent.slots import Slots

from tests.crash import world as wl
from tests.crash.campaign import Found, Life, scratch_folder
from tests.crash.disk import WAYS, Disk, Way, fingerprint, lay_out
from tests.crash.identity import Errand

STARTS, PARTS, FINISHED = 240, 4, ("first", "update", "withdrawn")
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
    made = Life(tmp_path_factory.mktemp("life"))
    yield made
    made.close()


def said(found: Found) -> str:
    faults = "\n".join(found.faults)
    return f"{len(found.faults)} of {found.starts} starts failed, seed {SEED}:\n{faults}"


def test_the_record_of_a_life_is_whole(life: Life) -> None:
    """The cuts below say nothing when the recorder misses a call: played back whole, the record is the device's folder."""
    disk = life.disk
    end = len(disk.operations)
    played, there = disk.files(disk.left(end, "killed")), dict(wl.tree_of(life.world.state_dir))
    mapped = disk.mapped(end)
    assert set(played) == set(there)
    assert [path for path in there if path not in mapped and played[path] != there[path]] == []
    assert all(path.startswith(("rings/", "run/")) for path in mapped), mapped
    done = Counter(operation.what for operation in disk.operations)
    assert done["R"] > 50 and done["S"] > 200 and done["W"] > 500, done
    # Every part of the story did something to the disk, by more than one process.
    assert all(disk.point_at(stage.end) - disk.point_at(stage.begin) > 10 for stage in life.stages)
    assert len({operation.pid for operation in disk.operations}) > 20


@pytest.mark.parametrize("part", range(PARTS))
def test_after_a_cut_anywhere_one_whole_version_runs_and_the_truth_is_told(life: Life, part: int) -> None:
    each = STARTS // PARTS
    found = life.examine(life.drawn_cases(STARTS, SEED)[part * each :][:each])
    assert found.starts > each / 2
    assert not found.faults, said(found)


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
def test_after_a_cut_at_every_point_in_every_way(life: Life) -> None:
    """``make crash``. All points in all ways; every ``FINISH_EVERY``-th point with real workers to the end of its stage."""
    found = life.examine(life.all_cases(seeds=(SEED, SEED + 1)), beside=os.cpu_count() or 1, told=print)
    print(f"{found.points} points, {found.cases} cuts, {found.starts} starts, {len(found.faults)} failed", flush=True)
    assert not found.faults, said(found)
    cases = [
        (point, WAYS[point // FINISH_EVERY % len(WAYS)], SEED)
        for point in range(1, len(life.disk.operations) + 1, FINISH_EVERY)
    ]
    ended = life.finish(cases, told=print)
    assert not ended.faults, said(ended)
