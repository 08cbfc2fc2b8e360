"""What the device says of itself: the retained MQTT state, the status for people, the metrics text. Builds values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from skerry_contract import wire

from skerry_agent import __version__
from skerry_agent.core.lifecycle import Update
from skerry_agent.slots import Slot


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Everything that is reported, at one moment.

    Attributes:
        answering: whether a live worker listens.
        linked: whether an MQTT session is up; server_online: what the server last said of itself.
        pending, pending_bytes, pending_inferences: what waits in the outbox.
        rss_mb: of this process; worker_rss_mb: of the serving worker, as it last said.
        worker_ends: how often a serving worker ended or was replaced, by reason code, over all starts of the agent.
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
    answering: bool
    update: Update
    lost: dict[str, int]
    linked: bool
    server_online: bool
    pending: int
    pending_bytes: int
    pending_inferences: int
    serving: dict[str, Any]
    sync: dict[str, Any]
    counts: dict[str, dict[str, Any]]
    rss_mb: float
    worker_pid: int
    worker_rss_mb: float
    worker_ends: dict[str, int]
    uptime_s: float


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
            state=slot.standing if snapshot.answering else "stopped",
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
        "update": update if snapshot.update.model else None,
        "serving": snapshot.serving,
        "worker": {"pid": snapshot.worker_pid, "rss_mb": snapshot.worker_rss_mb, "ends": snapshot.worker_ends},
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
        "uptime_s": snapshot.uptime_s,
    }


def metrics(snapshot: Snapshot) -> bytes:
    """The Prometheus text format."""
    gauges: list[tuple[str, str, list[tuple[dict[str, str], float]]]] = [
        ("skerry_agent_up_seconds", "Seconds since the agent started", [({}, snapshot.uptime_s)]),
        ("skerry_agent_rss_bytes", "Resident memory of the supervisor", [({}, snapshot.rss_mb * 1e6)]),
        ("skerry_agent_link_up", "1 while an MQTT session is up", [({}, float(snapshot.linked))]),
        ("skerry_agent_answering", "1 while a worker answers requests", [({}, float(snapshot.answering))]),
        ("skerry_agent_outbox_records", "Records that the server has not acknowledged", [({}, snapshot.pending)]),
        ("skerry_agent_outbox_bytes", "Bytes of those records", [({}, snapshot.pending_bytes)]),
        (
            "skerry_agent_lost",
            "What was lost or dropped, by cause",
            [({"cause": c}, n) for c, n in sorted(snapshot.lost.items())],
        ),
        (
            "skerry_agent_worker_ends",
            "How often a serving worker ended or was replaced, by reason code",
            [({"code": code}, n) for code, n in sorted(snapshot.worker_ends.items())],
        ),
        (
            "skerry_agent_requests",
            "Requests of the serving generation, by outcome",
            [
                ({"model": model, "outcome": outcome}, float(counts[outcome]))
                for model, counts in sorted(snapshot.counts.items())
                for outcome in ("ok", "invalid", "failed", "shed")
            ],
        ),
        (
            "skerry_agent_running",
            "1 for the bundle that answers for a model",
            [
                ({"model": name, "version": slot.version, "digest": slot.digest[:12]}, 1.0)
                for name, slot in sorted(snapshot.models.items())
            ],
        ),
    ]
    lines: list[str] = []
    for name, words, samples in gauges:
        lines += [f"# HELP {name} {words}", f"# TYPE {name} gauge"]
        for labels, value in samples:
            inner = ",".join(f'{key}="{text}"' for key, text in labels.items())
            lines.append(f"{name}{{{inner}}} {value:g}" if inner else f"{name} {value:g}")
    return ("\n".join(lines) + "\n").encode()
