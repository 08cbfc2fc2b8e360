"""Between what every number of the configuration must lie: what is outside could not be meant, and would be found out at night.

A value that no clock, disk or counter can follow (an infinite budget, a report every nanosecond) is refused when the file is read, by name.
"""

from __future__ import annotations

import math
from typing import Any, Final

_YEAR_S: Final = 366 * 86400.0
_MOST_MB: Final = 1e9
_POSITIVE: Final = frozenset({
    "limits.outbox_mb", "limits.uploads_in_flight", "limits.upload_kib", "limits.max_inflight", "limits.max_wait_s", "timing.health_interval_s",
    "timing.drain_s", "timing.ack_s", "timing.backoff_scale", "timing.courier_s", "mqtt.keepalive_s", "timing.silent_s", "timing.inference_s",
    "labels.predictions", "labels.former_keys", "timing.spin_s", "timing.unserved_s", "runtime.threads",
    "updates.lock_s",
})  # fmt: skip
_NOT_NEGATIVE: Final = frozenset({
    "apps.clients", "limits.disk_reserve_mb", "limits.memory_reserve_mb", "limits.leak_slack_mb", "pool.idle_s", "timing.fold_interval_s",
    "labels.max_age_s", "pool.waiting", "pool.wait_s", "access.rate", "access.burst", "access.distinct_most", "limits.outbox_free_mb",
    "limits.upload_kib_s", "limits.file_reserve", "timing.commit_s", "telemetry.readings_s", "telemetry.samples_per_hour",
    "updates.import_age_s",
})  # fmt: skip
_LEAST: Final[dict[str, float]] = {
    "timing.health_interval_s": 0.01,
    "timing.silent_s": 0.1,
    "timing.inference_s": 0.1,
    "limits.upload_kib_s": 0.1,
    "access.rate": 1e-4,
    "timing.fold_interval_s": 0.01,
    "telemetry.readings_s": 0.1,
}
"""Where there is more than 0; 0 itself has a meaning of its own."""
_MOST: Final[dict[str, float]] = {
    "mqtt.keepalive_s": 65535,
    "access.rate": 1e6,
    "access.burst": 10**6,
    "access.distinct_most": 2**53,
    "apps.clients": 4096,
    "labels.predictions": 1 << 24,
    "labels.former_keys": 1024,
    "limits.uploads_in_flight": 1024,
    "limits.upload_kib": 2048,
    "limits.upload_kib_s": 1e9,
    "limits.max_inflight": 1 << 16,
    "limits.max_wait_s": 3600,
    "limits.file_reserve": 10**12,
    "pool.waiting": 1 << 16,
    "timing.health_interval_s": 3600,
    "timing.drain_s": 3600,
    "timing.backoff_scale": 1000,
    "timing.trial_inferences": 10**12,
    "telemetry.samples_per_hour": 10**6,
    "updates.lock_s": 7 * 86_400,
}


def fault(key: str, value: Any) -> str | None:
    """What is wrong with a number by its key, ``section.name``; None where nothing is, or it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return f"wanted a number that has an end, got {value}"
    if key in _POSITIVE and not value > 0:
        return f"wanted more than 0, got {value}"
    if key in _NOT_NEGATIVE and not value >= 0:
        return f"wanted 0 or more, got {value}"
    least = _LEAST.get(key)
    if least is not None and 0 < value < least:
        return f"wanted at least {least:g}, got {value}"
    most = _MOST.get(key, _usual(key))
    if value > most:
        return f"wanted at most {most:g}, got {value}"
    return None


def _usual(key: str) -> float:
    if key.endswith("_mb"):
        return _MOST_MB
    return _YEAR_S if key.endswith("_s") else math.inf
