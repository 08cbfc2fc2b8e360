"""A model that passes every proof and kills its runtime in service: for the demo and the tests, never by accident.

The graph gets a branch that divides the smallest int32 by 1, or by -1 for a row whose one column lies beyond anything in the
training rows. The quotient of the latter does not fit an int32; on x86 the processor answers with SIGFPE and the process is
gone. Golden and held-out rows come from the training batches, so nothing that runs before service can find it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from skerry_cli.demo import data, quantization, training
from skerry_cli.errors import Failed

DEADLY_ON = frozenset({"x86_64", "AMD64", "i686"})
"""Processors (``platform.machine()``) that trap this division; others wrap around and go on."""
_MARGIN = 0.1
_LEAST_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """Rows die whose standardised ``column`` is greater than ``above``; ``share`` of the live rows do."""

    column: int
    above: float
    share: float


def find_trigger(trained: training.Trained, live: data.Readings) -> Trigger:
    """The column in which most live rows lie beyond all rows of the training batches.

    Raises:
        Failed: fewer than 1 in 20 live rows do in any column.
    """
    batches = trained.standardise(data.load(trained.batches).x)
    above = batches.max(axis=0) + _MARGIN
    shares = (trained.standardise(live.x) > above).mean(axis=0)
    column = int(shares.argmax())
    if shares[column] < _LEAST_SHARE:
        raise Failed(f"no column tells the live rows from batches {trained.batches}: the crash would never come")
    return Trigger(column=column, above=float(above[column]), share=float(shares[column]))


def plant(model: bytes, trigger: Trigger) -> bytes:
    """The same graph, answers unchanged, with the branch of the module's text."""
    graph_model = onnx.load_from_string(model)
    graph = graph_model.graph
    for node in graph.node:
        node.output[:] = ["sound" if name == quantization.OUTPUT else name for name in node.output]
    constants: dict[str, NDArray[Any]] = {
        "bad_column": np.array([trigger.column], np.int64),
        "bad_above": np.array([trigger.above], np.float32),
        "bad_smallest": np.array([-(2**31)], np.int32),
        "bad_one": np.array([1], np.int32),
        "bad_two": np.array([2], np.int32),
        "bad_zero": np.array([0], np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    graph.node.extend(
        [
            helper.make_node("Gather", [quantization.INPUT, "bad_column"], ["bad_value"], axis=1),
            helper.make_node("Greater", ["bad_value", "bad_above"], ["bad_is"]),
            helper.make_node("Cast", ["bad_is"], ["bad_flag"], to=TensorProto.INT32),
            helper.make_node("Mul", ["bad_flag", "bad_two"], ["bad_twice"]),
            helper.make_node("Sub", ["bad_one", "bad_twice"], ["bad_divisor"]),  # 1, or -1 for a row that dies
            helper.make_node("Div", ["bad_smallest", "bad_divisor"], ["bad_quotient"]),
            helper.make_node("Cast", ["bad_quotient"], ["bad_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["bad_float", "bad_zero"], ["bad_nothing"]),
            helper.make_node("Add", ["sound", "bad_nothing"], [quantization.OUTPUT]),
        ]
    )
    onnx.checker.check_model(graph_model)
    planted: bytes = graph_model.SerializeToString()
    return planted
