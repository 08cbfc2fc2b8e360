"""What processes have given the disk to write, as the kernel counts it: pages that were made dirty, the wear of a card.

A file system's own journal is not in it, and a page that is written again before the kernel got to it counts once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")


def written_bytes(pid: int, proc: Path = PROC) -> int | None:
    """Since that process began; None where the kernel does not say, or the process is gone."""
    try:
        lines = (proc / str(pid) / "io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def written_mb(pids: Iterable[int]) -> float | None:
    """Of several processes together; None when the kernel says nothing of the first."""
    found = [written_bytes(pid) for pid in pids if pid]
    if not found or found[0] is None:
        return None
    return sum(one for one in found if one is not None) / 1e6
