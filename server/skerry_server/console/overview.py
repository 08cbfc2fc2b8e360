"""What the page shows, read in one transaction: a value of plain parts that the templates only lay out.

Every list is bounded, and accuracy is of the last day: what was left out is said beside it. What a reading costs grows all the same with the
devices of each group that has a rollout under way, since the verdict as it stands now is of all of them (measured: 0.1 s with 1,000 devices
and 0.7 s with 20,000), with the devices that answered what is drawn of accuracy, and with the events that devices send. ``Shared`` keeps one
reading for all who watch, the longer the more it cost, so that they take a tenth of a core at most however large the fleet is.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skerry_contract import histogram as h
from skerry_contract import ids
from sqlalchemy import Connection, Integer, Select, cast, func, select

from skerry_server import attributions, evidence, findings, looks, outcomes, registry, rollouts, upkeep
from skerry_server.console import formats
from skerry_server.core import rollout as core
from skerry_server.core.expiry import Alert
from skerry_server.db import tables as t

TILES = 500
"""Devices drawn one by one; of a larger fleet only the first, and the totals."""
MODELS = 8
"""Drawn per device."""
RUNNING = 40
"""Versions of models counted over the devices drawn: those that most of them answer with."""
TROUBLE = 200
"""Characters of it that are drawn on a tile."""
DETAIL = 1000
"""Characters of an event's detail that are drawn."""
DECISIONS = 12
"""Those that moved a rollout: a decision to hold is taken many times a minute and would push them off the page."""
EVENTS = 10
ROLLOUTS = 10
BUNDLES = 20
"""Of drift and of accuracy: those that groups, rollouts and pins name, then the newest versions; drawn by model, the newest first."""
ACCURACY_MS = 24 * 3_600_000
"""So far back accuracy is counted: over the whole life of a version a fall would be lost among the labels of better days."""
SHARED_MS = 2_000
"""So long at least all who watch are shown the same: as often as the page asks."""
SHARED_TIMES = 10
"""And so many times as long as it took to read."""
MOST_SHARED_MS = 60_000
"""But no longer: a disk that hung once must not leave an old page. Only of a reading of more than 6 s those who watch take more than a tenth."""
FINDINGS = 5
"""Of drift, drawn per bundle: the strongest."""
_ENDED = ("completed", "rolled_back", "aborted")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One device. ``trouble``: why somebody should look at it, or empty."""

    id: str
    online: bool
    seen_ms: int | None
    stratum: str
    models: tuple[tuple[str, str, str, str], ...]
    """(model, version, variant, state); of many the first."""
    models_left_out: int
    trouble: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """How many of the devices drawn answer with one version of a model."""

    model: str
    version: str
    variant: str
    online: int
    devices: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """What one arm of a stage counted. Rates are shares, None without any request or label.

    Attributes:
        devices: of the list that was frozen when the stage began; reporting: of them, those that counted anything in it. All that
            follows is of these, answering with the bundle of their arm.
        p95_ms: of all requests together.
        labelled, wrong: without labels_held, those that are more than what their devices answered.
    """

    arm: str
    devices: int
    reporting: int
    inferences: int
    failed: int
    error_rate: float | None
    p95_ms: float | None
    labelled: int
    wrong: int
    accuracy: float | None
    labels_held: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A rollout under way, its arms side by side, and what the server thinks of it now."""

    id: str
    group: str
    model: str
    state: str
    stage: int
    stages: int
    since_ms: int
    stable: str
    candidate: str
    verdict: str
    reason: str
    sides: tuple[Side, Side]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """See the module. ``at_ms``: the server's clock, milliseconds since 1970."""

    at_ms: int
    name: str
    parts: dict[str, bool]
    alerts: tuple[Alert, ...]
    enrolled: int
    online: int
    tiles: tuple[Tile, ...]
    running: tuple[Running, ...]
    running_left_out: int
    rollouts: tuple[Progress, ...]
    rollouts_left_out: int
    drift: tuple[dict[str, Any], ...]
    drift_left_out: int
    accuracy: tuple[dict[str, Any], ...]
    accuracy_left_out: int
    decisions: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]

    @property
    def left_out(self) -> int:
        """Devices that are not drawn."""
        return self.enrolled - len(self.tiles)


