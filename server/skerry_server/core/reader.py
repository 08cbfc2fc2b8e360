"""Reading builtins field by field, so that every fault is named at once."""

from __future__ import annotations

import math
from typing import Any


class Reader:
    """Takes fields from a map and remembers what was wrong in ``faults``. ``end`` names what nobody took."""

    def __init__(self, value: object, where: str, faults: list[str]) -> None:
        self.where = where
        self.faults = faults
        self.value: dict[str, Any] = {}
        if isinstance(value, dict):
            self.value = dict(value)
        else:
            faults.append(f"{where}: wanted an object, got {type(value).__name__}")

    def number(self, name: str, default: float | None, low: float, high: float, *, whole: bool = False) -> float | None:
        """A number from low to high; the default where it is missing or wrong. None is allowed where it is the default."""
        value = self.value.pop(name, default)
        if value is None and default is None:
            return None
        fits = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and low <= value <= high
            and math.isfinite(value)
        )
        if not fits or (whole and not float(value).is_integer()):
            kind = "a whole number" if whole else "a number"
            self.faults.append(f"{self.where}.{name}: wanted {kind} from {low:g} to {high:g}, got {value!r}")
            return default
        return float(value)

    def count(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """A whole number."""
        value = self.number(name, default, low, high, whole=True)
        return None if value is None else int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; the default where it is missing or wrong."""
        value = self.value.pop(name, default)
        if isinstance(value, bool):
            return value
        self.faults.append(f"{self.where}.{name}: wanted true or false, got {value!r}")
        return default

    def end(self) -> None:
        """Every field that is left is a fault."""
        for name in sorted(map(str, self.value)):
            self.faults.append(f"{self.where}.{name}: no such field")
