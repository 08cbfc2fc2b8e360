"""How the elements of a tensor are coded, beside those of a base or alone. Written once: a coder writes or reads.

Every codec works on the unsigned integers that the bits of the elements are. ``NUMBERS`` is by the width of an element in bytes
the alphabet of a number's symbol; small numbers are their symbol, larger ones are their order of magnitude and three bits, and
the rest of them are bits that no model would shorten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from skerry_runtime.delta.coder import CHUNK_MOST, U64, Coder, Symbols, Table
from skerry_runtime.delta.container import DeltaError
from skerry_runtime.delta.low_rank import FACTOR_MOST, LowRank

NUMBERS = {1: 256, 2: 112, 4: 240, 8: 496}
WIDTHS = tuple(NUMBERS)
_NONE = np.uint64(0)
_ONE = np.uint64(1)
_SPREAD = 24
"""Contexts by the exponent of the base."""
_FRACTIONS = 16
CHANNELS_MOST = 1 << 14
_SIZES = 72
_CONTEXTS = {0: _SPREAD, 1: 16, 2: _FRACTIONS, 7: _SIZES}
"""Contexts by the expected bits of a difference, in halves."""
_MARKS = 128
_COLUMN_ZERO = 64
_BIAS = {2: 0, 4: 2 * 96, 8: 2 * 992}
"""What rows leave out of exponents: no weight is as small as 2 ** -31."""
FLOATS = {2: (5, 10), 4: (8, 23), 8: (11, 52)}
"""Bits of exponent and mantissa, by width."""
_TOP = 4
"""Bits of a mantissa that are coded with a model."""


class Method(IntEnum):
    """How elements are coded; numbers stand in patches and are never used again."""

    FLOAT_DIFFERENCE = 0
    """The difference of floats in the order of their values, by the base's exponent."""
    INTEGER_DIFFERENCE = 1
    """The difference of integers, by the base's high bits."""
    FLOAT_PLANES = 2
    """Exponent, by the base's; sign and head of the mantissa; the rest as it is."""
    FLOAT_PLANES_ALONE = 3
    """The same without a base."""
    RESCALED = 4
    """8-bit integers from the base's by a ratio of scales, one for all or one for each channel."""
    BYTE_PLANES = 5
    """Bytes of the same rank together, packed by LZMA."""
    BYTE_PLANES_XOR = 6
    """The same, of what differs from the base in its bits."""
    BYTE_PLANES_DIFFERENCE = 7
    """The same, of the difference."""
    INTEGERS_ALONE = 8
    """Integers without a base."""
    FLOAT_DIFFERENCE_SCALED = 9
    """The difference of floats, by how large it tends to be in this row and in this column, which is said before."""
    LOW_RANK = 10
    """The same, from a base to which a product of two thin matrices was added."""
    LOW_RANK_LEANING = 11
    """The same, with a product that leans by what is left in this row and in this column."""


