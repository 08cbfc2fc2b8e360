"""Plans from JSON: what is kept, what is refused, and that every fault is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_server.core import plan as p
from skerry_server.core.judge_plan import design_of


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


# --- the judge ---------------------------------------------------------------------------------------------------------


def test_a_judge_survives_being_stored() -> None:
    wanted = p.read_plan(
        {
            "stages": [{"devices": 4}, {"share": 1}],
            "judge": {
                "guardrails": {"labelled_errors": {"alpha": 0.03, "margin": 1.2, "limit": 0.3}, "trouble": {}},
                "end_labels": 500,
                "guard_s": 0,
                "small_fleet": True,
            },
        }
    )
    assert p.read_plan(json.loads(json.dumps(wanted.to_builtins()))) == wanted
    assert wanted.judge is not None
    assert [rail.name for rail in wanted.judge.guardrails] == ["labelled_errors", "trouble"]
    assert (wanted.judge.guard_s, wanted.judge.planned) == (0, True)
    assert wanted.judge.information(9e9, 250) == 0.5


def test_without_a_judge_nothing_is_judged() -> None:
    plan = p.read_plan({"stages": [{"devices": 4}], "judge": None})
    assert plan.judge is None
    assert not plan.is_judged(0)


def test_the_usual_guardrails_are_wrong_in_four_of_a_hundred_rollouts_at_most() -> None:
    plan = p.read_plan({"stages": [{"devices": 2}, {"devices": 4}, {"share": 1}], "judge": {"end_s": 60}})
    assert plan.judge is not None
    assert sum(rail.alpha for rail in plan.judge.guardrails) == pytest.approx(0.04)
    assert [plan.is_judged(stage) for stage in range(4)] == [True, True, False, False]
    design = design_of(plan.judge, rollout="r", stage=0, compared=plan.compared, units=[], limits={"failures": 0.05})
    assert sum(rail.alpha for rail in design.guardrails) == pytest.approx(0.02), "divided over the stages compared"
    assert {rail.name: rail.limit for rail in design.guardrails}["failures"] == 0.05


@pytest.mark.parametrize(
    ("judge", "where"),
    [
        ({"guardrails": {"accuracy": {}}}, "judge.guardrails.accuracy"),
        ({"guardrails": {}}, "judge.guardrails"),
        ({"guardrails": {"failures": {"alpha": 0}}}, "failures.alpha"),
        ({"guardrails": {"failures": {"margin": 1}}}, "failures.margin"),
        ({"guardrails": {"failures": {"margins": 2}}}, "failures.margins"),
        ({"guardrails": {"failures": {"alpha": 0.15}, "trouble": {"alpha": 0.15}}}, "alpha adds up"),
        ({"end_s": 1, "end_labels": 1}, "at most one of"),
        ({"look_s": 0}, "judge.look_s"),
        ({"small_fleet": 1}, "judge.small_fleet"),
        ({"looks": 1}, "judge.looks"),
        ([], "plan.judge"),
    ],
    ids=str,
)
def test_a_judge_is_refused_with_the_place_of_each_fault(judge: Any, where: str) -> None:
    with pytest.raises(p.BadPlan) as refused:
        p.read_plan({"stages": [{"devices": 4}], "judge": judge})
    assert len(refused.value.faults) == 1
    assert where in refused.value.faults[0]


def test_a_plan_with_nothing_to_compare_needs_consent() -> None:
    with pytest.raises(p.BadPlan, match="nothing to compare with"):
        p.read_plan({"stages": [{"share": 1}], "judge": {}})
    assert p.read_plan({"stages": [{"share": 1}], "judge": {"small_fleet": True}}).is_judged(0)


# --- a judge that could never see or never pass ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "judge", "where"),
    [
        ([{"devices": 1}, {"share": 1}], {"end_labels": 1000}, "plan.stages[0].devices"),
        ([{"devices": 2}, {"devices": 3}, {"share": 1}], {"min_devices": 3}, "plan.stages[0].devices"),
        ([{"devices": 4, "max_seconds": 60}, {"share": 1}], {"end_s": 3600}, "plan.stages[0].max_seconds (60)"),
        ([{"devices": 4}, {"devices": 9, "max_seconds": 60}], {"end_s": 60}, "plan.stages[1].max_seconds (60)"),
        ([{"devices": 4}, {"share": 1}], {"end_s": 604_800}, "plan.stages[0].max_seconds (86400)"),
        ([{"share": 1, "max_seconds": 60}], {"end_s": 60, "small_fleet": True}, "plan.stages[0].max_seconds (60)"),
    ],
    ids=str,
)
def test_a_new_plan_whose_judge_could_never_see_or_never_pass_is_refused(stages: Any, judge: Any, where: str) -> None:
    value = {"stages": stages, "judge": judge}
    with pytest.raises(p.BadPlan) as refused:
        p.read_new_plan(value)
    assert len(refused.value.faults) == 1
    assert where in refused.value.faults[0]
    # A rollout that was made before this was asked goes on.
    stored = p.read_plan(value)
    assert p.read_plan(stored.to_builtins()) == stored


@pytest.mark.parametrize(
    ("stages", "judge"),
    [
        ([{"devices": 1}, {"share": 1}], None),
        ([{"devices": 1}, {"share": 1}], {"min_devices": 1, "end_s": 60}),
        # A stage of everyone beside one that is compared is not judged: its deadline may come first.
        ([{"devices": 4}, {"share": 1, "max_seconds": 60}], {"end_s": 3600}),
        ([{"share": 0.1, "max_seconds": 61}, {"share": 1}], {"end_s": 60}),
    ],
    ids=str,
)
def test_a_new_plan_whose_judge_can_see_and_pass_is_taken(stages: Any, judge: Any) -> None:
    value = {"stages": stages, "judge": judge}
    assert p.read_new_plan(value) == p.read_plan(value)


def test_a_new_plan_that_cannot_be_read_is_refused_as_any_other() -> None:
    with pytest.raises(p.BadPlan, match=r"judge\.looks"):
        p.read_new_plan({"stages": [{"devices": 1}], "judge": {"looks": 1}})
