"""Open Inference Protocol v2: bytes of an inference request to numpy arrays, arrays to bytes of the answer.

Both forms are read and written: JSON, and the binary tensor extension (``Inference-Header-Content-Length``: JSON first, then
raw tensors in order). What an element may be is ``skerry_runtime.tensors``'s to say; here is the envelope, and a short cut
for the commonest tensor, a flat list of floats. The bare words ``NaN`` and ``Infinity`` that some clients write are read
as what they mean, so that the guards can name the field. Whether names, shapes and values fit the model is the guards' job.

Not done: shared memory regions and the ``classification`` extension are refused by name.
"""

from __future__ import annotations

import json
import struct
from typing import Annotated, Any

import msgspec
import numpy as np
from skerry_runtime import tensors
from skerry_runtime.errors import BadInput, Violation
from skerry_runtime.tensors import Array

from skerry_agent.worker import intake

MOST_TENSORS = 1024
"""Inputs, and outputs asked for, of one request: above what any model has, and little enough to be looked at one by one."""
MORE = frozenset({"age_ms", "explain", "sequence_id", "sequence_start", "sequence_end"})
"""Parameters of a request that are not about its form: ``calls`` reads them."""
_MOST_SHAPE = 1024
_FLOAT_CODES = {"FP32": "f", "FP64": "d"}


class InferRequest(msgspec.Struct, frozen=True):
    """An inference request, read.

    Attributes:
        id: to be echoed; empty when there was none.
        inputs: by name.
        wanted: names of the outputs asked for and whether in binary; None for all of them.
        binary: whether outputs that say nothing are wanted in binary.
        more: the request's parameters where some of them are of ``MORE``; ages: ``age_ms`` of inputs that have it.
    """

    id: str
    inputs: dict[str, Array]
    wanted: tuple[tuple[str, bool], ...] | None
    binary: bool
    more: dict[str, Any] | None = None
    ages: dict[str, Any] | None = None


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: dict[str, Any] | None = None


class _Wanted(msgspec.Struct):
    name: str
    parameters: dict[str, Any] | None = None


class _Request(msgspec.Struct):
    inputs: Annotated[list[_Input], msgspec.Meta(max_length=MOST_TENSORS)]
    id: str | None = ""
    parameters: dict[str, Any] | None = None
    outputs: Annotated[list[_Wanted], msgspec.Meta(max_length=MOST_TENSORS)] | None = None


class _Output(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any]


class _BinaryOutput(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int]


class _Prediction(msgspec.Struct):
    prediction_id: str


