"""What a check finds, and what checks are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.identity import Identity

Verdict = Literal["ok", "warn", "fail"]
NET_S = 5.0
"""How long anything that is asked may take to answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line. ``advice``: what to do; empty when all is well."""

    check: str
    verdict: Verdict
    detail: str
    advice: str = ""


@dataclass(kw_only=True, slots=True)
class Patient:
    """The device under examination. ``status``, ``identity``: once a check has found them."""

    config: Config
    status: dict[str, Any] | None = None
    identity: Identity | None = None
    clock: Clock = field(default_factory=Clock)
