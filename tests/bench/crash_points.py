"""Power is cut before calls that change a device's disk: on how many of the devices that start on what is left something is not as it must be.

The device's life and what is looked at are those of ``tests/system/test_crash_points.py``; points are drawn, all ways of failing at each.
``make crash`` looks at every point.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from tests.bench.result import Result
from tests.crash.campaign import Found, first_life, second_life
from tests.crash.disk import WAYS

POINTS = 200
SEED = 7


def run() -> Result:
    found, calls = Found(), 0
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as name:
        life = first_life(Path(name))
        try:
            lives = (life, second_life(life))
            calls = sum(len(one.disk.operations) for one in lives)
            for one in lives:
                every = range(1, len(one.disk.operations) + 1)
                points = sorted(random.Random(SEED).sample(every, POINTS * len(every) // calls))
                some = one.examine([(point, way, SEED) for point in points for way in WAYS])
                found.points, found.starts = found.points + some.points, found.starts + some.starts
                found.faults += some.faults
        finally:
            life.world.close()
    return Result(
        bench="crash_points",
        value=len(found.faults),
        unit="failures",
        n=found.points,
        note=f"of {calls} calls of one device's life, in {len(WAYS)} ways each: {found.starts} devices started; {' | '.join(found.faults)[:500]}",
    )
