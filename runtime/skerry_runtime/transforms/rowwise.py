"""Steps that work row by row on the last axis: what a row gives never depends on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from skerry_runtime.tensors import DTYPES, Array
from skerry_runtime.transforms.params import Made, Params, float_type


def _scale(params: Params) -> Made:
    dtype, datatype = float_type(params)
    mean, scale = params.numbers("mean", dtype), params.numbers("scale", dtype)
    if not np.all(scale):
        raise params.fail("scale: wanted numbers other than 0 (that also fit FP32)")
    if dtype == params.dtype:

        def function(x: Array) -> Array:
            found: Array = x - mean
            found /= scale
            return found
    else:

        def function(x: Array) -> Array:
            found: Array = x.astype(dtype)
            found -= mean
            found /= scale
            return found

    return function, datatype, params.source.shape


def _clip(params: Params) -> Made:
    params.floating()
    low, high = params.numbers("low", params.dtype), params.numbers("high", params.dtype)
    if np.any(low > high):
        raise params.fail("wanted low <= high")
    minimum, maximum = np.minimum, np.maximum

    def function(x: Array) -> Array:
        found: Array = maximum(x, low)
        minimum(found, high, out=found)
        return found

    return function, params.source.datatype, params.source.shape


def _impute(params: Params) -> Made:
    params.floating()
    value = params.numbers("value", params.dtype)
    return lambda x: np.where(np.isnan(x), value, x), params.source.datatype, params.source.shape


def _log1p(params: Params) -> Made:
    dtype, datatype = float_type(params)

    def function(x: Array) -> Array:
        wide = x.astype(dtype, copy=False)
        found: Array = np.copysign(np.log1p(np.abs(wide)), wide)
        return found

    return function, datatype, params.source.shape


def _select(params: Params) -> Made:
    params.ranked()
    columns = params.take("columns")
    if not isinstance(columns, list) or not columns:
        raise params.fail("columns: wanted a list of column indices")
    picked = np.array([params.index("columns", c) for c in columns], np.intp)
    if params.width == -1:
        raise params.fail(f"columns: wanted a fixed width, {params.source.name} has shape {list(params.source.shape)}")
    return lambda x: x.take(picked, axis=-1), params.source.datatype, (*params.source.shape[:-1], len(columns))


def _cast(params: Params) -> Made:
    datatype = params.take("datatype")
    target = DTYPES.get(datatype) if isinstance(datatype, str) else None
    if target is None or target.kind == "O":
        raise params.fail(f"datatype: wanted a datatype of numbers, got {datatype!r}")
    if params.dtype.kind == "O":
        raise params.fail(f"wanted numbers in {params.source.name}, it is BYTES")
    if params.dtype.kind not in "fiu" or target.kind not in "iu":
        return lambda x: x.astype(target), datatype, params.source.shape
    bounds = np.iinfo(target)
    if params.dtype.kind in "iu":
        source = np.iinfo(params.dtype)
        low, high = max(source.min, bounds.min), min(source.max, bounds.max)
        return lambda x: np.clip(x, low, high).astype(target), datatype, params.source.shape
    # The largest float not above the integer's limit: FP32 cannot say 2**31 - 1, and rounding up would wrap.
    top, bottom = float(bounds.max), float(bounds.min)
    limit, lowest = bounds.max, bounds.min

    def saturate(x: Array) -> Array:
        wide = np.rint(x.astype(np.float64))
        with np.errstate(invalid="ignore"):
            found = np.where(np.isnan(wide), 0.0, wide).astype(target)
        found[wide >= top] = limit
        found[wide <= bottom] = lowest
        return found

    return saturate, datatype, params.source.shape


def _softmax(params: Params) -> Made:
    params.floating()
    params.ranked()

    def function(x: Array) -> Array:
        found: Array = np.exp(x - x.max(axis=-1, keepdims=True))
        found /= found.sum(axis=-1, keepdims=True)
        return found

    return function, params.source.datatype, params.source.shape


def _argmax(params: Params) -> Made:
    params.numeric()
    params.ranked()
    return lambda x: x.argmax(axis=-1), "INT64", params.source.shape[:-1]


def _labels(params: Params) -> Made:
    params.numeric()
    names = params.take("labels")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise params.fail("labels: wanted a list of text")
    table = np.empty(len(names), np.object_)
    table[:] = names
    if params.dtype.kind == "f":
        params.ranked()
        if params.width not in (-1, len(names)):
            raise params.fail(f"labels: wanted {params.width} labels for {params.source.name}, got {len(names)}")
        return lambda x: table.take(x.argmax(-1)), "BYTES", params.source.shape[:-1]
    last = len(names) - 1
    return lambda x: table[np.clip(x, 0, last).astype(np.intp)], "BYTES", params.source.shape


def _threshold(params: Params) -> Made:
    params.numeric()
    value = params.numbers("value", np.dtype(np.float64))
    if value.ndim:
        raise params.fail("value: wanted one number")
    limit = params.dtype.type(value) if params.dtype.kind == "f" else float(value)
    if not params.has("column"):
        return lambda x: x >= limit, "BOOL", params.source.shape
    params.ranked()
    column = params.index("column", params.take("column"))
    return lambda x: x[..., column] >= limit, "BOOL", params.source.shape[:-1]


def _one_hot(params: Params) -> Made:
    params.ranked()
    values = params.take("values")
    text = params.dtype.kind == "O"
    kinds: tuple[type, ...] = (str,) if text else (int, float)
    what = "different texts" if text else "different numbers"
    if not isinstance(values, list) or not values:
        raise params.fail(f"values: wanted a list of {what}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise params.fail(f"values: wanted {what}, got {value!r}")
    if len(set(values)) != len(values):
        raise params.fail(f"values: wanted {what}")
    if not text:
        params.numeric()
        held = np.array(values).astype(params.dtype)
        if held.tolist() != values and not (params.dtype.kind == "f" and len(set(held.tolist())) == len(values)):
            raise params.fail(f"values: wanted numbers that fit {params.source.datatype}")
    one_axis = len(params.source.shape) == 1
    width = 1 if one_axis else params.width
    if width == -1:
        raise params.fail(f"wanted a fixed width, {params.source.name} has shape {list(params.source.shape)}")
    datatype = "FP32" if text or params.source.datatype != "FP64" else "FP64"
    dtype = DTYPES[datatype]
    table = np.array([value.encode() for value in values], np.object_) if text else held

    def ones(x: Array) -> Array:
        if text:
            flat = [v.encode() if isinstance(v, str) else v for v in x.ravel().tolist()]
            same = np.array([[v == one for one in table] for v in flat], np.bool_).reshape(*x.shape, len(table))
        else:
            same = x[..., None] == table
        return same.astype(dtype)

    def every(x: Array) -> Array:
        found = ones(x)
        return found if one_axis else found.reshape(*x.shape[:-1], width * len(table))

    batch = params.source.shape if one_axis else params.source.shape[:-1]
    if not params.has("column"):
        return every, datatype, (*batch, width * len(values))
    if text or one_axis:
        raise params.fail("column: wanted a tensor of numbers with several columns")
    column = params.index("column", params.take("column"))

    def one(x: Array) -> Array:
        parts = (x[..., :column].astype(dtype), ones(x[..., column]), x[..., column + 1 :].astype(dtype))
        return np.concatenate(parts, axis=-1)

    return one, datatype, (*batch, width - 1 + len(values))


OPERATIONS: dict[str, Callable[[Params], Made]] = {
    "scale": _scale,
    "clip": _clip,
    "impute": _impute,
    "log1p": _log1p,
    "select": _select,
    "cast": _cast,
    "softmax": _softmax,
    "argmax": _argmax,
    "labels": _labels,
    "threshold": _threshold,
    "one_hot": _one_hot,
}
"""By ``op``."""
