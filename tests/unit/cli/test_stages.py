"""People count the stages of a rollout from 1, as the page and ``device why`` do; JSON counts from 0."""

from __future__ import annotations

import pytest
from skerry_cli.commands import rollout


def test_a_decision_in_the_first_stage_says_stage_1() -> None:
    made = {"at_ms": 1_000, "stage": 0, "action": "advance", "verdict": "PASS", "reason": "well"}
    assert rollout.decision_text(made).endswith("stage 1: advance [PASS]: well")


@pytest.mark.parametrize(("stage", "said"), [(0, "1 of 2"), (1, "2 of 2"), (2, "all 2 passed")])
def test_a_rollout_says_where_it_stands(stage: int, said: str) -> None:
    assert rollout.stage_text({"stage": stage, "plan": {"stages": [{}, {}]}}) == said
