"""``/metrics`` in the Prometheus format: the server's own health and the fleet's totals. Never a label per device.

Counters of this process live in a registry of their own; totals of the fleet are read from the database at each scrape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Engine, func, select

from skerry_server import __version__
from skerry_server.core import expiry
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.engine import reading

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Telemetry:
    """What is measured. Safe to use from several threads."""

    def __init__(
        self,
        engine: Engine,
        probe: Callable[[], dict[str, bool]],
        now_ms: Callable[[], int],
        certificates: Callable[[], dict[str, float]],
        clock_behind: Callable[[], bool],
    ) -> None:
        """Args:
        probe: whether each part of the server is well, by name.
        certificates: seconds to the end of each of the server's own certificates, by name.
        clock_behind: see ``Publication``.
        """
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "skerry_http_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "skerry_http_request_seconds", "Time to answer a request", ["route"], registry=self.registry
        )
        self.tick_seconds = Histogram(
            "skerry_orchestrator_tick_seconds",
            "Time of one look of the orchestrator",
            registry=self.registry,
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
        )
        self.tick_failures = Counter("skerry_orchestrator_tick_failures", "Looks that failed", registry=self.registry)
        self.faults = Counter(
            "skerry_orchestrator_faults",
            "Rollouts that could not be looked at, by the part that raised",
            ["part"],
            registry=self.registry,
        )
        self.delta_seconds = Histogram(
            "skerry_delta_make_seconds",
            "Time to make and try one delta, by what became of it",
            ["state"],
            registry=self.registry,
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
        )
        self.registry.register(_Fleet(engine, probe, now_ms, certificates, clock_behind))

    def observe_tick(self, seconds: float, well: bool) -> None:
        """Counts one look of the orchestrator."""
        self.tick_seconds.observe(seconds)
        if not well:
            self.tick_failures.inc()

    def observe_fault(self, part: str) -> None:
        """Counts one rollout of which ``part``, the judge or all of the look, raised."""
        self.faults.labels(part).inc()

    def observe_delta(self, state: str, seconds: float) -> None:
        """Counts one delta that became ``ready``, ``useless`` or ``failed``."""
        self.delta_seconds.labels(state).observe(seconds)

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts one request. ``route`` is the template, never the path: labels stay few."""
        self.requests.labels(method, route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)


class _Fleet(Collector):
    """Totals read from the database at each scrape."""

    def __init__(
        self,
        engine: Engine,
        probe: Callable[[], dict[str, bool]],
        now_ms: Callable[[], int],
        certificates: Callable[[], dict[str, float]],
        clock_behind: Callable[[], bool],
    ) -> None:
        self._engine, self._probe, self._now_ms, self._certificates = engine, probe, now_ms, certificates
        self._clock_behind = clock_behind

    def collect(self) -> Iterable[Any]:
        build = GaugeMetricFamily("skerry_build_info", "The running version", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        well = GaugeMetricFamily("skerry_part_up", "Whether a part of the server is well", labels=["part"])
        for part, up in sorted(self._probe().items()):
            well.add_metric([part], float(up))
        yield well
        ends = GaugeMetricFamily("skerry_certificate_expires_seconds", "Time left of a certificate", labels=["name"])
        for name, seconds in sorted(self._certificates().items()):
            ends.add_metric([name], seconds)
        yield ends
        with reading(self._engine) as conn:
            yield _counted(
                "skerry_devices",
                "Devices",
                ("group", "status", "online"),
                conn,
                t.devices,
                ("group", "status", "online"),
            )
            yield _counted("skerry_bundles", "Bundles", ("state",), conn, t.bundles, ("state",))
            yield _counted("skerry_rollouts", "Rollouts", ("state",), conn, t.rollouts, ("state",))
            made = queries.delta_totals(conn)
            totals = queries.telemetry_totals(conn)
            refused = queries.ingest_counts(conn)
            roles = conn.execute(select(t.roles.c.role, t.roles.c.version, t.roles.c.expires_ms)).all()
            ahead = conn.execute(select(t.ahead.c.role, t.ahead.c.version, t.ahead.c.device)).all()
        deltas = GaugeMetricFamily("skerry_deltas", "Deltas that devices could use", labels=["state"])
        for state, (n, _size) in sorted(made.items()):
            deltas.add_metric([state], n)
        yield deltas
        served = GaugeMetricFamily("skerry_delta_bytes", "Bytes of the deltas that are served")
        served.add_metric([], made.get("ready", (0, 0))[1])
        yield served
        telemetry = GaugeMetricFamily("skerry_telemetry", "Sums of what devices reported", labels=["kind"])
        for name, n in sorted(totals.items()):
            telemetry.add_metric([name], n)
        yield telemetry
        ingest = GaugeMetricFamily("skerry_ingest_refused", "What ingest refused or met", labels=["cause"])
        for name, n in sorted(refused.items()):
            ingest.add_metric([name], n)
        yield ingest
        version = GaugeMetricFamily("skerry_metadata_version", "Version of a TUF role", labels=["role"])
        left = GaugeMetricFamily("skerry_metadata_expires_seconds", "Time left of a TUF role", labels=["role"])
        for row in roles:
            version.add_metric([row.role], row.version)
            left.add_metric([row.role], (row.expires_ms - self._now_ms()) / 1000)
        yield version
        yield left
        alert = GaugeMetricFamily(
            "skerry_metadata_alert", "A TUF role that a person must see to, by reason", labels=["role", "code"]
        )
        if any(row.role == "timestamp" for row in roles):
            roles_now = {row.role: (row.version, row.expires_ms) for row in roles}
            held = {row.role: (row.version, row.device) for row in ahead}
            for due in expiry.alerts(roles_now, held, self._now_ms(), clock_behind=self._clock_behind()):
                alert.add_metric([due.role, due.code], 1)
        yield alert


def _counted(name: str, text: str, labels: tuple[str, ...], conn: Any, table: Any, columns: tuple[str, ...]) -> Any:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    by = [table.c[column] for column in columns]
    for row in conn.execute(select(*by, func.count()).group_by(*by)):
        *values, n = row
        family.add_metric([str(value).lower() for value in values], n)
    return family
