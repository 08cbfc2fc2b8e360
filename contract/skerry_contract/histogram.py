"""Counts that merge exactly: any partition, order and re-merge equals counting the raw data at once.

Everything is a Python integer. Four kinds:

* ``Exponential``: OpenTelemetry's exponential histogram (data model, "ExponentialHistogram"). Every device records at
  ``SCALE``; coarser scales come from shifting indices, which is exact. Bucket ``i`` holds ``2**(i/2**scale) < v <=
  2**((i+1)/2**scale)``; the relative error of a quantile is at most ``(b-1)/(b+1)`` with ``b = 2**(2**-scale)``, 1.08 % at 5.
* edge counts: how many values fell between the reference edges of the bundle; ``edge_bin`` says where.
* ``Moments``: count, sum and sum of squares of quantized values ``q``.
* registers of a HyperLogLog (Flajolet et al. 2007): about how many different things there were; merging takes the greater.

The numpy code that folds many values at once must give the same integers; a property test compares both.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence

import msgspec

from skerry_contract.errors import Malformed

SCALE = 5
"""Scale at which devices record: 32 buckets per doubling."""
MIN_INDEX, MAX_INDEX = -1, 63 * 32
"""Latencies are whole nanoseconds from 1 to 2**63; zero is counted apart."""

MAX_COUNT = 1 << 40
"""Counts on the wire are below it: a device at 10,000 inferences a second takes three years to reach it."""
MAX_SUM = 1 << 63
"""Sums on the wire are below it, as a 64-bit integer of a database holds them."""

BOUNDS: tuple[float, ...] = tuple(2.0 ** (i / 2**SCALE - 1.0) for i in range(2**SCALE))
"""Lower bounds of the buckets within one doubling, for a mantissa in [0.5, 1), as ``math.frexp`` gives it."""

Q_BITS = 12
Q_LIMIT = 1 << 20
P_BITS = 20


def exponential_index(value: int | float) -> int:
    """The index at ``SCALE`` of a positive value: ``ceil(log2(value) * 2**SCALE) - 1``, without rounding at powers of two.

    >>> exponential_index(1), exponential_index(2), exponential_index(3)
    (-1, 31, 50)
    """
    if not value > 0:
        raise ValueError(f"wanted a positive value, got {value!r}")
    mantissa, exponent = math.frexp(value)
    # bisect_left: a value on a bound belongs to the bucket below it (upper bounds are inclusive).
    return (exponent - 1) * (1 << SCALE) + bisect.bisect_left(BOUNDS, mantissa) - 1


class Exponential(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """An exponential histogram.

    Attributes:
        scale: resolution; 32 buckets per doubling at 5.
        zero: how many values were 0.
        offset: index of the first entry of ``counts``.
        counts: counts of consecutive buckets; neither first nor last is 0, unless empty.
        total: sum of the values, as integer of the value's unit.
    """

    scale: int = SCALE
    zero: int = 0
    offset: int = 0
    counts: tuple[int, ...] = ()
    total: int = 0

    @property
    def n(self) -> int:
        """How many values were counted."""
        return self.zero + sum(self.counts)


def exponential_of(values: Iterable[int]) -> Exponential:
    """Counts non-negative integers (nanoseconds) one by one: the definition that faster code must equal."""
    zero = total = 0
    found: dict[int, int] = {}
    for value in values:
        if value < 0:
            raise ValueError(f"wanted a value >= 0, got {value}")
        total += value
        if value == 0:
            zero += 1
        else:
            index = exponential_index(value)
            found[index] = found.get(index, 0) + 1
    return exponential_from(found, zero=zero, total=total)


def exponential_from(found: dict[int, int], *, zero: int = 0, total: int = 0, scale: int = SCALE) -> Exponential:
    """Builds the dense form from a map index -> count."""
    found = {index: count for index, count in found.items() if count}
    if not found:
        return Exponential(scale=scale, zero=zero, total=total)
    low, high = min(found), max(found)
    return Exponential(
        scale=scale, zero=zero, offset=low, counts=tuple(found.get(i, 0) for i in range(low, high + 1)), total=total
    )


def rescale(histogram: Exponential, scale: int) -> Exponential:
    """The same counts at a coarser scale. Exact: bucket ``i`` goes to ``i >> (old - new)``.

    Raises:
        ValueError: when asked for a finer scale.
    """
    if scale > histogram.scale:
        raise ValueError(f"cannot refine scale {histogram.scale} to {scale}")
    if scale == histogram.scale:
        return histogram
    shift = histogram.scale - scale
    found: dict[int, int] = {}
    for i, count in enumerate(histogram.counts, histogram.offset):
        found[i >> shift] = found.get(i >> shift, 0) + count
    return exponential_from(found, zero=histogram.zero, total=histogram.total, scale=scale)


def merge_exponential(a: Exponential, b: Exponential) -> Exponential:
    """The histogram of both. Commutative and associative; scales may differ."""
    scale = min(a.scale, b.scale)
    a, b = rescale(a, scale), rescale(b, scale)
    found = dict(enumerate(a.counts, a.offset))
    for i, count in enumerate(b.counts, b.offset):
        found[i] = found.get(i, 0) + count
    return exponential_from(found, zero=a.zero + b.zero, total=a.total + b.total, scale=scale)


def quantile(histogram: Exponential, q: float) -> float | None:
    """The q-quantile in the unit of the values, None when empty.

    It is the harmonic middle ``2 * low * high / (low + high)`` of the bucket that holds it: the point whose relative error
    is the same at both ends, ``(b - 1) / (b + 1)``, and so the least that can be promised.

    >>> round(quantile(exponential_of([1000] * 9 + [2000]), 0.5) / 1000, 1)
    1.0
    """
    n = histogram.n
    if not n:
        return None
    rank = min(n - 1, math.floor(q * n))
    if rank < histogram.zero:
        return 0.0
    seen = histogram.zero
    for i, count in enumerate(histogram.counts, histogram.offset):
        seen += count
        if rank < seen:
            width = 2.0**-histogram.scale
            return float(2.0 ** (i * width) * 2.0 / (1.0 + 2.0**-width))
    raise AssertionError("counts and n disagree")


def check_buckets(histogram: Exponential, *, where: str) -> None:
    """Refuses a scale or buckets that no device of ours can have.

    Raises:
        Malformed: absurd scale, buckets outside what whole nanoseconds can reach.
    """
    ok = -10 <= histogram.scale <= SCALE
    if ok and histogram.counts:
        shift = SCALE - histogram.scale
        low, high = histogram.offset, histogram.offset + len(histogram.counts) - 1
        ok = MIN_INDEX >> shift <= low and high <= MAX_INDEX >> shift
    if not ok:
        raise Malformed("histogram", "wanted -10 <= scale <= 5 and buckets within range", where=where)


def check_counts(histogram: Exponential, *, where: str) -> None:
    """Refuses counts and a sum that no device of ours can have made.

    Raises:
        Malformed: counts or sum out of range.
    """
    if not (0 <= histogram.zero < MAX_COUNT and 0 <= histogram.total < MAX_SUM and counts_fit(histogram.counts)):
        raise Malformed("histogram", "wanted counts >= 0 and a sum below 2**63", where=where)


def counts_fit(counts: Sequence[int]) -> bool:
    """Whether every count is one that a device can reach, and a database can add up."""
    return not counts or (min(counts) >= 0 and max(counts) < MAX_COUNT)


def edge_bin(edges: Sequence[float], value: float) -> int:
    """Which of the ``len(edges) + 1`` bins holds the value: bin ``i`` is ``edges[i-1] <= value < edges[i]``.

    >>> [edge_bin((0.0, 1.0), v) for v in (-1.0, 0.0, 0.5, 1.0)]
    [0, 1, 1, 2]
    """
    return bisect.bisect_right(edges, value)


def merge_counts(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """Adds two rows of counts of the same bins.

    Raises:
        ValueError: when the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} bins cannot be merged with {len(b)}")
    return tuple(x + y for x, y in zip(a, b, strict=True))


