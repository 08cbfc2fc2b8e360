"""What features had to do with answers: mean absolute attributions per bundle and variant, and how many answers were explained.

Owns the table ``explanations``: ``Adder`` adds the windows of one ingest transaction, the functions below read. It is kept in the
buckets of ``profiles``, as sums of integers only, so neither order nor batching changes the result. Variants stand apart: each
is a program of its own, and where the answer is no probability its attributions have a scale of its own.

A window whose attributions do not fit its bundle adds nothing here (``core.profile.explained_of``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from skerry_contract import histogram as h
from skerry_contract import manifest as m
from sqlalchemy import Connection, Insert, Select, func, select, tuple_

from skerry_server.core import profile as core
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.bulk import Many

log = logging.getLogger(__name__)

_MOST = (1 << 53) - 1
_UNIT = 1 << h.Q_BITS

_to_bytes = msgspec.msgpack.Encoder().encode
_to_body = msgspec.msgpack.Decoder(dict[str, tuple[int, bytes, bytes]]).decode


class Key(NamedTuple):
    """Primary key."""

    bundle: str
    variant: str
    bucket_ms: int


# --- bytes ---------------------------------------------------------------------------------------------------------------


def encode(attributions: Mapping[str, h.Moments]) -> bytes:
    """By feature: n, sum, sum of squares. Sums over a fleet outgrow 64 bits, so they are 16 bytes, big-endian."""
    return _to_bytes({name: (p.n, _wide(p.total), _wide(p.squares)) for name, p in attributions.items()})


def decode(body: bytes) -> dict[str, h.Moments]:
    """What ``encode`` wrote.

    Raises:
        msgspec.DecodeError: it is something else.
    """
    return {
        name: h.Moments(n=n, total=int.from_bytes(total, "big"), squares=int.from_bytes(squares, "big"))
        for name, (n, total, squares) in _to_body(body).items()
    }


def _wide(value: int) -> bytes:
    return value.to_bytes(16, "big")


# --- adding --------------------------------------------------------------------------------------------------------------


class Adder:
    """What the windows of one transaction explained: ``add`` each, then ``store``."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sums: dict[Key, core.Explained] = {}

    def add(self, key: Key, explained: core.Explained) -> None:
        """Adds it; what explains nothing makes no row."""
        if explained:
            before = self._sums.get(key)
            self._sums[key] = explained if before is None else core.total_explained((before, explained))

    def store(self) -> None:
        """Adds everything to the database."""
        if not self._sums:
            return
        query = select(t.explanations).where(tuple_(_e.bundle, _e.variant, _e.bucket_ms).in_(sorted(self._sums)))
        for row in self._connection.execute(query.with_for_update()):
            key = Key(row.bundle, row.variant, row.bucket_ms)
            self._sums[key] = core.total_explained((_read(row), self._sums[key]))
        rows = [
            key._asdict()
            | {name: min(getattr(one, name), _MOST) for name in ("chosen", "rows", "dropped")}
            | {"body": encode(one.attributions)}
            for key, one in self._sums.items()
        ]
        _SET.run(self._connection, rows)


def _set(connection: Connection) -> Insert:
    fresh = queries.upsert(connection, t.explanations)
    statement: Insert = fresh.on_conflict_do_update(
        index_elements=list(Key._fields),
        set_={name: fresh.excluded[name] for name in ("chosen", "rows", "dropped", "body")},
    )
    return statement


_e = t.explanations.c
_SET = Many(_set, _e.keys())


def _read(row: Any) -> core.Explained:
    return core.Explained(chosen=row.chosen, rows=row.rows, dropped=row.dropped, attributions=decode(row.body))


# --- reading -------------------------------------------------------------------------------------------------------------


def page(
    connection: Connection,
    *,
    model: str | None,
    from_ms: int,
    upto_ms: int,
    after: tuple[str, str] | None,
    limit: int,
) -> list[dict[str, Any]]:
    """What was explained of each bundle, over the buckets that begin within ``[from_ms, upto_ms)``, by (model, bundle)."""
    b = t.bundles.c
    within = (_e.bucket_ms >= from_ms, _e.bucket_ms < upto_ms)
    explained = select(_e.bundle).where(_e.bundle == b.digest, *within).exists()
    query = _bundles().where(explained).limit(limit)
    if model is not None:
        query = query.where(b.model == model)
    if after is not None:
        query = query.where(tuple_(b.model, b.digest) > tuple_(*after))
    return _items(connection, query, from_ms, upto_ms)


def of(connection: Connection, bundles: Sequence[str], *, from_ms: int, upto_ms: int) -> list[dict[str, Any]]:
    """As ``page``, of these bundles; one of which nothing was explained has no variants."""
    return _items(connection, _bundles().where(t.bundles.c.digest.in_(bundles)), from_ms, upto_ms)


def _bundles() -> Select[Any]:
    b = t.bundles.c
    return select(b.model, b.digest, b.version, b.manifest).order_by(b.model, b.digest)


def _items(connection: Connection, query: Select[Any], from_ms: int, upto_ms: int) -> list[dict[str, Any]]:
    return [
        {
            "model": row.model,
            "bundle": row.digest,
            "version": row.version,
            "unit": unit_of(m.parse(row.manifest)),
            "variants": _variants(connection, row.digest, from_ms, upto_ms),
        }
        for row in connection.execute(query).all()
    ]


def unit_of(manifest: m.Manifest) -> str:
    """What an attribution of 1 is: a ``probability`` of 1, or the variant's own ``scale`` of its golden answers."""
    return "probability" if any(tensor.labels for tensor in manifest.outputs) else "scale"


def _variants(connection: Connection, bundle: str, from_ms: int, upto_ms: int) -> list[dict[str, Any]]:
    of_late = (_e.bundle == bundle, _e.bucket_ms >= from_ms, _e.bucket_ms < upto_ms)
    found: dict[str, list[core.Explained]] = {}
    for row in connection.execute(select(t.explanations).where(*of_late)):
        try:
            found.setdefault(row.variant, []).append(_read(row))
        except msgspec.DecodeError as error:
            log.warning("explanations not readable bundle=%s bucket_ms=%s error=%s", bundle, row.bucket_ms, error)
    sums = {variant: core.total_explained(parts) for variant, parts in found.items()}
    p = t.profiles.c
    answered = select(p.variant, func.sum(p.rows)).where(
        p.bundle == bundle, p.bucket_ms >= from_ms, p.bucket_ms < upto_ms
    )
    rows = {variant: int(n) for variant, n in connection.execute(answered.group_by(p.variant))}
    return [told(variant, one, rows.get(variant, 0)) for variant, one in sorted(sums.items())]


def foremost(variants: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of several variants the one that explained most."""
    return max(variants, key=lambda one: one["explained"], default=None)


def told(variant: str, explained: core.Explained, answered: int) -> dict[str, Any]:
    """One variant as builtins: counts, coverage, and per feature the mean absolute attribution, the greatest first.

    ``coverage``: explained over answered rows; above 1 where answers of an earlier time were explained, None without any.
    ``share``: of the sum of all means.
    """
    means = {name: p.total / p.n / _UNIT for name, p in explained.attributions.items() if p.n}
    whole = sum(means.values())
    ordered = sorted(means.items(), key=lambda item: (-item[1], item[0]))
    return {
        "variant": variant,
        "answered": answered,
        "chosen": explained.chosen,
        "explained": explained.rows,
        "dropped": explained.dropped,
        "coverage": explained.rows / answered if answered else None,
        "features": [
            {"feature": name, "mean": mean, "share": mean / whole if whole else 0.0} for name, mean in ordered
        ],
    }
