"""Which runtimes this device can use: those that are installed, without those that failed when a worker loaded them.

A runtime that failed counts as missing, here and in what the server is told, until its wait is over (``core.backoff``), a worker
proves a model on it, or the agent starts again: what broke it may have been a moment, or be repaired. The stratum keeps its name
meanwhile, or the device would leave the part of a rollout that it was drawn in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from skerry_contract.manifest import Variant, runtime_suffices

from skerry_agent import facts
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.core import backoff
from skerry_agent.logs import kv

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Failed:
    failures: int
    until_s: float
    left_out: bool = True


class Runtimes:
    """See the module. ``draw``: uniform in [0, 1)."""

    def __init__(self, config: Config, clock: Clock, draw: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._draw = draw
        self._installed = facts.runtimes(config)
        self._failed: dict[str, _Failed] = {}

    @property
    def usable(self) -> dict[str, str]:
        """Name -> version, in the configuration's order."""
        broken = self.broken
        return {name: version for name, version in self._installed.items() if name not in broken}

    @property
    def broken(self) -> frozenset[str]:
        """Those that are installed and left out."""
        return frozenset(name for name, failed in self._failed.items() if failed.left_out)

    def lacks(self, variant: Variant) -> bool:
        """Whether no worker can be expected to load this variant now."""
        version = self.usable.get(variant.runtime)
        return version is None or not runtime_suffices(version, variant.min)

    def failed(self, variant: Variant, detail: str) -> bool:
        """A worker found no runtime for the variant. Returns whether that was news."""
        before = self.usable
        # Installed packages may have changed since the agent began; one that is gone or too old is not broken.
        self._installed = facts.runtimes(self._config)
        if not self.lacks(variant):
            known = self._failed.get(variant.runtime)
            failures = known.failures + 1 if known is not None else 1
            wait_s = backoff.delay_s("runtime", failures, self._draw(), scale=self._config.timing.backoff_scale)
            self._failed[variant.runtime] = _Failed(failures, self._clock.boot_s() + wait_s)
            log.error(
                "runtime does not work here",
                extra=kv(runtime=variant.runtime, detail=detail, left=sorted(self.usable), again_s=round(wait_s)),
            )
        return self.usable != before

    def worked(self, runtimes: Collection[str]) -> bool:
        """A worker proved models on these: nothing is held against them. Returns whether one had been left out."""
        gone = [self._failed.pop(name) for name in runtimes if name in self._failed]
        return any(failed.left_out for failed in gone)

    def try_again(self) -> bool:
        """Takes up those whose wait is over. Returns whether there was one."""
        now_s = self._clock.boot_s()
        due = [name for name, failed in self._failed.items() if failed.left_out and failed.until_s <= now_s]
        for name in due:
            self._failed[name].left_out = False
            log.info("runtime is tried again", extra=kv(runtime=name, failures=self._failed[name].failures))
        return bool(due)