class _Response(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    id: str
    outputs: list[_Output | _BinaryOutput]
    parameters: _Prediction | dict[str, Any] | None = None


class _Sketched(msgspec.Struct):
    name: str
    shape: msgspec.Raw
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()


class _Sketch(msgspec.Struct):
    """A request of which nothing that may be long is decoded."""

    inputs: Annotated[list[_Sketched], msgspec.Meta(max_length=MOST_TENSORS)]
    parameters: msgspec.Raw = msgspec.Raw()
    outputs: msgspec.Raw = msgspec.Raw()


_request = msgspec.json.Decoder(_Request)
_sketch = msgspec.json.Decoder(_Sketch)
_floats = msgspec.json.Decoder(list[float])
_encoder = msgspec.json.Encoder()


def parse_request(body: bytes, json_length: int = -1, takes: intake.Takes | None = None) -> InferRequest:
    """Reads a request.

    Args:
        body: the whole body.
        json_length: of the JSON part, bytes, when binary tensors may follow it; -1 when all of it is JSON.
        takes: of a large request: what the model can take, which is judged before anything is decoded.

    Raises:
        BadInput: more than the model takes, not JSON, a field missing or of the wrong type, data that does not fill its shape.
    """
    if json_length > len(body):
        raise _bad("Inference-Header-Content-Length", json_length, f"at most {len(body)}, the size of the body")
    text = body if json_length < 0 else body[:json_length]
    if takes is not None:
        _judge(text, len(body) - len(text), takes)
    loose: dict[int, Any] = {}
    try:
        request = _request.decode(text)
    except msgspec.ValidationError as error:
        raise _bad("request", "something else", f"an inference request: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        request, loose = _with_bare_nan(text, error)
    at = len(text)
    inputs: dict[str, Array] = {}
    ages: dict[str, Any] | None = None
    for i, tensor in enumerate(request.inputs):
        name = tensor.name
        if name in inputs:
            raise _bad(name, "it twice", "every input once")
        size = _binary_size(tensor, len(body) - at if json_length >= 0 else 0) if tensor.parameters else None
        if tensor.parameters and "age_ms" in tensor.parameters:
            ages = ages or {}
            ages[name] = tensor.parameters["age_ms"]
        if size is not None:
            array = tensors.from_binary(name, tensor.datatype, tensor.shape, memoryview(body)[at : at + size])
            # Where the JSON part ends decides the alignment; runtimes may want it whole.
            inputs[name] = array if array.flags.aligned else array.copy()
            at += size
        elif i in loose:
            inputs[name] = tensors.from_json(name, tensor.datatype, tensor.shape, loose[i])
        else:
            inputs[name] = _from_json(tensor)
    if at != len(body):
        raise _bad("binary data", f"{len(body) - at} bytes more", "as many as the inputs' binary_data_size say")
    parameters = request.parameters
    binary = parameters is not None and parameters.get("binary_data_output") is True
    wanted = tuple(_wanted(output, binary) for output in request.outputs) if request.outputs else None
    if wanted is not None and len(dict(wanted)) != len(wanted):
        names = [name for name, _ in wanted]
        raise _bad(next(name for name in names if names.count(name) > 1), "it twice", "every output once")
    more = parameters if parameters is not None and not MORE.isdisjoint(parameters) else None
    return InferRequest(request.id or "", inputs, wanted, binary, more, ages)


def build_response(
    model: str,
    version: str,
    request: InferRequest,
    outputs: dict[str, Array],
    prediction: bytes = b"",
    notes: dict[str, Any] | None = None,
) -> tuple[bytes, int]:
    """The body of the answer, and the length of its JSON part when binary tensors follow, else -1.

    Args:
        model, version: to be echoed.
        request: what was asked.
        outputs: all that the model gave.
        prediction: id for late labels; empty for none.
        notes: further parameters of the answer.

    Raises:
        BadInput: an output was asked for that the model does not have.
    """
    chosen = request.wanted
    if chosen is None:
        chosen = tuple((name, request.binary) for name in outputs)
    described: list[_Output | _BinaryOutput] = []
    raw: list[bytes] = []
    for name, binary in chosen:
        if name not in outputs:
            raise _bad(name, "an unknown output", f"one of {', '.join(outputs)}")
        array = outputs[name]
        datatype = tensors.datatype_of(array)
        if binary:
            data = tensors.to_binary(array)
            raw.append(data)
            described.append(_BinaryOutput(name, datatype, array.shape, {"binary_data_size": len(data)}))
        else:
            # msgspec writes NaN and infinities as null; only text needs more than that.
            values = tensors.to_json(array) if array.dtype.kind in "OSU" else array.ravel().tolist()
            described.append(_Output(name, datatype, array.shape, values))
    parameters: _Prediction | dict[str, Any] | None = _Prediction(prediction.decode()) if prediction else None
    if notes:
        parameters = {**notes, "prediction_id": prediction.decode()} if prediction else notes
    head = _encoder.encode(_Response(model, version, request.id, described, parameters))
    return (b"".join([head, *raw]), len(head)) if raw else (head, -1)


def error_body(message: str) -> bytes:
    """The protocol's error object."""
    return _encoder.encode({"error": message})


def _bad(field: str, got: object, wanted: str) -> BadInput:
    text = str(got)
    shown = field if len(field) <= 80 else field[:77] + "..."
    return BadInput(Violation(shown, text if len(text) <= 80 else text[:77] + "...", wanted))


def _judge(text: bytes, binary: int, takes: intake.Takes) -> None:
    sketch = _sketched(text)
    _short("parameters", sketch.parameters, intake.SMALL)
    if len(memoryview(sketch.outputs)) > intake.LEAST_BODY:
        raise _bad("outputs", f"{len(memoryview(sketch.outputs))} bytes of them", f"at most {MOST_TENSORS}")
    for tensor in sketch.inputs:
        _short(f"{tensor.name}.shape", tensor.shape, _MOST_SHAPE)
        _short(f"{tensor.name}.parameters", tensor.parameters, intake.SMALL)
        try:
            shape = msgspec.json.decode(tensor.shape, type=list[int])
        except (msgspec.DecodeError, RecursionError) as error:
            raise _bad(f"{tensor.name}.shape", "something else", f"a list of sizes: {error}") from None
        data = memoryview(tensor.data)
        values = takes.judge(tensor.name, shape, len(data) + binary)
        if len(data) > intake.SMALL:
            intake.judge_text(tensor.name, tensor.datatype, shape, values, data)


def _sketched(text: bytes) -> _Sketch:
    try:
        try:
            return _sketch.decode(text)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            # What stands in the place of these words counts as much.
            return _sketch.decode(text.replace(b"-Infinity", b"0").replace(b"Infinity", b"0").replace(b"NaN", b"0"))
    except msgspec.ValidationError as error:
        raise _bad("request", "something else", f"an inference request: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad("request", "something else", f"JSON: {error}") from None


def _short(name: str, part: msgspec.Raw, most: int) -> None:
    size = len(memoryview(part))
    if size > most:
        raise _bad(name, f"{size} bytes", f"at most {most}")


def _from_json(tensor: _Input) -> Array:
    code = _FLOAT_CODES.get(tensor.datatype)
    if code is not None:
        try:
            values = _floats.decode(tensor.data)
            # struct refuses what does not fit, and is faster than np.array.
            packed = struct.pack(f"<{len(values)}{code}", *values)
            if -1 not in tensor.shape:
                return np.frombuffer(packed, tensors.DTYPES[tensor.datatype]).reshape(tensor.shape)
        except (msgspec.DecodeError, ValueError, OverflowError):
            # Nested, with nulls, or wrong: the thorough way decides and explains.
            pass
    if not bytes(tensor.data):
        raise _bad(f"{tensor.name}.data", "nothing", "a list, or binary data")
    try:
        data = msgspec.json.decode(tensor.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(f"{tensor.name}.data", "something else", f"JSON: {error}") from None
    return tensors.from_json(tensor.name, tensor.datatype, tensor.shape, data)


def _with_bare_nan(text: bytes, error: Exception) -> tuple[_Request, dict[int, Any]]:
    """The request and, by input, the data that has no JSON form."""
    try:
        if b"NaN" not in text and b"Infinity" not in text:
            raise error
        value = json.loads(text)
        found = value.get("inputs") if isinstance(value, dict) else None
        loose = {
            i: tensor.pop("data")
            for i, tensor in enumerate(found if isinstance(found, list) else [])
            if isinstance(tensor, dict) and "data" in tensor
        }
        return msgspec.convert(value, _Request), loose
    except (ValueError, RecursionError) as second:
        raise _bad("request", "something else", f"JSON: {second}") from None


def _binary_size(tensor: _Input, left: int) -> int | None:
    parameters = tensor.parameters or {}
    if "shared_memory_region" in parameters:
        raise _bad(f"{tensor.name}.parameters", "shared_memory_region", "data in the request: it is not supported")
    size = parameters.get("binary_data_size")
    if size is None:
        return None
    if type(size) is not int or not 0 <= size <= left:
        raise _bad(f"{tensor.name}.parameters.binary_data_size", size, f"0 to {left}, the binary data left")
    return size


def _wanted(output: _Wanted, binary: bool) -> tuple[str, bool]:
    parameters = output.parameters or {}
    for parameter in ("classification", "shared_memory_region"):
        if parameter in parameters:
            raise _bad(f"{output.name}.parameters", parameter, "binary_data or nothing: it is not supported")
    return output.name, parameters.get("binary_data", binary) is True
