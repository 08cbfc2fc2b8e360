"""How many different requests there were, about: who copies a model asks it over and over with inputs that never repeat.

Each row of inputs is hashed into the registers of ``histogram.Distinct``, which merge exactly. The hash has no key, so that windows
of different workers and devices count the same question once. The registers are in memory until the window is cut: a
killed worker's are lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
from skerry_contract import histogram as h


class Distinct:
    """Registers under way. ``names``: of the inputs, in the order in which they are hashed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._registers = bytearray(h.DISTINCT_REGISTERS)
        self._any = False

    def add(self, inputs: Mapping[str, npt.NDArray[Any]], rows: int) -> None:
        """Counts a request, each of its rows on its own."""
        arrays = [inputs[name] for name in self._names if name in inputs]
        if rows <= 1 or any(array.ndim == 0 or len(array) != rows for array in arrays):
            self._count(arrays)
            return
        for row in range(rows):
            self._count([array[row] for array in arrays])

    def _count(self, arrays: Sequence[Any]) -> None:
        hasher = hashlib.blake2b(digest_size=8)
        for array in arrays:
            hasher.update(_bytes_of(array))
        register, rank = h.distinct_register(int.from_bytes(hasher.digest(), "little"))
        if rank > self._registers[register]:
            self._registers[register] = rank
            self._any = True

    def take(self) -> bytes:
        """The registers since the last call; empty when nothing was counted."""
        if not self._any:
            return b""
        found = bytes(self._registers)
        self._registers = bytearray(h.DISTINCT_REGISTERS)
        self._any = False
        return found


class Clients:
    """Of each client on its own, and of those beyond ``MOST`` together. ``names``: of all models' inputs."""

    MOST = 32
    REST = "other"

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._clients: dict[str, Distinct] = {}

    def add(self, client: str, inputs: Mapping[str, npt.NDArray[Any]], rows: int) -> None:
        """Counts an answered request."""
        found = self._clients.get(client)
        if found is None:
            name = client if len(self._clients) < self.MOST else self.REST
            found = self._clients.setdefault(name, Distinct(self._names))
        found.add(inputs, rows)

    def take(self) -> dict[str, bytes]:
        """Registers since the last call, of those who asked."""
        taken = {name: found.take() for name, found in self._clients.items()}
        return {name: registers for name, registers in taken.items() if registers}


def _bytes_of(array: Any) -> bytes:
    if getattr(array, "dtype", None) is not None and array.dtype.kind not in "OSU":
        data: bytes = array.tobytes()
        return data
    values = array.ravel().tolist() if hasattr(array, "ravel") else [array]
    parts = [value if isinstance(value, bytes) else str(value).encode() for value in values]
    # Lengths in front, as on the wire: "a", "bc" is not "ab", "c".
    return b"".join(b"%d:%b" % (len(part), part) for part in parts)
