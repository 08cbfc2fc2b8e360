"""The functions of ``scipy.special`` that are used here, loaded at the first use.

Loading them takes a quarter of a second, a seventh of a server's start, and many a server never judges anything.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from scipy import special

    found = getattr(special, name)
    globals()[name] = found
    return found
