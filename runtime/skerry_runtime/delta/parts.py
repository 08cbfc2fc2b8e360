"""Where the tensors of a model file lie. Reads protobuf and flatbuffers by hand: no library of a format is needed to make a patch.

What does not read as a model is bytes; nothing here says whether a model is sound.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_SMALLEST = 32
"""Bytes below which a tensor is bytes like those around it."""
_DEPTH_MOST = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A tensor's elements in a file.

    Attributes:
        name: as the model calls it, with what it lies in.
        start: of the first element, bytes from the file's begin.
        size: bytes of all elements, and of the tags before them.
        width: of an element, bytes.
        floats: IEEE floats; else integers (and bfloat16).
        shape: as the model says; empty when it does not.
        tag: a byte before each element, 0 for none.
    """

    name: str
    start: int
    size: int
    width: int
    floats: bool
    shape: tuple[int, ...] = ()
    tag: int = 0

    @property
    def stride(self) -> int:
        """Bytes from one element to the next."""
        return self.width + (self.tag != 0)

    @property
    def count(self) -> int:
        """How many elements."""
        return self.size // self.stride


def find(data: bytes) -> tuple[str, list[Part]]:
    """What a file is, ``onnx``, ``tflite`` or ``bytes``, and its tensors, in order and apart from each other."""
    for kind, read in (("tflite", _tflite), ("onnx", _onnx)):
        try:
            found = read(data)
        except (ValueError, IndexError, struct.error, UnicodeDecodeError, RecursionError):
            continue
        if found:
            return kind, _apart(found, len(data))
    return "bytes", []


def _apart(parts: list[Part], size: int) -> list[Part]:
    """Several names may share a buffer; what overlaps is told once."""
    kept: list[Part] = []
    end = 0
    for part in sorted(parts, key=lambda part: (part.start, -part.size)):
        if part.start >= end and part.start + part.size <= size:
            kept.append(part)
            end = part.start + part.size
    return kept


