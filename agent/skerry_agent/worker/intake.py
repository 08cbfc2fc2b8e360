"""What a body may be, judged before it costs anything: inflated no further than the model can use, counted before it is decoded.

A client may send what it likes, 64 MiB of it, and less than that when it is compressed. So the size is judged at the header
block, by what the model's inputs can need; what lies in a body, by its shape and by counting commas and brackets in the text, which is done at
gigabytes per second where decoding makes a Python object of each value. Small bodies can do no harm and are not looked at.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Final

from skerry_contract import manifest as mf
from skerry_runtime.errors import BadInput, Violation

from skerry_agent.worker import http1

SMALL: Final = 64 * 1024
"""A body of so many bytes is read on the event loop, in about a millisecond, whatever it holds."""
MOST_BODY: Final = 64 << 20
LEAST_BODY: Final = 1 << 20
"""Any path takes as much."""
MOST_JSON_VALUES: Final = 4 << 20
"""Of one tensor that comes as JSON: each becomes an object of some 32 bytes."""
_INFERENCE = 4 << 20
"""Of an inference, whatever the model's inputs: names, parameters, and spaces that somebody likes."""
_VALUE = 128
"""Bytes that one number may take in a request: 17 digits, written one to a line and far indented."""
_SLACK = 2048
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class Takes:
    """What one model can take.

    Attributes:
        body_bytes: of a whole request.
    """

    def __init__(self, inputs: Iterable[mf.Tensor], max_rows: int) -> None:
        self._max_rows = max_rows
        self._most = {tensor.name: _most_values(tensor, max_rows) for tensor in inputs}
        free = any(most is None or text for most, text in self._most.values())
        values = sum(most or 0 for most, _ in self._most.values())
        self.body_bytes = MOST_BODY if free else min(MOST_BODY, _INFERENCE + _VALUE * values)

    def judge(self, name: str, shape: Sequence[int], size: int) -> int:
        """How many values a tensor of a large request has, by its shape.

        Args:
            size: bytes that its values take in the request.

        Raises:
            BadInput: more than the model takes, or a shape that is none.
        """
        if len(shape) > 16 or any(length < 0 for length in shape):
            raise BadInput(Violation(f"{name}.shape", str(list(shape[:17])), "at most 16 whole sizes >= 0"))
        rows = shape[0] if shape else 1
        if rows > self._max_rows:
            raise BadInput(Violation(name, f"{rows} rows", f"at most {self._max_rows} in one request"))
        values = math.prod(shape)
        most, _ = self._most.get(name, (0, False))
        # An unknown name is the guards' to refuse, who name those that are known.
        most = MOST_BODY if most is None else max(most, _SLACK)
        if values > most or (name not in self._most and size > SMALL):
            raise BadInput(Violation(name, f"{values} values", f"at most {most} in one request"))
        return values


def _most_values(tensor: mf.Tensor, max_rows: int) -> tuple[int | None, bool]:
    """The most values of an input, None where sizes vary that are no rows; and whether they are text, of any length."""
    shape = tensor.shape
    further = shape[1:]
    rows = max_rows if shape and shape[0] < 0 else shape[0] if shape else 1
    return None if any(size < 0 for size in further) else rows * math.prod(further), tensor.datatype == "BYTES"


def judge_text(name: str, datatype: str, shape: Sequence[int], values: int, data: memoryview | bytes) -> None:
    """Whether the JSON of a tensor's ``data`` can be that many values, before one of them becomes an object.

    Raises:
        BadInput: there are more of them, or more lists than a nested array of that shape has.
    """
    if values > MOST_JSON_VALUES:
        raise BadInput(
            Violation(f"{name}.data", f"{values} values", f"at most {MOST_JSON_VALUES} as JSON: send binary data")
        )
    text = bytes(data)
    if datatype == "BYTES":
        # Each string has two quotes of its own; what is escaped is none of them.
        if text.count(b'"') - text.count(b'\\"') > 2 * values + _SLACK:
            raise _more(name, values)
        text = _STRING.sub(b"", text)
    if text.count(b",") > values + _SLACK or text.count(b"[") > (values + _SLACK) * (len(shape) + 1):
        raise _more(name, values)


def _more(name: str, values: int) -> BadInput:
    return BadInput(Violation(f"{name}.data", "more elements", f"{values}, as its shape says"))


def plain(request: http1.Request, most: int) -> http1.Request:
    """The request with its content encoding undone.

    Raises:
        http1.Refused: it would become longer than ``most`` bytes, or is not what its header says.
    """
    if not request.head.encoding:
        return request
    body, left = _inflated(request, most)
    if left:
        raise http1.Refused(413, f"body: at most {most} bytes when inflated")
    return http1.plainly(request, body)


def small(request: http1.Request) -> http1.Request | None:
    """The request with its content encoding undone, if that is little; else None, and little work is lost.

    Raises:
        http1.Refused: it is not what its header says.
    """
    if len(request.body) > SMALL:
        return None
    if not request.head.encoding:
        return request
    body, left = _inflated(request, SMALL)
    return None if left else http1.plainly(request, body)


def _inflated(request: http1.Request, most: int) -> tuple[bytes, bool]:
    """What it becomes, and whether that is more than so many bytes."""
    unpacker = zlib.decompressobj(wbits=31 if request.head.encoding == b"gzip" else 15)
    try:
        found = unpacker.decompress(request.body, most + 1)
    except zlib.error as error:
        raise http1.Refused(400, f"Content-Encoding: {error}") from None
    if len(found) > most:
        return found, True
    if not unpacker.eof:
        raise http1.Refused(400, "Content-Encoding: the stream is cut short")
    return found, False
