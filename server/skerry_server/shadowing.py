"""What devices paired of a bundle that answers and a candidate in its shadow: added as windows arrive, read by model.

Owns the table ``shadows``: a row per device, answering bundle and candidate. Two devices' pairs add up exactly, as windows do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from skerry_contract import histogram as h
from skerry_contract import window as w
from sqlalchemy import Connection, select, tuple_

from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.bulk import Many

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(w.Shadow)
_MOST = (1 << 53) - 1
_EXACT = 1000
_REASONS = 16
"""Names of reasons kept of one device: it makes them up."""
_NAME = 60


class Paired(NamedTuple):
    """What one window holds of one candidate."""

    device: str
    bundle: str
    candidate: str
    model: str
    shadow: w.Shadow


def paired(device: str, window: w.Window) -> list[Paired]:
    """What a window that the ledger took adds."""
    key = window.key
    return [Paired(device, key.bundle, candidate, key.model, found) for candidate, found in window.shadows.items()]


def fold(connection: Connection, items: Sequence[Paired], now_ms: int) -> list[Paired]:
    """Adds the pairs of one transaction. ``now_ms``: when they were received.

    Returns:
        Those of bundles that are not of this model: a device must not make rows by making up digests.
    """
    if not items:
        return []
    b, c = t.bundles.c, t.shadows.c
    named = sorted({digest for item in items for digest in (item.bundle, item.candidate)})
    models_of = {
        row.digest: row.model for row in connection.execute(select(b.digest, b.model).where(b.digest.in_(named)))
    }
    known: list[Paired] = []
    strange: list[Paired] = []
    for item in items:
        ours = models_of.get(item.bundle) == item.model == models_of.get(item.candidate)
        (known if ours else strange).append(item)
    items = known
    if not items:
        return strange
    keys = sorted({item[:3] for item in items})
    held = connection.execute(
        select(c.device, c.bundle, c.candidate, c.first_ms, c.body).where(
            tuple_(c.device, c.bundle, c.candidate).in_(keys)
        )
    ).all()
    first_ms = {tuple(row[:3]): row.first_ms for row in held}
    sums = {tuple(row[:3]): _decoder.decode(row.body) for row in held}
    models: dict[tuple[str, ...], str] = {}
    for item in items:
        key = item[:3]
        models[key] = item.model
        sums[key] = _bounded(w.merge_shadows(sums[key], item.shadow) if key in sums else item.shadow)
    rows = [
        {
            "device": key[0],
            "bundle": key[1],
            "candidate": key[2],
            "model": model,
            "pairs": sums[key].pairs,
            "agreed": sums[key].agreed,
            "first_ms": first_ms.get(key, now_ms),
            "last_ms": now_ms,
            "body": _encoder.encode(sums[key]),
        }
        for key, model in models.items()
    ]
    _STORE.run(connection, rows)
    return strange


def _bounded(found: w.Shadow) -> w.Shadow:
    """Sums that a database and JSON can hold: a device that claims more is counted up to there."""

    def most(histogram: h.Exponential) -> h.Exponential:
        return msgspec.structs.replace(
            histogram,
            zero=min(histogram.zero, _MOST),
            counts=tuple(min(n, _MOST) for n in histogram.counts),
            total=min(histogram.total, h.MAX_SUM - 1),
        )

    a, b, c, d = (min(n, _MOST) for n in found.labelled)
    # What devices do say comes first, so that made-up names push none of it out.
    reasons = sorted(found.dropped, key=lambda reason: (reason not in w.SHADOW_DROPS, reason))[:_REASONS]
    return w.Shadow(
        pairs=min(found.pairs, _MOST),
        dropped={reason[:_NAME]: min(found.dropped[reason], _MOST) for reason in reasons},
        agreed=min(found.agreed, _MOST),
        distance=most(found.distance),
        slower=most(found.slower),
        faster=most(found.faster),
        labelled=(a, b, c, d),
    )


def comparisons(
    connection: Connection, model: str, *, after: tuple[str, str] | None, limit: int
) -> list[dict[str, Any]]:
    """Each candidate beside each bundle of a model, all devices added up; sorted by (candidate, bundle)."""
    c = t.shadows.c
    pages = (
        select(c.candidate, c.bundle).where(c.model == model).distinct().order_by(c.candidate, c.bundle).limit(limit)
    )
    if after is not None:
        pages = pages.where(tuple_(c.candidate, c.bundle) > after)
    found = []
    for candidate, bundle in connection.execute(pages).all():
        rows = connection.execute(
            select(c.body, c.last_ms).where(c.model == model, c.candidate == candidate, c.bundle == bundle)
        )
        devices, last_ms = 0, 0
        total = w.Shadow()
        for body, at_ms in rows:
            total = _bounded(w.merge_shadows(total, _decoder.decode(body)))
            devices, last_ms = devices + 1, max(last_ms, at_ms)
        found.append(
            {"model": model, "bundle": bundle, "candidate": candidate, "devices": devices, "last_ms": last_ms}
            | shown(total)
        )
    return found


def shown(found: w.Shadow) -> dict[str, Any]:
    """A comparison in words that people read: shares, milliseconds, and the exact test of the labelled pairs."""
    both, ours, theirs, neither = found.labelled
    labelled = sum(found.labelled)
    return {
        "pairs": found.pairs,
        "dropped": found.dropped,
        "agreement": found.agreed / found.pairs if found.pairs else None,
        "distance": {f"p{q:.0f}": _part(found.distance, q / 100, 1e-6) for q in (50, 95, 99)},
        "latency_ms": {
            "slower": {
                "n": found.slower.n,
                "p50": _part(found.slower, 0.5, 1e-6),
                "p95": _part(found.slower, 0.95, 1e-6),
            },
            "faster": {
                "n": found.faster.n,
                "p50": _part(found.faster, 0.5, 1e-6),
                "p95": _part(found.faster, 0.95, 1e-6),
            },
        },
        "labelled": {
            "n": labelled,
            "both_right": both,
            "only_answer_right": ours,
            "only_candidate_right": theirs,
            "both_wrong": neither,
            "p": mcnemar(ours, theirs),
        },
    }


def _part(histogram: h.Exponential, q: float, unit: float) -> float | None:
    found = h.quantile(histogram, q)
    return None if found is None else found * unit


def mcnemar(ours: int, theirs: int) -> float | None:
    """Two-sided p of McNemar's exact test: whether the pairs in which only one is right fall evenly. None without any.

    >>> mcnemar(1, 9), mcnemar(0, 0)
    (0.021484375, None)
    """
    n, few = ours + theirs, min(ours, theirs)
    if not n:
        return None
    if n <= _EXACT:
        tail: int = sum(math.comb(n, i) for i in range(few + 1))
        return float(min(1.0, 2 * tail / 2**n))
    # Far past where the two differ in what anybody reads.
    z = max(0.0, abs(ours - theirs) - 1) / math.sqrt(n)
    return math.erfc(z / math.sqrt(2))


def _upsert(connection: Connection) -> Any:
    fresh = queries.upsert(connection, t.shadows)
    new = fresh.excluded
    moved = {name: new[name] for name in ("pairs", "agreed", "last_ms", "body")}
    return fresh.on_conflict_do_update(index_elements=["device", "bundle", "candidate"], set_=moved)


_STORE = Many(_upsert, t.shadows.c.keys())
