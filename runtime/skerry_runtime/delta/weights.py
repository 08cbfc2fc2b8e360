"""Weights beside their graph: a file that is nothing but numbers, as ONNX keeps them out of a large model (``model.onnx.data``).

Which tensors lie in it the graph says, which is another file. That two versions are as long is enough: place by place they are the same tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from skerry_runtime.delta.matching import Bytes
from skerry_runtime.delta.parts import Part

_LEAST_BYTES = 1 << 16
_SEGMENT_BYTES = 1 << 18
_SAMPLE_BYTES = 1 << 12
_SAMPLES = 64
_MOSTLY = 0.95


def segments(base: Bytes, target: Bytes) -> list[Part]:
    """The file in pieces of elements, the same in both; empty where it does not look like numbers, or the lengths differ."""
    size = len(target)
    if len(base) != size or size < _LEAST_BYTES:
        return []
    starts = np.linspace(0, size - _SAMPLE_BYTES, _SAMPLES).astype(np.int64) // 8 * 8
    old, new = (np.concatenate([data[at : at + _SAMPLE_BYTES] for at in starts]) for data in (base, target))
    width, floats = _elements(old, new)
    if not width:
        return []
    whole = size // width * width
    return [
        Part(name=f"at {at}", start=at, size=min(_SEGMENT_BYTES, whole - at), width=width, floats=floats)
        for at in range(0, whole, _SEGMENT_BYTES)
    ]


def _elements(old: Bytes, new: Bytes) -> tuple[int, bool]:
    """Bytes of an element, 0 where nobody can tell, and whether it is an IEEE float.

    Of floats because most are neither huge nor tiny, of int8 because most hardly moved.
    """
    singles, halves = new.view("<u4"), new.view("<u2")
    if np.mean(_usual(halves >> 7 & 255) | (halves << 1 == 0)) > _MOSTLY:
        # bfloat16, which is coded as integers are.
        return 2, False
    if np.mean(_usual(singles >> 23 & 255) | (singles << 1 == 0)) > _MOSTLY:
        return 4, True
    # Below 2, and not all of them tiny.
    if np.mean(halves >> 14 & 1 == 0) > _MOSTLY and np.mean(halves >> 13 & 1 == 1) > 1 - _MOSTLY:
        return 2, True
    moved = (new - old).astype(np.int8)
    is_int8 = np.mean(np.abs(moved.astype(np.int16)) <= 2) > _MOSTLY and np.mean(moved != 0) > 1 - _MOSTLY
    return int(is_int8), False


def _usual(exponents: NDArray[Any]) -> NDArray[np.bool_]:
    return (exponents >= 90) & (exponents < 140)
