"""What the acceptance suite asks of a public client, so that the same checks run with each; ``tritons`` and ``kserves`` are the clients.

Runs in the clients' own environments: numpy and the standard library only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DATATYPES = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64, "INT8": np.int8,
    "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
    "BYTES": np.object_,
}  # fmt: skip


class Asked(NamedTuple):
    """One inference. ``outputs``: names, None for all. ``binary_in`` and ``binary_out``: the form of tensors each way."""

    model: str
    inputs: Mapping[str, Array]
    outputs: Sequence[str] | None = None
    binary_in: bool = True
    binary_out: bool = True
    id: str = ""


class Answered(NamedTuple):
    """One answer. ``headers`` in lower case, empty where the client does not give them."""

    id: str
    outputs: dict[str, Array]
    headers: Mapping[str, str] = {}


class Client(Protocol):
    """A public client, in its own manner, on one address."""

    def live(self) -> bool: ...
    def ready(self) -> bool: ...
    def model_ready(self, model: str) -> bool: ...
    def metadata(self, model: str) -> dict[str, Any]:
        """What the server says of a model, by the client's call or its connection."""
        ...

    def infer(self, asked: Asked) -> Answered:
        """Raises what the client raises, with the server's words in it, when the server refuses."""
        ...

    def many(self, asked: Sequence[Asked], at_once: int) -> list[Answered]:
        """All of them, so many at a time."""
        ...

    def close(self) -> None: ...


def datatype_of(array: Array) -> str:
    return next(name for name, dtype in DATATYPES.items() if np.dtype(dtype) == array.dtype)


_begun: list[str] = []


def connections() -> int:
    """TCP connections that this process has begun since ``count_connections``."""
    return len(_begun)


def _heard(event: str, _arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        _begun.append(event)


def count_connections() -> None:
    """Begins to count, for good."""
    sys.addaudithook(_heard)