PRODUCTS = {Method.LOW_RANK, Method.LOW_RANK_LEANING}
BY_SIZES = {Method.FLOAT_DIFFERENCE_SCALED, *PRODUCTS}
WITH_BASE = {
    Method.FLOAT_DIFFERENCE, *BY_SIZES, Method.INTEGER_DIFFERENCE, Method.FLOAT_PLANES, Method.RESCALED, Method.BYTE_PLANES_XOR,
    Method.BYTE_PLANES_DIFFERENCE,
}  # fmt: skip
PLANES = {Method.BYTE_PLANES, Method.BYTE_PLANES_XOR, Method.BYTE_PLANES_DIFFERENCE}
BY_EXPONENT = {Method.FLOAT_DIFFERENCE, Method.FLOAT_PLANES}
OF_FLOATS = {*BY_SIZES, Method.FLOAT_DIFFERENCE, Method.FLOAT_PLANES, Method.FLOAT_PLANES_ALONE}
ONE_WIDTH = {Method.RESCALED: 1, **dict.fromkeys(PRODUCTS, 4)}
"""Methods of elements of one width alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Of ``RESCALED``: element ``i`` is of channel ``i // inner % len(ratios)``; a prediction is ``base * ratio / 65536 + offset``."""

    ratios: NDArray[np.int64]
    inner: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of ``FLOAT_DIFFERENCE_SCALED``: how large differences tend to be, in half powers of two, by row and by column."""

    rows: Symbols
    columns: Symbols

    def context(self, base: U64, width: int, start: int) -> Symbols:
        """About twice the bits of the difference of each element."""
        place = start + np.arange(len(base))
        inner = len(self.columns)
        expected = self.rows[place // inner] + self.columns[place % inner] - _COLUMN_ZERO
        found: Symbols = np.clip(expected - 2 * exponent_of(base, width) + _BIAS[width], 0, _SIZES - 1)
        return found

    @classmethod
    def fitted(cls, base: U64, target: U64, width: int, rows: int) -> Sizes:
        """Means over rows and columns."""
        mask = np.uint64((1 << 8 * width) - 1)
        change = zigzag((ordered(target, width) - ordered(base, width)) & mask, width)
        size = 2 * np.log2(change.astype(np.float64) + 1) + 2 * exponent_of(base, width) - _BIAS[width]
        table = size.reshape(rows, -1)
        by_row = table.mean(axis=1)
        by_column = (table - by_row[:, None]).mean(axis=0)
        return cls(
            rows=np.clip(np.rint(by_row), 0, _MARKS - 1).astype(np.int64),
            columns=np.clip(np.rint(by_column) + _COLUMN_ZERO, 0, _MARKS - 1).astype(np.int64),
        )


class Codec:
    """Tables of all methods, which are shared by all tensors of a patch."""

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        self._tables: dict[tuple[int, ...], Table] = {}

    def run(self, method: Method, width: int, start: int, base: U64 | None, target: U64 | None, n: int, low: int,
            scaling: Scaling | None = None, sizes: Sizes | None = None, product: LowRank | None = None) -> U64:  # fmt: skip
        """Codes at most ``n`` elements, as many as ``room`` said.

        Args:
            method: but those of ``PLANES``.
            width: of an element, bytes.
            start: how many elements of this tensor came before.
            base: elements beside them, where the method has a base.
            target: what is written, or None to read.
            n: how many.
            low: the exponent below which the base's does not matter.
            scaling: of ``RESCALED``.
            sizes: of ``BY_SIZES``.
            product: of ``PRODUCTS``: what is added to the base.
        """
        if method in BY_SIZES:
            assert base is not None
            assert sizes is not None
            if product is not None:
                base = product.predict(base, start)
            context = sizes.context(base, width, start)
            return self._difference(width, ordered, unordered, context, base, target, table=7)
        if method == Method.FLOAT_DIFFERENCE:
            assert base is not None
            return self._difference(width, ordered, unordered, _exponent_context(base, width, low), base, target)
        if method == Method.INTEGER_DIFFERENCE:
            assert base is not None
            high = (base >> np.uint64(8 * width - 4)).astype(np.int64)
            return self._difference(width, _same, _same, high, base, target, table=1)
        if method == Method.RESCALED:
            assert base is not None
            assert scaling is not None
            guess, fraction = predicted(base, start, scaling)
            return self._difference(1, _same, _same, fraction, guess, target, table=2)
        if method == Method.INTEGERS_ALONE:
            context = np.zeros(n, np.int64)
            return self._number(self._table(3, width, 1, NUMBERS[width]), context, width, target)
        return self._planes(width, base, target, n, low)

    def sizes(self, rows: int, columns: int, given: Sizes | None) -> Sizes:
        """Codes what differences tend to be."""
        found: list[Symbols] = []
        both = (None, None) if given is None else (given.rows, given.columns)
        for n, values in zip((rows, columns), both, strict=True):
            table, parts, at = self._table(8, len(found), 1, _MARKS), [], 0
            while at < n:
                room = min(table.chunk(), n - at)
                part = None if values is None else values[at : at + room]
                parts.append(self._coder.symbols(table, np.zeros(room, np.int64), part))
                at += room
            found.append(np.concatenate(parts))
        return Sizes(rows=found[0], columns=found[1])

    def product(self, rows: int, columns: int, rank: int, exponent: int, given: LowRank | None) -> LowRank:
        """Codes the factors of a product, rank by rank, the largest first."""
        sides = []
        for side, n in enumerate((rows, columns)):
            table, parts = self._table(9, side, 8, NUMBERS[4]), []
            values = None if given is None else (given.left.T if side == 0 else given.right)
            for order in range(rank):
                at = 0
                while at < n:
                    room = min(table.chunk(), n - at)
                    part = None
                    if values is not None:
                        part = zigzag(values[order, at : at + room].astype(np.int64).view(np.uint64), 8)
                    found = self._number(table, np.full(room, min(order // 4, 7)), 4, part)
                    parts.append(unzigzag(found).view(np.int64).astype(np.float64))
                    at += room
            sides.append(np.concatenate(parts).reshape(rank, n))
        if max(np.abs(side).max() for side in sides) >= FACTOR_MOST:
            raise DeltaError("the patch multiplies by too much")
        return LowRank(left=np.ascontiguousarray(sides[0].T), right=sides[1], exponent=exponent)

    def room(self, method: Method, width: int) -> int:
        """How many elements the next chunk may have."""
        return self._first_table(method, width).chunk()

    def _first_table(self, method: Method, width: int) -> Table:
        if method == Method.FLOAT_DIFFERENCE:
            return self._table(0, width, _SPREAD, NUMBERS[width])
        if method in BY_SIZES:
            return self._table(7, width, _SIZES, NUMBERS[width])
        if method == Method.INTEGER_DIFFERENCE:
            return self._table(1, width, 16, NUMBERS[width])
        if method == Method.RESCALED:
            return self._table(2, 1, _FRACTIONS, 256)
        if method == Method.INTEGERS_ALONE:
            return self._table(3, width, 1, NUMBERS[width])
        alone = method == Method.FLOAT_PLANES_ALONE
        return self._table(5 if alone else 4, width, 1 if alone else _SPREAD, 1 << FLOATS[width][0])

    def _table(self, *key: int) -> Table:
        if key not in self._tables:
            self._tables[key] = Table(*key[2:])
        return self._tables[key]

    def _difference(self, width: int, there: Callable[[U64, int], U64], back: Callable[[U64, int], U64], context: Symbols,
                    base: U64, target: U64 | None, table: int = 0) -> U64:  # fmt: skip
        mask = np.uint64((1 << 8 * width) - 1)
        old = there(base, width)
        wanted = None if target is None else zigzag((there(target, width) - old) & mask, width)
        alphabet = NUMBERS[width]
        contexts = _CONTEXTS[table]
        found = self._number(self._table(table, width, contexts, alphabet), context, width, wanted)
        return back((old + unzigzag(found)) & mask, width)

    def _number(self, table: Table, context: Symbols, width: int, value: U64 | None) -> U64:
        if width == 1:
            given = None if value is None else value.astype(np.int64)
            return self._coder.symbols(table, context, given).astype(np.uint64)
        if value is None:
            symbols = self._coder.symbols(table, context, None)
            return _join(symbols, self._coder.bits(_rest(symbols), None))
        symbols = split(value)
        widths = _rest(symbols)
        self._coder.symbols(table, context, symbols)
        self._coder.bits(widths, value & ((_ONE << widths.astype(np.uint64)) - _ONE))
        return value

    def _planes(self, width: int, base: U64 | None, target: U64 | None, n: int, low: int) -> U64:
        _, mantissa_bits = FLOATS[width]
        rest_bits = mantissa_bits - _TOP
        sign_at, exponent_at = np.uint64(8 * width - 1), np.uint64(mantissa_bits)
        context = np.zeros(n, np.int64) if base is None else _exponent_context(base, width, low)
        first = self._first_table(Method.FLOAT_PLANES_ALONE if base is None else Method.FLOAT_PLANES, width)
        exponent = None if target is None else exponent_of(target, width)
        exponent = self._coder.symbols(first, context, exponent)
        head = rest = None
        if target is not None:
            sign = (target >> sign_at) & _ONE
            top = (target >> np.uint64(rest_bits)) & np.uint64((1 << _TOP) - 1)
            head = ((sign << np.uint64(_TOP)) | top).astype(np.int64)
            rest = target & np.uint64((1 << rest_bits) - 1)
        second = np.zeros(n, np.int64)
        if base is not None:
            second = 2 * np.minimum(np.abs(exponent - exponent_of(base, width)), 2) + (base >> sign_at).astype(np.int64)
        head = self._coder.symbols(self._table(6, width, 6, 2 << _TOP), second, head)
        rest = self._coder.bits(np.full(n, rest_bits, np.int64), rest)
        found = head.astype(np.uint64)
        high = ((found >> np.uint64(_TOP)) << sign_at) | (exponent.astype(np.uint64) << exponent_at)
        joined: U64 = high | ((found & np.uint64((1 << _TOP) - 1)) << np.uint64(rest_bits)) | rest
        return joined


def exponent_of(values: U64, width: int) -> Symbols:
    """The exponents of floats, biased as they stand."""
    exponent_bits, mantissa_bits = FLOATS[width]
    return ((values >> np.uint64(mantissa_bits)) & np.uint64((1 << exponent_bits) - 1)).astype(np.int64)


def _exponent_context(base: U64, width: int, low: int) -> Symbols:
    return np.clip(exponent_of(base, width) - low, 0, _SPREAD - 1)


def lowest(base: U64, width: int) -> int:
    """The exponent from which those of a base are told apart, up to the largest that is not rare."""
    exponents = np.sort(exponent_of(base, width))
    return max(0, int(exponents[int(0.999 * (len(exponents) - 1))]) - _SPREAD + 2)


def ordered(values: U64, width: int) -> U64:
    """Floats as integers in the order of their values.

    >>> bits = np.array([-1.5, -0.0, 0.0, 2.0], np.float32).view(np.uint32).astype(np.uint64)
    >>> bool((np.diff(ordered(bits, 4).astype(np.int64)) > 0).all())
    True
    """
    sign = np.uint64(1 << (8 * width - 1))
    mask = np.uint64((1 << 8 * width) - 1)
    return np.where(values & sign != _NONE, ~values & mask, values | sign)


def unordered(values: U64, width: int) -> U64:
    """What ``ordered`` was given."""
    sign = np.uint64(1 << (8 * width - 1))
    mask = np.uint64((1 << 8 * width) - 1)
    return np.where(values & sign != _NONE, values ^ sign, ~values & mask)


def _same(values: U64, width: int) -> U64:  # noqa: ARG001 - beside ``ordered``
    return values


def zigzag(values: U64, width: int) -> U64:
    """Differences modulo ``2 ** (8 * width)`` as numbers that are small when the difference is, whatever its sign."""
    mask = np.uint64((1 << 8 * width) - 1)
    negative = (values >> np.uint64(8 * width - 1)) & _ONE
    return ((values << _ONE) & mask) ^ np.where(negative != _NONE, mask, _NONE)


def unzigzag(values: U64) -> U64:
    """What ``zigzag`` was given, modulo the same."""
    return (values >> _ONE) ^ np.where(values & _ONE != _NONE, np.uint64(0xFFFF_FFFF_FFFF_FFFF), _NONE)


def split(values: U64) -> Symbols:
    """Symbols of numbers.

    >>> split(np.array([0, 15, 16, 17, 18, 31, 32], np.uint64)).tolist()
    [0, 15, 16, 16, 17, 23, 24]
    """
    order = np.zeros(len(values), np.uint64)
    rest = values.copy()
    for step in (32, 16, 8, 4, 2, 1):
        large = rest >> np.uint64(step) != _NONE
        order[large] += np.uint64(step)
        rest[large] >>= np.uint64(step)
    large = values >= np.uint64(16)
    order = np.maximum(order, np.uint64(4))
    head = (values >> (order - np.uint64(3))) & np.uint64(7)
    return np.where(large, np.uint64(16) + (order - np.uint64(4)) * np.uint64(8) + head, values).astype(np.int64)


def _rest(symbols: Symbols) -> Symbols:
    """How many bits follow each symbol."""
    return np.where(symbols < 16, 0, ((symbols - 16) >> 3) + 1)


def _join(symbols: Symbols, rest: U64) -> U64:
    large = np.maximum(symbols - 16, 0)
    head = (np.uint64(8) | (large & 7).astype(np.uint64)) << ((large >> 3) + 1).astype(np.uint64)
    return np.where(symbols < 16, symbols.astype(np.uint64), head | rest)


def predicted(base: U64, start: int, scaling: Scaling) -> tuple[U64, Symbols]:
    """What rescaling gives of int8 elements, and how far from a tie each was rounded, in sixteenths."""
    ratio = scaling.ratios[(start + np.arange(len(base))) // scaling.inner % len(scaling.ratios)]
    exact = base.astype(np.uint8).view(np.int8).astype(np.int64) * ratio + (1 << 15)
    guess = np.clip((exact >> 16) + scaling.offset, -128, 127).astype(np.int8).view(np.uint8).astype(np.uint64)
    return guess, (exact & 0xFFFF) >> 12


def to_integers(data: bytes | NDArray[np.uint8], width: int) -> U64:
    """Little-endian elements as unsigned integers."""
    return np.frombuffer(data, f"<u{width}").astype(np.uint64)


def to_bytes(values: U64, width: int) -> bytes:
    """What ``to_integers`` was given."""
    return values.astype(f"<u{width}").tobytes()


def planes(values: U64, width: int) -> bytes:
    """Bytes of the same rank together, the highest first."""
    return values.astype(f">u{width}").view(np.uint8).reshape(-1, width).T.tobytes()


def from_planes(data: bytes, width: int) -> U64:
    """What ``planes`` was given."""
    rows = np.frombuffer(data, np.uint8).reshape(width, -1)
    return np.ascontiguousarray(rows.T).view(f">u{width}").ravel().astype(np.uint64)


PLANES_CHUNK = 2 * CHUNK_MOST
"""Elements whose planes stand together."""


def combined(method: Method, width: int, target: U64, base: U64 | None) -> U64:
    """What the planes of a method are of."""
    if method == Method.BYTE_PLANES:
        return target
    assert base is not None
    return target ^ base if method == Method.BYTE_PLANES_XOR else (target - base) & np.uint64((1 << 8 * width) - 1)


def uncombined(method: Method, width: int, found: U64, base: U64 | None) -> U64:
    """The elements, of what their planes were of."""
    if method == Method.BYTE_PLANES:
        return found
    assert base is not None
    return found ^ base if method == Method.BYTE_PLANES_XOR else (found + base) & np.uint64((1 << 8 * width) - 1)


def tagged(data: bytes, width: int, tag: int) -> bytes:
    """Elements with a byte before each; as they are when it is 0."""
    if not tag:
        return data
    rows = np.frombuffer(data, np.uint8).reshape(-1, width)
    return np.concatenate([np.full((len(rows), 1), tag, np.uint8), rows], axis=1).tobytes()
