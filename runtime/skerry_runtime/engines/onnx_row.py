"""One row through ONNX Runtime at fixed places: what a small model's ordinary request runs.

``session.run`` makes a tensor of every input and an array of every output anew: of a small model that is a third of the whole call. Here
both are bound once (``IOBinding``), and a request only copies its row in and its answer out. Only for one row, of few bytes, all of whose
sizes are known; whatever else comes goes the session's usual way, and so does a second thread while the first is in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from skerry_runtime.tensors import DTYPES, Array, Spec, Tensors

MOST_BYTES = 1 << 16
"""Of all tensors together: copying more costs what is saved."""

Run = Callable[[Tensors], Sequence[Array]]


class _Places(NamedTuple):
    """Tensors that are bound. ``filled``: the inputs' bytes, to be written into."""

    binding: Any
    inputs: tuple[Array, ...]
    filled: tuple[memoryview, ...]
    outputs: tuple[Array, ...]


def bind_row(session: Any, inputs: Sequence[Spec], outputs: Sequence[Spec], run: Run) -> Run:
    """A function that does what ``run`` does, faster for one row.

    Args:
        session: ``onnxruntime.InferenceSession``, on the CPU alone.
        inputs: all of the model's.
        outputs: those that are wanted, in their order.
        run: the usual way; also what says what is wrong, in our words.

    Returns:
        ``run`` itself where nothing can be bound.
    """
    inner_run = getattr(getattr(session, "_sess", None), "run_with_iobinding", None)
    sizes = [_row_bytes(spec) for spec in (*inputs, *outputs)]
    if inner_run is None or not inputs or not outputs or not all(sizes) or sum(sizes) > MOST_BYTES:
        return run
    try:
        places = _bound(session, inputs, outputs)
    except Exception:
        # A release without it, or a model it does not take: nothing is lost but the haste.
        return run
    if len(inputs) == len(outputs) == 1:
        return _one_to_one(inner_run, run, inputs[0].name, places)
    return _many(inner_run, run, inputs, places)


def _one_to_one(inner_run: Callable[[Any, Any], None], run: Run, name: str, places: _Places) -> Run:
    free = [places]
    shape, dtype = places.inputs[0].shape, places.inputs[0].dtype

    def run_row(feeds: Tensors) -> Sequence[Array]:
        array = feeds[name]
        # Bytes of another type of that size would be taken for numbers. Types that numpy brings are the same object everywhere.
        if array.shape != shape or array.dtype is not dtype:
            return run(feeds)
        try:
            mine = free.pop()
        except IndexError:
            return run(feeds)
        try:
            mine.filled[0][:] = array.tobytes()
            inner_run(mine.binding, None)
            found = (mine.outputs[0].copy(),)
        except Exception:
            return _again(run, feeds, free, mine)
        free.append(mine)
        return found

    return run_row


def _many(inner_run: Callable[[Any, Any], None], run: Run, inputs: Sequence[Spec], places: _Places) -> Run:
    free = [places]
    wanted = [(spec.name, array.shape, array.dtype) for spec, array in zip(inputs, places.inputs, strict=True)]

    def run_row(feeds: Tensors) -> Sequence[Array]:
        for name, shape, dtype in wanted:
            array = feeds[name]
            if array.shape != shape or array.dtype is not dtype:
                return run(feeds)
        try:
            mine = free.pop()
        except IndexError:
            return run(feeds)
        try:
            for (name, _, _), filled in zip(wanted, mine.filled, strict=True):
                filled[:] = feeds[name].tobytes()
            inner_run(mine.binding, None)
            found = [output.copy() for output in mine.outputs]
        except Exception:
            return _again(run, feeds, free, mine)
        free.append(mine)
        return found

    return run_row


def _again(run: Run, feeds: Tensors, free: list[_Places], mine: _Places) -> Sequence[Array]:
    """The usual way, for it may be the model that fails. Where only the places do not fit, they are not used again."""
    try:
        return run(feeds)
    except Exception:
        free.append(mine)
        raise


def _bound(session: Any, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> _Places:
    binding = session.io_binding()
    made: list[list[Array]] = [[], []]
    for specs, arrays, bind in ((inputs, made[0], binding.bind_input), (outputs, made[1], binding.bind_output)):
        for spec in specs:
            array = np.zeros(_row(spec), DTYPES[spec.datatype])
            bind(spec.name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
            arrays.append(array)
    filled = tuple(array.reshape(-1).view(np.uint8).data for array in made[0])
    # The inner binding: what the session's own method would take out of the outer one at each call, which must live with it.
    return _Places(binding._iobinding, tuple(made[0]), filled, tuple(made[1]))


def _row(spec: Spec) -> tuple[int, ...]:
    """The shape of one row."""
    return (1 if spec.shape[0] == -1 else spec.shape[0], *spec.shape[1:]) if spec.shape else ()


def _row_bytes(spec: Spec) -> int:
    """0 where a size, or the size of an element, is not known."""
    if spec.datatype == "BYTES" or spec.datatype not in DTYPES or -1 in spec.shape[1:]:
        return 0
    return math.prod(_row(spec)) * DTYPES[spec.datatype].itemsize
