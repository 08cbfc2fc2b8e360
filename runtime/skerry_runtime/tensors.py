"""Tensors of the Open Inference Protocol and numpy arrays, both ways.

JSON data may be flat or nested, row-major. ``null`` stands for NaN in floating-point data (JSON has no NaN). Numbers are
never guessed from text, and a number that does not fit its datatype is refused, not wrapped. Binary data is little-endian,
row-major; BOOL is one byte; a BYTES element is its length (uint32) and its bytes.

In numpy BYTES is an object array: of ``bytes`` when it came in binary, of ``str`` when it came as JSON or from a label.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from skerry_runtime.errors import BadInput, Violation

Array: TypeAlias = npt.NDArray[Any]
Tensors: TypeAlias = dict[str, Array]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
_DATATYPES = {dtype: name for name, dtype in DTYPES.items()}
_WANTED = {"b": "true or false", "u": "whole numbers", "i": "whole numbers", "f": "numbers", "O": "strings"}


class Spec(NamedTuple):
    """Name, datatype and shape of a tensor; -1 for a size that varies."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether an array of that shape fits."""
        return len(shape) == len(self.shape) and all(w in (-1, g) for w, g in zip(self.shape, shape, strict=True))


def datatype_of(array: Array) -> str:
    """The datatype of an array. Raises ``BadInput`` for one that the protocol does not have."""
    found = _DATATYPES.get(array.dtype)
    if found is None:
        found = "BYTES" if array.dtype.kind in "SUO" else None
    if found is None:
        raise BadInput(Violation("tensor", str(array.dtype), "a datatype of the Open Inference Protocol"))
    return found


def dtype_of(name: str, datatype: str) -> np.dtype[Any]:
    """The numpy type of a datatype. Raises ``BadInput`` that names the tensor."""
    try:
        return DTYPES[datatype]
    except (KeyError, TypeError):
        raise BadInput(Violation(f"{name}.datatype", _shown(datatype), f"one of {', '.join(DTYPES)}")) from None


def from_json(name: str, datatype: str, shape: Sequence[int], data: Any) -> Array:
    """Reads the ``data`` of a JSON tensor.

    Args:
        name: for the error.
        datatype: of the protocol.
        shape: sizes, all known.
        data: list, flat or nested, as a JSON parser gives it.

    Raises:
        BadInput: unknown datatype, a shape that is none, elements of another kind or outside the datatype's range, or
            another number of them than the shape says.
    """
    dtype = dtype_of(name, datatype)
    wanted = _size(name, shape)
    if not isinstance(data, (list, tuple)):
        raise BadInput(Violation(f"{name}.data", type(data).__name__, "a list"))
    if dtype.kind == "O":
        flat = _flat_strings(name, data)
    else:
        flat = _flat_numbers(name, dtype, data)
    if flat.size != wanted:
        raise BadInput(Violation(f"{name}.data", f"{flat.size} elements", f"{wanted} for shape {list(shape)}"))
    return flat.reshape(shape)


def to_json(array: Array) -> list[Any]:
    """The flat ``data`` of a tensor. NaN and infinities become ``null``: JSON has neither."""
    if array.dtype.kind == "f":
        values: list[Any] = array.ravel().tolist()
        if not np.isfinite(array).all():
            values = [v if math.isfinite(v) else None for v in values]
        return values
    if array.dtype.kind in "OSU":
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in array.ravel().tolist()]
    return array.ravel().tolist()


