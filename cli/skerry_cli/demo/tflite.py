"""From the trained network to a genuine int8 TFLite file, without TensorFlow.

The float graph is written as a flatbuffer by LiteRT's own schema, and quantized statically to full integers: weights and
activations int8, biases int32, one QUANTIZE at the entry and one DEQUANTIZE at the end. The activations' ranges are the true
smallest and largest values over the training rows, worked out here in numpy: the quantizer's own calibration averages the
ranges of its samples, and a rare class can vanish in what that cuts off. Per-tensor scales: older runtimes answer wrongly, and
silently, for per-channel fully connected layers.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from skerry_cli.demo.quantization import INPUT, OUTPUT
from skerry_cli.demo.training import Trained

_IDENTIFIER = b"TFL3"
_SIGNATURE = "serving_default"
Layer = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Weights [inputs, outputs] and bias [outputs]."""


def quantize(trained: Trained) -> bytes:
    """The int8 graph, with the same inputs and outputs as the ONNX one."""
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer

    layers = _layers(trained)
    ranges = _ranges(layers, trained.standardise(trained.fitted.x))
    every = qtyping.TFLOperationName
    with _quiet():
        wanted = quantizer.Quantizer(_float_graph(layers))
        wanted.add_static_config(".*", every.ALL_SUPPORTED, 8, 8, qtyping.QuantGranularity.TENSORWISE)
        # Float at the edges, as the bundle's inputs and outputs are: the file gets QUANTIZE and DEQUANTIZE there.
        for edge in (every.INPUT, every.OUTPUT):
            wanted.update_quantization_recipe(".*", edge, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE)
        found = wanted.quantize(ranges)
    return bytes(found.quantized_model)


def answer(model: bytes, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities of standardised rows, one row at a time as a device asks, float32 [n, classes]."""
    from ai_edge_litert.interpreter import Interpreter

    with _quiet():
        interpreter = Interpreter(model_content=model, num_threads=1)
        runner = interpreter.get_signature_runner(_SIGNATURE)
    answers: list[Any] = [runner(**{INPUT: row[None, :]})[OUTPUT][0] for row in rows]
    return np.asarray(answers, dtype=np.float32)


def _layers(trained: Trained) -> list[Layer]:
    network = trained.network
    pairs = zip(network.coefs_, network.intercepts_, strict=True)
    return [(np.asarray(weights, np.float32), np.asarray(bias, np.float32)) for weights, bias in pairs]


def _ranges(layers: list[Layer], rows: NDArray[np.float32]) -> dict[str, dict[str, NDArray[np.float32]]]:
    """The smallest and largest value of each activation over the rows, as the quantizer takes them."""
    found = {INPUT: rows}
    for i, (weights, bias) in enumerate(layers):
        rows = rows @ weights + bias
        if i < len(layers) - 1:
            rows = np.maximum(rows, 0)
        found[_dense(i)] = rows
    odds = np.exp(rows - rows.max(axis=1, keepdims=True))
    found[OUTPUT] = odds / odds.sum(axis=1, keepdims=True)
    return {
        name: {"min": np.full((1, 1), values.min(), np.float32), "max": np.full((1, 1), values.max(), np.float32)}
        for name, values in found.items()
    }


def _dense(i: int) -> str:
    return f"dense_{i}"


def _float_graph(layers: list[Layer]) -> bytes:
    """The network as a float TFLite file: fully connected layers, ReLU fused into all but the last, then softmax."""
    file = _File()
    here = file.add_tensor(INPUT, (1, layers[0][0].shape[0]))
    first = here
    for i, (weights, bias) in enumerate(layers):
        relu = schema.ActivationFunctionType.RELU if i < len(layers) - 1 else schema.ActivationFunctionType.NONE
        options = schema.FullyConnectedOptionsT()
        options.fusedActivationFunction = relu
        # TFLite keeps weights as [outputs, inputs].
        operands = [here, file.add_constant(f"weights_{i}", weights.T), file.add_constant(f"bias_{i}", bias)]
        here = file.add_tensor(_dense(i), (1, weights.shape[1]))
        file.add_operator("FULLY_CONNECTED", operands, here, options)
    softmax = schema.SoftmaxOptionsT()
    softmax.beta = 1.0
    last = file.add_tensor(OUTPUT, (1, layers[-1][0].shape[1]))
    file.add_operator("SOFTMAX", [here], last, softmax)
    return file.written(first, last)


class _File:
    """A TFLite file under construction. Tensors and operators are numbered in the order in which they are added."""

    def __init__(self) -> None:
        self._model = schema.ModelT()
        self._model.version = 3
        self._model.description = b"skerry demo"
        self._model.buffers = [schema.BufferT()]  # number 0 is by convention the empty one
        self._model.operatorCodes = []
        self._graph = schema.SubGraphT()
        self._graph.name = b"main"
        self._graph.tensors, self._graph.operators = [], []

    def add_tensor(self, name: str, shape: tuple[int, ...]) -> int:
        """An activation; its first dimension may vary."""
        return self._add(name, shape, [-1, *shape[1:]], buffer=0)

    def add_constant(self, name: str, values: NDArray[np.float32]) -> int:
        """Weights or a bias."""
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values, "<f4").tobytes(), np.uint8)
        self._model.buffers.append(buffer)
        return self._add(name, values.shape, None, buffer=len(self._model.buffers) - 1)

    def add_operator(self, kind: str, inputs: list[int], output: int, options: Any) -> None:
        """One node; each kind gets its code once."""
        number = getattr(schema.BuiltinOperator, kind)
        numbers = [code.builtinCode for code in self._model.operatorCodes]
        if number not in numbers:
            code = schema.OperatorCodeT()
            code.builtinCode = code.deprecatedBuiltinCode = number
            code.version = 1
            self._model.operatorCodes.append(code)
            numbers.append(number)
        operator = schema.OperatorT()
        operator.opcodeIndex = numbers.index(number)
        operator.inputs, operator.outputs = inputs, [output]
        operator.builtinOptions = options
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self._graph.operators.append(operator)

    def written(self, first: int, last: int) -> bytes:
        """The file, with one signature that names input and output."""
        self._graph.inputs, self._graph.outputs = [first], [last]
        signature = schema.SignatureDefT()
        signature.signatureKey = _SIGNATURE.encode()
        signature.subgraphIndex = 0
        signature.inputs, signature.outputs = [_named(INPUT, first)], [_named(OUTPUT, last)]
        self._model.subgraphs, self._model.signatureDefs = [self._graph], [signature]
        builder = flatbuffers.Builder(0)
        builder.Finish(self._model.Pack(builder), _IDENTIFIER)
        return bytes(builder.Output())

    def _add(self, name: str, shape: tuple[int, ...], signature: list[int] | None, *, buffer: int) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.buffer = name.encode(), schema.TensorType.FLOAT32, buffer
        tensor.shape = list(shape)
        if signature is not None:
            tensor.shapeSignature = signature
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what LiteRT writes to the process's own stderr (that it has a delegate), and the quantizer's report on stdout."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _named(name: str, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name.encode(), index
    return entry
