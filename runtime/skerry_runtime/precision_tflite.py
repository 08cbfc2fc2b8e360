"""Whether a TFLite graph is what its bundle declares: int8 means that nothing between its edges computes in float.

A converter that is short of ranges leaves operators float with no more than a log line, and "dynamic range" quantization keeps
int8 weights beside float activations; by file size both look like int8. So the graph itself is read. A float tensor may come
in and be quantized at once, or be the dequantized end; every other operand is an integer, and matrix products take 8 bits.

Needs the schema that comes with ``ai-edge-litert`` (server and CLI; on a device the proof runs the graph instead).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skerry_runtime.errors import Degraded, Rejected

_IDENTIFIER = b"TFL3"
_PRODUCTS = {"FULLY_CONNECTED", "CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "BATCH_MATMUL"}
_TRANSPOSED_PRODUCTS = {"TRANSPOSE_CONV", "CONV_3D_TRANSPOSE"}
"""These take a shape first, then weights and rows."""
_RECURRENT = {
    "LSTM", "UNIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_LSTM", "RNN", "UNIDIRECTIONAL_SEQUENCE_RNN",
    "BIDIRECTIONAL_SEQUENCE_RNN", "SVDF",
}  # fmt: skip
_FLOAT = {"FLOAT16", "FLOAT32", "FLOAT64", "BFLOAT16", "COMPLEX64", "COMPLEX128"}
_EIGHT_BITS = {"INT8", "UINT8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of a graph. ``type`` is the schema's name, ``scaled`` whether fixed quantization parameters are in the file."""

    name: str
    type: str
    scaled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One node: the schema's name of its operator and the indices of its tensors; -1 for one left out."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One subgraph."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A file: its graphs, the first of which is run, and the other files that it keeps weights in (unchecked)."""

    graphs: tuple[Graph, ...]
    external_files: frozenset[str]


def read_model(path: Path) -> Model:
    """Parses a TFLite file, weights left where they are.

    Raises:
        Degraded: ``runtime_missing`` without ai-edge-litert.
        Rejected: ``model_damaged``.
    """
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        raise Degraded("runtime_missing", f"ai-edge-litert is needed to read a TFLite graph: {error}") from None
    data = path.read_bytes()
    if data[4:8] != _IDENTIFIER:
        raise Rejected("model_damaged", f"{path.name}: no TFLite file")
    try:
        model = schema.Model.GetRootAs(data, 0)
        graphs = tuple(_graph(schema, model, model.Subgraphs(i)) for i in range(model.SubgraphsLength()))
        groups = [model.ExternalBufferGroups(i).Name() for i in range(model.ExternalBufferGroupsLength())]
        external = frozenset((name or b"").decode("utf-8", "replace") for name in groups)
    except Exception as error:
        # Offsets of a damaged file lead anywhere: struct errors, index errors, missing tables.
        raise Rejected("model_damaged", f"{path.name}: {type(error).__name__}: {error}") from None
    if not graphs or not graphs[0].operators:
        raise Rejected("model_damaged", f"{path.name}: the graph has no operator")
    return Model(graphs=graphs, external_files=external)


def check_int8(model: Model, *, name: str = "model") -> None:
    """Refuses a file that is not quantized to 8 bits throughout.

    Raises:
        Rejected: ``not_quantized``, naming the operators.
    """
    faults = [fault for graph in model.graphs for fault in _faults(graph)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise Rejected("not_quantized", f"{name} is declared int8: {'; '.join(faults[:3])}{more}")
    products = _PRODUCTS | _TRANSPOSED_PRODUCTS | _RECURRENT
    if not any(operator.kind in products for graph in model.graphs for operator in graph.operators):
        raise Rejected("not_quantized", f"{name} is declared int8 and holds no quantized matrix product")


def _faults(graph: Graph) -> Iterator[str]:
    consumed = {index for operator in graph.operators for index in operator.inputs}
    for operator in graph.operators:
        fault = _fault(graph, operator, consumed)
        if fault:
            made = graph.tensors[operator.outputs[0]].name if operator.outputs else ""
            yield f"{operator.kind} {made!r} {fault}"


def _fault(graph: Graph, operator: Operator, consumed: set[int]) -> str:
    """Why the operator does not belong in an int8 graph; empty when it does."""
    inputs = [graph.tensors[index] for index in operator.inputs if index >= 0]
    outputs = [graph.tensors[index] for index in operator.outputs if index >= 0]
    if operator.kind == "QUANTIZE":
        inside = [i for i in operator.inputs if i >= 0 and graph.tensors[i].type in _FLOAT and i not in graph.inputs]
        return f"takes float {graph.tensors[inside[0]].name!r} from within the graph" if inside else _unscaled(outputs)
    if operator.kind == "DEQUANTIZE":
        inside = [i for i in operator.outputs if i in consumed or i not in graph.outputs]
        return f"gives float {graph.tensors[inside[0]].name!r} to the graph" if inside else _unscaled(inputs)
    floats = [tensor for tensor in (*inputs, *outputs) if tensor.type in _FLOAT]
    if floats:
        return f"computes in float: {floats[0].name!r} is {floats[0].type}"
    factors = inputs[1:3] if operator.kind in _TRANSPOSED_PRODUCTS else inputs[:2] if operator.kind in _PRODUCTS else []
    wide = [tensor for tensor in factors if tensor.type not in _EIGHT_BITS]
    if wide:
        return f"takes {wide[0].name!r}, which is {wide[0].type} and not 8 bits"
    return _unscaled(factors)


def _unscaled(tensors: list[Tensor]) -> str:
    loose = [tensor for tensor in tensors if tensor.type in _EIGHT_BITS and not tensor.scaled]
    return f"has no scale for {loose[0].name!r}" if loose else ""


def _graph(schema: Any, model: Any, graph: Any) -> Graph:
    types = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    kinds = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}

    def tensor(found: Any) -> Tensor:
        scales = found.Quantization()
        return Tensor(
            name=(found.Name() or b"").decode("utf-8", "replace"),
            type=types.get(found.Type(), f"type {found.Type()}"),
            scaled=scales is not None and scales.ScaleLength() > 0,
        )

    def operator(found: Any) -> Operator:
        code = model.OperatorCodes(found.OpcodeIndex())
        # Files older than the wide field keep the number in the narrow one; the larger of the two counts.
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        return Operator(
            kind=kinds.get(number, f"operator {number}"),
            inputs=tuple(found.Inputs(i) for i in range(found.InputsLength())),
            outputs=tuple(found.Outputs(i) for i in range(found.OutputsLength())),
        )

    read = Graph(
        tensors=tuple(tensor(graph.Tensors(i)) for i in range(graph.TensorsLength())),
        operators=tuple(operator(graph.Operators(i)) for i in range(graph.OperatorsLength())),
        inputs=tuple(graph.Inputs(i) for i in range(graph.InputsLength())),
        outputs=tuple(graph.Outputs(i) for i in range(graph.OutputsLength())),
    )
    named = {i for o in read.operators for i in (*o.inputs, *o.outputs)} | {*read.inputs, *read.outputs}
    if not all(-1 <= index < len(read.tensors) for index in named):
        raise IndexError(f"tensor {max(named)} of {len(read.tensors)}")
    return read
