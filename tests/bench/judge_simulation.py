"""Fleets for the judge's benchmarks: simulated rollouts, run through the real judge beside simpler rules.

A rollout is 10 candidates beside 190 controls: 60 looks over 1,020 requests of each device, after 2,040 before. Each has four guardrails,
whose alphas sum to 0.04: labelled errors (base 1 %), failed requests (0.2 %), the p95, and devices in trouble (2 %). A cell says how devices
differ and how their rates move:

* ``cv``: coefficient of variation of the devices' own rates (gamma);
* ``rho``, ``log_sd``: first-order autoregression of each device's log rate, from look to look;
* ``shock``: log-sd of a factor common to the whole fleet at each look; above 0, the rate of all doubles in the middle as well;
* ``odd``: the share of wrong answers of one control, from the beginning of the stage on: a device that is broken, not the candidate;
* ``stages``: with two, ten more devices become candidates in a second stage of as many looks, alphas are halved, as a plan of two compared
  stages has it, and what doubles does so where the second begins. Sent back is who FAILs in either.

The simpler rules see the labelled errors only, which is in their favour where nothing is wrong.

``python -m tests.bench.judge_simulation --runs 1000`` prints the table of docs/reference/benchmarks.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats
from skerry_server.core.judge import Design, Guardrail, Look, Memory, Reading, Unit, Verdict, verdict_of
from skerry_server.core.judge_values import LEVEL_STEPS

CANDIDATES, CONTROLS = 10, 190
DEVICES = CANDIDATES + CONTROLS
LOOKS, PER_LOOK, PRE_LOOKS = 60, 17, 120
BASE, FAILURES, TROUBLE = 0.01, 0.002, 0.02
MARGIN = 1.5
RAILS = (
    Guardrail(name="labelled_errors", kind="rate", alpha=0.02, margin=MARGIN, min_n=100),
    Guardrail(name="failures", kind="rate", alpha=0.01, margin=2.0, min_n=100),
    Guardrail(name="latency", kind="level", alpha=0.005, margin=1.25),
    Guardrail(name="trouble", kind="incidence", alpha=0.005, margin=0.2),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """See the module."""

    cv: float
    rho: float
    log_sd: float
    shock: float
    pre_looks: int = PRE_LOOKS
    stages: int = 1
    odd: float = 0.0

    def __str__(self) -> str:
        parts = [f"CV {self.cv:g}", f"rho {self.rho:g}", f"log-sd {self.log_sd:g}"]
        if self.shock:
            parts.append("shock and doubling")
        if self.pre_looks != PRE_LOOKS:
            parts.append(f"pre-period {self.pre_looks * PER_LOOK}")
        if self.odd:
            parts.append(f"one control {self.odd:.0%} wrong")
        if self.stages > 1:
            parts.append(f"{self.stages} stages")
        return ", ".join(parts)


CELLS = tuple(
    Cell(cv=cv, rho=rho, log_sd=0.5, shock=shock) for cv in (0, 0.5, 1) for rho in (0, 0.8) for shock in (0, 0.5)
)
STAGED = (
    Cell(cv=0.5, rho=0.8, log_sd=0.5, shock=0, stages=2),
    Cell(cv=0.5, rho=0.8, log_sd=0.5, shock=0.5, stages=2),
    Cell(cv=1, rho=0.8, log_sd=0.5, shock=0.5, stages=2),
)
"""Two compared stages; the judge alone, since the simpler rules know none."""
BESIDE = (
    Cell(cv=1, rho=0.8, log_sd=1.0, shock=0),
    Cell(cv=1, rho=0.8, log_sd=0.5, shock=0, pre_looks=29),
    Cell(cv=1, rho=0.8, log_sd=0.5, shock=0, pre_looks=0),
    Cell(cv=0.5, rho=0.8, log_sd=0.5, shock=0, odd=0.2),
    Cell(cv=0.5, rho=0.8, log_sd=0.5, shock=0, odd=1.0),
)
"""Harder than the budget's cells; reported beside."""
PASS_CELL = Cell(cv=1, rho=0.8, log_sd=0.5, shock=0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fleet:
    """One stage of a simulated rollout. Per device and look of the stage: errors and failures. Sums from before the rollout."""

    name: str
    stage: int
    stages: int
    candidates: int
    errors: np.ndarray
    failures: np.ndarray
    pre_errors: np.ndarray
    pre_failures: np.ndarray
    level: np.ndarray
    pre_level: np.ndarray
    trouble_from: np.ndarray
    pre_n: int

    def looks(self) -> Iterator[Look]:
        errors, failures = self.errors.cumsum(axis=1), self.failures.cumsum(axis=1)
        level = np.rint(self.level.cumsum(axis=1) / np.arange(1, LOOKS + 1) * LEVEL_STEPS).astype(int)
        before = (self.pre_n,) * DEVICES
        pre_errors, pre_failures = tuple(self.pre_errors.tolist()), tuple(self.pre_failures.tolist())
        pre_level = tuple(np.rint(self.pre_level * LEVEL_STEPS).astype(int).tolist())
        once = (1,) * DEVICES
        for t in range(LOOKS):
            n = (PER_LOOK * (t + 1),) * DEVICES
            trouble = tuple((self.trouble_from <= t).astype(int).tolist())
            yield Look(
                number=t + 1,
                information=(t + 1) / LOOKS,
                readings={
                    "labelled_errors": Reading(n=n, x=tuple(errors[:, t].tolist()), pre_n=before, pre_x=pre_errors),
                    "failures": Reading(n=n, x=tuple(failures[:, t].tolist()), pre_n=before, pre_x=pre_failures),
                    "latency": Reading(n=n, x=tuple(level[:, t].tolist()), pre_n=before, pre_x=pre_level),
                    "trouble": Reading(n=once, x=trouble),
                },
            )

    def design(self) -> Design:
        units = tuple(Unit(device=f"d-{i:03}", candidate=i < self.candidates) for i in range(DEVICES))
        rails = tuple(replace(rail, alpha=rail.alpha / self.stages) for rail in RAILS)
        return Design(rollout=self.name, stage=self.stage, units=units, guardrails=rails)


def fleet(cell: Cell, ratio: float, number: int) -> tuple[Fleet, ...]:
    """The stages of the ``number``-th rollout of a cell, whose candidates have ``ratio`` times the errors."""
    name = f"{cell} ratio {ratio:g} run {number}"
    rng = np.random.default_rng(np.frombuffer(name.encode(), np.uint8))
    length = LOOKS * cell.stages
    looks = cell.pre_looks + length
    spans = [slice(LOOKS * stage, LOOKS * (stage + 1)) for stage in range(cell.stages)]

    def counts(base: float, factor: float) -> np.ndarray:
        own = base * (rng.gamma(1 / cell.cv**2, cell.cv**2, DEVICES) if cell.cv else np.ones(DEVICES))
        moves = _autoregression(rng, looks, cell) + common
        rates = own[:, None] * np.exp(moves)
        for stage, span in enumerate(spans):
            rates[: CANDIDATES * (stage + 1), cell.pre_looks :][:, span] *= factor
        return rng.binomial(PER_LOOK, np.minimum(rates, 1.0))

    common = cell.shock * rng.normal(size=looks) - cell.shock**2 / 2
    if cell.shock:
        common[cell.pre_looks + length // 2 :] += math.log(2)
    errors, failures = counts(BASE, ratio), counts(FAILURES, 1.0)
    if cell.odd:
        errors[-1, cell.pre_looks :] = rng.binomial(PER_LOOK, cell.odd, length)
    own = rng.normal(0, 0.4, DEVICES)
    level = own[:, None] + 0.2 * _autoregression(rng, length, replace(cell, log_sd=1.0))
    pre_level = own + rng.normal(0, 0.05, DEVICES)
    return tuple(
        Fleet(
            name=name,
            stage=stage,
            stages=cell.stages,
            candidates=CANDIDATES * (stage + 1),
            errors=errors[:, cell.pre_looks :][:, span],
            failures=failures[:, cell.pre_looks :][:, span],
            pre_errors=errors[:, : cell.pre_looks].sum(axis=1),
            pre_failures=failures[:, : cell.pre_looks].sum(axis=1),
            level=level[:, span],
            pre_level=pre_level,
            trouble_from=np.where(rng.random(DEVICES) < TROUBLE, rng.integers(0, LOOKS, DEVICES), LOOKS),
            pre_n=cell.pre_looks * PER_LOOK,
        )
        for stage, span in enumerate(spans)
    )


def _autoregression(rng: np.random.Generator, looks: int, cell: Cell) -> np.ndarray:
    """Mean one after ``exp``, stationary."""
    steps = rng.normal(size=(looks, DEVICES))
    moves = np.empty((looks, DEVICES))
    moves[0] = steps[0]
    keep = math.sqrt(1 - cell.rho**2)
    for t in range(1, looks):
        moves[t] = cell.rho * moves[t - 1] + keep * steps[t]
    return (cell.log_sd * moves - cell.log_sd**2 / 2).T


# --- rules: whether, and at the latest by the planned end, a rollout is sent back ------------------------------------------


def judged(one: Fleet) -> Verdict:
    """What the judge says at the end, or FAIL as soon as it does."""
    design, memory = one.design(), Memory()
    verdict: Verdict = "NO_DATA"
    for look in one.looks():
        verdict, memory = verdict_of(design, look, memory)
        if verdict == "FAIL":
            return verdict
    return verdict


def _arms(one: Fleet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    looks = np.arange(1, LOOKS + 1) * PER_LOOK
    errors = one.errors.cumsum(axis=1)
    return errors[:CANDIDATES].sum(axis=0), errors[CANDIDATES:].sum(axis=0), looks


def naive_z(one: Fleet) -> bool:
    """A one-sided z-test of two proportions at 5 %, requests taken as independent, at every look."""
    bad, other, looks = _arms(one)
    n, m = looks * CANDIDATES, looks * CONTROLS
    pooled = (bad + other) / (n + m)
    error = np.sqrt(np.maximum(pooled * (1 - pooled) * (1 / n + 1 / m), 1e-18))
    return bool(((bad / n - other / m) / error > stats.norm.ppf(0.95)).any())


def fixed_threshold(one: Fleet) -> bool:
    """More than 1.5 times the controls' error rate at any look, once the candidates made 1,000 requests."""
    bad, other, looks = _arms(one)
    n, m = looks * CANDIDATES, looks * CONTROLS
    return bool(((n >= 1000) & (bad / n > 1.5 * other / m)).any())


def kayenta(one: Fleet) -> bool:
    """Kayenta's Mann-Whitney rule on the arms' error rates per look, at a third, two thirds and the end.

    High when the 95 % interval of the Hodges-Lehmann shift lies above a quarter of the estimated shift.
    """
    candidate = one.errors[:CANDIDATES].sum(axis=0) / (CANDIDATES * PER_LOOK)
    control = one.errors[CANDIDATES:].sum(axis=0) / (CONTROLS * PER_LOOK)
    return any(_high(candidate[:t], control[:t]) for t in (LOOKS // 3, 2 * LOOKS // 3, LOOKS))


def _high(experiment: np.ndarray, control: np.ndarray) -> bool:
    n, m = len(experiment), len(control)
    shifts = np.sort((experiment[:, None] - control[None, :]).ravel())
    drop = n * m / 2 - stats.norm.ppf(0.975) * math.sqrt(n * m * (n + m + 1) / 12)
    low = shifts[max(0, int(drop) - 1)]
    return bool(low > 0.25 * abs(np.median(shifts)))


def unadjusted(one: Fleet) -> bool:
    """One-sided Mann-Whitney test of the devices' own error rates at 5 %, once, at the end: no pre-period is used."""
    rates = one.errors.sum(axis=1)
    return bool(stats.mannwhitneyu(rates[:CANDIDATES], rates[CANDIDATES:], alternative="greater").pvalue < 0.05)


RULES: dict[str, Callable[[Fleet], bool]] = {
    "judge": lambda one: judged(one) == "FAIL",
    "naive z-test": naive_z,
    "fixed threshold": fixed_threshold,
    "Kayenta": kayenta,
    "unadjusted devices": unadjusted,
}
"""Whether a stage is sent back."""


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Tally:
    """How often each rule said yes in ``runs`` rollouts of a cell."""

    runs: int = 0
    yes: dict[str, int] = field(default_factory=dict)

    def add(self, said: dict[str, bool]) -> None:
        self.runs += 1
        for name, yes in said.items():
            self.yes[name] = self.yes.get(name, 0) + yes

    def share(self, name: str) -> float:
        return self.yes.get(name, 0) / self.runs if self.runs else math.nan

    def text(self, name: str) -> str:
        """Share with its 95 % Wilson interval, in percent."""
        low, high = wilson(self.yes.get(name, 0), self.runs)
        return f"{self.share(name):.1%} ({low:.1%} to {high:.1%})"


def wilson(yes: int, runs: int) -> tuple[float, float]:
    interval = stats.binomtest(yes, runs).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def simulate(
    cells: tuple[Cell, ...], ratio: float, rules: tuple[str, ...], runs: int, *, seconds: float = math.inf
) -> dict[Cell, Tally]:
    """Rounds over all cells, so that a run that is cut short has as many rollouts of each."""
    tallies = {cell: Tally() for cell in cells}
    end = time.monotonic() + seconds
    for number in range(runs):
        if time.monotonic() > end:
            break
        for cell, tally in tallies.items():
            stages = fleet(cell, ratio, number)
            tally.add({name: any(RULES[name](stage) for stage in stages) for name in rules})
    return tallies


def passes(ratio: float, runs: int, *, seconds: float = math.inf) -> Tally:
    """How often a candidate with ``ratio`` times the errors PASSes by the planned end: by its labelled errors, and by all four."""
    tally = Tally()
    end = time.monotonic() + seconds
    for number in range(runs):
        if time.monotonic() > end:
            break
        (one,) = fleet(PASS_CELL, ratio, number)
        design, memory = one.design(), Memory()
        verdict: Verdict = "NO_DATA"
        for look in one.looks():
            verdict, memory = verdict_of(design, look, memory)
        tail = memory.tails["labelled_errors"]
        tally.add({"errors": not tail.failed_at and tail.settled == "PASS", "all": verdict == "PASS"})
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="rollouts per cell")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after about so long, with fewer runs")
    wanted = parser.parse_args()
    names = tuple(RULES)
    parts = (
        ("identical candidate", 1.0, CELLS, names, 0.45),
        ("identical candidate, two stages", 1.0, STAGED, ("judge",), 0.15),
        ("twice the errors", 2.0, CELLS + BESIDE, names, 0.2),
    )
    for title, ratio, cells, rules, part in parts:
        began = time.monotonic()
        found = simulate(cells, ratio, rules, wanted.runs, seconds=part * wanted.seconds)
        print(f"\n{title}: sent back\n\n| cell | runs | {' | '.join(rules)} |\n|{'---|' * (len(rules) + 2)}")
        for cell, tally in found.items():
            print(f"| {cell} | {tally.runs} | {' | '.join(tally.text(rule) for rule in rules)} |")
        print(f"\n{time.monotonic() - began:.0f} s", flush=True)
    for ratio in (1.0, MARGIN):
        began = time.monotonic()
        tally = passes(ratio, wanted.runs * len(CELLS), seconds=0.1 * wanted.seconds)
        print(
            f"\nPASS at {ratio:g} times the errors, {PASS_CELL}, {tally.runs} runs: by labelled errors {tally.text('errors')}, "
            f"by all four {tally.text('all')}; {time.monotonic() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
