"""Adaptive entropy coding of whole arrays: interleaved rANS, whose lanes are the elements of a numpy array.

Symbols are coded in chunks. A chunk's frequencies come from what was coded before it, so a patch carries no tables; within a
chunk all is arithmetic of arrays. Frequencies are integers computed from integers: every machine computes the same. Codes that
need no model go into a stream of bits beside it.

rANS: Duda, "Asymmetric numeral systems" (arXiv:1311.2540), with 64-bit states, 32-bit words and frequencies of 16 bits;
interleaved as Giesen describes in arXiv:1402.3392.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from skerry_runtime.delta.container import DeltaError, Source

U64 = NDArray[np.uint64]
Symbols = NDArray[np.int64]

CHUNK_MOST = 8192
_CHUNK_LEAST = 64
_SCALE_BITS = 16
_SCALE = 1 << _SCALE_BITS
_LOWEST = 1 << 31
_WORD = np.uint64(32)
_LANES_MOST_BITS = 8
_SEEN = 24
"""What one symbol adds to a count that began at 1."""
_FORGET = 1 << 22


class Table:
    """Counts of the symbols ``0..alphabet`` in each of some contexts, and the frequencies that follow from them."""

    def __init__(self, contexts: int, alphabet: int) -> None:
        self.contexts, self.alphabet = contexts, alphabet
        self._counts = np.ones((contexts, alphabet), np.int64)
        self._seen = 0
        self._fresh = False
        self._frequencies = np.zeros((contexts, alphabet), np.int64)
        self._starts = np.zeros((contexts, alphabet), np.int64)

    def chunk(self) -> int:
        """How many symbols the next chunk may have: few while little is known."""
        return min(max(self._seen // 2, _CHUNK_LEAST), CHUNK_MOST)

    def learn(self, contexts: Symbols, symbols: Symbols) -> None:
        """Counts a chunk."""
        flat = np.bincount(contexts * self.alphabet + symbols, minlength=self._counts.size)
        self._counts += _SEEN * flat.reshape(self._counts.shape)
        much = self._counts.sum(axis=1) > _FORGET
        if much.any():
            self._counts[much] = (self._counts[much] + 1) >> 1
        self._seen += len(symbols)
        self._fresh = False

    def frequencies(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each context: frequencies, at least 1, that sum to the scale, and where each begins."""
        if not self._fresh:
            total = self._counts.sum(axis=1, keepdims=True)
            found = 1 + self._counts * (_SCALE - self.alphabet) // total
            most = found.argmax(axis=1)
            rows = np.arange(self.contexts)
            found[rows, most] += _SCALE - found.sum(axis=1)
            self._frequencies = found
            self._starts = np.cumsum(found, axis=1) - found
            self._fresh = True
        return self._frequencies, self._starts


class Coder(Protocol):
    """Writes what it is given, or reads what it is not: codecs are written once for both."""

    def symbols(self, table: Table, contexts: Symbols, values: Symbols | None) -> Symbols:
        """One symbol for each context; the same that was given, or that was read."""

    def bits(self, widths: Symbols, values: U64 | None) -> U64:
        """Numbers of as many bits as each has."""


