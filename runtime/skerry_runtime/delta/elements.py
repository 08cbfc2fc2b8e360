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

NUMBERS = {1: 256, 2: 112, 4: 240, 8: 496}
WIDTHS = tuple(NUMBERS)
_NONE = np.uint64(0)
_ONE = np.uint64(1)
_SPREAD = 24
"""Contexts by the exponent of the base."""
_FRACTIONS = 16
CHANNELS_MOST = 1 << 14
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


WITH_BASE = {
    Method.FLOAT_DIFFERENCE, Method.INTEGER_DIFFERENCE, Method.FLOAT_PLANES, Method.RESCALED, Method.BYTE_PLANES_XOR,
    Method.BYTE_PLANES_DIFFERENCE,
}  # fmt: skip
PLANES = {Method.BYTE_PLANES, Method.BYTE_PLANES_XOR, Method.BYTE_PLANES_DIFFERENCE}
BY_EXPONENT = {Method.FLOAT_DIFFERENCE, Method.FLOAT_PLANES}
OF_FLOATS = {Method.FLOAT_DIFFERENCE, Method.FLOAT_PLANES, Method.FLOAT_PLANES_ALONE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Of ``RESCALED``: element ``i`` is of channel ``i // inner % len(ratios)``; a prediction is ``base * ratio / 65536 + offset``."""

    ratios: NDArray[np.int64]
    inner: int
    offset: int = 0


class Codec:
    """Tables of all methods, which are shared by all tensors of a patch."""

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        self._tables: dict[tuple[int, ...], Table] = {}

    def run(self, method: Method, width: int, start: int, base: U64 | None, target: U64 | None, n: int, low: int,
            scaling: Scaling | None = None) -> U64:  # fmt: skip
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
        """
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

    def room(self, method: Method, width: int) -> int:
        """How many elements the next chunk may have."""
        return self._first_table(method, width).chunk()

    def _first_table(self, method: Method, width: int) -> Table:
        if method == Method.FLOAT_DIFFERENCE:
            return self._table(0, width, _SPREAD, NUMBERS[width])
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
        contexts = (_SPREAD, 16, _FRACTIONS)[table]
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
