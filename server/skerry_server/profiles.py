"""Profiles in the database: what bundles' features, answers and labels looked like, per bucket of time.

Owns ``profiles`` and ``label_sums`` (what was explained is ``attributions``', in the same buckets): ``Folder`` adds the windows of one ingest transaction, the functions below read. Sums of
integers only, so neither order nor batching changes the result, and a window that comes late is added to the bucket of its
time. Leaves what the numbers mean to ``core.drift`` and ``core.accuracy``.

**Which bucket.** The one that holds the end of the window, as ``anchors`` places it: by the device's wall clock when it calls that
synchronised, else by what is known of its boot, at last by the time of receipt. A window is never split: one that spans several buckets (merged
offline) is counted at its end.

**What is counted.** Only windows of bundles that the registry holds, and of them only what fits the manifest: a device that
counts for other bins cannot spoil the sums of the others. The rest is counted per device as ``profile_unfit``.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from skerry_contract import histogram as h
from skerry_contract import manifest as m
from skerry_contract import window as w
from skerry_contract.errors import ContractError
from sqlalchemy import Connection, Insert, Update, bindparam, insert, select, update

from skerry_server import attributions
from skerry_server.core import profile as core
from skerry_server.core.drift import Span
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.bulk import Many
from skerry_server.evidence import labels_of

log = logging.getLogger(__name__)

BUCKET_MS = 300_000
_MOST = (1 << 53) - 1
_AT_ONCE = 32
_KNOWN_SHAPES = 1000
LABELS = ("matched", "late", "unknown", "duplicate", "conflicting")


# --- bytes ---------------------------------------------------------------------------------------------------------------


class _Body(msgspec.Struct, array_like=True):
    """``features``: name -> counts, null, outside, n, sum, squares; ``outputs``: name -> counts, n, sum, squares, estimated.

    Sums of quantized values outgrow 64 bits when a large fleet drifts far, so they are 16 bytes, signed, big-endian.
    """

    features: dict[str, tuple[tuple[int, ...], int, int, int, bytes, bytes]]
    outputs: dict[str, tuple[tuple[int, ...], int, bytes, bytes, tuple[int, ...]]]


_to_bytes = msgspec.msgpack.Encoder().encode
_to_body = msgspec.msgpack.Decoder(_Body).decode
to_counts = msgspec.msgpack.Decoder(tuple[int, ...]).decode
"""Of a confusion matrix as it is stored."""
to_lags = msgspec.msgpack.Decoder(dict[int, h.Exponential]).decode
"""Of lags per true class as they are stored."""


def encode(profile: core.Profile) -> bytes:
    """Features and outputs of a profile."""
    features = {
        name: (
            part.counts,
            part.null,
            part.outside,
            part.moments.n,
            _wide(part.moments.total),
            _wide(part.moments.squares),
        )
        for name, part in profile.features.items()
    }
    outputs = {
        name: (part.counts, part.moments.n, _wide(part.moments.total), _wide(part.moments.squares), part.estimated)
        for name, part in profile.outputs.items()
    }
    return _to_bytes(_Body(features, outputs))


def decode(body: bytes) -> core.Profile:
    """What ``encode`` wrote; rows and labels stand in columns of their own.

    Raises:
        msgspec.DecodeError: it is something else.
    """
    found = _to_body(body)
    return core.Profile(
        features={
            name: w.FeatureCounts(counts, null, outside, h.Moments(n=n, total=_narrow(total), squares=_narrow(squares)))
            for name, (counts, null, outside, n, total, squares) in found.features.items()
        },
        outputs={
            name: w.OutputCounts(counts, h.Moments(n=n, total=_narrow(total), squares=_narrow(squares)), estimated)
            for name, (counts, n, total, squares, estimated) in found.outputs.items()
        },
    )


def _wide(value: int) -> bytes:
    return value.to_bytes(16, "big", signed=True)


def _narrow(value: bytes) -> int:
    return int.from_bytes(value, "big", signed=True)


# --- adding --------------------------------------------------------------------------------------------------------------


class Shapes:
    """Shapes of bundles by digest. A bundle never changes, so what was read once stays true."""

    def __init__(self) -> None:
        self._known: dict[str, core.Shape] = {}

    def find(self, connection: Connection, digest: str) -> core.Shape | None:
        """None when the registry does not hold the bundle, or cannot read it."""
        if digest not in self._known:
            manifest = manifest_of(connection, digest)
            if manifest is None:
                return None
            if len(self._known) >= _KNOWN_SHAPES:
                del self._known[next(iter(self._known))]
            self._known[digest] = core.shape_of(manifest)
        return self._known[digest]


class Key(NamedTuple):
    """Primary key of a profile."""

    bundle: str
    variant: str
    bucket_ms: int


@dataclass(slots=True)
class _Sum:
    windows: int
    profiles: list[core.Profile]

    def add(self, profile: core.Profile) -> None:
        self.windows += 1
        self.profiles.append(profile)
        if len(self.profiles) >= _AT_ONCE:
            # So that a batch never holds the values of every window.
            self.profiles = [core.total(self.profiles)]


class Folder:
    """The windows of one transaction: ``add`` each, then ``store``."""

    def __init__(self, connection: Connection, shapes: Shapes, *, bucket_ms: int, now_ms: int) -> None:
        self._connection = connection
        self._shapes = shapes
        self._bucket_ms = bucket_ms
        self._now_ms = now_ms
        self._sums: dict[Key, _Sum] = {}
        self._models: dict[str, str] = {}
        self._labels: dict[tuple[str, int, str], tuple[int, int]] = {}
        self._unknown: set[str] = set()
        self._explained = attributions.Adder(connection)

    def add(self, device: str, window: w.Window, *, at_ms: int) -> int:
        """Takes what fits of a window that ended at ``at_ms``; returns how many of its parts do not."""
        bundle = window.key.bundle
        shape = None if bundle in self._unknown else self._shapes.find(self._connection, bundle)
        if shape is None:
            self._unknown.add(bundle)
            return 0
        if window.key.model != shape.model or window.key.variant not in shape.variants:
            return 1
        profile, unfit = core.profile_of(window, shape)
        bucket = at_ms - at_ms % self._bucket_ms
        self._models[bundle] = shape.model
        self._sums.setdefault(Key(bundle, window.key.variant, bucket), _Sum(0, [])).add(profile)
        explained = core.explained_of(window, shape.features)
        if explained is None:
            unfit += 1
        else:
            self._explained.add(attributions.Key(bundle, window.key.variant, bucket), explained)
        labelled, wrong = labels_of(profile.labels)
        if labelled:
            before = self._labels.get((bundle, bucket, device), (0, 0))
            self._labels[bundle, bucket, device] = (before[0] + labelled, before[1] + wrong)
        return unfit

    def labels_fit(self, window: w.Window) -> bool:
        """Whether the window's labels are such that a device can have counted them of this bundle."""
        if not window.labels.confusion and not window.labels.lags:
            return True
        bundle = window.key.bundle
        shape = None if bundle in self._unknown else self._shapes.find(self._connection, bundle)
        if shape is None:
            self._unknown.add(bundle)
        return core.labels_fit(window.labels, shape)

    def store(self) -> None:
        """Adds everything to the database."""
        if not self._sums:
            return
        stored = self._stored()
        fresh, known = [], []
        for key, one in self._sums.items():
            before = stored.get(key)
            windows = one.windows + (before[0] if before else 0)
            whole = core.total([*([before[1]] if before else []), *one.profiles])
            row = self._row(windows, whole)
            if before:
                known.append({f"at_{name}": value for name, value in zip(Key._fields, key, strict=True)} | row)
            else:
                fresh.append(key._asdict() | {"model": self._models[key.bundle], "span_ms": self._bucket_ms} | row)
        _ENTER.run(self._connection, fresh)
        _SET.run(self._connection, known)
        labels = [
            {"bundle": bundle, "bucket_ms": bucket, "device": device, "labelled": labelled, "wrong": wrong}
            for (bundle, bucket, device), (labelled, wrong) in self._labels.items()
        ]
        _LABELS.run(self._connection, labels)
        self._explained.store()

    def _stored(self) -> dict[Key, tuple[int, core.Profile]]:
        bundles = sorted({key.bundle for key in self._sums})
        buckets = sorted({key.bucket_ms for key in self._sums})
        query = select(*_COLUMNS).where(_p.bundle.in_(bundles), _p.bucket_ms.in_(buckets)).with_for_update()
        found = {}
        for row in self._connection.execute(query):
            key = Key(row.bundle, row.variant, row.bucket_ms)
            if key in self._sums:
                found[key] = (row.windows, _read(row))
        return found

    def _row(self, windows: int, profile: core.Profile) -> dict[str, Any]:
        counted = [part for part in profile.outputs.values() if part.estimated][:1]
        return {
            "windows": windows,
            "rows": _bounded(profile.rows),
            "predicted": _bounded(sum(sum(part.counts) for part in counted)),
            "estimated": _bounded(sum(sum(part.estimated) for part in counted)),
            **{name: _bounded(getattr(profile.labels, name)) for name in LABELS},
            "confusion": _to_bytes(profile.labels.confusion) if profile.labels.confusion else b"",
            "lags": _to_bytes(profile.labels.lags) if profile.labels.lags else None,
            "updated_ms": self._now_ms,
            "body": encode(profile),
        }


