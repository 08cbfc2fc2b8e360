"""What a rollout does next, case by case, and what no evidence can make it do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_server.core import judge as j
from skerry_server.core import rollout as core
from skerry_server.core.judge_plan import Judge
from skerry_server.core.plan import Gates, Plan, Stage

STAGE = Stage(devices=4, min_devices=4, min_inferences=100, min_seconds=10, max_seconds=600)
PLAN = Plan(stages=(STAGE, Stage(share=1.0, min_devices=15, min_inferences=200)), gates=Gates(latency_p95_ms=50))
GOOD: dict[str, Any] = {"candidates": 4, "online": 4, "confirmed": 4, "still": 4, "ok": 100, "p95_ms": 5.0}


def decide(
    elapsed_s: float = 60,
    *,
    state: core.State = "running",
    stage: int = 0,
    plan: Plan = PLAN,
    first: bool = False,
    **seen: Any,
) -> core.Decision:
    rollout = core.Rollout(id="r", state=state, stage=stage, stage_since_ms=1_000_000, plan=plan, first=first)
    return core.decide(rollout, core.Evidence(**(GOOD | seen)), 1_000_000 + int(elapsed_s * 1000))


@pytest.mark.parametrize(
    ("seen", "elapsed_s", "wanted"),
    [
        # everything met
        ({}, 60, ("advance", "PASS")),
        ({}, 10, ("advance", "PASS")),
        # a minimum not met: never a pass
        ({"confirmed": 3}, 60, ("hold", "NO_DATA")),
        ({"confirmed": 3, "on_golden": 1}, 60, ("hold", "NO_DATA")),
        ({"confirmed": 3, "online": 3}, 60, ("hold", "NO_DATA")),
        ({"ok": 99}, 60, ("hold", "NO_DATA")),
        ({"ok": 0, "p95_ms": None}, 60, ("hold", "NO_DATA")),
        ({"p95_ms": None}, 60, ("hold", "NO_DATA")),
        ({"ok": 0, "invalid": 500, "p95_ms": None}, 60, ("hold", "NO_DATA")),
        # met, but the stage has not lasted long enough
        ({}, 9.9, ("hold", "INCONCLUSIVE")),
        ({}, -5, ("hold", "INCONCLUSIVE")),
        # the deadline only pauses
        ({"confirmed": 3}, 600, ("pause", "NO_DATA")),
        ({"ok": 0}, 601, ("pause", "NO_DATA")),
        ({}, 6000, ("advance", "PASS")),
        # errors: 5 % of at least the minimum
        ({"ok": 95, "failed": 5}, 60, ("advance", "PASS")),
        ({"ok": 94, "failed": 6}, 60, ("roll_back", "FAIL")),
        ({"ok": 94, "shed": 6}, 60, ("roll_back", "FAIL")),
        ({"ok": 0, "failed": 5}, 60, ("hold", "NO_DATA")),
        ({"ok": 0, "failed": 6}, 1, ("roll_back", "FAIL")),
        ({"ok": 9500, "failed": 500}, 60, ("advance", "PASS")),
        ({"ok": 9499, "failed": 501}, 60, ("roll_back", "FAIL")),
        # p95, once there is enough to take it from
        ({"p95_ms": 50.0}, 60, ("advance", "PASS")),
        ({"p95_ms": 50.1}, 60, ("roll_back", "FAIL")),
        ({"p95_ms": 50.1, "ok": 99}, 60, ("hold", "NO_DATA")),
        # devices that went back
        ({"reverted": {"trial_crashed": 1}}, 1, ("roll_back", "FAIL")),
        ({"reverted": {"golden_failed": 1}, "ok": 0, "confirmed": 0}, 1, ("roll_back", "FAIL")),
        # a failing gate beats a deadline and a pass
        ({"ok": 94, "failed": 6}, 6000, ("roll_back", "FAIL")),
    ],
    ids=str,
)
def test_a_running_stage(seen: dict[str, Any], elapsed_s: float, wanted: tuple[str, str]) -> None:
    found = decide(elapsed_s, **seen)
    assert (found.action, found.verdict) == wanted, found.reason
    assert found.reason


@pytest.mark.parametrize(
    ("gates", "seen", "verdict"),
    [
        (Gates(require="golden"), {"confirmed": 1, "on_golden": 3}, "PASS"),
        (Gates(require="trial"), {"confirmed": 1, "on_golden": 3}, "NO_DATA"),
        (Gates(max_reverts=2), {"reverted": {"trial_slow": 1, "trial_errors": 1}}, "PASS"),
        (Gates(max_reverts=2), {"reverted": {"trial_slow": 2, "trial_errors": 1}}, "FAIL"),
        (Gates(max_error_rate=None), {"ok": 1, "failed": 99}, "PASS"),
        (Gates(max_error_rate=0.0), {"ok": 5000, "failed": 1}, "FAIL"),
        (Gates(max_invalid_rate=0.1), {"ok": 100, "invalid": 11}, "PASS"),
        (Gates(max_invalid_rate=0.1), {"ok": 100, "invalid": 12}, "FAIL"),
        (Gates(), {"ok": 100, "invalid": 10_000}, "PASS"),
        (Gates(), {"p95_ms": 1e9}, "PASS"),
    ],
    ids=str,
)
def test_each_gate_is_what_the_plan_says(gates: Gates, seen: dict[str, Any], verdict: str) -> None:
    assert decide(plan=Plan(stages=(STAGE,), gates=gates), **seen).verdict == verdict


def test_one_failed_request_of_one_sends_no_fleet_back() -> None:
    plan = Plan(stages=(Stage(share=1.0),))
    assert decide(plan=plan, ok=0, failed=1).verdict == "PASS"
    assert decide(plan=plan, ok=0, failed=2).verdict == "FAIL"


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        ({"online": 4, "confirmed": 4}, "PASS"),
        ({"online": 5, "confirmed": 4}, "NO_DATA"),
        ({"online": 5, "confirmed": 4, "unable": 1}, "PASS"),
        ({"online": 0, "confirmed": 0}, "NO_DATA"),
        ({"online": 1, "confirmed": 0, "unable": 1}, "NO_DATA"),
    ],
    ids=str,
)
def test_without_a_minimum_every_able_device_online_must_confirm_and_at_least_one(
    seen: dict[str, Any], wanted: str
) -> None:
    assert decide(plan=Plan(stages=(Stage(share=1.0),)), **seen).verdict == wanted


@pytest.mark.parametrize(
    ("seen", "wanted", "missing"),
    [
        # one of four is gone: the three that are left do not pass for it
        ({"online": 3, "confirmed": 3, "silent": 1}, "INCONCLUSIVE", ("silent",)),
        # all but one, and all
        ({"online": 1, "confirmed": 1, "silent": 3}, "INCONCLUSIVE", ("silent",)),
        ({"online": 0, "confirmed": 0, "silent": 4}, "INCONCLUSIVE", ("silent", "devices")),
        # silence beside what is lacking anyhow
        ({"online": 3, "confirmed": 2, "silent": 1}, "INCONCLUSIVE", ("silent", "devices")),
        ({"online": 3, "confirmed": 3, "silent": 1, "ok": 9}, "INCONCLUSIVE", ("silent", "inferences")),
        # offline since before the stage: takes the bundle when it returns
        ({"online": 3, "confirmed": 3, "silent": 0}, "PASS", ()),
        # a gate that is broken beats silence
        ({"online": 3, "confirmed": 3, "silent": 1, "failed": 90}, "FAIL", ()),
    ],
    ids=str,
)
def test_candidates_that_fall_silent_hold_the_stage_and_then_pause_it(
    seen: dict[str, Any], wanted: str, missing: tuple[str, ...]
) -> None:
    plan = Plan(stages=(Stage(devices=4, min_inferences=100, max_seconds=600), Stage(share=1.0)))
    found = decide(plan=plan, **seen)
    assert (found.verdict, found.missing) == (wanted, missing), found.reason
    if wanted == "INCONCLUSIVE":
        assert found.action == "hold"
        assert "went offline since the stage began" in found.reason
        late = decide(600, plan=plan, **seen)
        assert (late.action, late.verdict) == ("pause", "INCONCLUSIVE")


def test_a_stated_minimum_decides_how_many_may_fall_silent() -> None:
    plan = Plan(stages=(Stage(devices=4, min_devices=3), Stage(share=1.0)))
    found = decide(plan=plan, online=3, confirmed=3, silent=1, silent_ids=("d-3",))
    assert (found.action, found.verdict) == ("advance", "PASS")
    assert "1 device went offline" in found.reason, "tolerated, not hidden"
    lost = decide(plan=plan, online=2, confirmed=2, silent=2, silent_ids=("d-2", "d-3"))
    assert (lost.action, lost.verdict, lost.missing) == ("hold", "INCONCLUSIVE", ("silent", "devices"))
    assert "d-2, d-3" in lost.reason


def test_a_reason_names_the_first_silent_devices_and_counts_the_rest() -> None:
    plan = Plan(stages=(Stage(share=1.0),))
    found = decide(plan=plan, online=1, confirmed=1, silent=7, silent_ids=("a", "b"))
    assert "7 devices went offline since the stage began (a, b and 5 more)" in found.reason
    assert found.evidence["silent_ids"] == ["a", "b"], "plain JSON, as the database gives it back"


def completing(plan: Plan = PLAN, elapsed_s: float = 0, **seen: Any) -> core.Decision:
    return decide(elapsed_s, state="completing", stage=len(plan.stages), plan=plan, **seen)


def test_completing_wants_the_last_stages_minimums_counted_anew() -> None:
    rest = {"candidates": 16, "online": 15, "confirmed": 15}
    assert completing(**rest, ok=200).action == "finish"
    short = completing(**rest, ok=199)
    assert (short.action, short.verdict, short.missing) == ("hold", "NO_DATA", ("inferences",))
    assert completing(elapsed_s=90_000, **rest, ok=199).action == "pause"


def test_completing_without_any_minimum_still_wants_a_sign_of_life_from_devices_with_traffic() -> None:
    quiet = {"candidates": 4, "online": 4, "ok": 0, "p95_ms": None}
    plan = Plan(stages=(Stage(share=1.0),))
    assert completing(plan, **quiet, confirmed=4).verdict == "NO_DATA"
    assert completing(plan, **(quiet | {"ok": 1}), confirmed=4).action == "finish"
    golden = Plan(stages=(Stage(share=1.0),), gates=Gates(require="golden"))
    assert completing(golden, **quiet, confirmed=0, on_golden=4).action == "finish"


def test_completing_holds_when_devices_fall_silent_in_it() -> None:
    plan = Plan(stages=(Stage(share=1.0, max_seconds=600),))
    gone = {"candidates": 16, "online": 12, "confirmed": 12, "silent": 4, "ok": 500}
    assert (completing(plan, **gone).action, completing(plan, **gone).verdict) == ("hold", "INCONCLUSIVE")
    assert completing(plan, elapsed_s=600, **gone).action == "pause"
    before = gone | {"silent": 0}
    assert completing(plan, **before).action == "finish", "offline since before it began"


def test_completing_waits_for_every_able_device_online_even_above_the_stated_minimum() -> None:
    seen = {"candidates": 20, "online": 18, "ok": 500}
    assert completing(**seen, confirmed=17).missing == ("devices",)
    assert completing(**seen, confirmed=18).action == "finish"
    assert completing(**seen, confirmed=17, unable=1).action == "finish"
    assert completing(**(seen | {"online": 15}), confirmed=15, silent=5).action == "finish", (
        "15 are enough for this plan"
    )
    assert completing(**(seen | {"online": 14}), confirmed=14, silent=6).verdict == "INCONCLUSIVE"


def test_the_last_stage_completes_and_completing_finishes() -> None:
    last = decide(stage=1, candidates=16, online=15, confirmed=15, ok=200)
    assert (last.action, last.verdict) == ("complete", "PASS")
    rest = {"candidates": 16, "online": 15, "ok": 200, "p95_ms": 5.0}
    assert decide(0, state="completing", stage=2, confirmed=15, **rest).action == "finish"
    assert decide(0, state="completing", stage=2, confirmed=14, **rest).action == "hold"
    assert decide(90_000, state="completing", stage=2, confirmed=14, **rest).action == "pause"
    broken = decide(0, state="completing", stage=2, confirmed=15, **(rest | {"ok": 50, "failed": 50}))
    assert (broken.action, broken.verdict) == ("roll_back", "FAIL")


def test_a_paused_rollout_never_goes_forward_and_still_goes_back() -> None:
    assert decide(state="paused").action == "hold"
    assert decide(9e6, state="paused").action == "hold"
    assert decide(state="paused", failed=90).action == "roll_back"


def test_a_first_bundle_that_fails_pauses_because_there_is_none_to_go_back_to() -> None:
    found = decide(first=True, failed=90)
    assert (found.action, found.verdict) == ("pause", "FAIL")
    assert "first bundle" in found.reason
    assert decide(first=True, state="paused", failed=90).action == "hold"


def test_rolling_back_lasts_until_no_device_online_answers_with_the_candidate() -> None:
    assert decide(state="rolling_back", still=1).action == "hold"
    assert decide(9e6, state="rolling_back", still=1).action == "hold"
    assert decide(state="rolling_back", still=0, failed=90).action == "rolled_back"


@pytest.mark.parametrize("state", ["draft", "completed", "rolled_back", "aborted"])
def test_a_rollout_that_does_not_run_is_left_alone(state: core.State) -> None:
    assert decide(state=state, failed=90).action == "hold"


EVIDENCE = st.builds(
    core.Evidence,
    **{
        name: st.integers(0, 500)
        for name in (
            "candidates",
            "online",
            "silent",
            "confirmed",
            "on_golden",
            "on_trial",
            "unable",
            "still",
            "ok",
            "invalid",
            "failed",
            "shed",
        )
    },
    reverted=st.dictionaries(st.sampled_from(["trial_crashed", "golden_failed"]), st.integers(1, 9), max_size=2),
    p95_ms=st.none() | st.floats(0.001, 1e6),
)
ROLLOUTS = st.builds(
    core.Rollout,
    id=st.just("r"),
    state=st.sampled_from(
        ["draft", "running", "paused", "completing", "completed", "rolling_back", "rolled_back", "aborted"]
    ),
    stage=st.just(0),
    stage_since_ms=st.just(0),
    plan=st.just(PLAN),
    first=st.booleans(),
)


@given(ROLLOUTS, EVIDENCE, st.integers(0, 10**7))
def test_every_decision_is_a_transition_of_the_table_and_the_same_again(
    rollout: core.Rollout, evidence: core.Evidence, now_ms: int
) -> None:
    found = core.decide(rollout, evidence, now_ms)
    assert found == core.decide(rollout, evidence, now_ms)
    assert found.reason
    if rollout.state == "completing":
        return  # its stage is past the plan's; see the test above
    core.transition(rollout.state, found.action)


@given(EVIDENCE, st.integers(0, 10**7))
def test_no_evidence_lets_a_stage_pass_below_its_minimums(evidence: core.Evidence, now_ms: int) -> None:
    rollout = core.Rollout(id="r", state="running", stage=0, stage_since_ms=0, plan=PLAN)
    if core.decide(rollout, evidence, now_ms).action == "advance":
        assert evidence.confirmed >= 4
        assert evidence.inferences >= 100
        assert now_ms >= 10_000
        assert not evidence.reverted
        assert evidence.failed + evidence.shed <= 0.05 * evidence.inferences
        assert evidence.p95_ms is not None
        assert evidence.p95_ms <= 50


@given(EVIDENCE, st.integers(0, 10**7), st.booleans())
def test_silence_never_lets_a_stage_pass_that_names_no_minimum(
    evidence: core.Evidence, now_ms: int, completing: bool
) -> None:
    plan = Plan(stages=(Stage(share=1.0),))
    state: core.State = "completing" if completing else "running"
    rollout = core.Rollout(id="r", state=state, stage=int(completing), stage_since_ms=0, plan=plan)
    if core.decide(rollout, evidence, now_ms).verdict == "PASS":
        assert evidence.confirmed >= evidence.online - evidence.unable + evidence.silent


def test_the_table_ends_where_it_should() -> None:
    ends = {"completed", "rolled_back", "aborted"}
    assert set(core.TRANSITIONS.values()) >= ends
    assert not ends & {state for state, _ in core.TRANSITIONS}
    assert {state for state, _ in core.TRANSITIONS} == core.ACTIVE
    with pytest.raises(core.NotAllowed, match="cannot resume; it can do nothing more"):
        core.transition("aborted", "resume")


def test_a_refused_command_names_only_what_a_person_can_ask_for() -> None:
    with pytest.raises(core.NotAllowed, match=r"that is paused cannot pause; it can abort, resume, roll back$"):
        core.transition("paused", "pause")
    with pytest.raises(core.NotAllowed, match=r"that is completing cannot resume; it can abort, pause, roll back$"):
        core.transition("completing", "resume")
    with pytest.raises(core.NotAllowed, match=r"that is paused cannot pause; it can abort, resume$"):
        core.transition("paused", "pause", first=True)
    with pytest.raises(core.NotAllowed, match=r"that is rolling_back cannot roll back; it can abort$"):
        core.transition("rolling_back", "roll_back")


# --- with a judge ------------------------------------------------------------------------------------------------------

JUDGED = Plan(stages=(STAGE, Stage(share=1.0)), judge=Judge(end_s=60))


def ruling(verdict: j.Verdict, *, uncontrolled: bool = False) -> j.Ruling:
    arm = j.Arm(devices=4, of=4, n=100, x=1, value=0.01)
    found = j.Finding(
        guardrail="g", kind="rate", verdict=verdict, reason=f"g: {verdict} it is", candidate=arm, control=arm, alpha=0.04, margin=1.5
    )  # fmt: skip
    missing = () if verdict in ("PASS", "FAIL") else ("g:planned_end",)
    return j.Ruling(
        look=3, information=0.5, verdict=verdict, reasons=(found.reason,), findings=(found,),
        uncontrolled=uncontrolled, missing=missing,
    )  # fmt: skip


def judged(
    said: j.Ruling | None, elapsed_s: float = 60, *, stage: int = 0, plan: Plan = JUDGED, **seen: Any
) -> core.Decision:
    rollout = core.Rollout(id="r", state="running", stage=stage, stage_since_ms=1_000_000, plan=plan)
    return core.decide(rollout, core.Evidence(**(GOOD | seen)), 1_000_000 + int(elapsed_s * 1000), said)


@pytest.mark.parametrize(
    ("said", "seen", "wanted"),
    [
        (ruling("PASS"), {}, ("advance", "PASS", ())),
        (ruling("FAIL"), {}, ("roll_back", "FAIL", ())),
        (ruling("INCONCLUSIVE"), {}, ("hold", "INCONCLUSIVE", ("g:planned_end",))),
        (ruling("NO_DATA"), {}, ("hold", "NO_DATA", ("g:planned_end",))),
        (None, {}, ("hold", "NO_DATA", ("look",))),
        # the gates stay what they are
        (ruling("PASS"), {"ok": 94, "failed": 6}, ("roll_back", "FAIL", ())),
        (ruling("PASS"), {"confirmed": 3}, ("hold", "NO_DATA", ("devices",))),
        (ruling("FAIL"), {"confirmed": 3}, ("roll_back", "FAIL", ())),
        (ruling("INCONCLUSIVE"), {"confirmed": 3}, ("hold", "NO_DATA", ("devices", "g:planned_end"))),
        (ruling("PASS", uncontrolled=True), {}, ("hold", "INCONCLUSIVE", ("small_fleet",))),
        (ruling("FAIL", uncontrolled=True), {}, ("roll_back", "FAIL", ())),
    ],
    ids=str,
)
def test_a_judged_stage(said: j.Ruling | None, seen: dict[str, Any], wanted: tuple[str, str, tuple[str, ...]]) -> None:
    found = judged(said, **seen)
    assert (found.action, found.verdict, found.missing) == wanted
    if said is not None:
        assert found.evidence["look"] == {"number": 3, "information": 0.5, "verdict": said.verdict}


def test_the_reason_is_the_judges() -> None:
    assert judged(ruling("FAIL")).reason == "g: FAIL it is"
    assert judged(ruling("PASS")).reason.startswith("g: PASS it is; 4 devices confirmed")
    assert "--small-fleet" in judged(ruling("PASS", uncontrolled=True)).reason


def test_an_inconclusive_stage_pauses_at_its_deadline_and_is_never_let_go() -> None:
    for said in (ruling("INCONCLUSIVE"), ruling("NO_DATA"), ruling("PASS", uncontrolled=True), None):
        assert judged(said, 600).action == "pause"


def test_consent_lets_a_small_fleet_pass() -> None:
    plan = Plan(stages=JUDGED.stages, judge=Judge(end_s=60, small_fleet=True))
    assert judged(ruling("PASS", uncontrolled=True), plan=plan).action == "advance"


def test_a_stage_of_everyone_is_not_judged() -> None:
    assert judged(None, stage=1).action == "complete"
    assert judged(ruling("INCONCLUSIVE"), stage=2).action == "finish"
