"""How right bundles are: sums of labels and confidence from ``profiles``, put to ``core.accuracy``, per bundle.

Only bundles that have counted something are listed, by (model, bundle).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from skerry_contract import manifest as m
from sqlalchemy import Connection, Select, select, tuple_

from skerry_server import profiles
from skerry_server.core import accuracy as core
from skerry_server.db import tables as t


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
    found = profiles.outcomes(connection, bundle, from_ms=from_ms, upto_ms=upto_ms)
    labels = next((tensor.labels for tensor in manifest.outputs if tensor.labels), ())
    measured = core.measured(found.confusion, labels, found.devices, found.rows, held_back=found.held_back)
    estimate = core.estimated((found.estimated,) if found.predicted else (), found.predicted)
    return {
        "from_ms": found.from_ms,
        "to_ms": found.to_ms,
        "measured": msgspec.to_builtins(measured),
        "labels": found.labels,
        "estimate": msgspec.to_builtins(estimate),
        "validated_accuracy": manifest.reference.accuracy,
    }
