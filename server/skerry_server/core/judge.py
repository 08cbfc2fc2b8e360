"""The judge: whether a candidate makes devices worse than their controls, by a sequential randomisation test.

Pure. ``judge(design, look, memory)`` gives a ruling and what to keep for the next look; the same values always give the same bytes, so that
stored looks replay. The unit is the device with its whole trajectory, never the request: requests of one device hang
together, and a test that takes them as independent sends good candidates back in one rollout of five and more.

Per guardrail, at each look:

* NO_DATA while an arm lacks devices or trials. Nothing is spent then.
* FAIL when the assignment that was made is among those removed (``judge_spending``, on the residuals of ``judge_residuals``).
* PASS at the planned end only, when the upper bound of the ratio is below the margin (``judge_bounds``); asked once, at the first
  look that has the data, since asking again and again would find a lucky moment. Where events are too few for any ratio, a rate also
  passes when the candidates' own Clopper-Pearson bound is not above what is negligible. For incidence, which no few devices can
  bound, the difference of shares itself.
* INCONCLUSIVE otherwise, with what is missing.

With fewer reference assignments than 1/alpha no comparison can fail honestly: then only the absolute limit counts
(``judge_absolute``), and the finding is marked ``uncontrolled``.

The whole FAILs when one guardrail does, has NO_DATA while one has, and PASSes when all do. All guardrails of a stage together
are wrong with a chance of at most the sum of their alphas.

References: Fisher 1935 (randomisation); Lan and DeMets 1983, Biometrika 70 (spending); Hoeffding 1952, Pitman 1937 (exactness);
the rule of removal is that of sequential permutation tests, e.g. Besag and Clifford 1991.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from skerry_server.core import judge_absolute as absolute
from skerry_server.core import judge_bounds as bounds
from skerry_server.core import judge_residuals as res
from skerry_server.core import judge_spending as spending
from skerry_server.core import judge_words as words
from skerry_server.core.judge_assignments import Assignments, Floats, assignments
from skerry_server.core.judge_values import (
    LEVEL_STEPS,
    Arm,
    Design,
    Finding,
    Guardrail,
    Look,
    Memory,
    Reading,
    Ruling,
    Tail,
    Unit,
    Verdict,
    level_of,
)

__all__ = [
    "Arm",
    "Design",
    "Finding",
    "Guardrail",
    "Look",
    "Memory",
    "Reading",
    "Ruling",
    "Tail",
    "Unit",
    "Verdict",
    "judge",
    "level_of",
    "replay",
    "verdict_of",
]


_Judged = TypeVar("_Judged", Finding, "_Case")


def judge(design: Design, look: Look, memory: Memory) -> tuple[Ruling, Memory]:
    """Rules on one look.

    Args:
        memory: what the look before gave; ``Memory()`` before the first.

    Raises:
        ValueError: the memory is of another design, the look does not follow it, or a reading does not fit the design.
    """
    kept = _follow(design, look, memory)
    findings = []
    tails: dict[str, Tail] = {}
    for rail in design.guardrails:
        case = _Case(design, rail, look, kept)
        tails[rail.name] = case.tail
        findings.append(case.finding())
    verdict = _together(found.verdict for found in _watched(findings))
    ruling = Ruling(
        look=look.number,
        information=kept.information,
        verdict=verdict,
        reasons=tuple(found.reason for found in findings),
        findings=tuple(findings),
        uncontrolled=any(found.uncontrolled for found in findings),
        missing=tuple(f"{found.guardrail}:{what}" for found in findings for what in found.missing),
    )
    return ruling, _with(kept, tails)


def verdict_of(design: Design, look: Look, memory: Memory) -> tuple[Verdict, Memory]:
    """Verdict and memory as ``judge`` gives them, without the numbers that explain: for simulations."""
    kept = _follow(design, look, memory)
    cases = [_Case(design, rail, look, kept) for rail in design.guardrails]
    return _together(case.verdict for case in _watched(cases)), _with(
        kept, {case.rail.name: case.tail for case in cases}
    )


def replay(design: Design, looks: Iterable[Look]) -> list[tuple[Ruling, Memory]]:
    """Rules on stored looks from the first, and so explains what was decided."""
    found: list[tuple[Ruling, Memory]] = []
    memory = Memory()
    for look in looks:
        ruling, memory = judge(design, look, memory)
        found.append((ruling, memory))
    return found


def _follow(design: Design, look: Look, memory: Memory) -> Memory:
    """The memory as this look finds it: information never runs backwards."""
    mark = design.fingerprint()
    if memory.design not in ("", mark):
        raise ValueError(f"memory: of design {memory.design}, not of {mark}")
    if look.number <= memory.looks:
        raise ValueError(f"look: number {look.number} does not follow {memory.looks}")
    if not math.isfinite(look.information):
        raise ValueError("look: information is no finite number")
    lacking = [rail.name for rail in design.guardrails if rail.name not in look.readings]
    if lacking:
        raise ValueError(f"look: no reading of {', '.join(lacking)}")
    information = max(0.0, memory.information, look.information)
    return Memory(design=mark, looks=look.number, information=information, tails=memory.tails)


def _with(kept: Memory, tails: dict[str, Tail]) -> Memory:
    return Memory(design=kept.design, looks=kept.looks, information=kept.information, tails=tails)


def _watched(cases: list[_Judged]) -> list[_Judged]:
    """Those with something to be held against; all, when none has."""
    return [case for case in cases if not case.unwatched] or cases


def _together(verdicts: Iterable[Verdict]) -> Verdict:
    found = list(verdicts)
    for verdict in ("FAIL", "NO_DATA", "INCONCLUSIVE"):
        if verdict in found:
            return verdict
    return "PASS"


def _rounded(value: float | None) -> float | None:
    """To 9 digits: enough to explain, and what is stored then does not hang on the last bit of a logarithm."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.9g}")


