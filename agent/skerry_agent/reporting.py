"""What the device says of itself: the retained MQTT state, the status for people; ``exposition`` has the metrics. Builds values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from skerry_contract import wire

from skerry_agent import __version__
from skerry_agent.accelerators import engines_of
from skerry_agent.core.lifecycle import Update
from skerry_agent.serving import Generation, OnDemand
from skerry_agent.slots import Slot


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingWorker:
    """One worker.

    Attributes:
        cell: the model that has it for itself; empty for the shared one.
        pid: 0 while it is dead and not yet replaced.
        accepting: it takes new connections.
        rss_mb, own_mb, inflight, counts: as it last said; most_mb: what it may have for its own.
        engines: by model, what it runs on and why not on what was configured.
        spans_sent, spans_dropped: traced requests that a collector took, and did not get.
    """

    cell: str
    pid: int
    generation: int
    models: list[str]
    accepting: bool
    rss_mb: float
    own_mb: float
    most_mb: float
    inflight: int
    counts: dict[str, Any]
    engines: dict[str, dict[str, Any]]
    spans_sent: int = 0
    spans_dropped: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Everything that is reported, at one moment.

    Attributes:
        stopped: models whose worker is gone.
        linked: whether an MQTT session is up; server_online: what the server last said of itself.
        pending, pending_bytes, pending_inferences: what waits in the outbox.
        written_mb: what supervisor and workers gave the disk to write since each began; None where the kernel does not say.
        rss_mb: of this process; workers: the serving ones, the one that takes connections first.
        spare_pid: of a worker that was started ahead; 0 without one.
        requests_waited: for a worker that was not there. on_demand: models that are loaded when they are wanted.
        clients: about how many different requests each made, this day so far.
        suspects: models that were in work when a worker died, and how often of late.
        requests_refused: that waited too long, or with too many, for a worker that was not there.
        worker_ends: how often a serving worker ended or was replaced, by reason code, over all starts of the agent.
        applications: who runs a bundle in a process of its own.
        now_ms: the wall clock, never before the signed lower bound, milliseconds since 1970.
        swaps: how often another bundle took a model over, since the agent started.
        fetching: how far the files of the update are, None while none is fetched; fetched: the same for people.
    """

    device: str
    group: str
    birth: int
    generation: int
    boot_id: str
    epoch: str
    seq: int
    stratum: str
    arch: str
    abilities: tuple[str, ...]
    runtimes: dict[str, str]
    tuf: dict[str, int]
    models: dict[str, Slot]
    stopped: frozenset[str]
    update: Update
    lost: dict[str, int]
    linked: bool
    server_online: bool
    pending: int
    pending_bytes: int
    pending_inferences: int
    serving: dict[str, Any]
    sync: dict[str, Any]
    rss_mb: float
    workers: tuple[ServingWorker, ...]
    worker_ends: dict[str, int]
    suspects: dict[str, int]
    requests_refused: int
    requests_waited: int
    spare_pid: int
    on_demand: dict[str, OnDemand]
    clients: dict[str, int]
    uptime_s: float
    now_ms: int = 0
    written_mb: float | None = None
    applications: dict[str, Any] = field(default_factory=dict)
    swaps: dict[str, int] = field(default_factory=dict)
    fetching: wire.Progress | None = None
    fetched: dict[str, Any] | None = None

    @property
    def engines(self) -> dict[str, dict[str, Any]]:
        """By model, what it runs on and why not on what was configured."""
        return {model: engine for one in self.workers for model, engine in one.engines.items()}

    @property
    def counts(self) -> dict[str, Any]:
        """By model, since its worker listens."""
        return {model: counts for one in self.workers for model, counts in one.counts.items()}


def worker(generation: Generation) -> ServingWorker:
    """What is shown of a serving generation."""
    health = generation.health
    return ServingWorker(
        cell=generation.cell,
        pid=generation.worker.pid if generation.worker.alive and not generation.hung else 0,
        generation=generation.number,
        models=sorted(generation.models),
        accepting=generation.accepting,
        rss_mb=health.rss_mb if health else 0.0,
        own_mb=health.own_mb if health else 0.0,
        most_mb=generation.most_mb,
        inflight=health.inflight if health else 0,
        counts=msgspec.to_builtins(health.models) if health else {},
        engines=engines_of(generation.proofs),
        spans_sent=health.spans_sent if health else 0,
        spans_dropped=health.spans_dropped if health else 0,
    )


