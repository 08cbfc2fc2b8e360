"""Roll-ups: what each device counted of each key, kept as records arrive, and what it had counted before.

Owns the table ``evidence``: ``Folder`` adds the windows of one transaction, the functions below read. Everything is a sum of
integers, so neither order nor batching changes the result, and stops at ``MOST``. Leaves which windows count to ``ledger``, which
labels fit to ``core.profile`` and what follows from the sums to ``core``.

**Pre-period.** A row of a rollout's key carries ``pre_*``: what the same device had counted of the rollout's stable bundle, under
a key of no or another rollout, before it entered this row's. For a candidate that is the other bundle it ran; for a control, the same
bundle earlier; the judge measures both by it. What was counted in earlier stages of the same rollout is nobody's past: there a control
ran the stable bundle and a candidate did not, so it would give the arms pasts of different times. ``pasts`` gives the judge each
device's past before its first entry into any stage. *Before* means a lower position (epoch, seq), where a merged record stands at the
first seq it replaces: no clock decides. A window that comes late but belongs before is added to the ``pre_*`` of rows that exist.

**Guard.** A model that has just been loaded is slower than it will be, and what comes first is seldom like the rest. Where the plan of a
rollout has a ``judge`` with ``guard_s``, windows that begin within so many seconds of the row's entry, by the same boot's clock, are kept
beside the sums in ``early``, of both arms, and ``Evidence.compared`` leaves them out. They stand singly and not as a sum, since a window that
comes late may move the entry to an earlier time: what is no longer within the guard then counts, and order changes nothing. A window of
more than ``LONG`` guards (one merged during an outage) is never early: little of it lies in the guard.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from skerry_contract import histogram as h
from skerry_contract import window as w
from sqlalchemy import ColumnElement, Connection, bindparam, case, func, insert, literal_column, select, update

from skerry_server.db import tables as t
from skerry_server.db.bulk import Many

_MOST = (1 << 63) - 1
MOST = h.MAX_COUNT - 1
"""Where a sum of a row stops: 35 years of a thousand requests a second. A million such rows still add up below 2**63, beyond which
SQLite calculates in floating point and sums are exact no more."""
_RUNNING = ("running", "paused", "completing", "rolling_back")
_to_bytes = msgspec.msgpack.Encoder().encode
_to_histogram = msgspec.msgpack.Decoder(h.Exponential).decode

SUMS = ("windows", "ok", "invalid", "failed", "shed", "rows", "labelled", "wrong")
PRE = ("ok", "failed", "labelled", "wrong")
COMPARED = ("ok", "failed", "shed", "labelled", "wrong")
LONG = 20


class RowKey(NamedTuple):
    """Primary key of a row."""

    device: str
    model: str
    bundle: str
    variant: str
    arm: str
    rollout: str
    stage: int


class Early(msgspec.Struct, frozen=True, array_like=True):
    """A window that lies within the guard: boot and start of it, its sums by ``COMPARED``, its latency."""

    boot_id: str
    start_ns: int
    sums: tuple[int, ...]
    latency: h.Exponential


_NONE = _to_bytes(())
_to_early = msgspec.msgpack.Decoder(tuple[Early, ...]).decode


@dataclass(slots=True)
class _Row:
    stored: bool
    latency: h.Exponential
    first_ms: int
    last_ms: int
    entered_epoch: str
    entered_seq: int
    entered_boot: str
    entered_ns: int
    early: tuple[Early, ...] = ()
    added: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SUMS, 0))
    pre: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PRE, 0))
    fresh: list[h.Exponential] = field(default_factory=list)
    touched: bool = False


class Arrived(NamedTuple):
    """What a window that the ledger took adds. ``position`` is the first seq it stands for.

    Made from the window at once, so that a batch does not hold every decoded window until its end.
    """

    device: str
    epoch: str
    position: int
    key: w.Key
    sums: dict[str, int]
    latency: h.Exponential
    start: w.Instant
    span_ns: int


def arrived(device: str, epoch: str, position: int, window: w.Window, *, labels_fit: bool = True) -> Arrived:
    """See ``Arrived``. Labels that do not fit (``core.profile.labels_fit``) are left out; the rest of the window counts."""
    start, end = window.start, window.end
    span_ns = end.boot_ns - start.boot_ns if end.boot_id == start.boot_id else _MOST
    return Arrived(device, epoch, position, window.key, _sums(window, labels_fit), window.latency.total, start, span_ns)


def fold(connection: Connection, items: Sequence[Arrived], now_ms: int) -> None:
    """Adds the windows of one transaction. ``now_ms``: when they were received."""
    if items:
        _Folder(connection, now_ms).fold(items)


class _Folder:
    def __init__(self, connection: Connection, now_ms: int) -> None:
        self._connection = connection
        self._now_ms = now_ms
        self._rows: dict[RowKey, _Row] = {}
        self._by_model: dict[tuple[str, str], list[RowKey]] = {}
        self._stable: dict[str, str] = {}
        self._guard_ns: dict[str, int] = {}

    def fold(self, items: Sequence[Arrived]) -> None:
        self._load(items)
        for item in items:
            key = RowKey(item.device, *item.key)
            row = self._rows.get(key) or self._enter(key, item)
            for name, n in item.sums.items():
                row.added[name] += n
            row.fresh.append(item.latency)
            row.touched = True
            if item.epoch == row.entered_epoch and item.position < row.entered_seq:
                row.entered_seq = item.position
                row.entered_boot, row.entered_ns = item.start.boot_id, item.start.boot_ns
            self._guard(row, key, item)
            if self._stable:
                self._add_to_later(key, item)
        self._store()

    def _load(self, items: Sequence[Arrived]) -> None:
        e = t.evidence.c
        devices = sorted({item.device for item in items})
        models = sorted({item.key.model for item in items})
        named = {item.key.rollout for item in items}
        r = t.rollouts.c
        query = select(r.id, r.stable, r.plan).where(r.id.in_(sorted(named - {""})) | r.state.in_(_RUNNING))
        for name, stable, plan in self._connection.execute(query):
            self._stable[name] = stable
            guard_s = (plan.get("judge") or {}).get("guard_s") or 0
            if guard_s:
                self._guard_ns[name] = int(guard_s * 1e9)
        found = self._connection.execute(
            select(
                *(e[name] for name in RowKey._fields),
                *(
                    e.latency,
                    e.first_ms,
                    e.last_ms,
                    e.entered_epoch,
                    e.entered_seq,
                    e.entered_boot,
                    e.entered_ns,
                    e.early,
                ),
            ).where(e.device.in_(devices), e.model.in_(models), e.rollout.in_(sorted(named | set(self._stable))))
        )
        for values in found:
            latency, first_ms, last_ms, epoch, seq, boot, ns, early = values[7:]
            row = _Row(True, _to_histogram(latency), first_ms, last_ms, epoch, seq, boot, ns, _to_early(early or _NONE))
            self._put(RowKey(*values[:7]), row)

    def _put(self, key: RowKey, row: _Row) -> None:
        self._rows[key] = row
        self._by_model.setdefault((key.device, key.model), []).append(key)

    def _enter(self, key: RowKey, item: Arrived) -> _Row:
        start = item.start
        row = _Row(
            False, h.Exponential(), self._now_ms, self._now_ms, item.epoch, item.position, start.boot_id, start.boot_ns
        )
        stable = self._stable.get(key.rollout, "")
        if stable:
            row.pre = self._counted_before(key, stable)
        self._put(key, row)
        return row

    def _guard(self, row: _Row, key: RowKey, item: Arrived) -> None:
        guard_ns = self._guard_ns.get(key.rollout, 0)
        if not guard_ns:
            return
        early = row.early
        if item.span_ns <= LONG * guard_ns:
            sums = tuple(item.sums[name] for name in COMPARED)
            early = (*early, Early(item.start.boot_id, item.start.boot_ns, sums, item.latency))
        row.early = tuple(
            one for one in early if one.boot_id == row.entered_boot and one.start_ns - row.entered_ns < guard_ns
        )

    def _counted_before(self, key: RowKey, stable: str) -> dict[str, int]:
        e = t.evidence.c
        sums = self._connection.execute(
            select(*(func.coalesce(func.sum(e[name]), 0) for name in PRE)).where(
                e.device == key.device,
                e.model == key.model,
                e.bundle == stable,
                e.rollout != key.rollout,
            )
        ).one()
        before = dict(zip(PRE, (int(n) for n in sums), strict=True))
        for other in self._by_model.get((key.device, key.model), ()):
            if other.bundle == stable and other.rollout != key.rollout:
                for name in PRE:
                    before[name] += self._rows[other].added[name]
        return before

    def _add_to_later(self, key: RowKey, item: Arrived) -> None:
        for other in self._by_model[(key.device, key.model)]:
            if (
                self._stable.get(other.rollout) == key.bundle
                and key.rollout != other.rollout
                and self._rows[other].entered_epoch == item.epoch
                and item.position < self._rows[other].entered_seq
            ):
                row = self._rows[other]
                for name in PRE:
                    row.pre[name] += item.sums[name]
                row.touched = True

    def _store(self) -> None:
        touched = [(key, row) for key, row in self._rows.items() if row.touched]
        fresh = [self._values(key, row) for key, row in touched if not row.stored]
        known = [
            {f"at_{name}": value for name, value in zip(RowKey._fields, key, strict=True)} | self._values(None, row)
            for key, row in touched
            if row.stored
        ]
        _ENTER.run(self._connection, fresh)
        _ADD.run(self._connection, known)

    def _values(self, key: RowKey | None, row: _Row) -> dict[str, Any]:
        latency = merged([*([row.latency] if row.stored else ()), *row.fresh]) if row.fresh else row.latency
        values: dict[str, Any] = {
            "latency": _to_bytes(latency),
            "last_ms": self._now_ms if row.fresh else row.last_ms,
            "entered_seq": row.entered_seq,
            "entered_boot": row.entered_boot,
            "entered_ns": row.entered_ns,
            "early": _to_bytes(row.early) if row.early else None,
        }
        if key is None:
            values |= {f"add_{name}": min(n, MOST) for name, n in row.added.items()}
            return values | {f"add_pre_{name}": min(n, MOST) for name, n in row.pre.items()}
        values |= key._asdict() | {name: min(n, MOST) for name, n in row.added.items()}
        values |= {f"pre_{name}": min(n, MOST) for name, n in row.pre.items()}
        return values | {"first_ms": row.first_ms, "entered_epoch": row.entered_epoch}


_e = t.evidence.c


def _grown(name: str) -> ColumnElement[int]:
    # Both are below 2**41. What stops at MOST does so in any order of arrival.
    whole = _e[name] + bindparam(f"add_{name}")
    most: ColumnElement[int] = literal_column(str(MOST))
    return case((whole > most, most), else_=whole)


_ENTER = Many(lambda _connection: insert(t.evidence), _e.keys())
_ADD = Many(
    lambda _connection: (
        update(t.evidence)
        .where(*(_e[name] == bindparam(f"at_{name}") for name in RowKey._fields))
        .values(
            **{name: _grown(name) for name in SUMS},
            **{f"pre_{name}": _grown(f"pre_{name}") for name in PRE},
        )
    ),
    ("latency", "last_ms", "entered_seq", "entered_boot", "entered_ns", "early"),
)


def _sums(window: w.Window, labels_fit: bool) -> dict[str, int]:
    counts = window.counts
    labelled, wrong = labels_of(window.labels) if labels_fit else (0, 0)
    return {
        "windows": window.merged,
        "ok": counts.ok,
        "invalid": counts.invalid,
        "failed": counts.failed,
        "shed": counts.shed,
        "rows": counts.rows,
        "labelled": labelled,
        "wrong": wrong,
    }


def labels_of(labels: w.Labels) -> tuple[int, int]:
    """(labelled, wrong) of a confusion matrix that is row-major [true][predicted]."""
    if not labels.confusion:
        return 0, 0
    labelled = sum(labels.confusion)
    classes = math.isqrt(len(labels.confusion))
    return labelled, labelled - sum(labels.confusion[:: classes + 1])


def merged(histograms: Iterable[h.Exponential]) -> h.Exponential:
    """All of them in one, exactly as ``merge_exponential`` in turn; the sum of values stops at 2**63 - 1.

    Histograms of one scale, as devices send them, are added up in one dense row.
    """
    parts = list(histograms)
    scale = min((part.scale for part in parts), default=h.SCALE)
    parts = [h.rescale(part, scale) for part in parts]
    filled = [part for part in parts if part.counts]
    low = min((part.offset for part in filled), default=0)
    row = [0] * (max((part.offset + len(part.counts) for part in filled), default=0) - low)
    for part in filled:
        span = slice(part.offset - low, part.offset - low + len(part.counts))
        row[span] = map(operator.add, row[span], part.counts)
    return h.Exponential(
        scale=scale,
        zero=sum(part.zero for part in parts),
        offset=low,
        counts=tuple(row),
        total=min(sum(part.total for part in parts), _MOST),
    )


def without(whole: h.Exponential, part: h.Exponential) -> h.Exponential:
    """The whole less a part of it, which must not be finer."""
    part = h.rescale(part, min(whole.scale, part.scale))
    whole = h.rescale(whole, part.scale)
    row = list(whole.counts)
    for index, n in enumerate(part.counts, part.offset - whole.offset):
        row[index] -= n
    return h.Exponential(
        scale=whole.scale,
        zero=whole.zero - part.zero,
        offset=whole.offset,
        counts=tuple(row),
        total=max(0, whole.total - part.total),
    )


# --- reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What one device counted of one key, or of several added up.

    Attributes:
        latency: nanoseconds per request.
        pre_ok, pre_failed, pre_labelled, pre_wrong: see the module.
        first_ms, last_ms: when the server received the first and the last of it, milliseconds since 1970.
    """

    device: str
    model: str
    bundle: str
    arm: str
    rollout: str
    stage: int
    windows: int
    ok: int
    invalid: int
    failed: int
    shed: int
    rows: int
    labelled: int
    wrong: int
    pre_ok: int
    pre_failed: int
    pre_labelled: int
    pre_wrong: int
    first_ms: int
    last_ms: int
    latency: h.Exponential
    early: tuple[Early, ...] = ()

    def compared(self) -> Compared:
        """What the judge compares: all but what lies within the guard."""
        sums = {name: getattr(self, name) for name in COMPARED}
        for one in self.early:
            for name, n in zip(COMPARED, one.sums, strict=True):
                # Sums that stopped at MOST may hold less than what is taken off.
                sums[name] = max(0, sums[name] - n)
        sums["wrong"] = min(sums["wrong"], sums["labelled"])
        latency = without(self.latency, merged([one.latency for one in self.early])) if self.early else self.latency
        return Compared(**sums, latency=latency)


