"""Judges a new generation from its own counts: keep it, wait, or go back.

The trial looks for harm that a device can see alone within a minute: a runtime that fails, requests that suddenly are
invalid, answers far slower. It says nothing about accuracy; that is the server's judge. Errors are compared by the
Chernoff-Hoeffding bound (W. Hoeffding, JASA 58, 1963, theorem 1): with a true rate of at most p0, the chance of seeing a
share p > p0 among n is at most exp(-n KL(p || p0)). The trial goes back when that is below ``SIGNIFICANCE``. The bound holds at
one look; a trial looks every few seconds, which the small level allows for. p0 is the share of the generation before it, of late
(``recent``), and one request of ``MIN_BEFORE`` more: what little was seen of the old one is no excuse for the new one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

SIGNIFICANCE = 1e-4
TOLERATED_ERRORS = 0.01
"""Share of failed requests that is taken for granted, whatever the old generation did."""
TOLERATED_INVALID = 0.10
MIN_FAILED = 3
MIN_BEFORE = 30
"""Fewer requests to the old generation than these show no share of failures finer than one of so many."""
SLOWER = 4.0
"""How many times the old p95 the new one may take, when the bundle declares no limit of its own."""
SLOWER_MARGIN_MS = 10.0
MIN_TIMED = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What one generation counted of one model since it listens; ``p95_ms`` is None before the first answer.

    ``latency``: answers that took at most each of some bounds.
    """

    ok: int = 0
    invalid: int = 0
    failed: int = 0
    shed: int = 0
    p95_ms: float | None = None
    latency: tuple[int, ...] = ()

    @property
    def answered(self) -> int:
        """Requests that reached the runtime."""
        return self.ok + self.failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """The rules of one trial. ``limit_ms``: the bundle's own p95 limit, None when it declares none."""

    inferences: int
    duration_s: float
    limit_ms: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """``quiet`` is confirmed on golden: time over, too little traffic. ``code`` is set when ``answer`` is revert."""

    answer: Literal["keep", "quiet", "wait", "revert"]
    code: str = ""
    detail: str = ""


def judge_trial(
    trial: Trial, new: Counts, old: Counts | None, elapsed_s: float, *, crashed: bool = False, current: bool = True
) -> Verdict:
    """Decides about the new generation.

    Args:
        trial: its rules.
        new: counts of the new generation since it listens.
        old: counts of late of the one before; None when there was none.
        elapsed_s: seconds since the new generation listens.
        crashed: its process died.
        current: ``new`` says how things stand. When it is old, or a request that it does not hold yet is overdue, nothing
            is kept for it: silence is no lack of traffic. What speaks against the generation still does.
    """
    if crashed:
        return Verdict(answer="revert", code="trial_crashed", detail="the worker died during the trial")
    before = old or Counts()
    worse = _more(new.failed, new.answered, before.failed, before.answered, TOLERATED_ERRORS)
    if worse:
        return Verdict(answer="revert", code="trial_errors", detail=f"failed requests: {worse}")
    seen, seen_before = new.answered + new.invalid, before.answered + before.invalid
    # A first bundle has nothing to go back to: what an application asks wrong is its own. Where another answered, that one's silence of
    # late is no excuse.
    worse = _more(new.invalid, seen, before.invalid, seen_before, TOLERATED_INVALID) if old is not None else None
    if worse:
        return Verdict(answer="revert", code="trial_errors", detail=f"requests called invalid: {worse}")
    # None is never success, whatever the settings want.
    enough, over = new.answered >= max(1, trial.inferences), elapsed_s >= trial.duration_s
    # Latency is judged once, at the end: the first answers after a swap are slow for reasons of their own.
    slow = _slower(trial, new, before) if enough or over else None
    if slow:
        return Verdict(answer="revert", code="trial_slow", detail=slow)
    if not current:
        return Verdict(answer="wait", detail="the worker has not said how it is")
    if enough:
        return Verdict(answer="keep", detail=f"{new.answered} requests, {new.failed} failed")
    if over:
        return Verdict(
            answer="quiet", detail=f"{new.answered} requests in {elapsed_s:.0f} s, wanted {trial.inferences}"
        )
    return Verdict(answer="wait", detail=f"{new.answered} of {trial.inferences} requests")


def _more(bad: int, n: int, bad_before: int, n_before: int, tolerated: float) -> str | None:
    if bad < MIN_FAILED or n == 0:
        return None
    # One bad request is added to the old ones: what a short past did not show is not known to be zero.
    unseen = 1 / (max(n_before, MIN_BEFORE) + 1)
    expected = max(tolerated, bad_before / n_before + unseen if n_before else 0.0)
    share = bad / n
    if expected >= 1 or share <= expected or n * _divergence(share, expected) <= -math.log(SIGNIFICANCE):
        return None
    return f"{bad} of {n}, before {bad_before} of {n_before}"


def _divergence(p: float, q: float) -> float:
    found = p * math.log(p / q)
    return found if p >= 1 else found + (1 - p) * math.log((1 - p) / (1 - q))


def _slower(trial: Trial, new: Counts, before: Counts) -> str | None:
    if new.p95_ms is None or new.answered < MIN_TIMED:
        return None
    if trial.limit_ms is not None:
        if new.p95_ms <= trial.limit_ms:
            return None
        if before.p95_ms is None or before.p95_ms <= trial.limit_ms:
            return f"p95 {new.p95_ms:.2f} ms, the bundle allows {trial.limit_ms:g} ms"
        # The device missed the limit with the old model too: only a relative loss speaks against the new one.
    if before.p95_ms is not None and before.answered >= MIN_TIMED:
        if new.p95_ms > before.p95_ms * SLOWER + SLOWER_MARGIN_MS:
            return f"p95 {new.p95_ms:.2f} ms, before {before.p95_ms:.2f} ms"
    return None
