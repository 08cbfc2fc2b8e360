"""The parameters of a step, and what a maker of steps gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from skerry_runtime.errors import Rejected
from skerry_runtime.tensors import DTYPES, Array, Spec

Function = Callable[[Array], Array]
Made = tuple[Function, str, tuple[int, ...]]
"""A function of one tensor, the datatype and the shape of what it gives."""


class Params:
    """The parameters of one step, taken one by one; what is left over at the end is an error.

    Attributes:
        source: the tensor that the step reads; dtype: its numpy type; width: of its last axis, 1 without axes.
    """

    def __init__(self, at: str, params: Mapping[str, Any], source: Spec) -> None:
        self._at = at
        self._rest = dict(params)
        self.source = source
        self.dtype = DTYPES[source.datatype]
        self.width = source.shape[-1] if source.shape else 1

    def fail(self, text: str) -> Rejected:
        """The fault, to be raised."""
        return Rejected("transform_invalid", f"{self._at}: {text}")

    def done(self) -> None:
        """Refuses what nobody took."""
        if self._rest:
            raise self.fail(f"unknown parameter {', '.join(sorted(self._rest))}")

    def take(self, name: str) -> Any:
        """A parameter that must be there."""
        if name not in self._rest:
            raise self.fail(f"parameter {name} is missing")
        return self._rest.pop(name)

    def has(self, name: str) -> bool:
        """Whether it is there and was not taken."""
        return name in self._rest

    def numeric(self) -> None:
        """Refuses a tensor that holds no numbers."""
        if self.dtype.kind not in "fiu":
            raise self.fail(f"wanted numbers in {self.source.name}, it is {self.source.datatype}")

    def floating(self) -> None:
        """Refuses a tensor that holds no floating-point numbers."""
        if self.dtype.kind != "f":
            raise self.fail(f"wanted floating-point numbers in {self.source.name}, it is {self.source.datatype}")

    def ranked(self) -> None:
        """Refuses a tensor without axes."""
        if not self.source.shape:
            raise self.fail(f"wanted at least one axis in {self.source.name}")

    def numbers(self, name: str, dtype: np.dtype[Any]) -> Array:
        """A finite number, or one per column."""
        value = self.take(name)
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, (int, float)) or not math.isfinite(item):
                raise self.fail(f"{name}: wanted finite numbers, got {item!r}")
        if isinstance(value, list):
            if not self.source.shape:
                raise self.fail(f"{name}: wanted one number, {self.source.name} has no axis")
            if self.width == -1:
                raise self.fail(
                    f"{name}: a list needs a fixed width, {self.source.name} has shape {list(self.source.shape)}"
                )
            if len(value) != self.width:
                raise self.fail(f"{name}: wanted {self.width} numbers for {self.source.name}, got {len(value)}")
        with np.errstate(over="ignore"):
            found = np.array(value, np.float64).astype(dtype)
        if not np.isfinite(found).all():
            raise self.fail(f"{name}: wanted numbers that fit {dtype}")
        if found.ndim:
            # As many axes as the tensor: numpy takes a quicker way for one row then (0.7 us less per operation).
            found = found.reshape((1,) * (len(self.source.shape) - 1) + found.shape)
        return found

    def index(self, name: str, value: Any) -> int:
        """A column of the tensor."""
        limit = self.width if self.width != -1 else 1 << 31
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise self.fail(f"{name}: wanted a column from 0 to {limit - 1}, got {value!r}")
        return value

    def whole(self, name: str, value: Any, low: int, high: int) -> int:
        """A whole number within bounds."""
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(f"{name}: wanted a whole number from {low} to {high}, got {value!r}")
        return value

    def columns(self) -> tuple[int, ...] | None:
        """The parameter ``columns``, a list of different columns; None when it is not there."""
        if not self.has("columns"):
            return None
        value = self.take("columns")
        if not isinstance(value, list) or not value or len(set(map(repr, value))) != len(value):
            raise self.fail("columns: wanted a list of different column indices")
        return tuple(self.index("columns", column) for column in value)


def float_type(params: Params) -> tuple[np.dtype[Any], str]:
    """FP64 for FP64, else FP32, of a tensor of numbers. Raises ``Rejected``."""
    params.numeric()
    datatype = "FP64" if params.source.datatype == "FP64" else "FP32"
    return DTYPES[datatype], datatype
