"""How much memory this process has for its own."""

from __future__ import annotations

import re
from pathlib import Path

_OWN = re.compile(rb"^(?:RssAnon|VmSwap):\s+(\d+) kB", re.MULTILINE)


def own_mb() -> float:
    """Anonymous memory, swapped pages among it, MB (1e6 bytes). Mapped files are not in it: rings and label books among them."""
    return sum(int(size) for size in _OWN.findall(Path("/proc/self/status").read_bytes())) * 1024 / 1e6