class Compared(NamedTuple):
    """Sums by ``COMPARED``, and latency."""

    ok: int
    failed: int
    shed: int
    labelled: int
    wrong: int
    latency: h.Exponential

    @property
    def requests(self) -> int:
        """Answered, failed or shed."""
        return self.ok + self.failed + self.shed


_READ = (
    *("device", "model", "bundle", "arm", "rollout", "stage", *SUMS),
    *(f"pre_{name}" for name in PRE),
    *("first_ms", "last_ms", "latency", "early"),
)


def of_rollout(connection: Connection, rollout: str, stage: int | None = None) -> list[Evidence]:
    """Per device, bundle, arm and stage what was counted under the rollout; ``stage`` None for all. By device."""
    query = select(*(_e[name] for name in _READ)).where(_e.rollout == rollout)
    return _read(connection, query if stage is None else query.where(_e.stage == stage))


class Past(NamedTuple):
    """What a device had counted of the stable bundle before it entered a rollout, by ``PRE``."""

    ok: int = 0
    failed: int = 0
    labelled: int = 0
    wrong: int = 0


def pasts(connection: Connection, rollout: str, model: str, upto_stage: int) -> dict[str, Past]:
    """Per device its past before its first entry into any stage of the rollout up to this one: the same in every stage."""
    query = select(_e.device, *(_e[f"pre_{name}"] for name in PRE)).where(
        _e.rollout == rollout, _e.model == model, _e.stage <= upto_stage
    )
    found: dict[str, Past] = {}
    for device, *sums in connection.execute(query.order_by(_e.device, _e.stage, _e.first_ms, _e.entered_seq)):
        found.setdefault(device, Past(*sums))
    return found


