"""Windows as they arrive: the contract's, in types whose numbers the decoder itself holds to their ranges.

Owns one pass over a window's bytes for the case that nearly every window is. Leaves to the contract what its own reader does: fields
of a later release, and the name of a fault. Most of a window is counts, a few thousand of them; to look at each again in Python costs
five times as much as to read them.

Nothing here can be part of a cycle, and a batch builds tens of thousands, so the collector does not follow them (``gc=False``).
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from skerry_contract import histogram as h
from skerry_contract import window as w
from skerry_contract import wire

Count = Annotated[int, Meta(ge=0, le=h.MAX_COUNT - 1)]
Sum = Annotated[int, Meta(ge=0, le=h.MAX_SUM - 1)]
Row = Annotated[tuple[Count, ...], Meta(max_length=w.MAX_BINS)]


class _Counts(w.Counts, frozen=True, kw_only=True, gc=False):
    ok: Count = 0
    invalid: Count = 0
    failed: Count = 0
    shed: Count = 0
    rows: Count = 0
    retries: Count = 0
    cached: Count = 0
    fallback: Count = 0


class _Exponential(h.Exponential, frozen=True, kw_only=True, array_like=True, gc=False):
    scale: int = h.SCALE
    zero: Count = 0
    offset: int = 0
    counts: tuple[Count, ...] = ()
    total: Sum = 0


class _Latency(w.Latency, frozen=True, kw_only=True, gc=False):
    total: _Exponential = _Exponential()
    queue: _Exponential = _Exponential()
    transform: _Exponential = _Exponential()
    infer: _Exponential = _Exponential()


class _Moments(h.Moments, frozen=True, kw_only=True, array_like=True, gc=False):
    n: Count = 0
    total: int = 0
    squares: Sum = 0


class _FeatureCounts(w.FeatureCounts, frozen=True, array_like=True, gc=False):
    counts: Row
    null: Count
    outside: Count
    moments: _Moments


class _OutputCounts(w.OutputCounts, frozen=True, array_like=True, gc=False):
    counts: Row
    moments: _Moments
    estimated: Annotated[tuple[Sum, ...], Meta(max_length=w.MAX_BINS)] = ()


class _SliceCounts(w.SliceCounts, frozen=True, array_like=True, gc=False):
    rows: Count
    counts: tuple[Count, ...] = ()


class _Labels(w.Labels, frozen=True, kw_only=True, gc=False):
    confusion: tuple[Count, ...] = ()
    matched: Count = 0
    late: Count = 0
    unknown: Count = 0
    duplicate: Count = 0
    conflicting: Count = 0
    lags: dict[int, _Exponential] = msgspec.field(default_factory=dict)  # type: ignore[assignment]


class _Shadow(w.Shadow, frozen=True, kw_only=True):
    pairs: Count = 0
    dropped: dict[str, Count] = msgspec.field(default_factory=dict)
    agreed: Count = 0
    distance: _Exponential = _Exponential()
    slower: _Exponential = _Exponential()
    faster: _Exponential = _Exponential()
    labelled: tuple[Count, Count, Count, Count] = (0, 0, 0, 0)


class _Window(w.Window, frozen=True, kw_only=True, forbid_unknown_fields=True):
    counts: _Counts = _Counts()
    latency: _Latency = _Latency()
    # Narrower than the contract's, which a type checker allows of no dict: nobody writes to these.
    features: dict[str, _FeatureCounts] = msgspec.field(default_factory=dict)  # type: ignore[assignment]
    outputs: dict[str, _OutputCounts] = msgspec.field(default_factory=dict)  # type: ignore[assignment]
    slices: dict[str, _SliceCounts] = msgspec.field(default_factory=dict)  # type: ignore[assignment]
    labels: _Labels = _Labels()
    resources: dict[str, Sum] = msgspec.field(default_factory=dict)
    merged: Annotated[int, Meta(ge=1, le=h.MAX_COUNT - 1)] = 1
    tallies: dict[str, Count] = msgspec.field(default_factory=dict)
    freshness: _Exponential = _Exponential()
    attributions: dict[str, _Moments] = msgspec.field(default_factory=dict)  # type: ignore[assignment]
    shadows: dict[str, _Shadow] = msgspec.field(default_factory=dict)  # type: ignore[assignment]


_decoder = msgspec.msgpack.Decoder(_Window)


def read(body: bytes) -> w.Window:
    """Reads and checks the body of a ``window`` record, as ``wire.decode_window`` does.

    Raises:
        Malformed: what no device of ours can have made.
    """
    try:
        window = _decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        # Newer fields, or a fault: the contract's own reader keeps the ones and names the other.
        return wire.decode_window(body)
    return w.check_relations(window)