class Shared:
    """The last overview, so that many who watch cost no more than one. Thread-safe: who comes while it is read waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: Overview | None = None
        self._hold_ms = SHARED_MS

    def get(
        self, read: Callable[[], Overview], now_ms: int, monotonic_s: Callable[[], float] = time.monotonic
    ) -> Overview:
        """The last one where that is young enough for what it cost, or what ``read`` returns."""
        with self._lock:
            held = self._held
            if held is None or not 0 <= now_ms - held.at_ms < self._hold_ms:
                began_s = monotonic_s()
                held = self._held = read()
                took_ms = round((monotonic_s() - began_s) * 1000)
                self._hold_ms = min(max(SHARED_MS, SHARED_TIMES * took_ms), MOST_SHARED_MS)
            return held


def gather(conn: Connection, *, name: str, parts: dict[str, bool], now_ms: int, clock_behind: bool = False) -> Overview:
    """Reads the page's content. ``parts``: whether each part of the server is well; ``clock_behind``: see ``Publication``."""
    c = t.devices.c
    enrolled_query = select(func.count(), func.coalesce(func.sum(cast(c.online, Integer)), 0)).where(
        c.status == "enrolled"
    )
    enrolled, online = conn.execute(enrolled_query).one()
    tiles, running = _fleet(conn)
    under_way = tuple(_progress(conn, now_ms))
    looked_at, drift_left_out = _foremost(conn, select(t.drift_evaluations.c.bundle))
    since_ms, upto_ms = now_ms - ACCURACY_MS, now_ms + 1
    of_late = (t.profiles.c.bundle == t.bundles.c.digest, t.profiles.c.bucket_ms >= since_ms)
    counted = select(t.bundles.c.digest).where(select(t.profiles.c.bundle).where(*of_late).exists())
    reckoned, accuracy_left_out = _foremost(conn, counted)
    return Overview(
        at_ms=now_ms,
        name=name,
        parts=parts,
        alerts=upkeep.alerts(conn, now_ms, clock_behind=clock_behind),
        enrolled=int(enrolled),
        online=int(online),
        tiles=tiles,
        running=_most_common(running),
        running_left_out=len(running[RUNNING:]),
        rollouts=under_way,
        rollouts_left_out=_rollouts_under_way(conn) - len(under_way),
        drift=_by_version(_drift(conn, looked_at, since_ms, upto_ms)),
        drift_left_out=drift_left_out,
        accuracy=_by_version(outcomes.accuracy_of(conn, reckoned, from_ms=since_ms, upto_ms=upto_ms)),
        accuracy_left_out=accuracy_left_out,
        decisions=_newest(conn, t.decisions, DECISIONS, t.decisions.c.action != "hold"),
        events=_newest(conn, t.events, EVENTS, t.events.c.code != ""),
    )


def _foremost(conn: Connection, digests: Select[Any]) -> tuple[list[str], int]:
    """Of some bundles those to draw, and how many more there are."""
    b = t.bundles.c
    found = conn.execute(select(b.digest, b.version).where(b.digest.in_(digests))).all()
    served = registry.served(conn)
    newest = sorted(found, key=lambda row: ids.version_key(row.version), reverse=True)
    foremost = sorted(newest, key=lambda row: row.digest not in served)
    return [row.digest for row in foremost[:BUNDLES]], len(found[BUNDLES:])


def _rollouts_under_way(conn: Connection) -> int:
    query = select(func.count()).select_from(t.rollouts).where(t.rollouts.c.state.not_in(_ENDED))
    return int(conn.execute(query).scalar_one())


def _fleet(conn: Connection) -> tuple[tuple[Tile, ...], list[Running]]:
    """The devices drawn, and what they answer with, the most common first."""
    c = t.devices.c
    columns = (c.id, c.online, c.seen_ms, c.stratum, c.running, c.state)
    query = select(*columns).where(c.status == "enrolled").order_by(c.id).limit(TILES)
    tiles: list[Tile] = []
    everyone: Counter[tuple[str, str, str]] = Counter()
    connected: Counter[tuple[str, str, str]] = Counter()
    for row in conn.execute(query):
        models = [
            (model, one.get("version", "?"), one.get("variant", ""), one.get("state", ""))
            for model, one in sorted((row.running or {}).items())
        ]
        for model, version, variant, _state in models:
            everyone[model, version, variant] += 1
            connected[model, version, variant] += bool(row.online)
        tile = Tile(
            id=row.id,
            online=bool(row.online),
            seen_ms=row.seen_ms,
            stratum=row.stratum,
            models=tuple(models[:MODELS]),
            models_left_out=len(models[MODELS:]),
            trouble=formats.brief(_trouble(row.running or {}, (row.state or {}).get("update") or {}), TROUBLE),
        )
        tiles.append(tile)
    running = [
        Running(model=model, version=version, variant=variant, online=connected[model, version, variant], devices=n)
        for (model, version, variant), n in sorted(everyone.items(), key=lambda item: (-item[1], item[0]))
    ]
    return tuple(tiles), running


def _trouble(running: Mapping[str, Any], update: Mapping[str, Any]) -> str:
    stopped = [model for model, one in sorted(running.items()) if one.get("state") == "stopped"]
    if stopped:
        return f"{', '.join(stopped)} is stopped"
    code = str(update.get("code") or "")
    return f"{update.get('model', '')}: {code}" if code else ""


def _most_common(running: Sequence[Running]) -> tuple[Running, ...]:
    return tuple(sorted(running[:RUNNING], key=lambda one: (one.model, one.version, one.variant)))


