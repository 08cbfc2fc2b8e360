"""How right bundles are: sums of labels and confidence from ``profiles``, put to ``core.accuracy``, per bundle.

Only bundles that have counted something are listed, by (model, bundle).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from skerry_contract import histogram as h
from skerry_contract import manifest as m
from sqlalchemy import Connection, Select, func, select, tuple_

from skerry_server import profiles
from skerry_server.core import accuracy as core
from skerry_server.core.accuracy import DeviceLabels
from skerry_server.core.profile import add_lags
from skerry_server.db import tables as t
from skerry_server.evidence import ALL_LABELS, held_labels


def accuracy_page(
    connection: Connection,
    *,
    model: str | None,
    from_ms: int,
    upto_ms: int,
    after: tuple[str, str] | None,
    limit: int,
) -> list[dict[str, Any]]:
    """Accuracy and estimate of each bundle, over the buckets that begin within ``[from_ms, upto_ms)``."""
    b = t.bundles.c
    counted = select(t.profiles.c.bundle).where(t.profiles.c.bundle == b.digest).exists()
    query = select(b.model, b.digest, b.version, b.manifest).where(counted).order_by(b.model, b.digest).limit(limit)
    if model is not None:
        query = query.where(b.model == model)
    if after is not None:
        query = query.where(tuple_(b.model, b.digest) > tuple_(*after))
    return _items(connection, query, from_ms, upto_ms)


def accuracy_of(connection: Connection, bundles: Sequence[str], *, from_ms: int, upto_ms: int) -> list[dict[str, Any]]:
    """As ``accuracy_page``, of these bundles."""
    b = t.bundles.c
    query = select(b.model, b.digest, b.version, b.manifest).where(b.digest.in_(bundles)).order_by(b.model, b.digest)
    return _items(connection, query, from_ms, upto_ms)


def _items(connection: Connection, query: Select[Any], from_ms: int, upto_ms: int) -> list[dict[str, Any]]:
    return [
        {"model": row.model, "bundle": row.digest, "version": row.version}
        | of_bundle(connection, row.digest, m.parse(row.manifest), from_ms=from_ms, upto_ms=upto_ms)
        for row in connection.execute(query).all()
    ]


def of_bundle(
    connection: Connection, bundle: str, manifest: m.Manifest, *, from_ms: int, upto_ms: int
) -> dict[str, Any]:
    """What labels and confidence say of one bundle, as builtins."""
    found = counted(connection, bundle, from_ms=from_ms, upto_ms=upto_ms)
    labels = next((tensor.labels for tensor in manifest.outputs if tensor.labels), ())
    measured = core.measured(
        found.confusion, labels, found.devices, found.rows, held_back=found.held_back, lags=found.lags
    )
    estimate = core.estimated((found.estimated,) if found.predicted else (), found.predicted)
    return {
        "from_ms": found.from_ms,
        "to_ms": found.to_ms,
        "measured": msgspec.to_builtins(measured),
        "labels": found.labels,
        "estimate": msgspec.to_builtins(estimate),
        "validated_accuracy": manifest.reference.accuracy,
    }


_p = t.profiles.c


class Outcomes(msgspec.Struct, frozen=True, kw_only=True):
    """What answers and labels of a bundle came to in a span of time.

    Attributes:
        rows: answered; predicted, estimated: see ``core.accuracy.estimated``.
        confusion: row-major [true][predicted], empty without labels.
        lags: per true class how long after its prediction a label came, seconds.
        labels: matched, late, unknown, duplicate, conflicting.
        devices: labels per device, as far as they count (``evidence.held_labels``: over the whole life of device and bundle).
        held_back: those of all devices that do not; the matrix holds them.
        from_ms, to_ms: of the buckets that were added up; None without any.
    """

    rows: int
    predicted: int
    estimated: int
    confusion: tuple[int, ...]
    lags: dict[int, h.Exponential]
    labels: dict[str, int]
    devices: list[DeviceLabels]
    held_back: DeviceLabels
    from_ms: int | None
    to_ms: int | None


def counted(connection: Connection, bundle: str, *, from_ms: int, upto_ms: int) -> Outcomes:
    """The buckets that begin within ``[from_ms, upto_ms)``, the one under way included."""
    within = (_p.bundle == bundle, _p.bucket_ms >= from_ms, _p.bucket_ms < upto_ms)
    names = ("rows", "predicted", "estimated", *profiles.LABELS)
    sums = connection.execute(
        select(
            *(func.coalesce(func.sum(_p[name]), 0).label(name) for name in names),
            func.min(_p.bucket_ms).label("from_ms"),
            func.max(_p.bucket_ms + _p.span_ms).label("to_ms"),
        ).where(*within)
    ).one()
    matrices = connection.execute(select(_p.confusion).where(*within, func.length(_p.confusion) > 0)).scalars()
    lags = connection.execute(select(_p.lags).where(*within, _p.lags.is_not(None))).scalars()
    s = t.label_sums.c
    of_late = (s.bundle == bundle, s.bucket_ms >= from_ms, s.bucket_ms < upto_ms)
    claimed = connection.execute(
        select(s.device, func.sum(s.labelled), func.sum(s.wrong)).where(*of_late).group_by(s.device).order_by(s.device)
    )
    held = held_labels(connection, [bundle], select(s.device).where(*of_late))
    devices, over = [], DeviceLabels(0, 0)
    for device, labelled, wrong in claimed:
        part = held.get((device, bundle), ALL_LABELS)
        if part is not ALL_LABELS:
            # Evidence stops at ``evidence.MOST``, these sums do not.
            part = part._replace(labelled=max(part.labelled, int(labelled)))
        counts = DeviceLabels(part.of(int(labelled)), part.of(int(wrong)))
        devices.append(counts)
        over = DeviceLabels(over.labelled + int(labelled) - counts.labelled, over.wrong + int(wrong) - counts.wrong)
    return Outcomes(
        rows=int(sums.rows),
        predicted=int(sums.predicted),
        estimated=int(sums.estimated),
        confusion=_added(matrices),
        lags=add_lags([profiles.to_lags(data) for data in lags]),
        labels={name: int(getattr(sums, name)) for name in profiles.LABELS},
        devices=devices,
        held_back=over,
        from_ms=None if sums.from_ms is None else int(sums.from_ms),
        to_ms=None if sums.to_ms is None else int(sums.to_ms),
    )


def _added(matrices: Iterable[bytes]) -> tuple[int, ...]:
    found: tuple[int, ...] = ()
    for data in matrices:
        one: Sequence[int] = profiles.to_counts(data)
        if not found or len(one) == len(found):
            found = tuple(map(int.__add__, found, one)) if found else tuple(one)
    return found
