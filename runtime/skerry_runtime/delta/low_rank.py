"""What further training adds to a matrix is close to a product of two thin ones: a few examples' activations times their errors.

The product is said in integers and taken off before differences are coded; the same integers give the same prediction on every
machine, because all sums of them are exact in a float64. An adapter that was merged (LoRA) is such a product and nothing else.

What is left counts by its size beside what is left in its row and column, while a product fits best where most was learnt. So rows
and columns may lean: those where less is left than in the middle one are fitted at twice the weight, those with more at half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skerry_runtime.delta.coder import U64

Floats = NDArray[np.float64]

RANKS = (2, 4, 8, 12, 16, 24, 32, 48, 64)
FACTORS_MOST = 1 << 18
"""Integers of both matrices: what a device keeps of them."""
FACTOR_MOST = 1 << 20
"""No integer is as large: sums of 64 products stay far below 2 ** 53."""
EXPONENTS = range(-140, 64)
_LEAN = 1
"""Powers of two that a row or column leans at most, either way."""
_SAMPLE = 1 << 18
"""Elements by which a rank is chosen."""
_NOISE = 0.1
"""Of the variance that is left, how much rounding the factors may add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """``2 ** exponent * (left @ right)`` is what is added to a base: ``left`` [rows, rank], ``right`` [rank, columns], whole numbers."""

    left: Floats
    right: Floats
    exponent: int

    def factor_bytes(self) -> float:
        """About what the factors cost."""
        return sum(float(np.log2(10 * np.abs(side) + 6).sum()) for side in (self.left, self.right)) / 8

    def predict(self, base: U64, start: int) -> U64:
        """Elements of a float32 base from ``start`` on, with the product added to them."""
        columns = self.right.shape[1]
        first, last = start // columns, (start + len(base) - 1) // columns
        product = (self.left[first : last + 1] @ self.right).ravel()
        part = product[start - first * columns :][: len(base)]
        # One addition and one rounding, each as IEEE 754 says.
        with np.errstate(over="ignore", invalid="ignore"):
            there = base.astype(np.uint32).view(np.float32).astype(np.float64) + np.ldexp(part, self.exponent)
            found = there.astype(np.float32)
        # What is no number has no one spelling on all machines: there the base stands for itself.
        return np.where(np.isfinite(found), found.view(np.uint32).astype(np.uint64), base)


def leanings(marks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of rows or columns, by how large differences tend to be there, in half powers of two: whole powers from the middle one.

    >>> leanings(np.array([10, 12, 13, 14, 30])).tolist()
    [-1, 0, 0, 1, 1]
    """
    middle = np.sort(marks)[len(marks) // 2]
    found: NDArray[np.int64] = np.clip((marks - middle + 1) >> 1, -_LEAN, _LEAN)
    return found


def leaning(product: LowRank, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> LowRank:
    """What is added of a product that was fitted to what leans by such marks; sums of its whole numbers are exact as before."""
    left = np.ldexp(product.left, leanings(rows)[:, None] + _LEAN)
    right = np.ldexp(product.right, leanings(columns) + _LEAN)
    return LowRank(left=left, right=right, exponent=product.exponent - 2 * _LEAN)


def fitted(
    base: U64, target: U64, rows: int, marks: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
) -> LowRank | None:
    """The rank that saves most, by what is left of the difference and what the factors cost; None when none saves anything.

    ``marks``: of rows and of columns, where the product is to lean by them.
    """
    change = _floats(target) - _floats(base)
    if not np.isfinite(change).all() or not change.any():
        return None
    matrix = change.reshape(rows, -1)
    # What no product gives: each float of the target was rounded.
    noise = (
        np.spacing(np.maximum(np.abs(_floats(target)), 1e-30).astype(np.float32)).astype(np.float64).reshape(rows, -1)
    )
    if marks is not None:
        leans = leanings(marks[0])[:, None] + leanings(marks[1])
        matrix, noise = np.ldexp(matrix, -leans), np.ldexp(noise, -leans)
    columns = matrix.shape[1]
    most = min(RANKS[-1], rows, columns, FACTORS_MOST // (rows + columns))
    left, sizes, right = _decomposed(matrix, most)
    whole = float((matrix * matrix).sum())
    noise_squares = noise**2 / 12
    noise_whole = float(noise_squares.sum())
    some = np.arange(0, rows, max(1, rows * columns // _SAMPLE))
    best: tuple[float, int, int] | None = None
    for rank in RANKS:
        if rank > most or rank > len(sizes):
            break
        rest = max(whole - float((sizes[:rank] ** 2).sum()), 0.0) + noise_whole
        step = 12 * _NOISE * rest / (rows * columns) / float(sizes[:rank].sum() * (1 / rows + 1 / columns))
        largest = sizes[0] * max(float((left[:, 0] ** 2).max()), float((right[0] ** 2).max()))
        exponent = int(np.floor(max(np.log2(step), np.log2(largest / (FACTOR_MOST / 2) ** 2))))
        # Bits of what is left, by the sizes of all: a few that are large cost no more than they hold.
        there = matrix[some] ** 2 + noise_squares[some]
        after = (matrix[some] - (left[some, :rank] * sizes[:rank]) @ right[:rank]) ** 2 + noise_squares[some]
        saved = 0.5 * float(np.log2(there / after).mean()) * rows * columns
        # Bits of a rounded factor, as of a normal distribution of its variance.
        spread = sizes[:rank] / 2.0**exponent
        bits = sum(n * np.maximum(0.5 * np.log2(17.1 * (spread / n + 1 / 12)), 0.2).sum() for n in (rows, columns))
        gain = float(saved - bits)
        if exponent in EXPONENTS and gain > 0 and (best is None or gain > best[0]):
            best = gain, rank, exponent
    if best is None:
        return None
    _, rank, exponent = best
    roots = np.sqrt(sizes[:rank] / 2.0**exponent)
    a, b = np.rint(left[:, :rank] * roots), np.rint(right[:rank] * roots[:, None])
    if max(np.abs(a).max(), np.abs(b).max()) >= FACTOR_MOST:
        return None
    return LowRank(left=a, right=b, exponent=exponent)


def _floats(values: U64) -> Floats:
    return values.astype(np.uint32).view(np.float32).astype(np.float64)


def _decomposed(matrix: Floats, rank: int) -> tuple[Floats, Floats, Floats]:
    """The largest singular values with their vectors, by random projection: Halko, Martinsson and Tropp, 2011, algorithm 4.4."""
    rng = np.random.default_rng(0)
    seen = min(rank + 8, *matrix.shape)
    basis, _ = np.linalg.qr(matrix @ rng.standard_normal((matrix.shape[1], seen)))
    for _ in range(2):
        basis, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ basis)
    left, sizes, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :rank], sizes[:rank], right[:rank]