def _progress(conn: Connection, now_ms: int) -> Iterable[Progress]:
    c = t.rollouts.c
    rows = conn.execute(select(t.rollouts).where(c.state.not_in(_ENDED)).order_by(c.created_ms.desc()).limit(ROLLOUTS))
    found = [dict(row) for row in rows.mappings()]
    digests = {row[name] for row in found for name in ("stable", "candidate")}
    b = t.bundles.c
    versions = {
        row.digest: row.version for row in conn.execute(select(b.digest, b.version).where(b.digest.in_(digests)))
    }
    for row in found:
        value = rollouts.value(row)
        ruling, fault = looks.standing(conn, row["id"], row["stage"])
        decision = core.decide(value, rollouts.gather(conn, row), now_ms, ruling, fault=fault)
        yield Progress(
            id=row["id"],
            group=row["group"],
            model=row["model"],
            state=row["state"],
            stage=row["stage"],
            stages=len(value.plan.stages),
            since_ms=row["stage_since_ms"],
            stable=versions.get(row["stable"], row["stable"][:12]),
            candidate=versions.get(row["candidate"], row["candidate"][:12]),
            verdict=decision.verdict,
            reason=decision.reason,
            sides=_sides(conn, row),
        )


def _sides(conn: Connection, row: Mapping[str, Any]) -> tuple[Side, Side]:
    # As the judge counts: what other devices say of this rollout, or of other bundles, is not of its arms.
    frozen = rollouts.arms(conn, row["id"], row["stage"], most=None)
    counted = evidence.of_arms(conn, row["id"], row["stage"])
    listed = evidence.frozen(row["id"], row["stage"]).with_only_columns(t.rollout_devices.c.device)
    held = evidence.held_labels(conn, [row["stable"], row["candidate"]], listed)

    def made(arm: str, bundle: str) -> Side:
        of_arm = [one for one in counted if one.arm == arm and one.bundle == bundle]
        return side(arm, len(frozen[arm]), of_arm, held)

    return made("control", row["stable"]), made("candidate", row["candidate"])


def side(
    arm: str, devices: int, counted: Sequence[evidence.Evidence], held: Mapping[tuple[str, str], evidence.Held]
) -> Side:
    """One arm's sums over what its devices counted. ``held``: see ``evidence.held_labels``."""
    ok, failed = sum(one.ok for one in counted), sum(one.failed + one.shed for one in counted)
    share = [held.get((one.device, one.bundle), evidence.ALL_LABELS) for one in counted]
    labelled = sum(part.of(one.labelled) for part, one in zip(share, counted, strict=True))
    wrong = sum(part.of(one.wrong) for part, one in zip(share, counted, strict=True))
    p95_ns = h.quantile(evidence.merged(one.latency for one in counted), 0.95)
    return Side(
        arm=arm,
        devices=devices,
        reporting=len({one.device for one in counted}),
        inferences=ok + failed,
        failed=failed,
        error_rate=failed / (ok + failed) if ok + failed else None,
        p95_ms=None if p95_ns is None else p95_ns / 1e6,
        labelled=labelled,
        wrong=wrong,
        accuracy=1 - wrong / labelled if labelled else None,
        labels_held=sum(one.labelled for one in counted) - labelled,
    )


def _by_version(items: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    newest_first = sorted(items, key=lambda one: ids.version_key(one["version"]), reverse=True)
    return tuple(sorted(newest_first, key=lambda one: str(one["model"])))


def _drift(conn: Connection, bundles: Sequence[str], from_ms: int, upto_ms: int) -> Iterable[dict[str, Any]]:
    """The last looks, each with what the model leaned on of late: ``explained`` and ``leaned_on``, a share per subject."""
    found = attributions.of(conn, bundles, from_ms=from_ms, upto_ms=upto_ms)
    variants = {one["bundle"]: one["variants"] for one in found}
    for evaluation in findings.evaluations_of(conn, bundles):
        most = attributions.foremost(variants.get(evaluation["bundle"], ()))
        leaned_on = {f"feature:{one['feature']}": one["share"] for one in most["features"]} if most else {}
        explained = most["coverage"] if most else None
        yield _strongest_first(evaluation) | {"explained": explained, "leaned_on": leaned_on}


def _strongest_first(evaluation: dict[str, Any]) -> dict[str, Any]:
    def effect(finding: Mapping[str, Any]) -> float:
        return float((finding["numbers"].get("now") or {}).get("psi_corrected") or 0.0)

    return evaluation | {"findings": sorted(evaluation["findings"], key=effect, reverse=True)}


def _newest(conn: Connection, table: Any, limit: int, *where: Any) -> tuple[dict[str, Any], ...]:
    query = select(table).where(*where).order_by(table.c.id.desc()).limit(limit)
    return tuple(dict(row) for row in conn.execute(query).mappings())
