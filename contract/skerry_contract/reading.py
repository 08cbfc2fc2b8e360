"""Types that msgspec reads, made ready when their module is imported.

msgspec learns how to read a type when it reads the first one, and guards that against nobody: of two threads that come first at once one
may take what is half made, and the process dies (SIGSEGV, msgspec 0.22). At import there is one thread.
"""

from __future__ import annotations

from typing import Any

import msgspec


def ready(*kinds: Any) -> None:
    """After their classes, at the level of the module: any number of threads may read these types from then on."""
    for kind in kinds:
        msgspec.msgpack.Decoder(kind)
