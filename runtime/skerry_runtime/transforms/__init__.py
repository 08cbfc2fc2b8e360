"""Declarative steps before and after the model: the same code in training and on the device.

A step reads one tensor and writes one (the same name when ``output`` is empty). ``compile_steps`` checks every step against
the tensor it will read (operation, parameters, datatype, width) and gives functions that only compute: what can be wrong is
wrong at load, not at the thousandth request. Training calls ``apply`` on whole arrays, the device takes requests as they
come; both run the same functions, and give the same bits.

=============  =========================================  ==========================================================
op             params                                     result
=============  =========================================  ==========================================================
``scale``      ``mean``, ``scale`` (number or list)       ``(x - mean) / scale``, FP32 (FP64 stays FP64)
``clip``       ``low``, ``high`` (number or list)         values pulled into the range; NaN stays
``impute``     ``value`` (number or list)                 NaN replaced
``log1p``                                                 ``sign(x) * log(1 + |x|)``
``select``     ``columns`` (list of indices)              those columns, in that order
``one_hot``    ``values`` (numbers or texts), ``column``  1 for the value it is, 0 for the others, FP32 (FP64 stays
               (default: all)                             FP64); all 0 for an unknown one; in place of its column
``lag``        ``rows`` (number or list), ``columns``,    the row that many rows ago; NaN, or ``fill``, before the
               ``fill``, ``keep``                         first; with ``keep`` behind the row itself
``rolling``    ``rows``, ``statistics`` (some of          over the last ``rows`` rows, this one included, nulls left
               ``mean``, ``min``, ``max``, ``sd``),       out; NaN while they are fewer than ``minimum`` (1); ``sd``
               ``columns``, ``minimum``, ``keep``         of all these rows, not of a sample; FP32 (FP64 stays FP64)
``cast``       ``datatype``                               another datatype; floats round half to even, and saturate
``softmax``                                               over the last axis
``argmax``                                                INT64 index over the last axis, which goes
``labels``     ``labels`` (list of text)                  BYTES: the label of the largest column, or of an index
``threshold``  ``value``, ``column`` (default: all)       BOOL: ``x >= value``; with ``column`` the last axis goes
=============  =========================================  ==========================================================

All but ``lag`` and ``rolling`` work row by row on the last axis, so that a row's result never depends on its batch. Those
two look back over the rows of a stream: rows of one array or request are successive, and a stream goes on from request to
request (``streams`` in the manifest).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np
from skerry_contract import manifest as mf
from skerry_contract import misfit

from skerry_runtime.errors import Rejected
from skerry_runtime.tensors import Array, Spec, Tensors, datatype_of
from skerry_runtime.transforms import rowwise, windows
from skerry_runtime.transforms.params import Function, Params
from skerry_runtime.transforms.windows import Window

__all__ = ["OPERATIONS", "Step", "Steps", "Window", "apply", "compile_steps"]

OPERATIONS: tuple[str, ...] = (*rowwise.OPERATIONS, *windows.OPERATIONS)
Memory = dict[int, Array]
"""What a stream's windows must be handed with its next rows, by the step's number."""


class Step(NamedTuple):
    """A checked step: reads ``source``, writes ``target``."""

    function: Function
    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Checked steps in order.

    Attributes:
        steps: the functions; one that looks back sees nothing before the rows at hand.
        after: what is there after them: the given tensors and those that the steps wrote.
        windows: those that look back, by the step's number.
    """

    steps: tuple[Step, ...]
    after: dict[str, Spec]
    windows: dict[int, Window] = field(default_factory=dict)

    def run(self, tensors: Mapping[str, Array]) -> Tensors:
        """All tensors after the steps, of rows that nothing came before; ``tensors`` itself is left as it is."""
        found = dict(tensors)
        for function, source, target in self.steps:
            found[target] = function(found[source])
        return found

    def begin(self) -> Memory:
        """The memory of a stream that begins."""
        return {number: window.before for number, window in self.windows.items()}

    def run_on(self, tensors: Tensors, memory: Memory) -> Memory:
        """Runs the steps on the next rows of a stream.

        Args:
            tensors: of these rows; what the steps write is put in.
            memory: as the last call gave it, or ``begin``. It is left as it is, so that rows that fail later can come again.
        """
        after: Memory = {}
        windows = self.windows
        for number, (function, source, target) in enumerate(self.steps):
            window = windows.get(number)
            if window is None:
                tensors[target] = function(tensors[source])
            else:
                tensors[target], after[number] = window.function(tensors[source], memory[number])
        return after


