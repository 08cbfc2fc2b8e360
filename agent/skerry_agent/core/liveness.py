"""Says whether a worker must be replaced: it hangs, it leaks, or it spins.

A runtime in a deadlock or an endless loop neither answers nor dies.

Two signs. A worker that reports nothing has a loop that stands still. A worker that reports, but whose inference thread has
been at one inference for very much longer than the model's proof took, has lost that thread: every further request to it
queues behind. The first is judged by the supervisor's own waking time, so that neither a suspended device nor a supervisor
that was kept busy takes a healthy worker for a hung one.

A worker that leaks has more memory of its own than its models declare and than it had when it was ready. One that spins uses a
core while it has nothing to do. Both still answer, so that they can be replaced without a failed request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MISSED_REPORTS = 5
"""So many reports in a row must be missing, however long the interval."""
FRESH_REPORTS = 2
"""A report older than so many intervals says nothing about now."""
SLOWER = 10.0
"""An inference may take so many times what it should."""
OVERDUE_S = 1.0
"""No inference is overdue before that."""
SPINNING_SHARE = 0.2
"""Of a core, used on average without work. An idle worker uses a hundredth; one that spins on a busy device may get no more than this."""
FAR_PAST = 1.5
"""So many times the memory it may have: a worker that has it is ended at once, before the kernel ends something else."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """What a worker said of itself in one report.

    Attributes:
        at_s: when, by its monotonic clock.
        own_mb: memory that is its own: anonymous pages, swapped ones among them. Mapped files (rings, books) are not, nor is what
            clients' requests take until they are answered.
        cpu_s: processor time of all its threads so far.
        work: moves with everything that clients do, served or refused, and everything folded.
        idle: nothing was in work at that moment.
    """

    at_s: float
    own_mb: float = 0.0
    cpu_s: float = 0.0
    work: int = 0
    idle: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Unruly:
    """Why a worker that still answers must be replaced. ``now``: without waiting for a successor."""

    code: Literal["worker_leaked", "worker_spun"]
    detail: str
    now: bool = False


def allowed_mb(*, base_mb: float, ready_mb: float, needs_mb: float, slack_mb: float) -> float:
    """The memory that a worker may have for its own.

    Args:
        base_mb: what it had before it loaded its first model.
        ready_mb: what it had when all were loaded and proved.
        needs_mb: the sum of its models' ``needs.rss_mb``.
        slack_mb: from the configuration.

    A model that declares too little is held against nobody: only what comes on top of what it had when it was ready is.

    >>> allowed_mb(base_mb=20, ready_mb=60, needs_mb=100, slack_mb=64)
    184
    >>> allowed_mb(base_mb=20, ready_mb=60, needs_mb=10, slack_mb=64)
    124
    """
    return max(base_mb + needs_mb, ready_mb) + slack_mb


def spins_since(since: Use | None, now: Use) -> Use:
    """The report since which a worker has used a core without work, after one more report; that one itself when it does not.

    Args:
        since: what this said after the report before; None without one.
    """
    if since is None or now.work != since.work or not (since.idle and now.idle):
        return now
    return since if now.cpu_s - since.cpu_s >= SPINNING_SHARE * (now.at_s - since.at_s) else now


def judge_use(use: Use, since: Use, *, most_mb: float, longest_s: float) -> Unruly | None:
    """Why the worker must be replaced although it answers; None while it need not.

    Args:
        use: its last report.
        most_mb: what it may have, ``allowed_mb``.
        since: ``spins_since`` after it.
        longest_s: how long it may spin.
    """
    if use.own_mb > most_mb:
        detail = f"{use.own_mb:.0f} MB of its own, at most {most_mb:.0f} MB"
        return Unruly(code="worker_leaked", detail=detail, now=use.own_mb > FAR_PAST * most_mb)
    spinning_s = use.at_s - since.at_s
    if spinning_s >= longest_s:
        return Unruly(
            code="worker_spun",
            detail=f"a core in use, as far as there is one, for {spinning_s:.0f} s without work, at most {longest_s:g} s",
        )
    return None
