"""One generation: a worker, what it serves, which rings it counts in, and what it said of itself."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from skerry_agent import workerwire as ww
from skerry_agent.config import Config
from skerry_agent.core import liveness
from skerry_agent.core.recent import Recent
from skerry_agent.core.trial import Counts
from skerry_agent.serving.notes import Note
from skerry_agent.slots import Slot, Slots
from skerry_agent.workers import Worker


@dataclass(kw_only=True, slots=True)
class Generation:
    """One worker and what it serves.

    Attributes:
        rings: model -> ring it counts in now; former: rings it gave up by a rekey; books: label books it writes.
        health: counts since it listens; None before the first report.
        silent_s: since the last report; see ``core.liveness``.
        hung: why it was killed as hung; empty when it was not.
        unruly: the code for which it is being replaced although it answers; empty when it is not.
        needs_mb: what its models declare; ready_mb: what it had when it was ready; most_mb: what it may have.
        spins_since: see ``core.liveness``.
        gone: its process has ended, and what it said was heard.
        note: which model it is at; suspects: those that were in work when it died. loading: the one that it loads.
        accepting: it takes new connections; elsewhere: models of other cells, as it was told.
        cold_ms: what its start took, when a request waited for it.
        recent: by model, what it counted of late.
        refused: models for which it must not answer any more.
        listening_s: when it began to listen, seconds since boot; None before.
    """

    number: int
    cell: str
    models: dict[str, Slot]
    rings: dict[str, str]
    worker: Worker
    ready: asyncio.Future[ww.Ready]
    note: Note
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    former: set[str] = field(default_factory=set)
    books: set[str] = field(default_factory=set)
    recovering: set[str] = field(default_factory=set)
    health: ww.Health | None = None
    silent_s: float = 0.0
    hung: str = ""
    unruly: str = ""
    needs_mb: float = 0.0
    ready_mb: float = 0.0
    most_mb: float = math.inf
    spins_since: liveness.Use | None = None
    proofs: dict[str, ww.Proved] = field(default_factory=dict)
    listening_s: float | None = None
    cold_ms: int = 0
    leaving: bool = False
    gone: bool = False
    accepting: bool = False
    elsewhere: dict[str, str] = field(default_factory=dict)
    loading: str = ""
    suspects: tuple[str, ...] = ()
    recent: dict[str, Recent] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    @property
    def only(self) -> str:
        """The name of its model, when it has but one."""
        return next(iter(self.models)) if len(self.models) == 1 else ""

    @property
    def owned_rings(self) -> set[str]:
        """Rings that this worker may still write or fold."""
        return {*self.rings.values(), *self.former, *self.recovering}


def use_of(health: ww.Health) -> liveness.Use:
    """What ``core.liveness`` wants of a report."""
    idle = health.inflight == 0 and health.busy_s == 0.0
    own_mb = max(0.0, health.own_mb - health.held_mb)
    return liveness.Use(at_s=health.at_s, own_mb=own_mb, cpu_s=health.cpu_s, work=health.work, idle=idle)


def life_of(generation: Generation) -> liveness.Life:
    """What is known of its worker."""
    health = generation.health
    return liveness.Life(
        silent_s=generation.silent_s,
        busy_s=health.busy_s if health is not None else 0.0,
        expected_s=health.expected_s if health is not None else 0.0,
    )


def take_health(generation: Generation, health: ww.Health, now_s: float) -> None:
    """Notes a report of its worker. ``now_s``: seconds since boot."""
    for name, told in health.models.items():
        generation.recent.setdefault(name, Recent()).hear(now_s, counts_of(told))
    generation.health, generation.silent_s = health, 0.0
    generation.spins_since = liveness.spins_since(generation.spins_since, use_of(health))


def start_message(
    generation: Generation,
    slots: Slots,
    config: Config,
    *,
    window_s: float,
    boot_id: str,
    throttle: float,
    sampling: ww.SamplingRules,
    device: str = "",
) -> ww.Start:
    """The first message to its worker."""
    access = config.access
    generation.refused |= {name for name, slot in generation.models.items() if slots.forbidden(name, slot.version)}
    return ww.Start(
        generation=generation.number,
        models=tuple(
            ww.Served(
                name=name,
                version=slot.version,
                digest=slot.digest,
                variant=slot.variant,
                path=str(slots.load_path(slot.digest)),
                ring=generation.rings[name],
                arm=slot.arm,
                rollout=slot.rollout,
                stage=slot.stage,
            )
            for name, slot in sorted(generation.models.items())
        ),
        window_s=window_s,
        fold_interval_s=config.timing.fold_interval_s,
        health_interval_s=config.timing.health_interval_s,
        max_inflight=config.limits.max_inflight,
        max_wait_s=config.limits.max_wait_s,
        boot_id=boot_id,
        label_age_s=config.labels.max_age_s,
        label_predictions=config.labels.predictions,
        label_books=config.labels.former_keys,
        access=ww.Access(
            clients=str(config.clients_file) if access.required else "",
            rate=access.rate,
            burst=access.burst,
            distinct=access.distinct,
            shared=str(config.run_dir / "limits"),
        ),
        throttle=throttle,
        sampling=sampling,
        refused=tuple(sorted(generation.refused)),
        acceleration=config.runtime.acceleration,
        otlp_endpoint=config.telemetry.otlp_endpoint,
        trace_share=config.telemetry.trace_share,
        device=device,
    )


def counts_of(health: ww.ModelHealth | None) -> Counts:
    """What the trial judges, from what the worker reports."""
    if health is None:
        return Counts()
    return Counts(
        ok=health.ok, invalid=health.invalid, failed=health.failed, shed=health.shed, p95_ms=health.p95_ms, latency=health.latency
    )  # fmt: skip


def exit_words(code: int) -> str:
    """How a process ended."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
