"""Names the model that brings its worker down again and again.

A worker that dies leaves a note of the models that were in work at that moment; those are the suspects of that crash. One model
in a worker is always the suspect. A crash without a suspect (between two requests, in a library's own thread) speaks against
nobody: a model must not go back for what another one did. What served before and does not start any more is counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from skerry_agent.core.lifecycle import CRASHES, CRASHES_WITHIN_S

NOT_THE_BUNDLE = frozenset({"start_timeout", "not_enough_memory", "process_not_started", "runtime_missing"})
"""Codes of a start that failed for a busy or small moment of this device, or for want of a runtime: no model's fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crash:
    """One end of a serving worker: when, seconds since boot, and (model, digest) of each suspect."""

    at_s: float
    suspects: tuple[tuple[str, str], ...] = ()


def remembered(crashes: Sequence[Crash], now_s: float) -> list[Crash]:
    """Those that still count."""
    return [crash for crash in crashes if now_s - crash.at_s <= CRASHES_WITHIN_S]


def charges(crashes: Sequence[Crash], now_s: float) -> Counter[tuple[str, str]]:
    """How often each (model, digest) was a suspect, of the crashes that still count."""
    return Counter(suspect for crash in remembered(crashes, now_s) for suspect in crash.suspects)


def culprit(crashes: Sequence[Crash], now_s: float) -> tuple[str, str] | None:
    """The (model, digest) that brought its worker down too often; of several the one that did most often; None without."""
    found = charges(crashes, now_s)
    worst = max(found, key=lambda suspect: (found[suspect], suspect), default=None)
    return worst if worst is not None and found[worst] >= CRASHES else None
