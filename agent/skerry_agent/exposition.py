"""``GET /metrics`` of the control socket: the Prometheus text format (0.0.4). Builds bytes only.

Counters begin at 0 with the agent, or with the worker where they are its own: a reader takes a fall for a restart. Labels are
models, outcomes, causes and codes, never values of requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from skerry_agent import __version__
from skerry_agent import workerwire as ww
from skerry_agent.reporting import Snapshot

Labels = dict[str, str]
Samples = list[tuple[Labels, float]]
_OUTCOMES = ("ok", "invalid", "failed", "shed")


def metrics(snapshot: Snapshot) -> bytes:
    """Everything of one moment."""
    lines: list[str] = []
    for kind, name, words, samples in _families(snapshot):
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
        lines += [_line(name, labels, value) for labels, value in samples]
    lines += _latency(snapshot)
    return ("\n".join(lines) + "\n").encode()


def _families(s: Snapshot) -> Iterable[tuple[Literal["gauge", "counter"], str, str, Samples]]:
    counts = sorted(s.counts.items())
    yield (
        "gauge",
        "skerry_agent_info",
        "1, with the agent's version, group and stratum",
        [({"version": __version__, "group": s.group, "stratum": s.stratum}, 1.0)],
    )
    yield "gauge", "skerry_agent_up_seconds", "Seconds since the agent started", [({}, s.uptime_s)]
    yield "gauge", "skerry_agent_rss_bytes", "Resident memory of the supervisor", [({}, s.rss_mb * 1e6)]
    yield "gauge", "skerry_agent_link_up", "1 while an MQTT session is up", [({}, float(s.linked))]
    yield (
        "gauge",
        "skerry_agent_server_online",
        "1 while the server says that it listens",
        [({}, float(s.server_online))],
    )
    yield (
        "gauge",
        "skerry_agent_answering",
        "1 while every model that should be is served",
        [({}, float(bool(s.models) and not s.stopped))],
    )
    yield (
        "gauge",
        "skerry_agent_running",
        "1 for the bundle that answers for a model",
        [
            ({"model": name, "version": slot.version, "digest": slot.digest[:12], "standing": slot.standing}, 1.0)
            for name, slot in sorted(s.models.items())
        ],
    )
    yield (
        "counter",
        "skerry_agent_swaps_total",
        "How often another bundle took a model over, since the agent started",
        [({"model": name}, float(n)) for name, n in sorted(s.swaps.items())],
    )
    yield (
        "counter",
        "skerry_agent_requests_total",
        "Requests by outcome, since the model's worker listens",
        [
            ({"model": model, "outcome": outcome}, float(found[outcome]))
            for model, found in counts
            for outcome in _OUTCOMES
        ],
    )
    yield "gauge", "skerry_agent_inflight", "Requests in work", [({}, float(sum(one.inflight for one in s.workers)))]
    yield (
        "counter",
        "skerry_agent_requests_waited_total",
        "Requests that waited for a worker of their model",
        [({}, float(s.requests_waited))],
    )
    yield (
        "counter",
        "skerry_agent_requests_refused_total",
        "Requests turned away because their model had no worker",
        [({}, float(s.requests_refused))],
    )
    yield (
        "gauge",
        "skerry_agent_worker_rss_bytes",
        "Resident memory of a worker; cell: the model that has it for itself",
        [({"cell": one.cell}, one.rss_mb * 1e6) for one in s.workers],
    )
    yield (
        "counter",
        "skerry_agent_worker_ends_total",
        "How often a serving worker ended or was replaced, over all starts",
        [({"code": code}, float(n)) for code, n in sorted(s.worker_ends.items())],
    )
    yield (
        "gauge",
        "skerry_agent_client_distinct_requests",
        "About how many different requests a client made, this day so far",
        [({"client": name}, float(n)) for name, n in s.clients.items()],
    )
    on_demand = sorted(s.on_demand.items())
    yield (
        "gauge",
        "skerry_agent_asleep",
        "1 while a model that is loaded on demand has no worker",
        [({"model": name}, float(cell.resting)) for name, cell in on_demand],
    )
    yield (
        "counter",
        "skerry_agent_cold_starts_total",
        "How often a request had a model loaded",
        [({"model": name}, float(cell.cold_starts)) for name, cell in on_demand],
    )
    yield (
        "counter",
        "skerry_agent_cold_start_seconds_total",
        "How long that took in all",
        [({"model": name}, cell.cold_start_s) for name, cell in on_demand],
    )
    yield (
        "gauge",
        "skerry_agent_cold_start_last_seconds",
        "How long it took the last time",
        [({"model": name}, cell.cold_last_s) for name, cell in on_demand],
    )
    yield (
        "gauge",
        "skerry_agent_cold_start_max_seconds",
        "How long it took at most since the agent started",
        [({"model": name}, cell.cold_max_s) for name, cell in on_demand],
    )
    yield (
        "gauge",
        "skerry_agent_outbox_records",
        "Records that the server has not acknowledged",
        [({}, float(s.pending))],
    )
    yield "gauge", "skerry_agent_outbox_bytes", "Bytes of those records", [({}, float(s.pending_bytes))]
    yield (
        "gauge",
        "skerry_agent_outbox_inferences",
        "Inferences that those records count",
        [({}, float(s.pending_inferences))],
    )
    yield (
        "counter",
        "skerry_agent_lost_total",
        "What was lost or dropped since the store began, by cause",
        [({"cause": cause}, float(n)) for cause, n in sorted(s.lost.items())],
    )
    yield (
        "gauge",
        "skerry_agent_applications",
        "Models that applications run in processes of their own",
        [({}, float(len(s.applications.get("connected", ()))))],
    )
    for what in ("sent", "dropped"):
        yield (
            "counter",
            f"skerry_agent_spans_{what}_total",
            f"Traced requests whose spans were {what}",
            [({"cell": one.cell}, float(getattr(one, f"spans_{what}"))) for one in s.workers],
        )


def _latency(s: Snapshot) -> list[str]:
    name = "skerry_agent_request_seconds"
    lines = [
        f"# HELP {name} Time of answered requests in the worker; a bucket may lack those within 2.2 % of its bound",
        f"# TYPE {name} histogram",
    ]
    for model, found in sorted(s.counts.items()):
        below = found["latency"]
        bounds = [f"{bound_ms / 1e3:g}" for bound_ms in ww.LATENCY_MS]
        for bound, n in zip([*bounds, "+Inf"], [*below, found["ok"]], strict=True) if below else ():
            lines.append(_line(f"{name}_bucket", {"model": model, "le": bound}, float(n)))
        if below:
            lines.append(_line(f"{name}_sum", {"model": model}, found["latency_s"]))
            lines.append(_line(f"{name}_count", {"model": model}, float(found["ok"])))
    return lines


def _line(name: str, labels: Labels, value: float) -> str:
    inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    # As many digits as it has: a counter that is rounded seems to stand still.
    text = str(int(value)) if value == int(value) else repr(value)
    return f"{name}{{{inner}}} {text}" if inner else f"{name} {text}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
