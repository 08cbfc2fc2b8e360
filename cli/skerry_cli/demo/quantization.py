"""From the trained network to a float ONNX graph, and from there to a genuine int8 one.

Static QDQ quantization, calibrated on the training rows. Dynamic quantization would be shorter and wrong here: it makes the
answer to a row depend on the other rows of its batch.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.utils
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from skl2onnx import to_onnx

from skerry_cli.demo.training import Trained

INPUT, OUTPUT = "readings", "probabilities"
_CALIBRATION_ROWS = 64
_OPSET = {"": 17, "ai.onnx.ml": 3}


class _Rows(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, rows: NDArray[np.float32]) -> None:
        self._parts: Iterator[NDArray[np.float32]] = iter(
            [rows[i : i + _CALIBRATION_ROWS] for i in range(0, len(rows), _CALIBRATION_ROWS)]
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        part = next(self._parts, None)
        return None if part is None else {INPUT: part}


def quantize(trained: Trained) -> bytes:
    """The int8 graph: input ``readings`` float32 [n, 128] standardised, output ``probabilities`` float32 [n, classes]."""
    rows = trained.standardise(trained.fitted.x)
    with tempfile.TemporaryDirectory(prefix="skerry-quantize-") as folder, _quiet():
        work = Path(folder)
        whole = to_onnx(
            trained.network, rows[:1], options={"zipmap": False}, target_opset=_OPSET, initial_types=None, name="gas"
        )
        onnx.save(whole, str(work / "whole.onnx"))
        source = whole.graph.input[0].name
        # The class label comes out as int64 beside the probabilities: the probabilities say it all, so it is cut away.
        onnx.utils.extract_model(str(work / "whole.onnx"), str(work / "head.onnx"), [source], [OUTPUT])
        _rename_input(work / "head.onnx", source)
        quant_pre_process(str(work / "head.onnx"), str(work / "ready.onnx"), skip_symbolic_shape=True)
        quantize_static(
            str(work / "ready.onnx"),
            str(work / "int8.onnx"),
            _Rows(rows),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=False,
        )
        return (work / "int8.onnx").read_bytes()


def answer(model: bytes, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities of standardised rows, one row at a time as a device asks, float32 [n, classes]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    answers: list[Any] = [session.run([OUTPUT], {INPUT: row[None, :]})[0][0] for row in rows]
    return np.asarray(answers, dtype=np.float32)


def _rename_input(path: Path, old: str) -> None:
    model = onnx.load(str(path))
    for node in model.graph.node:
        node.input[:] = [INPUT if name == old else name for name in node.input]
    model.graph.input[0].name = INPUT
    onnx.save(model, str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    # The quantizer's advice to run its own pre-processing comes through the root logger even after it was run.
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