def compile_steps(steps: Iterable[mf.Transform], given: Iterable[Spec], *, where: str = "transforms") -> Steps:
    """Checks steps and works out all that can be worked out before the first request.

    Args:
        steps: of a manifest.
        given: the tensors that are there before the first step.
        where: for errors, e.g. ``transforms.pre``.

    Raises:
        Rejected: ``transform_invalid`` with the step, what was expected and what stood there.
    """
    known = {spec.name: spec for spec in given}
    checked: list[Step] = []
    looking_back: dict[int, Window] = {}
    for i, step in enumerate(steps):
        at = f"{where}[{i}] ({step.op})"
        if step.op not in OPERATIONS:
            raise Rejected("transform_invalid", f"{at}: unknown op, wanted one of {', '.join(OPERATIONS)}")
        source = known.get(step.input)
        if source is None:
            raise Rejected("transform_invalid", f"{at}: no tensor {step.input!r}, there are {', '.join(known)}")
        params = Params(at, step.params, source)
        if step.op in windows.OPERATIONS:
            looking_back[i], datatype, shape = windows.OPERATIONS[step.op](params)
            function: Function = looking_back[i].alone
        else:
            function, datatype, shape = rowwise.OPERATIONS[step.op](params)
        params.done()
        target = step.output or step.input
        known[target] = Spec(target, datatype, shape)
        checked.append(Step(function, step.input, target))
    return Steps(steps=tuple(checked), after=known, windows=looking_back)


def apply(
    steps: Iterable[mf.Transform | Mapping[str, Any]],
    data: Array | Mapping[str, Array],
    *,
    streams: Array | Iterable[Any] | None = None,
) -> Any:
    """Runs a manifest's steps on whole arrays, as the device will on what comes one by one.

    Args:
        steps: of a manifest, or tables as they stand in a bundle's spec: ``op``, ``input``, ``output``, ``params``.
        data: an array of rows, in the order of time, for steps whose first reads it; or arrays by name.
        streams: which stream each row belongs to, one value per row; None when all are of one stream. Rows of several streams
            may be mixed as long as each stream's are in order.

    Returns:
        What the last step gave, for an array; for arrays by name, all tensors after the steps.

    Raises:
        Rejected: ``transform_invalid``: a step cannot be run on this.
        ValueError: the arrays, or ``streams``, have different numbers of rows.

    >>> import numpy as np
    >>> apply([{"op": "lag", "input": "x", "params": {"rows": 1, "fill": 0.0, "keep": True}}], np.array([[1.0], [2.0], [3.0]]))
    array([[1., 0.],
           [2., 1.],
           [3., 2.]])
    """
    checked: list[mf.Transform] = []
    for i, step in enumerate(steps):
        try:
            checked.append(step if isinstance(step, mf.Transform) else _transform(step))
        except msgspec.ValidationError as error:
            place, words = misfit.words(error, mf.Transform, dict(step) if isinstance(step, Mapping) else step)
            raise Rejected("transform_invalid", f"steps[{i}]{'.' if place else ''}{place}: {words}") from None
        except TypeError as error:
            raise Rejected("transform_invalid", f"steps[{i}]: {error}") from None
    tensors: Tensors
    if isinstance(data, Mapping):
        tensors = {name: np.asarray(array) for name, array in data.items()}
    elif checked:
        tensors = {checked[0].input: np.asarray(data)}
    else:
        return data
    sizes = {name: len(array) if array.ndim else 1 for name, array in tensors.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"wanted arrays with as many rows, got {sizes}")
    given = [Spec(name, datatype_of(array), (-1, *array.shape[1:])[: array.ndim]) for name, array in tensors.items()]
    compiled = compile_steps(checked, given, where="steps")
    found = compiled.run(tensors) if streams is None else _by_stream(compiled, tensors, streams, max(sizes.values()))
    return found if isinstance(data, Mapping) else found[checked[-1].output or checked[-1].input]


def _transform(step: Mapping[str, Any]) -> mf.Transform:
    unknown = sorted(set(step) - set(mf.Transform.__struct_fields__))
    if unknown:
        raise TypeError(f"unknown key {', '.join(unknown)}; wanted one of {', '.join(mf.Transform.__struct_fields__)}")
    return msgspec.convert(dict(step), mf.Transform)


def _by_stream(steps: Steps, tensors: Tensors, streams: Any, rows: int) -> Tensors:
    groups: dict[Any, list[int]] = {}
    for row, stream in enumerate(streams.tolist() if isinstance(streams, np.ndarray) else streams):
        groups.setdefault(stream, []).append(row)
    if sum(map(len, groups.values())) != rows:
        raise ValueError(f"streams: wanted one value for each of {rows} rows")
    found: Tensors = {}
    for members in groups.values():
        part = steps.run({name: array[members] for name, array in tensors.items()})
        for name, array in part.items():
            if name not in found:
                found[name] = np.empty((rows, *array.shape[1:]), array.dtype)
            found[name][members] = array
    return found