# --- ONNX ------------------------------------------------------------------------------------------------------------

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
# TensorProto.DataType: width and whether it is an IEEE float.
_ONNX_TYPES = {
    1: (4, True), 2: (1, False), 3: (1, False), 4: (2, False), 5: (2, False), 6: (4, False), 7: (8, False), 9: (1, False),
    10: (2, True), 11: (8, True), 12: (4, False), 13: (8, False), 16: (2, False), 17: (1, False), 18: (1, False), 19: (1, False),
    20: (1, False), 21: (1, False), 22: (1, False),
}  # fmt: skip
_FLOAT_DATA, _DOUBLE_DATA, _RAW_DATA = 4, 10, 9


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, kind, begin and end of the content of each field of a message; of a varint its value stands for the begin."""
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("no such field")
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, kind, value, at
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_EIGHT, _FOUR):
            size = 8 if kind == _EIGHT else 4
        else:
            raise ValueError("no such kind of field")
        if size > end - at:
            raise ValueError("a field ends outside of its message")
        yield number, kind, at, at + size
        at += size


def _onnx(data: bytes) -> list[Part]:
    parts: list[Part] = []
    for number, kind, start, end in _fields(data, 0, len(data)):
        if number == 7 and kind == _BYTES:
            _graph(data, start, end, "", parts, 0)
    return parts


def _graph(data: bytes, start: int, end: int, inside: str, parts: list[Part], depth: int) -> None:
    if depth > _DEPTH_MOST:
        raise ValueError("graphs lie too deep in each other")
    for number, kind, begin, close in _fields(data, start, end):
        if kind == _BYTES and number == 5:
            _tensor(data, begin, close, inside, parts)
        elif kind == _BYTES and number == 1:
            _node(data, begin, close, inside, parts, depth)


def _node(data: bytes, start: int, end: int, inside: str, parts: list[Part], depth: int) -> None:
    name, attributes = "", []
    for number, kind, begin, close in _fields(data, start, end):
        if kind == _BYTES and number == 2:
            name = name or data[begin:close].decode()
        elif kind == _BYTES and number == 5:
            attributes.append((begin, close))
    for begin, close in attributes:
        _attribute(data, begin, close, f"{inside}{name}/", parts, depth)


def _attribute(data: bytes, start: int, end: int, inside: str, parts: list[Part], depth: int) -> None:
    name = ""
    run: list[int] = []
    fields = list(_fields(data, start, end))
    for number, kind, begin, close in fields:
        if kind == _BYTES and number == 1:
            name = data[begin:close].decode()
    for number, kind, begin, close in fields:
        if kind == _BYTES and number in (5, 10):
            _tensor(data, begin, close, f"{inside}{name}/", parts)
        elif kind == _BYTES and number in (6, 11):
            _graph(data, begin, close, f"{inside}{name}/", parts, depth + 1)
        elif kind == _BYTES and number == 7 and (close - begin) % 4 == 0 and close - begin >= _SMALLEST:
            parts.append(Part(name=inside + name, start=begin, size=close - begin, width=4, floats=True))
        elif kind == _FOUR and number == 7:
            run.append(begin)
    # Floats one by one, each behind its tag.
    if run and run[-1] - run[0] == 5 * (len(run) - 1) and 5 * len(run) >= _SMALLEST:
        tag = data[run[0] - 1]
        parts.append(Part(name=inside + name, start=run[0] - 1, size=5 * len(run), width=4, floats=True, tag=tag))


def _tensor(data: bytes, start: int, end: int, inside: str, parts: list[Part]) -> None:
    name, kind_of, shape = "", 0, []
    content: tuple[int, int, int] | None = None
    for number, kind, begin, close in _fields(data, start, end):
        if number == 1 and kind == _VARINT:
            shape.append(begin)
        elif number == 1 and kind == _BYTES:
            at = begin
            while at < close:
                size, at = _varint(data, at)
                shape.append(size)
        elif number == 2 and kind == _VARINT:
            kind_of = begin
        elif number == 8 and kind == _BYTES:
            name = data[begin:close].decode()
        elif number in (_FLOAT_DATA, _RAW_DATA, _DOUBLE_DATA) and kind == _BYTES:
            content = number, begin, close
    if content is None or kind_of not in _ONNX_TYPES:
        return
    number, begin, close = content
    width, floats = _ONNX_TYPES[kind_of]
    size = close - begin
    if size >= _SMALLEST and size % width == 0:
        parts.append(Part(name=inside + name, start=begin, size=size, width=width, floats=floats, shape=tuple(shape)))


# --- TFLite ----------------------------------------------------------------------------------------------------------

# TensorType: width and whether it is an IEEE float. What is packed more tightly is bytes.
_TFLITE_TYPES = {
    0: (4, True), 1: (2, True), 2: (4, False), 3: (1, False), 4: (8, False), 6: (1, False), 7: (2, False), 9: (1, False),
    10: (8, True), 12: (8, False), 15: (4, False), 16: (2, False),
}  # fmt: skip


class _Table:
    """A table of a flatbuffer."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - struct.unpack_from("<i", data, at)[0]
        if self._fields < 0:
            raise ValueError("a table's fields lie before the file")
        self._length = struct.unpack_from("<H", data, self._fields)[0]

    def _place(self, field: int) -> int:
        """Where a field's value lies; 0 for none."""
        slot = 4 + 2 * field
        if slot + 2 > self._length:
            return 0
        offset: int = struct.unpack_from("<H", self._data, self._fields + slot)[0]
        return self._at + offset if offset else 0

    def number(self, field: int, kind: str) -> int:
        place = self._place(field)
        return int(struct.unpack_from(kind, self._data, place)[0]) if place else 0

    def vector(self, field: int) -> tuple[int, int]:
        """Begin and length; of no vector both are 0."""
        place = self._place(field)
        if not place:
            return 0, 0
        start = place + struct.unpack_from("<I", self._data, place)[0]
        (length,) = struct.unpack_from("<I", self._data, start)
        if start + 4 + length > len(self._data):
            raise ValueError("a vector ends outside of the file")
        return start + 4, length

    def tables(self, field: int) -> Iterator[_Table]:
        start, length = self.vector(field)
        for at in range(start, start + 4 * length, 4):
            yield _Table(self._data, at + struct.unpack_from("<I", self._data, at)[0])


def _tflite(data: bytes) -> list[Part]:
    if data[4:8] != b"TFL3":
        raise ValueError("no TFLite")
    model = _Table(data, struct.unpack_from("<I", data, 0)[0])
    buffers = [table.vector(0) for table in model.tables(4)]
    parts: list[Part] = []
    for order, graph in enumerate(model.tables(2)):
        for tensor in graph.tables(0):
            start, size = buffers[tensor.number(2, "<I")]
            width, floats = _TFLITE_TYPES.get(tensor.number(1, "<b"), (1, False))
            if size < _SMALLEST or size % width:
                continue
            at, rank = tensor.vector(0)
            shape = struct.unpack_from(f"<{rank}i", data, at) if rank else ()
            name, length = tensor.vector(3)
            label = f"{order}/{data[name : name + length].decode()}"
            parts.append(Part(name=label, start=start, size=size, width=width, floats=floats, shape=shape))
    return parts
