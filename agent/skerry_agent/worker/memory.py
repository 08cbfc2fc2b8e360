"""How much memory this process has for its own."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_OWN = re.compile(rb"^(?:RssAnon|VmSwap):\s+(\d+) kB", re.MULTILINE)


def own_mb() -> float:
    """Anonymous memory, swapped pages among it, MB (1e6 bytes). Mapped files are not in it: rings and label books among them."""
    return sum(int(size) for size in _OWN.findall(Path("/proc/self/status").read_bytes())) * 1024 / 1e6


def give_back() -> None:
    """Gives memory that was freed back to the system, where the C library can: glibc keeps it, for what may come."""
    # 1 MB that a worker without large requests does without.
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
