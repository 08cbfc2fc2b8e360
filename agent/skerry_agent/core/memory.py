"""Whether there is memory for a worker that only waits: what ran before, beside a bundle on trial."""

from __future__ import annotations

WORKER_MB = 64.0
"""What a worker has beside its models: interpreter, numpy, a runtime."""
SPARE_MB = 64.0
"""What must be free beside it when it is begun; with less than half of that left it goes."""


def may_stand_by(*, needs_mb: float, free_mb: float, reserve_mb: float) -> str:
    """Why it may not be begun; empty when it may. All in MB (1e6 bytes).

    >>> may_stand_by(needs_mb=40, free_mb=1000, reserve_mb=0)
    ''
    >>> may_stand_by(needs_mb=400, free_mb=500, reserve_mb=100)
    'it wants 464 MB and 164 MB beside it, 500 MB are free'
    """
    wanted_mb = needs_mb + WORKER_MB
    if free_mb >= wanted_mb + reserve_mb + SPARE_MB:
        return ""
    return f"it wants {wanted_mb:.0f} MB and {reserve_mb + SPARE_MB:.0f} MB beside it, {free_mb:.0f} MB are free"


def must_let_go(*, free_mb: float, reserve_mb: float) -> bool:
    """Whether memory is so short that it must go.

    >>> must_let_go(free_mb=500, reserve_mb=100), must_let_go(free_mb=120, reserve_mb=100)
    (False, True)
    """
    return free_mb < reserve_mb + SPARE_MB / 2
