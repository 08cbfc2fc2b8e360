"""What a strange value does to its request: a null, one outside its range, one older than its time to live.

A manifest says it per feature (``on_null``, ``on_outside``, ``on_stale``); empty is what ``guards`` does by itself. Of one
request the strongest finding decides: ``reject`` ends it, naming the feature; ``fallback`` sends it, as it came, to the
manifest's fallback model; ``impute`` changes the values that the model gets; ``count`` changes nothing. What the application
sent stays as it is, so that windows count a null as a null whatever took its place.

How old values are, only the application knows: it says so (``Ages``), or nothing is stale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from skerry_contract import manifest as mf
from skerry_contract.window import GUARD_KINDS

from skerry_runtime.errors import BadInput, Rejected, Violation
from skerry_runtime.guards import Check
from skerry_runtime.tensors import DTYPES, Array, Tensors

KIND: dict[str, int] = {name: 1 << i for i, name in enumerate(GUARD_KINDS)}
"""The bit of each kind in a request's record."""
MOST_AGE_MS = float(1 << 52)


class Ages(NamedTuple):
    """How old a request's values are, milliseconds: all of them, and by input (one number, or one per column)."""

    whole: float | None = None
    inputs: Mapping[str, float | tuple[float, ...]] = {}

    def of(self, name: str, column: int) -> float | None:
        """Of one column; None when nobody said."""
        found = self.inputs.get(name, self.whole)
        if isinstance(found, tuple):
            return found[column] if column < len(found) else None
        return found

    def oldest_ms(self) -> int:
        """Of the oldest value, rounded up; -1 when nobody said anything."""
        known = [] if self.whole is None else [self.whole]
        for part in self.inputs.values():
            known += part if isinstance(part, tuple) else [part]
        return math.ceil(max(known)) if known else -1


NO_AGES = Ages()


class Judged(NamedTuple):
    """What the policies make of a request.

    Attributes:
        inputs: what the model gets; as they came when nothing was imputed.
        kinds: bits of ``GUARD_KINDS``.
        fallback: why the fallback model must answer; None when it need not.
    """

    inputs: Tensors
    kinds: int
    fallback: Violation | None


@dataclass(frozen=True, slots=True)
class _Rule:
    feature: mf.Feature
    low: float
    high: float
    ttl_ms: float

    def place(self, row: int) -> str:
        return f"{self.feature.input}[{row}][{self.feature.column}] ({self.feature.name})"


@dataclass(frozen=True, slots=True)
class _Watched:
    """The rules of one input. ``low``, ``high``: per column, infinite where nothing is ruled."""

    name: str
    rules: tuple[_Rule, ...]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    one_axis: bool


class Policies:
    """The policies of a manifest, worked out once.

    Attributes:
        always: whether every request must be judged; else only one that says how old its values are.
    """

    def __init__(self, inputs: Iterable[mf.Tensor], features: Iterable[mf.Feature], check: Check) -> None:
        """Takes inputs and features of a manifest, and their guard's check.

        Raises:
            Rejected: ``malformed_manifest``: a policy on what holds no numbers, a value that the input cannot hold.
        """
        self._check = check
        features = tuple(features)
        self.always = any(f.on_null or f.on_outside or f.on_stale for f in features)
        watched = (_watched(tensor, features) for tensor in inputs)
        self._watched = tuple(part for part in watched if part is not None)
        self._ttl = tuple(_Rule(f, -math.inf, math.inf, f.ttl_s * 1000.0) for f in features if f.ttl_s > 0)

    @property
    def any(self) -> bool:
        """Whether there is anything to judge at all."""
        return self.always or bool(self._ttl)

    def judge(self, tensors: Tensors, ages: Ages = NO_AGES) -> Judged:
        """Decides about one request.

        Args:
            tensors: raw, as the application sent them.
            ages: as it said.

        Raises:
            BadInput: refused; its violation has the kind.
        """
        violation = self._check(tensors)
        if violation is not None:
            raise BadInput(violation)
        case = _Case(tensors)
        for part in self._watched:
            array = tensors[part.name]
            # One look at the whole tensor: a NaN fits no range, and so does not pass for harmless.
            fits = (array >= part.low) & (array <= part.high)
            if not fits.all():
                _look(part, array, fits, case)
        if ages is not NO_AGES:
            for rule in self._ttl:
                _look_at_age(rule, ages, case)
        return case.result()


