"""Whether an ONNX graph is what its bundle declares: int8 means int8, through and through.

Dynamic quantization makes a row's answer depend on the rows that share its batch, and a scaler left inside the graph makes
static quantization leave the activations float with no more than a log line. Both look like int8 by file size. So the graph
itself is read: no quantization parameters computed at run time, and every matrix product takes quantized tensors.

Needs the ``onnx`` package (server and CLI; never on a device).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skerry_runtime.errors import Degraded, Rejected

_PRODUCTS = {
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "FusedMatMul", "FusedGemm", "FusedConv", "TransposeMatMul",
    "GemmFastGelu", "NhwcFusedConv", "FusedMatMulActivation",
}  # fmt: skip
_FLOAT_BLOCKS = {
    "LSTM", "GRU", "RNN", "Attention", "MultiHeadAttention", "GroupQueryAttention", "LinearClassifier", "LinearRegressor",
    "SVMClassifier", "SVMRegressor", "MatMulNBits", "DeformConv",
}  # fmt: skip
_DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulIntegerToFloat"}
_LAYOUT = {
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Identity",
    "Slice",
    "Gather",
    "Concat",
    "Pad",
    "MaxPool",
}
_INTEGER_PRODUCTS = {"MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "QGemm", "QLinearConvTranspose"}


def read_model(path: Path) -> Any:
    """Parses an ONNX file, local functions unfolded, weights in other files left there.

    Raises:
        Degraded: ``runtime_missing`` without the onnx package.
        Rejected: ``model_damaged``.
    """
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise Degraded("runtime_missing", f"the onnx package is needed to read a graph: {error}") from None
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.node:
            raise Rejected("model_damaged", f"{path.name}: the graph has no node")
        return onnx.inliner.inline_local_functions(model) if model.functions else model
    except Rejected:
        raise
    except Exception as error:
        raise Rejected("model_damaged", f"{path.name}: {' '.join(str(error).split())[:300]}") from None


def external_files(model: Any) -> set[str]:
    """Files in which the model keeps weights, as the model names them (unchecked)."""
    found: set[str] = set()
    for graph in _graphs(model.graph):
        for tensor in graph.initializer:
            found |= {entry.value for entry in tensor.external_data if entry.key == "location"}
        for node in graph.node:
            for attribute in node.attribute:
                for tensor in (attribute.t, *attribute.tensors):
                    found |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    return found


def check_int8(model: Any, *, name: str = "model") -> None:
    """Refuses a graph that is not statically quantized to 8 bits.

    Raises:
        Rejected: ``not_quantized``, naming the nodes.
    """
    faults: list[str] = []
    quantized = 0
    for graph in _graphs(model.graph):
        reader = _Reader(graph, model.graph)
        for node in graph.node:
            fault = reader.fault(node)
            if fault:
                faults.append(f"{node.op_type} {node.name or node.output[0]!r} {fault}")
            quantized += node.op_type in _INTEGER_PRODUCTS or (node.op_type in _PRODUCTS and not fault)
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise Rejected("not_quantized", f"{name} is declared int8: {'; '.join(faults[:3])}{more}")
    if not quantized:
        raise Rejected("not_quantized", f"{name} is declared int8 and holds no quantized matrix product")


class _Reader:
    """Where the tensors of one graph come from. Names of an outer graph are visible in an inner one."""

    def __init__(self, graph: Any, outer: Any) -> None:
        from onnx import TensorProto

        self._eight_bits = (TensorProto.INT8, TensorProto.UINT8)
        self._maker = {name: node for g in (outer, graph) for node in g.node for name in node.output}
        self._constant = {tensor.name: tensor for g in (outer, graph) for tensor in g.initializer}

    def fault(self, node: Any) -> str:
        """Why the node does not belong in an int8 graph; empty when it does."""
        if node.op_type in _DYNAMIC:
            return "quantizes at run time"
        if node.op_type in _FLOAT_BLOCKS:
            return "computes in float"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            computed = [name for name in node.input[1:3] if name and not self._is_constant(name)]
            return f"takes {computed[0]!r}, computed at run time" if computed else ""
        if node.op_type in ("MatMulInteger", "ConvInteger"):
            loose = [name for name in node.input[:2] if not self._is_eight_bits(name)]
            return f"takes {loose[0]!r}, which is not 8 bits" if loose else ""
        if node.op_type in _PRODUCTS:
            count = len(node.input) if node.op_type == "Einsum" else 2
            loose = [name for name in node.input[:count] if not self._is_dequantized(name)]
            return f"takes float {loose[0]!r}" if loose else ""
        return ""

    def _is_constant(self, name: str) -> bool:
        made_by = self._maker.get(name)
        return name in self._constant or (made_by is not None and made_by.op_type == "Constant")

    def _is_dequantized(self, name: str, depth: int = 0) -> bool:
        node = self._maker.get(name)
        if node is None or depth > 32:
            return False
        if node.op_type == "DequantizeLinear":
            return self._is_eight_bits(node.input[0])
        if node.op_type == "Concat":
            return all(self._is_dequantized(i, depth + 1) for i in node.input)
        return node.op_type in _LAYOUT and self._is_dequantized(node.input[0], depth + 1)

    def _is_eight_bits(self, name: str, depth: int = 0) -> bool:
        tensor = self._constant.get(name)
        if tensor is not None:
            return tensor.data_type in self._eight_bits
        node = self._maker.get(name)
        if node is None or depth > 32:
            return False
        if node.op_type == "Constant":
            return any(a.name == "value" and a.t.data_type in self._eight_bits for a in node.attribute)
        if node.op_type == "QuantizeLinear":
            # Without a zero point the default is uint8, unless output_dtype says otherwise.
            if len(node.input) > 2 and node.input[2]:
                return self._is_eight_bits(node.input[2], depth + 1)
            declared = [a.i for a in node.attribute if a.name == "output_dtype" and a.i]
            return not declared or declared[0] in self._eight_bits
        return node.op_type in _LAYOUT and self._is_eight_bits(node.input[0], depth + 1)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)
