"""Many cuts of one story: which to look at, and what was found.

A case is a point, a way of failing and a seed. Cases that leave the same files at the same part of the story are one start.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.checks import Examiner
from tests.crash.disk import WAYS, Disk, Way
from tests.crash.world import Stage, Story, World, recorder

MEMORY = Path("/dev/shm")
Case = tuple[int, Way, int]


@dataclass(kw_only=True)
class Found:
    """``points``: calls that were cut; ``starts``: of devices; ``faults``: a line for each start that failed."""

    points: int = 0
    cases: int = 0
    starts: int = 0
    faults: list[str] = field(default_factory=list)


class Life:
    """A device's story, told once. ``disk`` is what was done to it; ``stages`` its parts."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder)
        try:
            self.world.enrol()
            self.disk = Disk(self.world.state_dir)
            story = Story(self.world, recorder(folder))
            self.disk.take(story.tell())
            self.stages: list[Stage] = story.stages
        except BaseException:
            self.world.close()
            raise

    def all_cases(self, seeds: Sequence[int] = (0,)) -> list[Case]:
        """Every point in every way."""
        points = range(1, len(self.disk.operations) + 1)
        return [(point, way, seed) for point in points for way in WAYS for seed in (seeds if way == "torn" else (0,))]

    def drawn_cases(self, n: int, seed: int) -> list[Case]:
        """So many, evenly over the story's parts; of each part at moments and in ways that are drawn."""
        rng = random.Random(seed)
        cases: list[Case] = []
        for number in range(n):
            stage = self.stages[number % len(self.stages)]
            point = rng.randint(self.disk.point_at(stage.begin) + 1, self.disk.point_at(stage.end))
            # Each part gets every way in turn, and parts that follow each other get different ones.
            way = WAYS[(number % len(self.stages) + number // len(self.stages)) % len(WAYS)]
            cases.append((point, way, seed))
        return cases

    def examine(
        self,
        cases: Sequence[Case],
        *,
        finish: bool = False,
        beside: int = 1,
        told: Callable[[str], None] = lambda _: None,
    ) -> Found:
        """Looks at cases, ``beside`` each other.

        Args:
            finish: with real workers and the network back, to the end of the stage. The cases of one stage only.
            told: hears how far it is.
        """
        found = Found(points=len({point for point, _, _ in cases}), cases=len(cases))
        seen: set[tuple[str, str, int]] = set()
        lock = threading.Lock()
        local = threading.local()
        examiners: list[Examiner] = []
        began_s = time.monotonic()

        def one(case: Case) -> None:
            point, way, seed = case
            with lock:
                if not hasattr(local, "examiner"):
                    local.examiner = Examiner(self.world, self.disk, self.stages, scratch / str(len(examiners)))
                    examiners.append(local.examiner)
            examiner: Examiner = local.examiner
            files = examiner.state(point, way, seed)
            key = examiner.key(point, files)
            with lock:
                if key in seen:
                    return
                seen.add(key)
            faults = examiner.examine(point, way, files, finish=finish)
            with lock:
                found.starts += 1
                if faults:
                    before = self.disk.operations[point].told if point < len(self.disk.operations) else "the end"
                    where = f"point {point} ({examiner.stage_of(point).name}, before: {before}), {way}, seed {seed}"
                    found.faults.append(f"{where}: {'; '.join(faults)}")
                    told(found.faults[-1])
                if found.starts % 100 == 0:
                    took_s = time.monotonic() - began_s
                    told(f"{found.starts} starts in {took_s:.0f} s, at point {point} of {len(self.disk.operations)}")

        with scratch_folder() as scratch:
            try:
                with ThreadPoolExecutor(beside) as pool:
                    for done in [pool.submit(one, case) for case in cases]:
                        done.result()
            finally:
                for examiner in examiners:
                    examiner.close()
        return found

    def finish(self, cases: Sequence[Case], *, beside: int = 1, told: Callable[[str], None] = lambda _: None) -> Found:
        """Looks at cases with real workers and the network back, each to the end of its stage."""
        total = Found()
        for stage in self.stages:
            begin, end = self.disk.point_at(stage.begin), self.disk.point_at(stage.end)
            mine = [case for case in cases if begin < case[0] <= end]
            if not mine:
                continue
            # What the plan named when the stage had ended.
            self.world.publish("1.1.0" if stage.name == "withdrawn" else stage.offered)
            found = self.examine(mine, finish=True, beside=beside, told=told)
            told(f"{stage.name}: {found.starts} devices came to the end that they should, but {len(found.faults)}")
            total.points += found.points
            total.cases += found.cases
            total.starts += found.starts
            total.faults += found.faults
        return total

    def close(self) -> None:
        """Ends the server."""
        self.world.close()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder with a short name, in memory where there is some: what is synchronised there by a start costs nothing."""
    found = Path(tempfile.mkdtemp(prefix="crash-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        yield found
    finally:
        shutil.rmtree(found, ignore_errors=True)