class Encoder:
    """Collects; ``finish`` gives the streams of words and bits."""

    def __init__(self) -> None:
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._bits: list[bytes] = []
        self._count = 0

    def symbols(self, table: Table, contexts: Symbols, values: Symbols | None) -> Symbols:
        """Takes symbols."""
        assert values is not None
        frequencies, starts = table.frequencies()
        self._pending.append((frequencies[contexts, values], starts[contexts, values]))
        self._count += len(values)
        table.learn(contexts, values)
        return values

    def bits(self, widths: Symbols, values: U64 | None) -> U64:
        """Takes bits."""
        assert values is not None
        widest = int(widths.max(initial=0))
        if widest:
            places = np.arange(widest)
            plane = (values[:, None] >> places.astype(np.uint64)[None]) & np.uint64(1)
            self._bits.append(np.packbits(plane.astype(np.uint8)[places[None] < widths[:, None]]).tobytes())
        return values

    def finish(self) -> tuple[bytes, bytes]:
        """Words and bits; both empty when nothing was taken."""
        if not self._count:
            return b"", b"".join(self._bits)
        lane_bits = min(max((self._count >> 11).bit_length(), 2), _LANES_MOST_BITS)
        lanes = 1 << lane_bits
        states = np.full(lanes, _LOWEST, np.uint64)
        words: list[NDArray[np.uint32]] = []
        for frequencies, starts in reversed(self._pending):
            for begin in range((len(starts) - 1) // lanes * lanes, -1, -lanes):
                f = frequencies[begin : begin + lanes].astype(np.uint64)
                s = starts[begin : begin + lanes].astype(np.uint64)
                x = states[: len(f)]
                full = x >= f << np.uint64(47)
                if full.any():
                    words.append(x[full].astype(np.uint32))
                    x = np.where(full, x >> _WORD, x)
                states[: len(f)] = ((x // f) << np.uint64(_SCALE_BITS)) + x % f + s
        stream = [bytes([lane_bits]), states.astype("<u8").tobytes()]
        stream += [part.astype("<u4").tobytes() for part in reversed(words)]
        return b"".join(stream), b"".join(self._bits)


class Decoder:
    """Reads what an encoder gave."""

    def __init__(self, words: Source, bits: Source) -> None:
        self._words, self._bits = words, bits
        self._states: U64 | None = None

    def symbols(self, table: Table, contexts: Symbols, values: Symbols | None) -> Symbols:  # noqa: ARG002 - beside ``Encoder``
        """Gives symbols."""
        if self._states is None:
            self._states = self._begin()
        states, lanes = self._states, len(self._states)
        frequencies, starts = table.frequencies()
        f, s = frequencies.ravel(), starts.ravel()
        # Starts of all contexts in one ascending row: a search finds the symbol.
        row = (starts + np.arange(table.contexts)[:, None] * _SCALE).ravel()
        out = np.empty(len(contexts), np.int64)
        for begin in range(0, len(contexts), lanes):
            context = contexts[begin : begin + lanes]
            x = states[: len(context)]
            slot = (x & np.uint64(_SCALE - 1)).astype(np.int64)
            place = np.searchsorted(row, slot + context * _SCALE, "right") - 1
            x = f[place].astype(np.uint64) * (x >> np.uint64(_SCALE_BITS)) + (slot - s[place]).astype(np.uint64)
            short = np.flatnonzero(x < np.uint64(_LOWEST))
            if len(short):
                more = np.frombuffer(self._words.take(4 * len(short)), "<u4").astype(np.uint64)
                x[short] = (x[short] << _WORD) | more
            states[: len(context)] = x
            out[begin : begin + lanes] = place - context * table.alphabet
        table.learn(contexts, out)
        return out

    def bits(self, widths: Symbols, values: U64 | None) -> U64:  # noqa: ARG002 - beside ``Encoder``
        """Gives bits."""
        out = np.zeros(len(widths), np.uint64)
        total, widest = int(widths.sum()), int(widths.max(initial=0))
        if widest:
            packed = np.frombuffer(self._bits.take((total + 7) // 8), np.uint8)
            plane = np.zeros((len(widths), widest), np.uint8)
            plane[np.arange(widest)[None] < widths[:, None]] = np.unpackbits(packed, count=total)
            for place in range(widest):
                out |= plane[:, place].astype(np.uint64) << np.uint64(place)
        return out

    def finish(self) -> None:
        """Refuses words that end elsewhere than they began."""
        if self._states is not None and (self._states != np.uint64(_LOWEST)).any():
            raise DeltaError("the patch's words are damaged")

    def _begin(self) -> U64:
        lane_bits = self._words.take(1)[0]
        if not 2 <= lane_bits <= _LANES_MOST_BITS:
            raise DeltaError("the patch has more lanes than there are")
        states = np.frombuffer(self._words.take(8 << lane_bits), "<u8").astype(np.uint64)
        if ((states < np.uint64(_LOWEST)) | (states >= np.uint64(1 << 63))).any():
            raise DeltaError("the patch's words are damaged")
        return states


class Meter:
    """An encoder that only counts what it would write."""

    def __init__(self) -> None:
        self.bits_taken = 0.0

    def symbols(self, table: Table, contexts: Symbols, values: Symbols | None) -> Symbols:
        """Counts symbols."""
        assert values is not None
        frequencies, _ = table.frequencies()
        self.bits_taken += float(_SCALE_BITS * len(values) - np.log2(frequencies[contexts, values]).sum())
        table.learn(contexts, values)
        return values

    def bits(self, widths: Symbols, values: U64 | None) -> U64:
        """Counts bits."""
        assert values is not None
        self.bits_taken += float(widths.sum())
        return values
