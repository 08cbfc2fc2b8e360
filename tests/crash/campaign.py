"""Many cuts of one story: which to look at, and what was found.

A case is a point, a way of failing and a seed. Cases that leave the same files at the same part of the story are one start.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.crash import kept
from tests.crash.checks import BOOT_S, Examiner, Nursery, boot_after, forget_opened, stage_at, until
from tests.crash.disk import WAYS, Disk, Way, lay_out
from tests.crash.second_story import SecondStory
from tests.crash.story import FirstStory, Stage, Story
from tests.crash.world import World, recorder

MEMORY = Path("/dev/shm")
Case = tuple[int, Way, int]
_UPDATE = re.compile(rb'\{"state":"(\w+)","model":"\w*","digest":"(\w*)"')
"""How the store writes an update."""


@dataclass(kw_only=True)
class Found:
    """``points``: calls that were cut; ``starts``: of devices; ``faults``: a line for each start that failed."""

    points: int = 0
    cases: int = 0
    starts: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Life:
    """What was done to a device's disk, ready to be cut.

    Attributes:
        state_dir: the device's folder as it is in the end.
        stages: the parts of the story.
        boot_id: of the boot that it lived in; empty for the machine's own.
    """

    world: World
    state_dir: Path
    disk: Disk
    stages: list[Stage]
    boot_id: str = ""

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

    def ends(self) -> list[int]:
        """Points right behind what the store was told of an update's end, before anything that follows from it."""
        points = []
        last: tuple[str, str, int] | None = None
        written: list[tuple[bytes, ...]] = []
        seen: list[tuple[bytes, ...]] = []
        with scratch_folder() as scratch:
            for at, done in enumerate(self.disk.operations):
                if done.what == "W":
                    written += _UPDATE.findall(done.data)
                # Reading the store at every synchronisation takes long; between two that wrote the same nothing changed.
                if not (done.what == "S" and written and done.told.endswith("state.db-wal")):
                    continue
                same, seen, written = written == seen, written, []
                if same:
                    continue
                files = self.disk.files(self.disk.left(at + 1, "strict"))
                lay_out({name: files[name] for name in ("state.db", "state.db-wal") if name in files}, scratch / "cut")
                update = kept.kept(scratch / "cut" / "state.db").update
                shutil.rmtree(scratch / "cut")
                now = (update["digest"], update["state"], update["attempt"]) if update else None
                if now is not None and now != last and update["code"]:
                    points.append(at + 1)
                last = now
        return points

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
                    local.examiner = Examiner(
                        self.world, self.disk, self.stages, scratch / str(len(examiners)), boot_id=self.boot_id
                    )
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
            stage.scene.play()
            found = self.examine(mine, finish=True, beside=beside, told=told)
            told(f"{stage.name}: {found.starts} devices came to the end that they should, but {len(found.faults)}")
            total.points += found.points
            total.cases += found.cases
            total.starts += found.starts
            total.faults += found.faults
        return total

    def recovery(self, case: Case, folder: Path) -> Life:
        """The start that follows a cut, without a network, recorded like the life itself: power may fail in it as well."""
        point, way, seed = case
        stage = stage_at(self.disk, self.stages, point)
        state_dir, record, log = folder / "d", folder / "record", folder / "log"
        folder.mkdir()
        lay_out(self.disk.files(self.disk.left(point, way, seed)), state_dir)
        disk = Disk(state_dir)
        boot_id = boot_after(self.boot_id, way)
        log.touch()
        nursery = Nursery(
            {"LD_PRELOAD": str(recorder(folder)), "SKERRY_BELOW": str(state_dir), "SKERRY_RECORD": str(record)}
        )
        try:
            config = self.world.config(state_dir, folder / "agent.toml", local=True)
            pid = nursery.start(config, log, boot_id=boot_id)
            try:
                until(lambda: "agent up" in log.read_text(), BOOT_S, lambda: f"a start: {log.read_text()[-1500:]}")
                # What the plan takes up again by itself comes to rest.
                time.sleep(0.5)
            finally:
                nursery.end(pid)
        finally:
            nursery.close()
            forget_opened(config)
        disk.take(record.read_bytes())
        stages = [replace(stage, begin=0, end=record.stat().st_size)]
        return Life(world=self.world, state_dir=state_dir, disk=disk, stages=stages, boot_id=boot_id)


def _lived(story: Story) -> Life:
    disk = Disk(story.state_dir)
    try:
        disk.take(story.tell())
    finally:
        forget_opened(story.config)
    return Life(world=story.world, state_dir=story.state_dir, disk=disk, stages=story.stages)


def first_life(folder: Path) -> Life:
    """Of a device that is enrolled and never ran. Whoever has it closes its ``world``."""
    world = World(folder)
    try:
        world.enrol()
        return _lived(FirstStory(world, recorder(folder), world.state_dir))
    except BaseException:
        world.close()
        raise


def second_life(first: Life) -> Life:
    """The same device later on, in a folder of its own."""
    folder = first.world.folder / "later"
    shutil.copytree(first.state_dir, folder, ignore=shutil.ignore_patterns("*.sock"))
    return _lived(SecondStory(first.world, recorder(first.world.folder), folder, first.stages[-1].after))


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder with a short name, in memory where there is some: what is synchronised there by a start costs nothing."""
    found = Path(tempfile.mkdtemp(prefix="crash-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        yield found
    finally:
        shutil.rmtree(found, ignore_errors=True)
