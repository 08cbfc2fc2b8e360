"""Why the server refuses a request, grouped by what the caller does next.

Every refusal has a stable ``code`` that programs may match, a message for people and an HTTP status for the edge. A bug
stays a plain exception and becomes a 500 without details.
"""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """The request cannot be done as asked.

    Attributes:
        code: stable, e.g. ``not_found``.
        message: what, where and what was expected, in words.
        details: further facts by name; JSON builtins only, no secrets.
        status: HTTP status at the edge.
    """

    status = 400

    def __init__(self, code: str, message: str, **details: Any) -> None:
        self.code = code
        self.message = message
        self.details = details
        super().__init__(f"{code}: {message}")


class Invalid(Refused):
    """The request itself is wrong; sending it again cannot help."""

    status = 422


class Unauthenticated(Refused):
    """Who asks could not be told; a new token or a new nonce is needed."""

    status = 401


class Forbidden(Refused):
    """Who asks is known and may not."""

    status = 403


class NotFound(Refused):
    """The thing that the request names is not there."""

    status = 404

    def __init__(self, kind: str, name: str) -> None:
        super().__init__("not_found", f"there is no {kind} {name!r}", kind=kind, name=name)


class Conflict(Refused):
    """The present state forbids it; the caller looks again and decides anew."""

    status = 409


class TooLarge(Refused):
    """More bytes than are accepted."""

    status = 413

    def __init__(self, what: str, limit_bytes: int) -> None:
        super().__init__("too_large", f"{what}: at most {limit_bytes} bytes", limit_bytes=limit_bytes)


class Unavailable(Refused):
    """A part of the server is not ready; the caller tries again later."""

    status = 503


class BadSettings(Exception):
    """The configuration cannot be used. Holds every fault that was found, one per line."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))
