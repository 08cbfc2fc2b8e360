"""The bytes of a patch: a header, a table of streams, the streams. Owns their reading and writing and nothing else.

``SKDELTA1``, sha256 of the base, sizes of base and target, number of streams, then of each its role, its coding and its lengths;
the streams follow in that order and end with the file. All numbers are unsigned LEB128. A reader takes every number for hostile:
nothing is allocated by what a patch says beyond the bounds here.
"""

from __future__ import annotations

import lzma
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, TypeVar

MAGIC = b"SKDELTA1"
PIECE = 1 << 16
"""Bytes that are read at once."""
HEADER_MOST = 1024
DICTIONARIES_MOST = 6 << 20
"""Bytes of all LZMA dictionaries of a patch together: they are what applying it needs most."""
DICTIONARY_LEAST_BITS, DICTIONARY_MOST_BITS = 12, 22


class DeltaError(Exception):
    """A patch that cannot be applied: damaged, for another base, or not of what it should give. The message says which."""


class Role(IntEnum):
    """What a stream holds."""

    CONTROL = 0
    DIFFERENCES = 1
    LITERALS = 2
    WORDS = 3
    BITS = 4
    PLANES = 5


class Coding(IntEnum):
    """How a stream is packed."""

    STORED = 0
    LZMA = 1


class Op(IntEnum):
    """A step of the control stream."""

    COPY = 0
    ADD = 1
    LITERAL = 2
    ELEMENTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A stream as it lies in a patch."""

    role: Role
    coding: Coding
    size_bytes: int
    data: bytes
    properties: bytes = b""
    """Of LZMA: ``(pb * 5 + lp) * 9 + lc`` and the dictionary's size as a power of two."""


def unsigned(value: int) -> bytes:
    """LEB128.

    >>> unsigned(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def signed(value: int) -> bytes:
    """Zigzag, then LEB128.

    >>> signed(-1).hex(), signed(1).hex()
    ('01', '02')
    """
    return unsigned(value << 1 if value >= 0 else (-value << 1) - 1)


def write(base_digest: bytes, base_size: int, target_size: int, streams: Iterable[Packed]) -> bytes:
    """A whole patch."""
    kept = [stream for stream in streams if stream.size_bytes]
    head = [MAGIC, base_digest, unsigned(base_size), unsigned(target_size), unsigned(len(kept))]
    for stream in kept:
        head += [bytes([stream.role, stream.coding]), stream.properties]
        head += [unsigned(stream.size_bytes), unsigned(len(stream.data))]
    return b"".join(head + [stream.data for stream in kept])


_K = TypeVar("_K", bound=IntEnum)


class Source(Protocol):
    """A stream that is read from its beginning."""

    def take(self, n: int) -> bytes:
        """The next ``n`` bytes, no fewer."""

    def finish(self) -> None:
        """Refuses what was not taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """An opened patch."""

    base_digest: bytes
    base_size: int
    target_size: int
    streams: dict[Role, Source]


class Numbers:
    """LEB128 numbers and bytes out of a source."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def byte(self) -> int:
        """The next byte."""
        return self._source.take(1)[0]

    def unsigned(self) -> int:
        """The next number."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise DeltaError("a number in the patch is too long")

    def signed(self) -> int:
        """The next zigzag number."""
        value = self.unsigned()
        return -((value + 1) >> 1) if value & 1 else value >> 1


class Span:
    """A part of an open file, read in order."""

    def __init__(self, file: int, start: int, size: int, name: str) -> None:
        self._file, self._at, self._end, self._name = file, start, start + size, name
        self._piece, self._used = b"", 0

    def take(self, n: int) -> bytes:
        """The next ``n`` bytes."""
        found = self._piece[self._used : self._used + n]
        self._used += len(found)
        if len(found) == n:
            return found
        parts, missing = [found], n - len(found)
        if missing > self._end - self._at:
            raise DeltaError(f"the patch's {self._name} end too early")
        while missing:
            self._piece = os.pread(self._file, min(PIECE, self._end - self._at), self._at)
            if not self._piece:
                raise DeltaError(f"the patch is cut short in its {self._name}")
            self._at += len(self._piece)
            self._used = min(missing, len(self._piece))
            missing -= self._used
            parts.append(self._piece[: self._used])
        return b"".join(parts)

    def left(self) -> int:
        """Bytes that were not taken."""
        return len(self._piece) - self._used + self._end - self._at

    def finish(self) -> None:
        """Refuses bytes that were not taken."""
        if self.left():
            raise DeltaError(f"the patch's {self._name} are longer than what is used of them")


