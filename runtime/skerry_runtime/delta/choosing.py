"""Which method gives a tensor in the fewest bytes: each is metered on a sample, in tables that already know the tensors before."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from skerry_runtime.delta.coder import CHUNK_MOST, U64, Meter
from skerry_runtime.delta.elements import (
    BY_SIZES,
    CHANNELS_MOST,
    OF_FLOATS,
    PLANES,
    PRODUCTS,
    WITH_BASE,
    Codec,
    Method,
    Scaling,
    Sizes,
    combined,
    lowest,
    planes,
)
from skerry_runtime.delta.low_rank import LowRank, fitted, leaning, leanings
from skerry_runtime.delta.parts import Part

_SAMPLE = 4
_WORTH_MARKS = 4
_TURNS = 4
"""So often a product is fitted to what the one before it leaves."""
_WORTH_CHANNELS = 32
"""Elements for each channel below which its own ratio costs more than it saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A method with what it needs; ``cost_bytes`` is an estimate for the whole tensor."""

    method: Method
    low: int = 0
    scaling: Scaling | None = None
    sizes: Sizes | None = None
    product: LowRank | None = None
    """As it is said in the patch."""
    cost_bytes: float = 0.0

    @property
    def added(self) -> LowRank | None:
        """The product as it is added to the base."""
        if self.method != Method.LOW_RANK_LEANING or self.product is None or self.sizes is None:
            return self.product
        return leaning(self.product, self.sizes.rows, self.sizes.columns)


class Chooser:
    """Meters of all methods, which learn as a patch's tensors pass."""

    def __init__(self) -> None:
        self._meters: dict[Method, tuple[Meter, Codec]] = {}

    def best(self, part: Part, target: U64, base: U64 | None) -> Choice:
        """The cheapest method for elements, with a base of as many or without."""
        return min(self.tried(part, target, base), key=lambda choice: choice.cost_bytes)

    def tried(self, part: Part, target: U64, base: U64 | None) -> Iterator[Choice]:
        """Every method that suits the elements, with what it would cost."""
        width = part.width
        low = lowest(base, width) if base is not None and part.floats else 0
        samples = _samples(len(target))
        for method in Method:
            if (method in WITH_BASE and base is None) or ((method in OF_FLOATS) and not part.floats):
                continue
            if method == Method.RESCALED:
                if width == 1 and base is not None:
                    for scaling in scalings(part, target, base):
                        yield self._metered(part, Choice(method=method, scaling=scaling), target, base, samples)
            elif method in BY_SIZES:
                choice = None if base is None else _by_sizes(method, part, target, base)
                if choice is not None:
                    yield self._metered(part, choice, target, base, samples)
            elif method in PLANES:
                yield _planes(width, method, target, base, samples)
            elif method in (Method.INTEGER_DIFFERENCE, Method.INTEGERS_ALONE) and part.floats:
                continue
            else:
                yield self._metered(part, Choice(method=method, low=low), target, base, samples)

    def _metered(self, part: Part, choice: Choice, target: U64, base: U64 | None, samples: list[slice]) -> Choice:
        meter, codec = self._meters.get(choice.method) or (Meter(), None)
        codec = codec or Codec(meter)
        self._meters[choice.method] = meter, codec
        before, seen, added = meter.bits_taken, 0, choice.added
        for sample in samples:
            at = sample.start
            while at < sample.stop:
                n = min(codec.room(choice.method, part.width), sample.stop - at)
                beside = base[at : at + n] if base is not None and choice.method in WITH_BASE else None
                codec.run(
                    choice.method,
                    part.width,
                    at,
                    beside,
                    target[at : at + n],
                    n,
                    choice.low,
                    choice.scaling,
                    choice.sizes,
                    added,
                )
                at += n
            seen += sample.stop - sample.start
        cost = (meter.bits_taken - before) / 8 * len(target) / seen
        if choice.scaling is not None:
            cost += 3 * len(choice.scaling.ratios)
        if choice.sizes is not None:
            cost += (len(choice.sizes.rows) + len(choice.sizes.columns)) / 2
        if choice.product is not None:
            cost += choice.product.factor_bytes()
        return replace(choice, cost_bytes=cost)


