"""Evidence: what each device counted of each key, as it is stored, and how it is read.

Owns the layout of the table ``evidence`` and its reading; ``rollups`` adds to it. Everything is a sum of integers that stops at ``MOST``.
Leaves which windows count to ``ledger``, which labels and latency fit to ``core.profile`` and what follows from the sums to ``core``.

**Pre-period.** A row of a rollout's key carries ``pre_*``: what the same device had counted of the rollout's stable bundle, under
a key of no or another rollout, before it entered this row's. For a candidate that is the other bundle it ran; for a control, the same
bundle earlier; the judge measures both by it. What was counted in earlier stages of the same rollout is nobody's past: there a control
ran the stable bundle and a candidate did not, so it would give the arms pasts of different times. ``pasts`` gives the judge each
device's past before its first entry into any stage.

**Guard.** A model that has just been loaded is slower than it will be, and what comes first is seldom like the rest. Where the plan of a
rollout has a ``judge`` with ``guard_s``, windows that begin within so many seconds of the row's entry are kept beside the sums in
``early``, of both arms, and ``Evidence.compared`` leaves them out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from skerry_contract import histogram as h
from skerry_contract import window as w
from sqlalchemy import Connection, Select, case, func, select

from skerry_server.db import tables as t

MOST = h.MAX_COUNT - 1
"""Where a sum of a row stops: 35 years of a thousand requests a second. A million such rows still add up below 2**63, beyond which
SQLite calculates in floating point and sums are exact no more."""
to_bytes = msgspec.msgpack.Encoder().encode
to_histogram = msgspec.msgpack.Decoder(h.Exponential).decode

SUMS = ("windows", "ok", "invalid", "failed", "shed", "rows", "labelled", "wrong")
PRE = ("ok", "failed", "labelled", "wrong")
COMPARED = ("ok", "failed", "shed", "labelled", "wrong")


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


NONE = to_bytes(())
to_early = msgspec.msgpack.Decoder(tuple[Early, ...]).decode
_e = t.evidence.c


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
        total=min(sum(part.total for part in parts), h.MAX_SUM - 1),
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


def of_arms(connection: Connection, rollout: str, stage: int) -> list[Evidence]:
    """As ``of_rollout`` of one stage, of the devices frozen into it and under their arm. A completing rollout has its last stage's list."""
    found = frozen(rollout, stage).subquery()
    mine = (found.c.device == _e.device) & (found.c.arm == _e.arm)
    query = select(*(_e[name] for name in _READ)).join(found, mine)
    return _read(connection, query.where(_e.rollout == rollout, _e.stage == stage))


def frozen(rollout: str, stage: int) -> Select[tuple[str, str]]:
    """Selects (device, arm) of the list that was frozen for a stage, or for the last one before it that has a list."""
    c = t.rollout_devices.c
    newest = select(func.max(c.stage)).where(c.rollout == rollout, c.stage <= stage).scalar_subquery()
    return select(c.device, c.arm).where(c.rollout == rollout, c.stage == newest)


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


def held_labels(
    connection: Connection, bundles: Sequence[str], among: Select[tuple[str]] | None = None
) -> dict[tuple[str, str], Held]:
    """By (device, bundle): whose labels, over all keys and all time, are more than what was answered. Of honest devices none for long.

    Labels come later than the answers they are about, and under the same key, but their windows may overtake: what is over counts as
    soon as the answers are here, so that order changes nothing here either. A device that lost records stays over for good; its
    labels weigh then as much as what it answered, with the same share of wrong ones.

    Args:
        among: selects the devices that are asked for; None: all.
    """
    rows, requests, labelled = func.sum(_e.rows), func.sum(_e.ok), func.sum(_e.labelled)
    answered = case((rows > requests, rows), else_=requests)
    query = select(_e.device, _e.bundle, answered, labelled).where(_e.bundle.in_(list(bundles)))
    if among is not None:
        query = query.where(_e.device.in_(among))
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
        fields |= {"latency": to_histogram(fields["latency"]), "early": to_early(fields["early"] or NONE)}
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
