"""What this process takes of the device: memory and CPU time."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path


class _Rss:
    """Resident memory of this process; without a descriptor to spare, as it was when last read."""

    def __init__(self) -> None:
        self._kb = 0

    def read_kb(self) -> int:
        with contextlib.suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self._kb = pages * (os.sysconf("SC_PAGE_SIZE") // 1024)
        return self._kb


rss_kb = _Rss().read_kb
"""In units of 1024 bytes."""


def peak_kb() -> int:
    """The most that it ever was."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class CpuTime:
    """CPU time of this process, each microsecond given out once, however many models share it."""

    def __init__(self) -> None:
        self._given_us = time.process_time_ns() // 1000

    def since_us(self) -> int:
        """Since the last call, by whomever."""
        now_us = time.process_time_ns() // 1000
        given, self._given_us = now_us - self._given_us, now_us
        return max(0, given)

    def begin(self) -> None:
        """Nothing was given out yet: the clock of a forked process starts anew."""
        self._given_us = time.process_time_ns() // 1000


cpu_time = CpuTime()
os.register_at_fork(after_in_child=cpu_time.begin)
