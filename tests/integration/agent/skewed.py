"""The clocks of another machine, for a process of the product: the wall clock is off, and the device has slept.

A file of two words says by how much, now: nanoseconds on the wall clock, and nanoseconds that only the clock since boot ran on (a suspended
device's monotonic clock stands still). Run as a program it is the product's worker under such clocks.
"""

from __future__ import annotations

import mmap
import runpy
import struct
import sys
import time
from pathlib import Path

_WORDS = struct.Struct("<qq")


def write(path: Path, *, wall_ns: int = 0, slept_ns: int = 0) -> None:
    """Sets the clocks of every process that looks at the file."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(_WORDS.pack(wall_ns, slept_ns))


def install(path: Path) -> None:
    """From here on this process reads the file's clocks. Sleep passes for the wall clock as well."""
    with path.open("rb") as file:
        words = mmap.mmap(file.fileno(), _WORDS.size, prot=mmap.PROT_READ)
    wall_ns, clock_ns = time.time_ns, time.clock_gettime_ns

    def skewed_wall_ns() -> int:
        return wall_ns() + sum(_WORDS.unpack(words))

    def skewed_clock_ns(clock: int) -> int:
        if clock == time.CLOCK_REALTIME:
            return skewed_wall_ns()
        return clock_ns(clock) + (_WORDS.unpack(words)[1] if clock == time.CLOCK_BOOTTIME else 0)

    time.time_ns = skewed_wall_ns
    time.time = lambda: skewed_wall_ns() / 1e9
    time.clock_gettime_ns = skewed_clock_ns
    time.clock_gettime = lambda clock: skewed_clock_ns(clock) / 1e9


if __name__ == "__main__":
    install(Path(sys.argv.pop(1)))
    runpy.run_module("skerry_agent.worker", run_name="__main__", alter_sys=True)