class _Case:
    """A request under judgement."""

    __slots__ = ("_copies", "fallback", "fallback_kinds", "imputed_kinds", "kinds", "tensors")

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self._copies: Tensors = {}
        self.kinds = self.imputed_kinds = self.fallback_kinds = 0
        self.fallback: Violation | None = None

    def act(
        self, what: str, policy: str, rule: _Rule, violation: Violation, where: npt.NDArray[np.bool_] | None
    ) -> None:
        """Applies a policy to the values at ``where``, a mask over rows; None for all of them."""
        if policy == "reject":
            raise BadInput(violation._replace(kind=f"{what}.rejected"))
        if policy == "fallback":
            self.fallback_kinds |= KIND[f"{what}.fallback"]
            self.fallback = self.fallback or violation
        elif policy == "impute":
            self.imputed_kinds |= KIND[f"{what}.imputed"]
            name = rule.feature.input
            copy = self._copies.get(name)
            if copy is None:
                copy = self._copies[name] = self.tensors[name].copy()
            column = _column(copy, rule.feature.column)
            column[... if where is None else where] = rule.feature.impute
        elif what == "stale":
            # Nulls and values outside their range are counted where values are, per feature.
            self.kinds |= KIND["stale.counted"]

    def result(self) -> Judged:
        if self.fallback is not None:
            return Judged(self.tensors, self.kinds | self.fallback_kinds, self.fallback)
        inputs = {**self.tensors, **self._copies} if self._copies else self.tensors
        return Judged(inputs, self.kinds | self.imputed_kinds, None)


def _look(part: _Watched, array: Array, fits: Array, case: _Case) -> None:
    # Of many columns few are strange: only those are looked at one by one.
    well: Array | None = np.logical_and.reduce(fits.reshape(-1, len(part.low))) if part.low.ndim else None
    for rule in part.rules:
        feature = rule.feature
        if well is not None and well[feature.column]:
            continue
        if feature.column >= (1 if part.one_axis or not array.ndim else array.shape[-1]):
            raise BadInput(
                Violation(part.name, f"shape {list(array.shape)}", f"a column {feature.column} ({feature.name})")
            )
        values = _column(array, feature.column)
        if feature.on_null in ("impute", "fallback") and array.dtype.kind == "f":
            null = np.isnan(values)
            if null.any():
                row = int(np.argmax(null))
                case.act("null", feature.on_null, rule, Violation(rule.place(row), "NaN", "a number"), null)
        if feature.on_outside in ("reject", "impute", "fallback"):
            outside = (values < rule.low) | (values > rule.high)
            if outside.any():
                row = int(np.argmax(outside))
                wanted = f"{rule.low:g} to {rule.high:g}"
                violation = Violation(rule.place(row), str(values.ravel()[row]), wanted)
                case.act("outside", feature.on_outside, rule, violation, outside)


def _look_at_age(rule: _Rule, ages: Ages, case: _Case) -> None:
    feature = rule.feature
    age_ms = ages.of(feature.input, feature.column)
    if age_ms is None or age_ms <= rule.ttl_ms:
        return
    violation = Violation(
        f"{feature.input}[{feature.column}] ({feature.name})",
        f"a value {age_ms / 1000:g} s old",
        f"at most {feature.ttl_s:g} s",
    )
    case.act("stale", feature.on_stale, rule, violation, None)


def _column(array: Array, index: int) -> Array:
    """A view of one column: of all rows, whatever the axes before the last."""
    if array.ndim < 2:
        return array
    return array[..., index]


def _watched(tensor: mf.Tensor, features: Iterable[mf.Feature]) -> _Watched | None:
    mine = [f for f in features if f.input == tensor.name and (f.on_null or f.on_outside or f.on_stale)]
    if not mine:
        return None
    dtype = DTYPES[tensor.datatype]
    if dtype.kind not in "fiu":
        raise _wrong(mine[0], f"a policy wants numbers, {tensor.name} is {tensor.datatype}")
    one_axis = len(tensor.shape) < 2
    width = 1 if one_axis else tensor.shape[-1]
    low, high = np.full(max(width, 1), -np.inf), np.full(max(width, 1), np.inf)
    rules = []
    for feature in mine:
        if one_axis and feature.column:
            raise _wrong(feature, f"a policy wants columns, {tensor.name} has shape {list(tensor.shape)}")
        if feature.on_outside in ("reject", "impute", "fallback"):
            if feature.range is None:
                raise _wrong(feature, f"on_outside {feature.on_outside} wants a range")
            bounds = feature.range
        else:
            bounds = (-math.inf, math.inf)
        if feature.on_stale and not feature.ttl_s:
            raise _wrong(feature, f"on_stale {feature.on_stale} wants a ttl_s above 0")
        if feature.impute is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                held = np.array(feature.impute).astype(dtype)
            exact = dtype.kind == "f" or float(held) == feature.impute
            if not (exact and np.isfinite(held)):
                raise _wrong(feature, f"{tensor.datatype} cannot hold impute {feature.impute:g}")
        if width != -1:
            low[feature.column], high[feature.column] = bounds
        rules.append(_Rule(feature, *bounds, feature.ttl_s * 1000.0))
    if width == -1:
        # Of a width that varies nothing is known beforehand: no value passes the first look, each is looked at.
        low, high = np.array(np.inf), np.array(-np.inf)
    return _Watched(tensor.name, tuple(rules), low, high, one_axis)


def _wrong(feature: mf.Feature, detail: str) -> Rejected:
    return Rejected("malformed_manifest", f"features.{feature.name}: {detail}")
