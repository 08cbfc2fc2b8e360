"""How long to wait before the next try: exponential with full jitter, a cap per cause.

Full jitter (uniform between 0 and the growing limit) spreads a fleet that lost one server best: M. Brooker, "Exponential
Backoff And Jitter", 2015. Randomness is an argument.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Limits of one cause, seconds. ``floor_s`` is waited in any case."""

    base_s: float
    cap_s: float
    floor_s: float = 0.0


POLICIES: dict[str, Policy] = {
    "broker": Policy(base_s=1.0, cap_s=120.0, floor_s=0.2),
    "mirror": Policy(base_s=5.0, cap_s=21600.0, floor_s=1.0),
    "refused": Policy(base_s=30.0, cap_s=900.0, floor_s=5.0),
    "runtime": Policy(base_s=3600.0, cap_s=86400.0, floor_s=600.0),
    "sync": Policy(base_s=2.0, cap_s=600.0, floor_s=0.5),
    "unruly": Policy(base_s=10.0, cap_s=900.0, floor_s=2.0),
    "update": Policy(base_s=5.0, cap_s=900.0, floor_s=1.0),
    "worker": Policy(base_s=0.25, cap_s=60.0, floor_s=0.05),
}
"""By cause: the broker is away, a mirror sends wrong bytes (each try may cost some files), the broker refuses us, a runtime does not load, a sync failed, a worker leaked or spun again, an update
failed for want of a network, a worker died."""


def delay_s(cause: str, failures: int, draw: float, *, scale: float = 1.0) -> float:
    """The wait after the n-th failure in a row.

    Args:
        cause: a key of ``POLICIES``.
        failures: in a row, from 1.
        draw: uniform in [0, 1).
        scale: multiplies all limits; below 1 in tests and demonstrations.

    Raises:
        ValueError: when ``failures`` is below 1 or ``draw`` outside [0, 1).
    """
    if failures < 1 or not 0 <= draw < 1:
        raise ValueError(f"wanted failures >= 1 and 0 <= draw < 1, got {failures} and {draw}")
    policy = POLICIES[cause]
    # The exponent is bounded so that years of failures cannot overflow a float.
    limit = min(policy.cap_s, policy.base_s * 2.0 ** min(failures - 1, 60))
    return scale * max(policy.floor_s, limit * draw)


def bell_pause_s(idle_bells: int) -> float:
    """How long after the last sync a bell is answered, when ``idle_bells`` in a row brought nothing new.

    >>> [bell_pause_s(n) for n in (0, 1, 2, 3, 100)]
    [0.0, 1.0, 2.0, 4.0, 60.0]
    """
    return 0.0 if idle_bells < 1 else min(60.0, 2.0 ** min(idle_bells - 1, 10))


def spread(device: str, version: int) -> float:
    """Where in [0, 1) a device comes when its group's bell rings for a version: the same each time it rings, another place each version.

    >>> spread("press-01", 7) == spread("press-01", 7) != spread("press-01", 8)
    True
    """
    digest = hashlib.sha256(f"skerry-jitter:{device}:{version}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / (1 << 64)