class Moments(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Integer moments of quantized values ``q = clip(rint((x - centre) / scale * 2**12), +-2**20)``.

    Attributes:
        n: how many values.
        total: sum of q.
        squares: sum of q * q. Below 2**63 whatever the values for n < 2**23; a device makes no window and merges none beyond it.
    """

    n: int = 0
    total: int = 0
    squares: int = 0


def quantize(value: float, centre: float, scale: float) -> int:
    """The q of one value. ``scale`` must be positive; rounding is half to even, as ``numpy.rint`` does."""
    q = (value - centre) / scale * (1 << Q_BITS)
    return round(max(-float(Q_LIMIT), min(float(Q_LIMIT), q)))


def moments_of(qs: Iterable[int]) -> Moments:
    """Moments of quantized values, one by one: the definition that faster code must equal."""
    n = total = squares = 0
    for q in qs:
        n += 1
        total += q
        squares += q * q
    return Moments(n=n, total=total, squares=squares)


def binned_moments(counts: Sequence[int], edges: Sequence[float], centre: float, scale: float) -> Moments:
    """Moments of values of which only the bin shall be known: each counts as the middle of its bin, in the first and the last as their edge.

    They follow from the counts and say nothing beyond them, so they merge exactly as those do.

    >>> binned_moments((0, 1, 0), (1.0, 3.0), 0.0, 1.0)
    Moments(n=1, total=8192, squares=67108864)
    """
    if edges:
        middles = [edges[0], *((a + b) / 2 for a, b in itertools.pairwise(edges)), edges[-1]]
    else:
        middles = [centre]
    pairs = [(n, quantize(value, centre, scale)) for n, value in zip(counts, middles, strict=True)]
    return Moments(n=sum(counts), total=sum(n * q for n, q in pairs), squares=sum(n * q * q for n, q in pairs))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of both."""
    return Moments(n=a.n + b.n, total=a.total + b.total, squares=a.squares + b.squares)


def mean_and_sd(moments: Moments, centre: float, scale: float) -> tuple[float, float] | None:
    """Mean and standard deviation (n - 1) in the value's unit; None below two values."""
    if moments.n < 2:
        return None
    mean_q = moments.total / moments.n
    # The numerator is an exact integer: no cancellation between large sums.
    variance_q = (moments.n * moments.squares - moments.total**2) / (moments.n * (moments.n - 1))
    step = scale / (1 << Q_BITS)
    return centre + mean_q * step, math.sqrt(max(0.0, variance_q)) * step


DISTINCT_REGISTERS = 256
"""Relative standard error 1.04 / sqrt(256) = 6.5 %."""
_DISTINCT_BITS = 8
_ALPHA = 0.7213 / (1 + 1.079 / DISTINCT_REGISTERS)


def distinct_register(hashed: int) -> tuple[int, int]:
    """(register, rank) of a 64-bit hash: its lowest 8 bits choose, the rest's trailing zeros plus one rank it.

    >>> distinct_register(0x0500), distinct_register(0x0203), distinct_register(7)
    ((0, 1), (3, 2), (7, 57))
    """
    rest = hashed >> _DISTINCT_BITS
    rank = (rest & -rest).bit_length() if rest else 64 - _DISTINCT_BITS + 1
    return hashed & (DISTINCT_REGISTERS - 1), rank


def distinct_of(hashes: Iterable[int]) -> bytes:
    """Registers of 64-bit hashes, one by one: the definition that faster code must equal. Empty for none."""
    registers = bytearray(DISTINCT_REGISTERS)
    for hashed in hashes:
        register, rank = distinct_register(hashed)
        registers[register] = max(registers[register], rank)
    return bytes(registers) if any(registers) else b""


def merge_distinct(a: bytes, b: bytes) -> bytes:
    """The registers of both; empty is the zero."""
    if not a or not b:
        return a or b
    if len(a) != len(b):
        raise ValueError(f"{len(a)} registers cannot be merged with {len(b)}")
    return bytes(map(max, a, b))


def distinct_estimate(registers: bytes) -> float:
    """About how many different hashes there were, with linear counting while few registers are set."""
    if not registers:
        return 0.0
    size = len(registers)
    raw = _ALPHA * size * size / sum(2.0**-rank for rank in registers)
    empty = registers.count(0)
    return size * math.log(size / empty) if empty and raw <= 2.5 * size else raw
