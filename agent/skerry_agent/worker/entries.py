"""How the values of a request get into the slots of a ring, worked out once per ring from the plan."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from skerry_agent.worker import mapped
from skerry_agent.worker import ring as r
from skerry_agent.worker.plan import Plan

Tensors = Mapping[str, npt.NDArray[Any]]


class Count(Protocol):
    """Counts an answered request, see ``recorder.Recorder.count``."""

    def __call__(
        self,
        inputs: Tensors,
        outputs: Tensors,
        rows: int,
        total_ns: int,
        queue_ns: int,
        transform_ns: int,
        infer_ns: int,
        at_ns: int,
        flags: int = 0,
        ident: int = 0,
        kinds: int = 0,
        age_ms: int = -1,
    ) -> None:
        """See there."""


def quick_count(ring: r.Ring, plan: Plan, count: Count, wrote: Callable[[], None]) -> Count:
    """``count``, at a third of its price for the commonest request by far: one row, all of whose bytes are what is stored.

    Args:
        ring: which it writes; another ring needs another one of these.
        plan: of the ring.
        count: takes what is not so common.
        wrote: called when so much is written that ``ring.due`` is reached.

    Returns:
        ``count`` itself for a plan that has no such requests.
    """
    if not plan.direct or len(plan.whole) != 1 or len(plan.outputs) != 1:
        return count
    (source,), answer = plan.whole, plan.outputs[0].name
    item_bytes = np.dtype(plan.dtype).itemsize
    source_bytes, answer_bytes = len(plan.features) * item_bytes, plan.outputs[0].width * item_bytes
    # With the slot's padding: it is written as one piece.
    pack_into = struct.Struct(f"{r.META_FORMAT}{source_bytes}s{answer_bytes}s{len(ring.padding)}x").pack_into
    memory, start, capacity, slot_bytes = ring.memory, ring.start, ring.capacity, ring.slot_bytes
    positions = ring.positions
    ok, values, tag, at_written = r.OK, r.VALUES, r.TAG, mapped.WRITTEN

    def quick(
        inputs: Tensors,
        outputs: Tensors,
        rows: int,
        total_ns: int,
        queue_ns: int,
        transform_ns: int,
        infer_ns: int,
        at_ns: int,
        flags: int = 0,
        ident: int = 0,
        kinds: int = 0,
        age_ms: int = -1,
    ) -> None:
        if rows == 1 and not kinds and age_ms < 0 and source in inputs and answer in outputs:
            given, answered = inputs[source].tobytes(), outputs[answer].tobytes()
            # struct would cut off or fill up what is not of the shape that the manifest says.
            if len(given) == source_bytes and len(answered) == answer_bytes:
                written = ring.written
                pack_into(
                    memory, start + written % capacity * slot_bytes,
                    ok, flags | values, written & tag, 1, total_ns, queue_ns, transform_ns, infer_ns, at_ns, ident, 0, -1,
                    given, answered,
                )  # fmt: skip
                ring.written = positions[at_written] = written = written + 1
                if written >= ring.due:
                    wrote()
                return
        count(
            inputs, outputs, rows, total_ns, queue_ns, transform_ns, infer_ns, at_ns, flags, ident, kinds, age_ms,
        )  # fmt: skip

    return quick


# --- many rows, or other columns ------------------------------------------------------------------------------------


class _Whole:
    """All columns of a tensor, in order."""

    def __init__(self, name: str, target: npt.NDArray[np.floating]) -> None:
        self.name = name
        self._target = target

    def many(self, slots: slice, rows: slice, array: npt.NDArray[Any]) -> None:
        found = array.reshape(len(array), -1)[rows]
        if found.shape[1] != self._target.shape[1]:
            # One column would be spread over all of them.
            raise ValueError(f"{self.name}: {found.shape[1]} columns, wanted {self._target.shape[1]}")
        self._target[slots] = found


class _Chosen:
    """Some columns of a tensor."""

    def __init__(self, name: str, columns: list[int], target: npt.NDArray[np.floating]) -> None:
        self.name = name
        self._columns = np.array(columns)
        self._target = target

    def many(self, slots: slice, rows: slice, array: npt.NDArray[Any]) -> None:
        self._target[slots] = array.reshape(len(array), -1)[rows].take(self._columns, axis=1)


class _Top:
    """Of many classes the first largest, and how large it is."""

    def __init__(self, name: str, target: npt.NDArray[np.floating]) -> None:
        self.name = name
        self._target = target

    def many(self, slots: slice, rows: slice, array: npt.NDArray[Any]) -> None:
        part = array[rows]
        self._target[slots, 0] = part.argmax(1)
        self._target[slots, 1] = part.max(1)


Copy = _Whole | _Chosen | _Top


def input_copies(plan: Plan, values: npt.NDArray[np.floating]) -> list[Copy]:
    """Of a request's inputs, in the order of the plan; into ``values`` [slots, width]."""
    found: list[Copy] = []
    at = 0
    while at < len(plan.features):
        name = plan.features[at].input
        columns = [f.column for f in plan.features if f.input == name]
        target = values[:, at : at + len(columns)]
        found.append(_Whole(name, target) if name in plan.whole else _Chosen(name, columns, target))
        at += len(columns)
    return found


def output_copies(plan: Plan, values: npt.NDArray[np.floating]) -> list[Copy]:
    """Of a request's outputs."""
    found: list[Copy] = []
    at = len(plan.features)
    for output in plan.outputs:
        target = values[:, at : at + output.width]
        found.append(_Whole(output.name, target) if output.raw else _Top(output.name, target))
        at += output.width
    return found
