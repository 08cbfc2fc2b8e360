"""What goes wrong on a device, grouped by what the caller does next.

``Transient``: try again later. ``Rejected``: the peer is wrong, say so and stay as you are. ``Degraded``: this device is short of
something, a person must look. Each has a stable ``code`` and an ``advice``. A bug stays a plain exception.
"""

from __future__ import annotations


class AgentError(Exception):
    """Base: something the agent can name.

    Attributes:
        code: stable, of the update vocabulary where it concerns an update.
        detail: what was seen.
        advice: what a person can do.
        model: the model it is about, where somebody said so.
        after_s: the peer asks not to be asked again before so many seconds; 0 where it said nothing.
    """

    after_s = 0.0

    def __init__(self, code: str, detail: str, *, advice: str = "", model: str = "") -> None:
        self.code = code
        self.detail = detail
        self.advice = advice
        self.model = model
        super().__init__(f"{code}: {detail}")


class Transient(AgentError):
    """May be gone at the next try."""


class Rejected(AgentError):
    """The peer's data or wish cannot be accepted."""


class Degraded(AgentError):
    """This device lacks something: room, rights, a file, a runtime."""


class BadConfig(Exception):
    """The configuration cannot be used. ``faults`` holds everything that was found, one line each."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


def by_kind(kind: str, code: str, detail: str, after_s: object = 0.0) -> AgentError:
    """The error that a courier reported as ``{"kind", "code", "detail", "after_s"}``; an unknown kind counts as transient."""
    error = {"rejected": Rejected, "degraded": Degraded}.get(kind, Transient)(code, detail)
    error.after_s = float(after_s) if isinstance(after_s, (int, float)) and after_s > 0 else 0.0
    return error