def from_binary(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """Reads a tensor of the binary extension; numbers are a read-only view on ``data``, not a copy.

    Raises:
        BadInput: unknown datatype, a shape that is none, or another number of bytes than the shape says.
    """
    dtype = dtype_of(name, datatype)
    wanted = _size(name, shape)
    if dtype.kind == "O":
        return _from_binary_bytes(name, wanted, bytes(data)).reshape(shape)
    if len(data) != wanted * dtype.itemsize:
        raise BadInput(
            Violation(name, f"{len(data)} bytes", f"{wanted * dtype.itemsize} for {datatype} of shape {list(shape)}")
        )
    if dtype.kind == "b":
        raw = np.frombuffer(data, np.uint8)
        if raw.size and raw.max() > 1:
            raise BadInput(Violation(name, f"byte {raw.max()}", "bytes 0 or 1 for BOOL"))
        return raw.view(np.bool_).reshape(shape)
    return np.frombuffer(data, dtype.newbyteorder("<")).view(dtype).reshape(shape)


def to_binary(array: Array) -> bytes:
    """The bytes of a tensor in the binary extension."""
    if array.dtype.kind in "OSU":
        parts = [v if isinstance(v, bytes) else str(v).encode() for v in array.ravel().tolist()]
        return b"".join(piece for part in parts for piece in (struct.pack("<I", len(part)), part))
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _size(name: str, shape: Sequence[int]) -> int:
    if not isinstance(shape, (list, tuple)) or len(shape) > 16:
        raise BadInput(Violation(f"{name}.shape", _shown(shape), "a list of at most 16 sizes"))
    total, all_but_zeros = 1, 1
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 40:
            raise BadInput(Violation(f"{name}.shape", _shown(shape), "whole sizes >= 0"))
        total *= size
        all_but_zeros *= size or 1
    if all_but_zeros >= 1 << 40:
        # Also with a 0 among them: numpy makes no such array.
        raise BadInput(Violation(f"{name}.shape", _shown(shape), "sizes whose product is below 2**40"))
    return total


def _flat_numbers(name: str, dtype: np.dtype[Any], data: Sequence[Any]) -> Array:
    try:
        found = np.array(data)
    except (ValueError, OverflowError):
        raise BadInput(Violation(f"{name}.data", "rows of different lengths", "a full array")) from None
    found = found.ravel()
    if found.size == 0:
        return found.astype(dtype)
    if dtype.kind in "iu" and found.dtype.kind == "f":
        # numpy reads a list of whole numbers on both sides of 2**63 as floats.
        found = np.array(data, np.object_).ravel()
    if found.dtype.kind == "O":
        found = _from_objects(name, dtype, found)
    # A list that mixes numbers and text becomes text in numpy: refused here, never parsed.
    kinds = {"b": "b", "u": "iu", "i": "iu", "f": "fiu"}[dtype.kind]
    if found.dtype.kind not in kinds:
        kind = {"b": "true or false", "U": "strings", "f": "fractions"}.get(found.dtype.kind, str(found.dtype))
        raise BadInput(Violation(f"{name}.data", kind, f"{_WANTED[dtype.kind]} for {_DATATYPES[dtype]}"))
    if dtype.kind in "iu":
        low, high = int(found.min()), int(found.max())
        bounds = np.iinfo(dtype)
        if low < bounds.min or high > bounds.max:
            outside = low if low < bounds.min else high
            raise BadInput(
                Violation(f"{name}.data", str(outside), f"{bounds.min} to {bounds.max} for {_DATATYPES[dtype]}")
            )
        return found.astype(dtype)
    if found.dtype.itemsize <= dtype.itemsize or dtype.kind == "b":
        return found.astype(dtype)
    with np.errstate(over="ignore"):
        narrow = found.astype(dtype)
    if np.isinf(narrow).any() and not np.array_equal(np.isinf(narrow), np.isinf(found)):
        raise BadInput(Violation(f"{name}.data", str(np.abs(found).max()), f"numbers that fit {_DATATYPES[dtype]}"))
    return narrow


def _from_objects(name: str, dtype: np.dtype[Any], found: Array) -> Array:
    # Lists with null, whole numbers beyond 64 bits, objects, or rows nested unevenly.
    whole = dtype.kind in "iu"
    values: list[Any] = []
    for i, value in enumerate(found.tolist()):
        if value is None and dtype.kind == "f":
            values.append(math.nan)
        elif dtype.kind in "fiu" and type(value) in ((int,) if whole else (int, float)):
            values.append(value)
        else:
            got = "a fraction" if whole and type(value) is float else _shown(value)
            raise BadInput(Violation(f"{name}.data[{i}]", got, f"{_WANTED[dtype.kind]} for {_DATATYPES[dtype]}"))
    try:
        return np.array(values, dtype if whole else np.float64)
    except OverflowError:
        raise BadInput(
            Violation(f"{name}.data", "a number beyond it", f"numbers that fit {_DATATYPES[dtype]}")
        ) from None


def _flat_strings(name: str, data: Sequence[Any]) -> Array:
    flat: list[Any] = []
    rest = list(reversed(data))
    while rest:
        value = rest.pop()
        if isinstance(value, (list, tuple)):
            rest.extend(reversed(value))
        elif isinstance(value, (str, bytes)):
            flat.append(value)
        else:
            raise BadInput(Violation(f"{name}.data[{len(flat)}]", _shown(value), "strings for BYTES"))
    found = np.empty(len(flat), np.object_)
    found[:] = flat
    return found


def _from_binary_bytes(name: str, wanted: int, data: bytes) -> Array:
    values: list[bytes] = []
    at = 0
    while at < len(data):
        if len(values) == wanted:
            raise BadInput(Violation(name, f"more than {wanted} elements", str(wanted)))
        if at + 4 > len(data):
            raise BadInput(Violation(name, f"{len(data) - at} bytes after the last element", "a length of 4 bytes"))
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + length > len(data):
            raise BadInput(Violation(name, f"an element of {length} bytes, {len(data) - at} left", "whole elements"))
        values.append(data[at : at + length])
        at += length
    if len(values) != wanted:
        raise BadInput(Violation(name, f"{len(values)} elements", str(wanted)))
    found = np.empty(wanted, np.object_)
    found[:] = values
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
