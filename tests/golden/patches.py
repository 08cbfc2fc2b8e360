"""Patches with every step and every method there is, between files that are computed without any library's randomness."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from skerry_runtime.delta import container
from skerry_runtime.delta.choosing import Choice
from skerry_runtime.delta.elements import OF_FLOATS, ONE_WIDTH, PRODUCTS, WITH_BASE, Method, Scaling, Sizes, to_bytes
from skerry_runtime.delta.low_rank import LowRank
from skerry_runtime.delta.making import Plan
from skerry_runtime.delta.parts import Part

ROWS, COLUMNS = 12, 20
COUNT = ROWS * COLUMNS
SHIPPED = {"every-method.skdelta": [*Method][:11], "leaning.skdelta": [Method.LOW_RANK_LEANING]}
"""Methods of each file: those that were there when it was made."""


def stream(name: str, size: int) -> bytes:
    return b"".join(hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(size // 32 + 1))[:size]


def elements(name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a base and a target that is near to it."""
    base = np.frombuffer(stream(name, COUNT * width), f"<u{width}").astype(np.uint64)
    step = np.frombuffer(stream(name + " step", COUNT), np.uint8).astype(np.uint64) % np.uint64(7)
    return base, (base + step) & np.uint64((1 << 8 * width) - 1)


def cases(name: str) -> Iterator[tuple[Method, int, int]]:
    """Method, width and tag."""
    for method in SHIPPED[name]:
        widths = (2, 4, 8) if method in OF_FLOATS else (1, 2, 4, 8)
        if method in ONE_WIDTH:
            widths = (ONE_WIDTH[method],)
        for width in widths:
            yield method, width, 0x3D if width == 4 else 0


def choice(method: Method) -> Choice:
    marks = Sizes(rows=np.arange(ROWS) + 50, columns=np.arange(COLUMNS) + 54)
    if method == Method.RESCALED:
        return Choice(method=method, scaling=Scaling(ratios=np.arange(ROWS) * 100 + 65_000, inner=COLUMNS, offset=1))
    if method == Method.FLOAT_DIFFERENCE_SCALED:
        return Choice(method=method, sizes=marks)
    if method in PRODUCTS:
        left = np.arange(2.0 * ROWS).reshape(ROWS, 2) - 9
        right = np.arange(2.0 * COLUMNS).reshape(2, COLUMNS) - 17
        return Choice(method=method, sizes=marks, product=LowRank(left=left, right=right, exponent=-20))
    return Choice(method=method, low=110)


def laid(values: np.ndarray, width: int, tag: int) -> bytes:
    lines = np.frombuffer(to_bytes(values, width), np.uint8).reshape(-1, width)
    return np.concatenate([np.full((len(lines), int(tag != 0)), tag, np.uint8), lines], axis=1).tobytes()


def files(name: str) -> tuple[bytes, bytes, bytes]:
    """Base, target and today's patch."""
    plan, base, target = Plan(), bytearray(stream("head", 1000)), bytearray()
    target += base[100:900]
    plan.copy(100, 800)
    target += bytes(byte ^ (i % 50 == 0) for i, byte in enumerate(base[:700]))
    plan.add(0, bytes((byte ^ (i % 50 == 0)) - byte & 255 for i, byte in enumerate(base[:700])))
    target += b"literal " * 40
    plan.literal(b"literal " * 40)
    for method, width, tag in cases(name):
        old, new = elements(f"{method.name} {width}", width)
        at = len(base)
        base += laid(old, width, tag)
        target += laid(new, width, tag)
        part = Part(
            name="w",
            start=0,
            size=COUNT * (width + (tag != 0)),
            width=width,
            floats=True,
            shape=(ROWS, COLUMNS),
            tag=tag,
        )
        plan.elements(part, choice(method), new, old if method in WITH_BASE else None, at)
    whole = bytes(base)
    return (
        whole,
        bytes(target),
        container.write(hashlib.sha256(whole).digest(), len(whole), len(target), plan.streams()),
    )
