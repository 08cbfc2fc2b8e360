"""How often a candidate at the margin PASSes by the planned end."""

from __future__ import annotations

from tests.bench import judge_simulation as sim
from tests.bench.result import Result

RUNS = 300


def run(runs: int = RUNS) -> Result:
    tally = sim.passes(sim.MARGIN, runs)
    return Result(
        bench="judge_false_pass",
        value=tally.share("errors"),
        unit="share of rollouts",
        n=runs,
        note=(
            f"margin {sim.MARGIN:g}, {sim.PASS_CELL}; judged on labelled errors {tally.text('errors')}; "
            f"on all four guardrails together {tally.text('all')}"
        ),
    )
