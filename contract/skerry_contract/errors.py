"""What can be wrong with bytes that came from elsewhere."""

from __future__ import annotations

from typing import Any


class ContractError(Exception):
    """The peer's data cannot be used. Never raised for a bug of ours."""

    code = "contract"


class Malformed(ContractError):
    """The bytes do not have the form the contract asks for.

    Attributes:
        what: the thing that was read, for example ``manifest``.
        where: the place in it, for example ``$.variants[0].files``; empty when it is the whole.
        expected: what should have stood there.
    """

    code = "malformed"

    def __init__(self, what: str, expected: str, *, where: str = "") -> None:
        self.what = what
        self.where = where
        self.expected = expected
        super().__init__(f"{what}{' at ' + where if where else ''}: {expected}")


def misfit_in(what: str, error: Exception, kind: Any, value: Any) -> Malformed:
    """The ``Malformed`` of a value that does not fit its type: ``error`` is what msgspec raised."""
    # Only here: what is well-formed, which is nearly all, does not pay for it.
    from skerry_contract import misfit

    where, words = misfit.words(error, kind, value)
    return Malformed(what, words, where=f"$.{where}" if where and not where.startswith("[") else f"${where}")


class UnsupportedVersion(ContractError):
    """The schema number is newer than this program understands."""

    code = "unsupported_version"

    def __init__(self, what: str, got: int, newest: int) -> None:
        self.what = what
        self.got = got
        self.newest = newest
        super().__init__(f"{what}: schema {got} is newer than {newest}, the newest this program reads")