def _by_sizes(method: Method, part: Part, target: U64, base: U64) -> Choice | None:
    """What is said of a matrix, or of rows of anything, before their differences; None where there are no rows."""
    rows = part.shape[0] if len(part.shape) > 1 else 0
    if not 1 < rows < len(target) or len(target) % rows or rows + len(target) // rows > CHANNELS_MOST:
        return None
    if len(target) < _WORTH_MARKS * (rows + len(target) // rows):
        return None
    if method in PRODUCTS:
        return _with_product(method, target, base, rows) if part.width == 4 else None
    return Choice(method=method, sizes=Sizes.fitted(base, target, part.width, rows))


def _with_product(method: Method, target: U64, base: U64, rows: int) -> Choice | None:
    if method == Method.LOW_RANK:
        product = fitted(base, target, rows)
        return (
            None
            if product is None
            else Choice(method=method, sizes=_left(product, target, base, rows), product=product)
        )
    # By what is left a product leans, and by how it leans something else is left.
    choice, sizes = None, Sizes.fitted(base, target, 4, rows)
    for _ in range(_TURNS):
        product = fitted(base, target, rows, (sizes.rows, sizes.columns))
        if product is None:
            return None
        choice = Choice(method=method, sizes=sizes, product=product)
        before, sizes = sizes, _left(choice.added, target, base, rows)
        if all(
            np.array_equal(leanings(one), leanings(other))
            for one, other in ((before.rows, sizes.rows), (before.columns, sizes.columns))
        ):
            return replace(choice, sizes=sizes)
    return choice


def _left(added: LowRank | None, target: U64, base: U64, rows: int) -> Sizes:
    """How large what a product leaves tends to be."""
    assert added is not None
    parts = [added.predict(base[at : at + CHUNK_MOST], at) for at in range(0, len(base), CHUNK_MOST)]
    return Sizes.fitted(np.concatenate(parts), target, 4, rows)


def scalings(part: Part, target: U64, base: U64) -> Iterator[Scaling]:
    """Ratios by least squares: of the whole tensor, by its first axis and by its last."""
    new = target.astype(np.uint8).view(np.int8).astype(np.float64)
    old = base.astype(np.uint8).view(np.int8).astype(np.float64)
    shapes = {(1, len(new))}
    if len(part.shape) > 1 and min(part.shape) > 0 and math.prod(part.shape) == len(new):
        shapes |= {(part.shape[0], len(new) // part.shape[0]), (part.shape[-1], 1)}
    for channels, inner in sorted(shapes):
        if channels > 1 and len(new) < _WORTH_CHANNELS * channels:
            continue
        products = (new * old).reshape(-1, channels, inner).sum(axis=(0, 2))
        squares = (old * old).reshape(-1, channels, inner).sum(axis=(0, 2))
        ratios = np.rint(65536 * np.clip(products / np.maximum(squares, 1), -64, 64)).astype(np.int64)
        yield Scaling(ratios=ratios, inner=inner)


def _samples(n: int) -> list[slice]:
    """The whole, or parts of it apart from each other."""
    size = CHUNK_MOST
    if n <= size * _SAMPLE:
        return [slice(0, n)]
    return [slice(start, start + size) for start in np.linspace(0, n - size, _SAMPLE).astype(int).tolist()]


def _planes(width: int, method: Method, target: U64, base: U64 | None, samples: list[slice]) -> Choice:
    size = seen = 0
    for sample in samples:
        beside = None if base is None else base[sample]
        size += len(lzma.compress(planes(combined(method, width, target[sample], beside), width), format=lzma.FORMAT_RAW,
                                  filters=[{"id": lzma.FILTER_LZMA1, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]))  # fmt: skip
        seen += sample.stop - sample.start
    return Choice(method=method, cost_bytes=size * len(target) / seen)