def _bounded(value: int) -> int:
    # Only a device that makes its counts up gets here; a wrong sum of its own bundle is better than no ingest.
    return min(value, _MOST)


_p = t.profiles.c
_COLUMNS = [column for column in _p if column.name not in ("model", "updated_ms")]
_VALUES = ("windows", "rows", "predicted", "estimated", *LABELS, "confusion", "updated_ms", "body", "lags")
_ENTER = Many(lambda _connection: insert(t.profiles), _p.keys())


def _set(_connection: Connection) -> Update:
    return update(t.profiles).where(*(_p[name] == bindparam(f"at_{name}") for name in Key._fields))


def _add_labels(connection: Connection) -> Insert:
    fresh = queries.upsert(connection, t.label_sums)
    s = t.label_sums.c
    statement: Insert = fresh.on_conflict_do_update(
        index_elements=["bundle", "bucket_ms", "device"],
        set_={name: s[name] + fresh.excluded[name] for name in ("labelled", "wrong")},
    )
    return statement


_SET = Many(_set, _VALUES)
_LABELS = Many(_add_labels, t.label_sums.c.keys())


# --- reading -------------------------------------------------------------------------------------------------------------


def manifest_of(connection: Connection, digest: str) -> m.Manifest | None:
    """A bundle's manifest; None when the registry does not hold it, or holds what this release cannot read."""
    data = connection.execute(select(t.bundles.c.manifest).where(t.bundles.c.digest == digest)).scalar()
    if data is None:
        return None
    try:
        return m.parse(data)
    except ContractError as error:
        log.warning("manifest not readable bundle=%s error=%s", digest, error)
        return None


