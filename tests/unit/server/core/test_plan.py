"""Plans from JSON: what is kept, what is refused, and that every fault is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_server.core import plan as p


def test_a_plan_survives_the_database() -> None:
    plan = p.Plan(
        stages=(
            p.Stage(devices=4, min_devices=3, min_inferences=50),
            p.Stage(share=0.5, min_seconds=3),
            p.Stage(share=1.0),
        ),
        gates=p.Gates(max_error_rate=None, latency_p95_ms=12.5, max_invalid_rate=0.1, max_reverts=2, require="golden"),
        stratified=True,
    )
    assert p.read_plan(json.loads(json.dumps(plan.to_builtins()))) == plan


def test_what_is_left_out_has_its_default() -> None:
    assert p.read_plan({"stages": [{"share": 1}]}) == p.Plan(stages=(p.Stage(share=1.0),))


@pytest.mark.parametrize(
    ("plan", "where"),
    [
        ({}, "plan.stages"),
        ([], "plan: wanted an object"),
        ({"stages": []}, "plan.stages"),
        ({"stages": [{"share": 1}] * 21}, "plan.stages"),
        ({"stages": "all"}, "plan.stages"),
        ({"stages": [{}]}, "plan.stages[0]: wanted exactly one of"),
        ({"stages": [{"share": 0}]}, "plan.stages[0]: wanted exactly one of"),
        ({"stages": [{"share": 0.5, "devices": 1}]}, "plan.stages[0]: wanted exactly one of"),
        ({"stages": [{"share": True}]}, "plan.stages[0].share"),
        ({"stages": [{"devices": 1.5}]}, "plan.stages[0].devices"),
        ({"stages": [{"devices": "4"}]}, "plan.stages[0].devices"),
        ({"stages": [{"devices": 4, "min_devices": 5}]}, "plan.stages[0].min_devices"),
        ({"stages": [{"devices": 4, "min_seconds": 9, "max_seconds": 8}]}, "plan.stages[0].max_seconds"),
        ({"stages": [{"devices": 4}, {"devices": 3}]}, "plan.stages[1]"),
        ({"stages": [{"share": 0.5}, {"share": 0.25}]}, "plan.stages[1]"),
        ({"stages": [{"share": float("nan")}]}, "plan.stages[0].share"),
        ({"stages": [{"share": 1, "surprise": 1}]}, "plan.stages[0].surprise: no such field"),
        ({"stages": [{"share": 1}], "gates": {"require": "hope"}}, "plan.gates.require"),
        ({"stages": [{"share": 1}], "gates": {"max_error_rate": 2}}, "plan.gates.max_error_rate"),
        ({"stages": [{"share": 1}], "gates": 3}, "plan.gates: wanted an object"),
        ({"stages": [{"share": 1}], "stratified": "yes"}, "plan.stratified"),
        ({"stages": [{"share": 1}], "extra": 1}, "plan.extra"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_is_refused_with_the_place(plan: Any, where: str) -> None:
    with pytest.raises(p.BadPlan) as refused:
        p.read_plan(plan)
    assert any(where in fault for fault in refused.value.faults), refused.value.faults


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(p.BadPlan) as refused:
        p.read_plan({"stages": [{"devices": 0}, {"share": 3}], "gates": {"max_reverts": -1}})
    assert len(refused.value.faults) == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["stages", "gates", "devices", "share", "min_devices", "require", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_a_plan_or_a_refusal(value: Any) -> None:
    try:
        found = p.read_plan(value)
    except p.BadPlan:
        return
    assert p.read_plan(found.to_builtins()) == found


def test_a_models_first_bundle_goes_to_everyone_in_one_stage() -> None:
    plan = p.read_plan(
        {"stages": [{"devices": 1}, {"devices": 4, "min_devices": 3, "min_inferences": 9, "max_seconds": 60}]}
    )
    only = p.whole_fleet(plan).stages
    assert only == (p.Stage(share=1.0, min_devices=3, min_inferences=9, max_seconds=60),)
