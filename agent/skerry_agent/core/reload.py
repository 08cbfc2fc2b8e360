"""Says of a changed configuration what takes effect at once, what with the next worker, and what only with a restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LIVE = frozenset({
    "log.level", "log.json", "timing.sync_s", "timing.jitter_s", "timing.trial_s", "timing.trial_inferences", "timing.drain_s",
    "timing.courier_s", "timing.silent_s", "timing.inference_s", "timing.unserved_s", "limits.disk_reserve_mb",
    "limits.memory_reserve_mb", "limits.outbox_mb", "pool.standby", "updates.activate", "updates.clock", "updates.lock_s", "updates.import_age_s",
    "network.type", "network.metered", "apps.users", "apps.clients",
})  # fmt: skip
"""Read whenever they are needed."""
NEXT_WORKER = frozenset({
    "timing.fold_interval_s", "timing.health_interval_s", "limits.max_inflight", "labels.max_age_s", "labels.predictions",
    "labels.former_keys", "telemetry.otlp_endpoint", "telemetry.trace_share",
})  # fmt: skip
"""A worker is told when it starts: at the next update, crash or restart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """Keys that differ, sorted, by when they take effect."""

    live: tuple[str, ...] = ()
    next_worker: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()

    @property
    def now(self) -> frozenset[str]:
        """What the running agent takes over."""
        return frozenset((*self.live, *self.next_worker))


def judge_reload(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """Compares two configurations, by dotted key. A socket of applications comes and goes with a restart only.

    >>> judge_reload({"log.level": "info", "mqtt.port": 1}, {"log.level": "debug", "mqtt.port": 2})
    Changes(live=('log.level',), next_worker=(), restart=('mqtt.port',))
    """
    changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    toggled = {"apps.clients"} if not before.get("apps.clients") or not after.get("apps.clients") else set()
    live = tuple(key for key in changed if key in LIVE and key not in toggled)
    later = tuple(key for key in changed if key in NEXT_WORKER)
    return Changes(live=live, next_worker=later, restart=tuple(key for key in changed if key not in {*live, *later}))