class Held(NamedTuple):
    """Labels of one device for one bundle, of which there are more than rows that it answered with it."""

    answered: int
    labelled: int

    def of(self, n: int) -> int:
        """The part of a count of labels that counts: all such parts together are no more than what was answered."""
        return n * self.answered // self.labelled


ALL_LABELS = Held(1, 1)


def held_labels(connection: Connection, bundles: Sequence[str]) -> dict[tuple[str, str], Held]:
    """By (device, bundle): whose labels, over all keys and all time, are more than what was answered. Of honest devices none for long.

    Labels come later than the answers they are about, and under the same key, but their windows may overtake: what is over counts as
    soon as the answers are here, so that order changes nothing here either. A device that lost records stays over for good; its
    labels weigh then as much as what it answered, with the same share of wrong ones.
    """
    rows, requests, labelled = func.sum(_e.rows), func.sum(_e.ok), func.sum(_e.labelled)
    answered = case((rows > requests, rows), else_=requests)
    query = select(_e.device, _e.bundle, answered, labelled).where(_e.bundle.in_(list(bundles)))
    found = connection.execute(query.group_by(_e.device, _e.bundle).having(labelled > answered))
    return {(device, bundle): Held(int(n), int(labels)) for device, bundle, n, labels in found}


def of_bundle(connection: Connection, bundle: str) -> list[Evidence]:
    """Per device and key what was counted of a bundle, by device."""
    return _read(connection, select(*(_e[name] for name in _READ)).where(_e.bundle == bundle))