def _read(row: Any) -> core.Profile:
    counted = decode(row.body)
    labels = w.Labels(
        confusion=to_counts(row.confusion) if row.confusion else (),
        lags=to_lags(row.lags) if row.lags else {},
        **{name: getattr(row, name) for name in LABELS},
    )
    return core.Profile(rows=row.rows, features=counted.features, outputs=counted.outputs, labels=labels)


def buckets(connection: Connection, bundle: str, shape: core.Shape, *, from_ms: int, upto_ms: int) -> Iterator[Span]:
    """Buckets of a bundle that ended by ``upto_ms``, newest first, variants added up. Read as they are taken.

    A row that cannot be read, or does not fit the manifest, is left out and logged.
    """
    query = (
        select(*_COLUMNS)
        .where(_p.bundle == bundle, _p.bucket_ms >= from_ms, _p.bucket_ms <= upto_ms - _p.span_ms)
        .order_by(_p.bucket_ms.desc(), _p.variant)
        .execution_options(yield_per=8)
    )
    with connection.execute(query) as rows:
        for bucket_ms, same in itertools.groupby(rows, key=lambda row: int(row.bucket_ms)):
            kept = list(same)
            profiles = list(_readable(kept, shape))
            if profiles:
                to_ms = bucket_ms + max(int(row.span_ms) for row in kept)
                yield Span(from_ms=bucket_ms, to_ms=to_ms, profile=core.total(profiles))


def _readable(rows: Iterable[Any], shape: core.Shape) -> Iterator[core.Profile]:
    for row in rows:
        try:
            profile, unfit = core.fitted(_read(row), shape)
        except (msgspec.DecodeError, ValueError) as error:
            log.warning("profile not readable bundle=%s bucket_ms=%s error=%s", row.bundle, row.bucket_ms, error)
            continue
        if unfit:
            log.warning("profile does not fit bundle=%s bucket_ms=%s parts=%d", row.bundle, row.bucket_ms, unfit)
        yield profile