class Unpacked:
    """An LZMA stream, unpacked as it is asked for and never beyond."""

    def __init__(self, packed: Span, properties: bytes, size: int, name: str) -> None:
        self._packed, self._left, self._name = packed, size, name
        try:
            self._lzma = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=[lzma_filter(properties)])
        except (lzma.LZMAError, ValueError) as error:
            raise DeltaError(f"the patch's {name}: {error}") from None
        self._ready, self._used = b"", 0

    def take(self, n: int) -> bytes:
        """The next ``n`` bytes."""
        if n > self._left:
            raise DeltaError(f"the patch's {self._name} end too early")
        self._left -= n
        found = self._ready[self._used : self._used + n]
        self._used += len(found)
        if len(found) == n:
            return found
        parts, missing = [found], n - len(found)
        while missing:
            self._ready, self._used = self._more(), 0
            part = self._ready[:missing]
            self._used = len(part)
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _more(self) -> bytes:
        # Input goes in by small pieces: what the decompressor does not take at once it copies with every call.
        while True:
            try:
                feed = self._packed.take(min(4096, self._packed.left())) if self._lzma.needs_input else b""
                out = self._lzma.decompress(feed, max_length=PIECE)
            except (lzma.LZMAError, EOFError) as error:
                raise DeltaError(f"the patch's {self._name} are damaged: {error}") from None
            if out:
                return out
            if self._lzma.eof or not self._packed.left():
                raise DeltaError(f"the patch's {self._name} are cut short")

    def finish(self) -> None:
        """Refuses bytes that were not taken."""
        if self._left or self._used < len(self._ready):
            raise DeltaError(f"the patch's {self._name} are longer than what is used of them")


def lzma_properties(lc: int, lp: int, pb: int, dictionary_bits: int) -> bytes:
    """As they stand in the table of streams."""
    return bytes([(pb * 5 + lp) * 9 + lc, dictionary_bits])


def lzma_filter(properties: bytes) -> dict[str, int]:
    """The filter of a raw LZMA stream.

    Raises:
        ValueError: no such properties.
    """
    both, bits = properties
    rest, lc = divmod(both, 9)
    pb, lp = divmod(rest, 5)
    if lc + lp > 4 or pb > 4 or not DICTIONARY_LEAST_BITS <= bits <= DICTIONARY_MOST_BITS:
        raise ValueError("unknown parameters of LZMA")
    return {"id": lzma.FILTER_LZMA1, "dict_size": 1 << bits, "lc": lc, "lp": lp, "pb": pb}


def read(file: int) -> Patch:
    """The header of an open patch; streams are read later, as they are taken.

    Raises:
        DeltaError: not a patch, of a newer format, or damaged.
    """
    size = os.fstat(file).st_size
    head = Span(file, 0, min(size, HEADER_MOST), "header")
    magic = head.take(len(MAGIC))
    if magic != MAGIC:
        newer = magic[:-1] == MAGIC[:-1]
        raise DeltaError("the patch is of a format this version does not know" if newer else "this is no patch")
    numbers = Numbers(head)
    base_digest = head.take(32)
    base_size, target_size, count = numbers.unsigned(), numbers.unsigned(), numbers.unsigned()
    if count > len(Role):
        raise DeltaError("the patch names more streams than there are")
    table: list[tuple[Role, Coding, bytes, int, int]] = []
    for _ in range(count):
        role, coding = _known(Role, numbers.byte()), _known(Coding, numbers.byte())
        properties = head.take(2) if coding == Coding.LZMA else b""
        table.append((role, coding, properties, numbers.unsigned(), numbers.unsigned()))
    start = min(size, HEADER_MOST) - head.left()
    if sum(row[4] for row in table) != size - start:
        raise DeltaError("the patch is cut short, or longer than it says")
    if sum(1 << row[2][1] for row in table if row[2]) > DICTIONARIES_MOST:
        raise DeltaError("the patch wants more memory than a device gives it")
    streams: dict[Role, Source] = {}
    for role, coding, properties, raw, packed in table:
        name = role.name.lower()
        if role in streams:
            raise DeltaError(f"the patch has its {name} twice")
        span = Span(file, start, packed, name)
        if coding == Coding.STORED and raw != packed:
            raise DeltaError(f"the patch's {name} have two lengths")
        streams[role] = span if coding == Coding.STORED else Unpacked(span, properties, raw, name)
        start += packed
    return Patch(base_digest=base_digest, base_size=base_size, target_size=target_size, streams=streams)


def _known(kind: type[_K], value: int) -> _K:
    try:
        return kind(value)
    except ValueError:
        raise DeltaError(f"the patch has a {kind.__name__.lower()} {value}, which this version does not know") from None