def of_device(connection: Connection, device: str) -> list[Evidence]:
    """Per key what one device counted."""
    return _read(connection, select(*(_e[name] for name in _READ)).where(_e.device == device))


def totals_of_devices(connection: Connection, devices: Sequence[str]) -> dict[str, dict[str, int]]:
    """Per device the sums ``SUMS`` over all its keys; zeros for a device that counted nothing."""
    out = {device: dict.fromkeys(SUMS, 0) for device in devices}
    query = select(_e.device, *(func.sum(_e[name]) for name in SUMS)).where(_e.device.in_(list(devices)))
    for device, *sums in connection.execute(query.group_by(_e.device)):
        out[device] = {name: int(n) for name, n in zip(SUMS, sums, strict=True)}
    return out


def _read(connection: Connection, query: Any) -> list[Evidence]:
    # Variants of one key belong together for whoever judges: a device runs one at a time.
    found: dict[tuple[Any, ...], Evidence] = {}
    for values in connection.execute(query.order_by(_e.device, _e.bundle, _e.arm, _e.rollout, _e.stage, _e.variant)):
        fields = dict(zip(_READ, values, strict=True))
        fields |= {"latency": _to_histogram(fields["latency"]), "early": _to_early(fields["early"] or _NONE)}
        one = Evidence(**fields)
        key = (one.device, one.model, one.bundle, one.arm, one.rollout, one.stage)
        found[key] = _together(found[key], one) if key in found else one
    return list(found.values())


def _together(a: Evidence, b: Evidence) -> Evidence:
    summed = {name: getattr(a, name) + getattr(b, name) for name in SUMS}
    # Both rows carry the same pre-period; the one entered first has the true one.
    first = a if a.first_ms <= b.first_ms else b
    return Evidence(
        **{name: getattr(first, name) for name in ("device", "model", "bundle", "arm", "rollout", "stage")},
        **summed,
        **{f"pre_{name}": getattr(first, f"pre_{name}") for name in PRE},
        first_ms=first.first_ms,
        last_ms=max(a.last_ms, b.last_ms),
        latency=merged([a.latency, b.latency]),
        early=a.early + b.early,
    )
