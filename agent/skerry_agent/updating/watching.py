"""The trial: a bundle that answers is watched, and judged by what it counts (``core.trial``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skerry_contract import manifest as m

from skerry_agent.clock import Clock
from skerry_agent.core import effects as e
from skerry_agent.core import trial
from skerry_agent.core.lifecycle import Update
from skerry_agent.serving import Serving
from skerry_agent.slots import Slots


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRules:
    """From the group's settings, or the configuration. ``max_kib_s``: of downloads, 0 for any."""

    duration_s: float = 60.0
    inferences: int = 100
    max_kib_s: int = 0


class Watching:
    """See the module.

    Args:
        update: the one under way, as it is stored.
        manifest: what was fetched last, None before the first.

    Attributes:
        on: whether the bundle has taken over, so that its counts are its own.
    """

    def __init__(
        self,
        slots: Slots,
        serving: Serving,
        clock: Clock,
        *,
        update: Callable[[], Update],
        manifest: Callable[[], m.Manifest | None],
    ) -> None:
        self._slots = slots
        self._serving = serving
        self._clock = clock
        self._update = update
        self._manifest = manifest
        self.on = False

    def begins(self) -> str:
        """What takes over right now: too late for a lock."""
        update = self._update()
        return f"{update.model} {update.version}" if update.state == "trial" and not self.on else ""

    def judge(self, rules: TrialRules) -> e.Event | None:
        """What the trial's counts say; None: nothing yet."""
        update = self._update()
        generation = self._serving.generation_of(update.model)
        if not self.on or update.state != "trial" or generation is None or generation.listening_s is None:
            return None
        serves = generation.models.get(update.model)
        if serves is None or serves.digest != update.digest:
            # Only the bundle that answers can be judged, whatever the pointer file says.
            return None
        elapsed_s = self._clock.boot_s() - generation.listening_s
        manifest = self._manifest() or self._slots.manifest(update.digest)
        wanted = trial.Trial(
            inferences=rules.inferences,
            duration_s=rules.duration_s,
            limit_ms=manifest.slo.latency_p95_ms if manifest is not None else None,
        )
        model = update.model
        verdict = trial.judge_trial(
            wanted, self._serving.counts(model), self._serving.before.get(model), elapsed_s,
            current=self._serving.current_counts(model),
        )  # fmt: skip
        match verdict.answer:
            case "keep":
                return e.TrialKept(detail=verdict.detail)
            case "quiet":
                return e.TrialQuiet(detail=verdict.detail)
            case "revert":
                return e.Failed(code=verdict.code, detail=verdict.detail)
            case _:
                return None

    def so_far(self, rules: TrialRules) -> tuple[int, int, float]:
        """Inferences so far, those wanted, and seconds of its time that are left."""
        model, boot_s = self._update().model, self._clock.boot_s()
        generation = self._serving.generation_of(model)
        began_s = generation.listening_s if generation is not None and generation.listening_s is not None else boot_s
        answered = self._serving.counts(model).answered
        return answered, rules.inferences, max(0.0, rules.duration_s - (boot_s - began_s))
