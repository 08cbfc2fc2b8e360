"""Says whether a worker hangs: a runtime in a deadlock or an endless loop neither answers nor dies.

Two signs. A worker that reports nothing has a loop that stands still. A worker that reports, but whose inference thread has
been at one inference for very much longer than the model's proof took, has lost that thread: every further request to it
queues behind. The first is judged by the supervisor's own waking time, so that neither a suspended device nor a supervisor
that was kept busy takes a healthy worker for a hung one.
"""

from __future__ import annotations

from dataclasses import dataclass

MISSED_REPORTS = 5
"""So many reports in a row must be missing, however long the interval."""
FRESH_REPORTS = 2
"""A report older than so many intervals says nothing about now."""
SLOWER = 10.0
"""An inference may take so many times what it should."""
OVERDUE_S = 1.0
"""No inference is overdue before that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """What is known of a serving worker.

    Attributes:
        silent_s: since its last report, or since it listens; only time in which the supervisor could have heard it.
        busy_s: how long the inference under way has taken, as last reported; 0 without one.
        expected_s: what that inference should take.
    """

    silent_s: float
    busy_s: float = 0.0
    expected_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """``silent_s``, ``inference_s``: from the configuration; ``interval_s``: between two reports."""

    silent_s: float
    inference_s: float
    interval_s: float


def judge_liveness(life: Life, limits: Limits) -> str:
    """Why the worker must be replaced; empty while it need not."""
    longest_s = max(limits.silent_s, MISSED_REPORTS * limits.interval_s)
    if life.silent_s > longest_s:
        return f"no report for {life.silent_s:.1f} s, at most {longest_s:g} s"
    longest_s = max(limits.inference_s, SLOWER * life.expected_s)
    if life.busy_s > longest_s:
        return f"one inference has taken {life.busy_s:.1f} s, at most {longest_s:g} s"
    return ""


def speaks_for_now(life: Life, limits: Limits) -> bool:
    """Whether the last report can carry a verdict: it is fresh, and no inference under way is overdue."""
    fresh = life.silent_s <= FRESH_REPORTS * limits.interval_s + OVERDUE_S
    return fresh and life.busy_s <= max(OVERDUE_S, SLOWER * life.expected_s)
