"""How often the judge sends an identical candidate back: per rollout, all guardrails and looks together, worst cell."""

from __future__ import annotations

from tests.bench import judge_simulation as sim
from tests.bench.result import Result

RUNS = 70


def run(runs: int = RUNS) -> Result:
    found = sim.simulate(sim.CELLS, 1.0, ("judge", "naive z-test", "fixed threshold", "Kayenta"), runs)
    worst = max(found, key=lambda cell: found[cell].share("judge"))
    together = sim.Tally(runs=runs * len(found))
    for tally in found.values():
        for name, yes in tally.yes.items():
            together.yes[name] = together.yes.get(name, 0) + yes
    naive = max(tally.share("naive z-test") for tally in found.values())
    beside = "; ".join(f"{name} {together.text(name)}" for name in ("naive z-test", "fixed threshold", "Kayenta"))
    return Result(
        bench="judge_false_rollback",
        value=found[worst].share("judge"),
        unit="share of rollouts",
        peer="naive z-test at each look, its worst cell",
        peer_value=naive,
        n=runs * len(found),
        note=(
            f"worst of {len(found)} cells ({worst}): {found[worst].text('judge')} of {runs} runs; all cells together "
            f"{together.text('judge')}; {beside}; budget 5 % in the worst cell with 4,000 runs each"
        ),
    )