class _Case:
    """One guardrail at one look. The constructor rules; ``finding`` works out what explains it."""

    def __init__(self, design: Design, rail: Guardrail, look: Look, kept: Memory) -> None:
        self.rail = rail
        self.design = design
        self.information = kept.information
        self.ended = design.planned and kept.information >= 1 - 1e-9
        self.look = look.number
        self.tail = kept.tails.get(rail.name, Tail())
        self.assigned: Assignments = assignments(design)
        try:
            self.columns = res.Columns(look.readings[rail.name], self.assigned)
        except ValueError as error:
            raise ValueError(f"{rail.name}: {error}") from None
        self.uncontrolled = rail.alpha * self.assigned.total < 1
        self.allowed = 0
        self.lacking = self._lacking()
        self.verdict = self._rule()

    def _lacking(self) -> dict[str, str]:
        lacking: dict[str, str] = {}
        inside, seen = self.assigned.candidate, self.columns.seen
        arms = {"candidate": inside} if self.uncontrolled else {"candidate": inside, "control": ~inside}
        for name, arm in arms.items():
            of, devices = int(np.count_nonzero(arm)), int(np.count_nonzero(arm & seen))
            least = min(self.design.min_devices, max(1, of)) if self.uncontrolled else self.design.min_devices
            n = int(self.columns.n[arm].sum()) if self.rail.min_n else 0
            if devices < least:
                lacking[f"{name}_devices"] = f"{devices} of {least} {name}s with data"
            elif n < self.rail.min_n:
                lacking[f"{name}_n"] = f"{n} of {self.rail.min_n} {words.trials(self.rail)} on {name}s"
        return lacking

    @functools.cached_property
    def candidate(self) -> Arm:
        """The candidates in sum."""
        return self._arm(candidate=True)

    @functools.cached_property
    def control(self) -> Arm:
        """The controls in sum."""
        return self._arm(candidate=False)

    def _arm(self, *, candidate: bool) -> Arm:
        found, inside = self.columns, self.assigned.candidate == candidate
        seen = inside & found.seen
        n, x = int(found.n[seen].sum()), int(found.x[seen].sum())
        value: float | None = None
        if n and self.rail.kind == "level":
            value, x = math.exp(float(found.x[seen].mean()) / LEVEL_STEPS), 0
        elif n:
            value = x / n
        return Arm(devices=int(seen.sum()), of=int(inside.sum()), n=n, x=x, value=_rounded(value))

    def _rule(self) -> Verdict:
        if self.tail.failed_at:
            return "FAIL"
        if self.lacking:
            return "NO_DATA"
        if self.uncontrolled:
            return self._rule_alone()
        total = self.assigned.total
        self.allowed = spending.allowance(self.rail.alpha, self.information, total, planned=self.design.planned)
        if self.allowed > self.tail.count:
            removed = spending.remove(self.statistics, spending.unpack(self.tail.removed, total), self.allowed)
            failed = bool(removed[self.assigned.observed])
            self.tail = Tail(
                removed=spending.pack(removed),
                count=int(np.count_nonzero(removed)),
                failed_at=self.look if failed else 0,
                settled=self.tail.settled,
            )
            if failed:
                return "FAIL"
        if self.ended and self.tail.settled is None:
            self.tail = replace(self.tail, settled="PASS" if self._passes() else "INCONCLUSIVE")
        return self.tail.settled or "INCONCLUSIVE"

    @property
    def unwatched(self) -> bool:
        """Too few devices to compare, and no absolute limit either."""
        return self.uncontrolled and self.rail.limit is None

    @functools.cached_property
    def residuals(self) -> res.Residuals:
        """Of every unit."""
        return res.residuals(self.rail.kind, self.columns, self.assigned)

    @functools.cached_property
    def statistics(self) -> Floats:
        """Of every reference assignment."""
        return self.assigned.sums(self.residuals.values)

    def _passes(self) -> bool:
        if self.rail.kind == "incidence":
            return (self.candidate.value or 0) - (self.control.value or 0) <= self.rail.margin
        if bounds.excluded(self.rail.kind, self.columns, self.assigned, self.rail.margin):
            return True
        return self.own_bound is not None and self.own_bound <= self.rail.negligible

    @property
    def own_bound(self) -> float | None:
        """95 % bound of the candidates' own rate, where one so small as to be negligible passes."""
        if self.rail.kind != "rate" or self.rail.negligible <= 0:
            return None
        # Of one who claims a million right answers no more is taken than of others.
        fair, candidate = self.columns.fair, self.assigned.candidate
        return absolute.upper_rate(math.ceil(fair.x[candidate].sum()), math.floor(fair.n[candidate].sum()))

    def _rule_alone(self) -> Verdict:
        limit, arm = self.rail.limit, self.candidate
        if limit is None or arm.value is None:
            return "INCONCLUSIVE"
        if self.rail.kind == "rate":
            if absolute.fails(arm.x, arm.n, limit, self.rail.alpha):
                self.tail = Tail(failed_at=self.look)
                return "FAIL"
            good = absolute.upper_rate(arm.x, arm.n) <= limit
        else:
            good = arm.value <= limit
            if not good and (self.ended or self.rail.kind == "incidence"):
                self.tail = Tail(failed_at=self.look)
                return "FAIL"
        if self.ended and self.tail.settled is None:
            self.tail = replace(self.tail, settled="PASS" if good else "INCONCLUSIVE")
        return self.tail.settled or "INCONCLUSIVE"

    def finding(self) -> Finding:
        """The verdict with its numbers and its reason."""
        rail = self.rail
        compare = not self.uncontrolled and self.candidate.n > 0 and self.control.n > 0
        ratio = upper = detectable = None
        at_least: int | None = None
        statistic: float | None = None
        if compare:
            statistic = float(self.statistics[self.assigned.observed])
            at_least = int(np.count_nonzero(self.statistics >= statistic))
            ratio = self._ratio()
            if ratio is not None and rail.kind != "incidence":
                upper = bounds.upper_bound(rail.kind, self.columns, self.assigned, ratio)
            detectable = bounds.detectable(
                rail.kind, self.columns, self.assigned, self.residuals, self.statistics, rail.alpha
            )
        prior = self.residuals.prior if compare else None
        missing = tuple(self.lacking)
        if self.verdict == "INCONCLUSIVE":
            missing = ("below_limit" if self.uncontrolled else "below_margin",) if self.ended else ("planned_end",)
        if self.unwatched:
            missing = ("limit",)
        found = Finding(
            guardrail=rail.name,
            kind=rail.kind,
            verdict=self.verdict,
            reason="",
            candidate=self.candidate,
            control=self.control,
            alpha=rail.alpha,
            margin=rail.margin,
            missing=missing,
            uncontrolled=self.uncontrolled,
            limit=rail.limit,
            ratio=_rounded(ratio),
            upper=_rounded(upper),
            detectable_ratio=_rounded(detectable),
            assignments=self.assigned.total,
            allowed=self.allowed,
            removed=self.tail.count,
            failed_at=self.tail.failed_at,
            at_least=at_least,
            statistic=_rounded(statistic),
            common_factor=_rounded(self.residuals.common_factor) if compare else None,
            prior_mean=_rounded(prior.mean) if prior else None,
            prior_cv=_rounded(prior.cv) if prior else None,
        )
        return words.with_reason(
            found,
            tuple(self.lacking.values()),
            look=self.look,
            ended=self.ended,
            planned=self.design.planned,
            own=None if self.own_bound is None else (self.own_bound, rail.negligible),
        )

    def _ratio(self) -> float | None:
        candidate, found = self.assigned.candidate, self.columns
        if self.rail.kind == "incidence":
            return (self.candidate.value or 0) - (self.control.value or 0)
        if self.rail.kind == "level":
            values = res.levels(found, self.assigned)
            means = [float(values[found.seen & (candidate == arm)].mean()) for arm in (True, False)]
            return math.exp(means[0] - means[1])
        foretold, x = found.prior.rate * found.fair.n, found.common.x
        seen = [(float(x[candidate == arm].sum()), float(foretold[candidate == arm].sum())) for arm in (True, False)]
        (bad, expected), (other, others) = seen
        return (bad / expected) / (other / others) if expected > 0 and other > 0 and others > 0 else None
