"""Roll-ups: windows added to the evidence as they arrive, with what each device had counted before.

Owns the writing of the table ``evidence``: ``fold`` adds the windows of one transaction. Leaves the meaning of the columns to ``evidence``.

**Order.** Sums and latency are the same in any order and any batches of arrival, and so is ``early`` among the windows of one epoch. Of a
pre-period only this holds: *before* means a lower position (epoch, seq), where a merged record stands at the first seq it replaces, so no
clock decides, and a window that comes late but belongs before is added to the ``pre_*`` of rows that exist. A window of the stable bundle
that belongs *after* the entry and arrives before the first window that enters is past to this row, and stays so: to take it off again,
windows would have to be read again. It takes a device that went on to the candidate and back while a message of it was on its way a second
time. Of several epochs the one that arrives first holds the entry.

**Guard.** Windows within it, by the clock of the boot in which the row was entered, stand singly and not as a sum, since a window that
comes late may move the entry to an earlier time: what is no longer within the guard then counts. Of a row ``MOST_EARLY`` stand so, those
that begin first, as of a device that cuts a window every eighth of a second of a guard of 30 s; what lies beyond is compared like the rest.
Those that begin first are the same in any order, and no device makes a row that takes long to read and write. A window of more than ``LONG``
guards (one merged during an outage) is never early: little of it lies in the guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from skerry_contract import histogram as h
from skerry_contract import window as w
from sqlalchemy import ColumnElement, Connection, bindparam, case, func, insert, literal_column, select, update

from skerry_server.db import tables as t
from skerry_server.db.bulk import Many
from skerry_server.evidence import (
    COMPARED,
    MOST,
    NONE,
    PRE,
    SUMS,
    Early,
    RowKey,
    labels_of,
    merged,
    to_bytes,
    to_early,
    to_histogram,
)

_RUNNING = ("running", "paused", "completing", "rolling_back")
LONG = 20
MOST_EARLY = 256


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
    within: list[Arrived] = field(default_factory=list)
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


def arrived(
    device: str, epoch: str, position: int, window: w.Window, *, labels_fit: bool = True, latency_fits: bool = True
) -> Arrived:
    """See ``Arrived``. Labels and latency that do not fit (``core.profile``) are left out; the rest of the window counts."""
    start, end = window.start, window.end
    span_ns = end.boot_ns - start.boot_ns if end.boot_id == start.boot_id else h.MAX_SUM - 1
    latency = window.latency.total if latency_fits else h.Exponential()
    return Arrived(device, epoch, position, window.key, _sums(window, labels_fit), latency, start, span_ns)


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
            guard_ns = self._guard_ns.get(key.rollout, 0)
            if guard_ns and item.span_ns <= LONG * guard_ns:
                row.within.append(item)
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
            row = _Row(True, to_histogram(latency), first_ms, last_ms, epoch, seq, boot, ns, to_early(early or NONE))
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

    def _early(self, key: RowKey, row: _Row) -> tuple[Early, ...]:
        guard_ns = self._guard_ns.get(key.rollout, 0)
        if not guard_ns or not row.fresh:
            return row.early
        fresh = (
            Early(one.start.boot_id, one.start.boot_ns, tuple(one.sums[name] for name in COMPARED), one.latency)
            for one in row.within
        )
        found = [
            one
            for one in (*row.early, *fresh)
            if one.boot_id == row.entered_boot and one.start_ns - row.entered_ns < guard_ns
        ]
        if len(found) > MOST_EARLY:
            # Equal starts are told apart by the bytes, so that order of arrival does not decide which of them stand.
            found = sorted(found, key=lambda one: (one.start_ns, to_bytes(one)))[:MOST_EARLY]
        return tuple(found)

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
        fresh = [key._asdict() | self._entered(row) | self._values(key, row) for key, row in touched if not row.stored]
        known = [
            {f"at_{name}": value for name, value in zip(RowKey._fields, key, strict=True)}
            | self._added(row)
            | self._values(key, row)
            for key, row in touched
            if row.stored
        ]
        _ENTER.run(self._connection, fresh)
        _ADD.run(self._connection, known)

    def _values(self, key: RowKey, row: _Row) -> dict[str, Any]:
        latency = merged([*([row.latency] if row.stored else ()), *row.fresh]) if row.fresh else row.latency
        early = self._early(key, row)
        return {
            "latency": to_bytes(latency),
            "last_ms": self._now_ms if row.fresh else row.last_ms,
            "entered_seq": row.entered_seq,
            "entered_boot": row.entered_boot,
            "entered_ns": row.entered_ns,
            "early": to_bytes(early) if early else None,
        }

    def _added(self, row: _Row) -> dict[str, Any]:
        sums = {f"add_{name}": min(n, MOST) for name, n in row.added.items()}
        return sums | {f"add_pre_{name}": min(n, MOST) for name, n in row.pre.items()}

    def _entered(self, row: _Row) -> dict[str, Any]:
        sums = {name: min(n, MOST) for name, n in row.added.items()}
        sums |= {f"pre_{name}": min(n, MOST) for name, n in row.pre.items()}
        return sums | {"first_ms": row.first_ms, "entered_epoch": row.entered_epoch}


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
