"""Whether a request's tensors fit the model, decided before the model sees them.

Refused: a missing or unknown name, another datatype, another shape, an empty tensor, NaN in a watched column that is not
``nullable`` or whose ``on_null`` is ``reject``. A value outside a feature's ``range`` is counted and not refused (a strange
world is what the model is there to be watched in), unless ``strict_ranges``. What else a manifest's policies ask for is done
in ``policies``. The accepting path costs about a microsecond per tensor; only a refusal takes the time to say what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from skerry_contract import manifest as mf

from skerry_runtime.errors import Violation
from skerry_runtime.tensors import DTYPES, Array, Spec, Tensors

__all__ = ["Check", "Guard", "Violation"]

Check = Callable[[Tensors], Violation | None]


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    index: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class _Rule:
    spec: Spec
    dtype: np.dtype[np.generic]
    no_null: tuple[_Column, ...]
    ranged: tuple[_Column, ...]


class Guard:
    """The rules of a manifest's inputs, worked out once.

    Attributes:
        check: takes the inputs by name, gives the first ``Violation`` or None.
    """

    check: Check

    def __init__(
        self, inputs: Iterable[mf.Tensor], features: Iterable[mf.Feature] = (), *, strict_ranges: bool = False
    ) -> None:
        """Args: inputs and features of a manifest; ``strict_ranges`` refuses what is outside a ``range``."""
        watched = tuple(features)
        self._rules = {tensor.name: _rule(tensor, watched) for tensor in inputs}
        self.check = _single(self, *self._rules.values()) if len(self._rules) == 1 else self._check_all
        if strict_ranges and any(rule.ranged for rule in self._rules.values()):
            shape_check = self.check
            self.check = lambda tensors: shape_check(tensors) or self._outside_violation(tensors)

    def outside(self, tensors: Tensors) -> dict[str, int]:
        """How many values of each ranged feature lie outside its range, NaN not counted. Only features with any."""
        found: dict[str, int] = {}
        for name, rule in self._rules.items():
            for column in rule.ranged:
                values = _column(tensors[name], column.index, rule.spec)
                count = int(np.count_nonzero((values < column.low) | (values > column.high)))
                if count:
                    found[column.name] = count
        return found

    def explain(self, tensors: Tensors) -> Violation | None:
        """The first violation, found the thorough way. ``check`` is the same decision, faster when all is well."""
        for name in tensors:
            if name not in self._rules:
                return Violation(name, "an unknown input", f"one of {', '.join(self._rules)}")
        for name, rule in self._rules.items():
            if name not in tensors:
                return Violation(name, "no such input", f"{rule.spec.datatype} {list(rule.spec.shape)}")
            found = _explain_one(tensors[name], rule)
            if found is not None:
                return found
        return None

    def _check_all(self, tensors: Tensors) -> Violation | None:
        rules = self._rules
        if len(tensors) != len(rules):
            return self.explain(tensors)
        for name, rule in rules.items():
            array = tensors.get(name)
            if (
                not isinstance(array, np.ndarray)
                or array.dtype != rule.dtype
                or not rule.spec.takes(array.shape)
                or not array.size
                or (rule.no_null and _may_hold_nan(array))
            ):
                return self.explain(tensors)
        return None

    def _outside_violation(self, tensors: Tensors) -> Violation | None:
        for name, rule in self._rules.items():
            for column in rule.ranged:
                values = _column(tensors[name], column.index, rule.spec)
                wrong = values[(values < column.low) | (values > column.high)]
                if wrong.size:
                    return Violation(
                        f"{name}[{column.index}] ({column.name})",
                        str(wrong[0]),
                        f"{column.low} to {column.high}",
                        "outside.rejected",
                    )
        return None


def _single(guard: Guard, rule: _Rule) -> Check:
    # One input is by far the commonest model: everything is a local of one closure.
    name = rule.spec.name
    dtype = rule.dtype
    ndim = len(rule.spec.shape)
    fixed = tuple(rule.spec.shape[1:])
    rows = rule.spec.shape[0] if ndim else 0
    explain = guard.explain
    if ndim == 0 or rows != -1 or -1 in fixed or 0 in fixed:
        return guard._check_all
    no_null = bool(rule.no_null)
    quick_dot = rule.dtype in (np.dtype(np.float32), np.dtype(np.float64))
    one_row = (1, *fixed)
    # Past what hands it on to other kinds of arrays, which takes a third of its time; of ours there is one kind.
    vdot, ndarray = getattr(np.vdot, "_implementation", np.vdot), np.ndarray

    def check(tensors: Tensors) -> Violation | None:
        array = tensors.get(name)
        if type(array) is not ndarray or len(tensors) != 1 or array.dtype is not dtype:
            # Equal types need not be one object (a view, a subclass): the slow way decides.
            return explain(tensors)
        shape = array.shape
        if shape != one_row and (shape[1:] != fixed or not shape or not shape[0]):
            return explain(tensors)
        if no_null:
            if quick_dot:
                # A sum of squares is NaN exactly when a term is: infinities and overflow give inf, never NaN.
                found = vdot(array, array)
                if found != found:
                    return explain(tensors)
            elif _may_hold_nan(array):
                return explain(tensors)
        return None

    return check


def _rule(tensor: mf.Tensor, features: tuple[mf.Feature, ...]) -> _Rule:
    mine = [f for f in features if f.input == tensor.name]
    dtype = DTYPES[tensor.datatype]
    refused = [f for f in mine if f.on_null == "reject" or not (f.on_null or f.nullable)]
    no_null = refused if dtype.kind == "f" else []
    numeric = dtype.kind in "fiu"
    return _Rule(
        spec=Spec(tensor.name, tensor.datatype, tensor.shape),
        dtype=dtype,
        no_null=tuple(_Column(f.name, f.column, 0.0, 0.0) for f in no_null),
        ranged=tuple(_Column(f.name, f.column, *f.range) for f in mine if f.range is not None and numeric),
    )


def _explain_one(array: Array, rule: _Rule) -> Violation | None:
    spec = rule.spec
    if not isinstance(array, np.ndarray):
        return Violation(spec.name, type(array).__name__, f"an array of {spec.datatype}")
    if array.dtype != rule.dtype:
        return Violation(spec.name, _datatype(array), spec.datatype)
    if not spec.takes(array.shape):
        return Violation(spec.name, f"shape {list(array.shape)}", f"shape {list(spec.shape)}")
    if not array.size:
        return Violation(spec.name, f"shape {list(array.shape)}", "at least one element")
    for column in rule.no_null:
        nulls = np.flatnonzero(np.isnan(_column(array, column.index, spec).astype(np.float64)))
        if nulls.size:
            where = f"{spec.name}[{nulls[0]}][{column.index}] ({column.name})"
            return Violation(where, "NaN", "a number", "null.rejected")
    return None


def _datatype(array: Array) -> str:
    for name, dtype in DTYPES.items():
        if dtype == array.dtype:
            return name
    return str(array.dtype)


def _column(array: Array, index: int, spec: Spec) -> Array:
    if array.ndim == 0:
        return array.reshape(1)
    # A list of rows has one column: its only axis is the batch.
    return array if spec.shape == (-1,) else array[..., index].ravel()


def _may_hold_nan(array: Array) -> bool:
    return bool(np.isnan(array).any())
