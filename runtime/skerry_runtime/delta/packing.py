"""How the bytes of a stream are packed: LZMA with the parameters that suit them best, or not at all."""

from __future__ import annotations

import lzma

from skerry_runtime.delta.container import (
    DICTIONARY_LEAST_BITS,
    DICTIONARY_MOST_BITS,
    Coding,
    Packed,
    Role,
    lzma_properties,
)

_PARAMETERS = ((3, 0, 0), (0, 0, 0), (3, 0, 2), (0, 2, 2), (1, 3, 3), (4, 0, 0))
"""lc, lp, pb: text, planes, and words of 4 and 8 bytes."""
_OTHER_PARAMETERS = ((0, 0, 2), (0, 4, 4), (2, 1, 1), (2, 2, 2))
_SMALL = 1 << 17
"""Below it every set of parameters is tried: it costs nothing."""
_SAMPLE = 1 << 16


def pack(role: Role, data: bytes, most_bits: int = DICTIONARY_MOST_BITS) -> Packed:
    """The smallest packing of a stream; of a long one the parameters are those that suit a part of it."""
    bits = max(DICTIONARY_LEAST_BITS, min(most_bits, max(len(data) - 1, 1).bit_length()))
    parameters = _PARAMETERS + (_OTHER_PARAMETERS if len(data) <= _SMALL else ())
    if len(data) > _SMALL:
        middle = len(data) // 2 & ~7
        sample = data[:_SAMPLE] + data[middle : middle + _SAMPLE]
        parameters = (min(parameters, key=lambda one: len(squeeze(sample, one[0], one[1], one[2], 17))),)
    best = Packed(role=role, coding=Coding.STORED, size_bytes=len(data), data=data)
    cost = len(data)
    for lc, lp, pb in parameters:
        packed = squeeze(data, lc, lp, pb, bits)
        if len(packed) + 2 < cost:
            cost = len(packed) + 2
            properties = lzma_properties(lc, lp, pb, bits)
            best = Packed(role=role, coding=Coding.LZMA, size_bytes=len(data), data=packed, properties=properties)
    return best


def squeeze(data: bytes, lc: int, lp: int, pb: int, bits: int = DICTIONARY_MOST_BITS) -> bytes:
    """A raw LZMA stream."""
    chain = {
        "id": lzma.FILTER_LZMA1, "dict_size": 1 << bits, "lc": lc, "lp": lp, "pb": pb, "mode": lzma.MODE_NORMAL, "nice_len": 273,
        "mf": lzma.MF_BT4, "depth": 128,
    }  # fmt: skip
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=[chain])