def will(birth: int) -> bytes:
    """The will of a session: offline, and which session."""
    return wire.encode(wire.State(status="offline", birth=birth))


def running(snapshot: Snapshot) -> dict[str, wire.Running]:
    """What answers requests, by the bundle that the serving worker loaded."""
    return {
        name: wire.Running(
            digest=slot.digest,
            version=slot.version,
            variant=slot.variant,
            state="stopped" if name in snapshot.stopped else slot.standing,
        )
        for name, slot in sorted(snapshot.models.items())
    }


def state(snapshot: Snapshot) -> wire.State:
    """The retained state."""
    update = snapshot.update
    return wire.State(
        status="online",
        birth=snapshot.birth,
        agent=__version__,
        group=snapshot.group,
        generation=snapshot.generation,
        boot_id=snapshot.boot_id,
        epoch=snapshot.epoch,
        seq=snapshot.seq,
        stratum=snapshot.stratum,
        arch=snapshot.arch,
        abilities=snapshot.abilities,
        runtimes=snapshot.runtimes,
        tuf=snapshot.tuf,
        running=running(snapshot),
        update=wire.Update(
            model=update.model,
            digest=update.digest,
            state=update.state,
            since=update.since,
            code=update.code,
            detail=update.detail,
            attempt=update.attempt,
        )
        if update.model
        else None,
        lost=snapshot.lost,
        progress=snapshot.fetching,
    )


def status(snapshot: Snapshot) -> dict[str, Any]:
    """For ``skerry-agent status --json``: builtins, stable names."""
    update = msgspec.to_builtins(snapshot.update)
    return {
        "device": snapshot.device,
        "agent": __version__,
        "group": snapshot.group,
        "group_generation": snapshot.generation,
        "stratum": snapshot.stratum,
        "runtimes": snapshot.runtimes,
        "running": msgspec.to_builtins(running(snapshot)),
        "keys": {n: {"arm": s.arm, "rollout": s.rollout, "stage": s.stage} for n, s in sorted(snapshot.models.items())},
        "update": update | {"progress": snapshot.fetched} if snapshot.update.model else None,
        "serving": snapshot.serving,
        "worker": {
            "pid": snapshot.workers[0].pid if snapshot.workers else 0,
            "rss_mb": snapshot.workers[0].rss_mb if snapshot.workers else 0.0,
            "ends": snapshot.worker_ends,
            "suspects": snapshot.suspects,
            "spare_pid": snapshot.spare_pid,
        },
        "workers": [
            {
                "cell": one.cell,
                "pid": one.pid,
                "generation": one.generation,
                "models": one.models,
                "rss_mb": one.rss_mb,
                "own_mb": one.own_mb,
                "most_mb": one.most_mb,
                "accepting": one.accepting,
            }
            for one in snapshot.workers
        ],
        "clients": {name: {"distinct": n} for name, n in snapshot.clients.items()},
        "on_demand": {
            name: {
                "asleep": cell.resting,
                "cold_starts": cell.cold_starts,
                "cold_start_s": cell.cold_start_s,
                "cold_last_s": cell.cold_last_s,
                "cold_max_s": cell.cold_max_s,
            }
            for name, cell in sorted(snapshot.on_demand.items())
        },
        "engines": snapshot.engines,
        "applications": snapshot.applications,
        "counts": snapshot.counts,
        "outbox": {
            "epoch": snapshot.epoch,
            "seq": snapshot.seq,
            "pending": snapshot.pending,
            "pending_bytes": snapshot.pending_bytes,
            "pending_inferences": snapshot.pending_inferences,
            "lost": snapshot.lost,
        },
        "link": {"connected": snapshot.linked, "server_online": snapshot.server_online, "birth": snapshot.birth},
        "tuf": snapshot.tuf,
        "sync": snapshot.sync,
        "rss_mb": snapshot.rss_mb,
        "written_mb": snapshot.written_mb,
        "uptime_s": snapshot.uptime_s,
    }
