"""How often the judge sends a candidate with twice the errors back, worst cell."""

from __future__ import annotations

from tests.bench import judge_simulation as sim
from tests.bench.result import Result

RUNS = 50


def run(runs: int = RUNS) -> Result:
    found = sim.simulate(sim.CELLS, 2.0, ("judge", "unadjusted devices"), runs)
    beside = sim.simulate(sim.BESIDE, 2.0, ("judge",), runs)
    worst = min(found, key=lambda cell: found[cell].share("judge"))
    harder = "; ".join(f"{cell} {tally.text('judge')}" for cell, tally in beside.items())
    return Result(
        bench="judge_power",
        value=found[worst].share("judge"),
        unit="share of rollouts",
        peer="Mann-Whitney over devices, unadjusted, once at the end; its worst cell",
        peer_value=min(tally.share("unadjusted devices") for tally in found.values()),
        n=runs * len(found),
        note=f"worst of {len(found)} cells ({worst}): {found[worst].text('judge')} of {runs} runs; beside: {harder}",
    )
