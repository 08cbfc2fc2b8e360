"""Steps that look back: ``lag`` and ``rolling`` need the rows that came before, and so a stream that they came in.

Rows along the first axis are successive in time. A window is a function of the rows at hand and of the last few before them,
and gives what it must be handed next time: nothing is kept here. Before the first row there are nulls (``fill`` for ``lag``).

Whole arrays in training and single rows on the device give the same bits: sums run from the oldest row to the newest, one by
one, in float64, never pairwise or in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry_runtime.tensors import Array
from skerry_runtime.transforms.params import Params, float_type

MOST_ROWS = 4096
MOST_NUMBERS = 1 << 18
"""Of one window's memory; and of what ``rolling`` holds at once over a whole array, unless one row needs more."""
STATISTICS = ("mean", "min", "max", "sd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A step with a memory.

    Attributes:
        before: the rows that came before the first one; the memory of a stream that begins.
        function: (rows, memory) -> (result, the memory for the next rows). Neither argument is changed.
    """

    before: Array
    function: Callable[[Array, Array], tuple[Array, Array]]

    def alone(self, x: Array) -> Array:
        """What rows give that nothing came before."""
        return self.function(x, self.before)[0]


Made = tuple[Window, str, tuple[int, ...]]


def _table(params: Params) -> tuple[int, ...] | None:
    """The chosen columns, of a tensor with rows and a fixed number of columns."""
    params.numeric()
    if len(params.source.shape) != 2 or params.width == -1:
        shape = list(params.source.shape)
        raise params.fail(f"wanted rows with a fixed number of columns, {params.source.name} has shape {shape}")
    return params.columns()


def _keeps(params: Params) -> bool:
    keep = params.take("keep") if params.has("keep") else False
    if not isinstance(keep, bool):
        raise params.fail(f"keep: wanted true or false, got {keep!r}")
    return keep


def _bounded(params: Params, rows: int, width: int) -> None:
    if rows * width > MOST_NUMBERS:
        raise params.fail(f"wanted at most {MOST_NUMBERS} remembered numbers, {rows} rows of {width} are more")


def _lag(params: Params) -> Made:
    columns = _table(params)
    value = params.take("rows")
    lags = [params.whole("rows", one, 1, MOST_ROWS) for one in (value if isinstance(value, list) else [value])]
    if not lags or len(set(lags)) != len(lags):
        raise params.fail("rows: wanted a number of rows, or a list of different ones")
    dtype = params.dtype
    fill: Any = np.nan
    if params.has("fill") and dtype.kind == "f":
        fill = params.numbers("fill", dtype)
        if fill.ndim:
            raise params.fail("fill: wanted one number")
    elif params.has("fill"):
        fill = params.whole("fill", params.take("fill"), int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    elif dtype.kind != "f":
        raise params.fail(f"{params.source.name} is {params.source.datatype}, which has no null: wanted a fill")
    keep = _keeps(params)
    width = len(columns) if columns else params.width
    most = max(lags)
    _bounded(params, most, width)
    picked = None if columns is None else np.array(columns, np.intp)

    def function(x: Array, before: Array) -> tuple[Array, Array]:
        rows = x if picked is None else x.take(picked, axis=-1)
        whole = np.concatenate((before, rows))
        n = len(rows)
        parts = [x] if keep else []
        parts += [whole[most - lag : most - lag + n] for lag in lags]
        return np.concatenate(parts, axis=-1), whole[len(whole) - most :].copy()

    shape = (params.source.shape[0], (params.width if keep else 0) + width * len(lags))
    return Window(before=np.full((most, width), fill, dtype), function=function), params.source.datatype, shape


def _rolling(params: Params) -> Made:
    columns = _table(params)
    dtype, datatype = float_type(params)
    rows = params.whole("rows", params.take("rows"), 1, MOST_ROWS)
    names = params.take("statistics")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or len(set(map(repr, names))) != len(names):
        raise params.fail("statistics: wanted a list of different ones")
    for name in names:
        if name not in STATISTICS:
            raise params.fail(f"statistics: wanted some of {', '.join(STATISTICS)}, got {name!r}")
    minimum = params.whole("minimum", params.take("minimum"), 1, rows) if params.has("minimum") else 1
    keep = _keeps(params)
    width = len(columns) if columns else params.width
    _bounded(params, rows, width)
    picked = None if columns is None else np.array(columns, np.intp)
    at_once = max(1, MOST_NUMBERS // (rows * width))

    def function(x: Array, before: Array) -> tuple[Array, Array]:
        chosen = x if picked is None else x.take(picked, axis=-1)
        whole = np.concatenate((before, chosen.astype(dtype, copy=False)))
        n = len(chosen)
        found = np.empty((n, width * len(names)), dtype)
        for low in range(0, n, at_once):
            high = min(n, low + at_once)
            found[low:high] = _statistics(whole[low : high + rows - 1], rows, names, minimum)
        if keep:
            found = np.concatenate((x.astype(dtype, copy=False), found), axis=-1)
        return found, whole[len(whole) - (rows - 1) :].copy()

    shape = (params.source.shape[0], (params.width if keep else 0) + width * len(names))
    return Window(before=np.full((rows - 1, width), np.nan, dtype), function=function), datatype, shape


def _statistics(whole: Array, rows: int, names: list[str], minimum: int) -> npt.NDArray[np.float64]:
    """The statistics of each ``rows`` successive rows: [n, statistics * width]."""
    wide = whole.astype(np.float64)
    # [n, width, rows], oldest first.
    seen = np.lib.stride_tricks.sliding_window_view(wide, rows, axis=0) if len(wide) > rows else wide.T[None]
    null = np.isnan(seen)
    count = rows - null.sum(-1)
    found: list[Any] = []
    with np.errstate(all="ignore"):
        mean = _sum(np.where(null, 0.0, seen)) / count
        for name in names:
            if name == "mean":
                part = mean
            elif name == "sd":
                away = np.where(null, 0.0, seen - mean[..., None])
                part = np.sqrt(_sum(away * away) / count)
            else:
                part = (np.fmin if name == "min" else np.fmax).reduce(seen, axis=-1)
            # Which of -0.0 and 0.0 is the smaller depends on the order they are looked at in.
            found.append(np.where(count < minimum, np.nan, part + 0.0))
    return np.concatenate(found, axis=-1)


def _sum(values: npt.NDArray[np.float64]) -> Any:
    return np.add.accumulate(values, axis=-1)[..., -1]


OPERATIONS: dict[str, Callable[[Params], Made]] = {"lag": _lag, "rolling": _rolling}
"""By ``op``."""
