"""What the judge says of whole stages, and that it cannot be wrong more often than it says."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skerry_server.core import judge as j

ERRORS = j.Guardrail(name="errors", kind="rate", alpha=0.04, margin=1.5, min_n=50)


def design(
    candidates: int = 4, controls: int = 12, *rails: j.Guardrail, strata: Sequence[str] = ("",), **more: Any
) -> j.Design:
    units = tuple(
        j.Unit(device=f"d-{i:03}", stratum=strata[i % len(strata)], candidate=i < candidates)
        for i in range(candidates + controls)
    )
    return j.Design(rollout=more.pop("rollout", "r-1"), stage=0, units=units, guardrails=rails or (ERRORS,), **more)


def looks(
    plan: j.Design,
    factor: float = 1.0,
    *,
    base: float = 0.05,
    looks: int = 5,
    per_look: int = 200,
    seed: int = 1,
    pre: int = 2000,
) -> Iterator[j.Look]:
    """Devices of unequal rates; candidates have ``factor`` times theirs from the stage's start. Information ends at 1."""
    rng = np.random.default_rng(seed)
    own = base * rng.gamma(4, 1 / 4, len(plan.units))
    before = rng.binomial(pre, np.minimum(own, 1))
    now = own * np.array([factor if unit.candidate else 1.0 for unit in plan.units])
    events = np.zeros(len(plan.units), int)
    for number in range(1, looks + 1):
        events = events + rng.binomial(per_look, np.minimum(now, 1))
        reading = j.Reading(
            n=(per_look * number,) * len(plan.units),
            x=tuple(events.tolist()),
            pre_n=(pre,) * len(plan.units),
            pre_x=tuple(before.tolist()),
        )
        names = [rail.name for rail in plan.guardrails]
        yield j.Look(number=number, information=number / looks, readings=dict.fromkeys(names, reading))


def one_look(plan: j.Design, reading: j.Reading, information: float = 1.0) -> j.Ruling:
    return j.judge(
        plan, j.Look(number=1, information=information, readings={plan.guardrails[0].name: reading}), j.Memory()
    )[0]


def verdicts(plan: j.Design, all_looks: Iterator[j.Look]) -> list[str]:
    return [ruling.verdict for ruling, _ in j.replay(plan, all_looks)]


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_three_times_the_errors_fail_before_the_end() -> None:
    plan = design()
    found = verdicts(plan, looks(plan, 3.0))
    assert "FAIL" in found[:4]
    assert set(found[found.index("FAIL") :]) == {"FAIL"}


def test_an_identical_candidate_passes_at_the_planned_end_and_not_before() -> None:
    plan = design(10, 40)
    assert verdicts(plan, looks(plan)) == ["INCONCLUSIVE"] * 4 + ["PASS"]


def test_a_better_candidate_passes() -> None:
    plan = design()
    assert verdicts(plan, looks(plan, 0.3))[-1] == "PASS"


def test_too_little_data_for_the_margin_is_inconclusive_at_the_end() -> None:
    plan = design()
    (*_, (last, _)) = j.replay(plan, looks(plan, base=0.004, per_look=20))
    (found,) = last.findings
    assert last.verdict == "INCONCLUSIVE"
    assert last.missing == ("errors:below_margin",)
    assert found.upper is None or found.upper >= ERRORS.margin
    assert "planned end" in found.reason


def test_without_a_planned_end_nothing_passes_and_a_bad_candidate_still_fails() -> None:
    plan = design(10, 40, planned=False)
    assert set(verdicts(plan, looks(plan, looks=30, per_look=100))) == {"INCONCLUSIVE"}
    assert verdicts(plan, looks(plan, 3.0, looks=30, per_look=100))[-1] == "FAIL"


def test_pass_is_asked_once() -> None:
    """Asking again would find a lucky moment: what was said at the planned end stays, but for a failure."""
    plan = design(10, 40)
    (*_, good), few = looks(plan), next(looks(plan, base=0.004, per_look=20))
    for first, second, wanted in ((good, few, "PASS"), (few, good, "INCONCLUSIVE")):
        memory = j.Memory()
        for number, look in ((1, first), (2, second)):
            at_end = j.Look(number=number, information=number, readings=look.readings)
            ruling, memory = j.judge(plan, at_end, memory)
            assert ruling.verdict == wanted


@pytest.mark.parametrize(
    ("n", "missing"),
    [
        ((0, 0, 0, 60) + (100,) * 12, "errors:candidate_devices"),
        ((10,) * 4 + (100,) * 12, "errors:candidate_n"),
        ((100,) * 4 + (0,) * 12, "errors:control_devices"),
        ((100,) * 4 + (4,) * 12, "errors:control_n"),
        ((0,) * 16, "errors:candidate_devices"),
    ],
    ids=str,
)
def test_below_a_minimum_there_is_no_data_and_nothing_is_spent(n: tuple[int, ...], missing: str) -> None:
    plan = design()
    # Every candidate errs always: no matter.
    x = tuple(n[:4]) + (0,) * 12
    ruling, memory = j.judge(
        plan, j.Look(number=1, information=1.0, readings={"errors": j.Reading(n=n, x=x)}), j.Memory()
    )
    assert ruling.verdict == "NO_DATA"
    assert missing in ruling.missing
    assert memory.tails["errors"] == j.Tail()


def test_one_guardrail_without_data_keeps_the_stage_from_passing_and_not_from_failing() -> None:
    quiet = j.Guardrail(name="labels", kind="rate", alpha=0.02, margin=1.5, min_n=1)
    plan = design(10, 40, ERRORS, quiet)
    nothing = j.Reading(n=(0,) * 50, x=(0,) * 50)
    for factor, wanted in ((1.0, "NO_DATA"), (3.0, "FAIL")):
        (*_, last) = looks(plan, factor)
        ruling, _ = j.judge(
            plan, j.Look(number=1, information=1, readings=last.readings | {"labels": nothing}), j.Memory()
        )
        assert ruling.verdict == wanted


def test_no_errors_at_all_pass_no_test_that_has_no_power() -> None:
    plan = design()
    found = one_look(plan, j.Reading(n=(100,) * 16, x=(0,) * 16, pre_n=(100,) * 16, pre_x=(0,) * 16))
    assert found.verdict == "INCONCLUSIVE"
    assert found.findings[0].removed == 0
    assert found.findings[0].detectable_ratio is None


def few(n: int, *events: int) -> tuple[j.Guardrail, j.Reading]:
    """A rail of which 0.1 % is negligible, and n trials of each of 16 devices with so many events on the first ones."""
    rail = j.Guardrail(name="failures", kind="rate", alpha=0.01, margin=2.0, min_n=100, negligible=0.001)
    x = events + (0,) * (16 - len(events))
    return rail, j.Reading(n=(n,) * 16, x=x, pre_n=(n,) * 16, pre_x=(0,) * 16)


@pytest.mark.parametrize("events", [(), (1,), (0, 0, 0, 0, 2)])
def test_a_rate_shown_to_be_negligible_passes_where_no_ratio_can_be_told(events: tuple[int, ...]) -> None:
    rail, reading = few(10_000, *events)
    found = one_look(design(4, 12, rail), reading)
    assert found.verdict == "PASS"
    assert "of the candidates' own rate is negligible: not above 0.100%" in found.reasons[0]
    assert one_look(design(4, 12, rail), reading, information=0.9).verdict == "INCONCLUSIVE", "only at the planned end"
    strict = dataclasses.replace(rail, negligible=0.0)
    assert one_look(design(4, 12, strict), reading).verdict == "INCONCLUSIVE"


def test_too_few_trials_to_show_that_a_rate_is_negligible_are_inconclusive() -> None:
    # 4 candidates: the bound of 0 of 2,800 is 0.107 %, of 0 of 3,200 0.094 %.
    for n, wanted in ((700, "INCONCLUSIVE"), (800, "PASS")):
        rail, reading = few(n)
        found = one_look(design(4, 12, rail), reading)
        assert found.verdict == wanted
    rail, reading = few(700)
    (reason,) = one_look(design(4, 12, rail), reading).reasons
    assert reason.endswith(
        "the planned end is reached, but no 95 % bound shows the ratio to be below the margin 2, nor is the candidates' own rate "
        "shown to be negligible (bound 0.107%, wanted 0.100%)"
    )


def test_a_candidate_that_is_worse_fails_however_small_its_rate() -> None:
    rail, reading = few(100_000, 20, 20, 20, 20)
    assert one_look(design(4, 12, rail), reading).verdict == "FAIL"


def test_without_a_pre_period_a_gross_effect_is_still_found() -> None:
    plan = design(10, 40)
    (*_, last) = looks(plan, 8.0)
    bare = j.Reading(n=last.readings["errors"].n, x=last.readings["errors"].x)
    assert one_look(plan, bare).verdict == "FAIL"


def test_the_pre_period_tells_a_bad_device_from_a_bad_candidate() -> None:
    """All candidates always erred five times as much as the others: that is not the candidate's doing."""
    plan = design()
    rates = np.array([0.25] * 4 + [0.05] * 12)
    rng = np.random.default_rng(4)
    now = {"n": (400,) * 16, "x": tuple(rng.binomial(400, rates).tolist())}
    past = {"pre_n": (4000,) * 16, "pre_x": tuple(rng.binomial(4000, rates).tolist())}
    assert one_look(plan, j.Reading(**now)).verdict == "FAIL"
    assert one_look(plan, j.Reading(**now, **past)).verdict == "PASS"


def test_a_shock_common_to_both_arms_fails_nobody() -> None:
    plan = design()
    (*_, last) = looks(plan)
    tripled = tuple(min(3 * x, n) for x, n in zip(last.readings["errors"].x, last.readings["errors"].n, strict=True))
    reading = last.readings["errors"]
    shocked = j.Reading(n=reading.n, x=tripled, pre_n=reading.pre_n, pre_x=reading.pre_x)
    found = one_look(plan, shocked)
    assert found.verdict != "FAIL"
    assert found.findings[0].common_factor == pytest.approx(3, rel=0.15)


def test_devices_are_compared_within_their_stratum() -> None:
    """Most candidates are of the slow kind: across kinds they look bad, within them they do not."""
    kinds = ["slow"] * 8 + ["fast"] * 12
    inside = {*range(6), 8}
    rates = np.array([0.3 if kind == "slow" else 0.02 for kind in kinds])
    reading = j.Reading(n=(1000,) * 20, x=tuple(np.random.default_rng(6).binomial(1000, rates).tolist()))
    for strata, wanted in ((kinds, "INCONCLUSIVE"), ([""] * 20, "FAIL")):
        units = tuple(
            j.Unit(device=f"d-{i:02}", stratum=stratum, candidate=i in inside) for i, stratum in enumerate(strata)
        )
        plan = j.Design(rollout="r", stage=0, units=units, guardrails=(ERRORS,))
        assert one_look(plan, reading, 0.99).verdict == wanted


# --- levels and incidence -----------------------------------------------------------------------------------------------

P95 = j.Guardrail(name="p95", kind="level", alpha=0.04, margin=1.2, min_n=10)


def latency(factor: float, *, odd: int | None = None, past: bool = True) -> j.Reading:
    rng = np.random.default_rng(5)
    own = np.exp(rng.normal(0, 0.6, 16))
    now = own * np.exp(rng.normal(0, 0.02, 16))
    now[:4] *= factor
    if odd is not None:
        now[odd] *= 1000
    return j.Reading(
        n=(50,) * 16,
        x=tuple(j.level_of(float(value)) for value in now),
        pre_n=(50,) * 16 if past else (),
        pre_x=tuple(j.level_of(float(value)) for value in own) if past else (),
    )


def test_a_slower_candidate_fails_and_an_equal_one_passes() -> None:
    plan = design(4, 12, P95)
    assert one_look(plan, latency(1.5)).verdict == "FAIL"
    equal = one_look(plan, latency(1.0))
    assert equal.verdict == "PASS"
    assert equal.findings[0].ratio == pytest.approx(1.0, abs=0.05)


def test_the_devices_past_is_what_shows_a_small_slowdown() -> None:
    plan = design(4, 12, P95)
    assert one_look(plan, latency(1.15)).verdict == "FAIL"
    assert one_look(plan, latency(1.15, past=False)).verdict == "INCONCLUSIVE"


def test_one_odd_device_does_not_decide_a_level() -> None:
    plan = design(4, 12, P95)
    assert one_look(plan, latency(1.0, odd=0)).verdict != "FAIL"
    assert one_look(plan, latency(1.5, odd=9)).verdict == "FAIL"


def with_odd(all_looks: Iterator[j.Look], unit: int, n: int, x: int) -> Iterator[j.Look]:
    """The same, but for one device that says it counted ``x`` events in ``n`` trials from the first look on."""
    for look in all_looks:
        ((name, reading),) = look.readings.items()
        columns = {"n": list(reading.n), "x": list(reading.x)}
        columns["n"][unit], columns["x"][unit] = n, x
        changed = dataclasses.replace(reading, **{column: tuple(values) for column, values in columns.items()})
        yield dataclasses.replace(look, readings={name: changed})


ODD_CONTROLS = [(1000, 300), (1000, 1000), (10**8, 10**7), (10**8, 10**8), (10**8, 0)]


@pytest.mark.parametrize(("n", "x"), ODD_CONTROLS)
@pytest.mark.parametrize(("candidates", "controls", "factor"), [(10, 190, 2.0), (4, 12, 4.0)])
def test_one_odd_control_hides_no_bad_candidate(candidates: int, controls: int, factor: float, n: int, x: int) -> None:
    plan = design(candidates, controls)
    found = verdicts(plan, with_odd(looks(plan, factor, base=0.02), -1, n, x))
    assert found[-1] == "FAIL", found


@pytest.mark.parametrize(("n", "x"), ODD_CONTROLS)
@pytest.mark.parametrize("seed", range(3))
def test_one_odd_device_of_either_arm_sends_no_good_candidate_back(n: int, x: int, seed: int) -> None:
    plan = design(10, 190)
    for unit in (0, -1):
        assert "FAIL" not in verdicts(plan, with_odd(looks(plan, base=0.02, seed=seed), unit, n, x))


@pytest.mark.parametrize(("candidates", "controls"), [(10, 190), (4, 12)])
@pytest.mark.parametrize("n", [10**5, 10**8])
def test_a_candidate_that_claims_any_number_of_right_answers_does_not_pass_the_others(
    candidates: int, controls: int, n: int
) -> None:
    plan = design(candidates, controls)
    assert "PASS" not in verdicts(plan, with_odd(looks(plan, 2.5, base=0.02), 0, n, 0))


def test_candidates_in_trouble_fail() -> None:
    plan = design(10, 40, j.Guardrail(name="trouble", kind="incidence", alpha=0.02, margin=0.15))
    n = (1,) * 50

    def ruling(candidates: int, controls: int) -> str:
        x = (1,) * candidates + (0,) * (10 - candidates) + (1,) * controls + (0,) * (40 - controls)
        return one_look(plan, j.Reading(n=n, x=x)).verdict

    assert ruling(5, 1) == "FAIL"
    assert ruling(0, 0) == ruling(1, 0) == ruling(5, 20) == "PASS"
    assert ruling(2, 1) == "INCONCLUSIVE"


# --- fleets too small to compare ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "wrong", "information", "wanted"),
    [
        (0.1, 10, 1.0, "PASS"),
        (0.1, 90, 0.2, "FAIL"),
        (0.1, 30, 1.0, "INCONCLUSIVE"),
        (0.1, 10, 0.5, "INCONCLUSIVE"),
        (None, 90, 1.0, "INCONCLUSIVE"),
    ],
)
def test_a_fleet_too_small_to_compare_is_held_to_absolute_limits(
    limit: float | None, wrong: int, information: float, wanted: str
) -> None:
    rail = j.Guardrail(name="errors", kind="rate", alpha=0.04, margin=1.5, limit=limit, min_n=100)
    plan = design(2, 4, rail)  # 15 ways to divide them, fewer than 25
    found = one_look(plan, j.Reading(n=(200, 100, 300, 300, 300, 300), x=(wrong, 0, 300, 300, 300, 300)), information)
    assert (found.verdict, found.uncontrolled) == (wanted, True)
    assert found.findings[0].assignments == 15
    assert "uncontrolled" in found.reasons[0]


def test_a_single_device_can_be_judged_by_limits() -> None:
    rails = (
        j.Guardrail(name="errors", kind="rate", alpha=0.04, margin=1.5, limit=0.1),
        j.Guardrail(name="other", kind="rate", alpha=0.04, margin=1.5),
    )
    plan = design(1, 0, *rails)
    reading = j.Reading(n=(500,), x=(20,))
    found, _ = j.judge(
        plan, j.Look(number=1, information=1, readings={"errors": reading, "other": reading}), j.Memory()
    )
    assert (found.verdict, found.uncontrolled) == ("PASS", True)
    assert "other:limit" in found.missing


def test_a_limit_may_be_looked_at_as_often_as_one_likes() -> None:
    """Streams at the limit itself, looked at after every request: at most alpha of them fail."""
    from skerry_server.core.judge_absolute import fails

    rng = np.random.default_rng(3)
    failed = 0
    for _ in range(300):
        events = rng.random(400) < 0.1
        failed += any(fails(int(x), n, 0.1, 0.05) for n, x in enumerate(events.cumsum(), 1))
    assert failed <= 0.05 * 300 + 3 * (0.05 * 0.95 * 300) ** 0.5


# --- what is always true ------------------------------------------------------------------------------------------------


@st.composite
def stages(draw: st.DrawFn) -> tuple[j.Design, list[j.Look]]:
    strata = draw(st.lists(st.sampled_from("ab"), min_size=6, max_size=7))
    candidates = draw(st.sets(st.integers(0, len(strata) - 1), min_size=2, max_size=4))
    kind = draw(st.sampled_from(["rate", "level", "incidence"]))
    rail = j.Guardrail(name="g", kind=kind, alpha=draw(st.sampled_from([0.1, 0.3])), margin=1.5)
    units = tuple(j.Unit(device=f"d{i}", stratum=s, candidate=i in candidates) for i, s in enumerate(strata))
    plan = j.Design(
        rollout=draw(st.sampled_from(["r-1", "r-2"])),
        stage=0,
        units=units,
        guardrails=(rail,),
        planned=draw(st.booleans()),
        min_devices=1,
    )
    column = st.lists(st.integers(0, 12), min_size=len(strata), max_size=len(strata)).map(tuple)
    n = tuple(1 if kind == "incidence" else 12 for _ in strata)
    found = []
    for number in range(1, draw(st.integers(1, 4)) + 1):
        x = draw(column)
        x = tuple(v % 2 for v in x) if kind == "incidence" else x
        reading = j.Reading(n=n, x=x, pre_n=n, pre_x=draw(column))
        found.append(
            j.Look(number=number, information=draw(st.sampled_from([0.3, 0.6, 1.0, 3.0])), readings={"g": reading})
        )
    return plan, found


@settings(max_examples=40)
@given(stages())
def test_of_all_ways_in_which_the_arms_could_have_fallen_at_most_alpha_fail(
    case: tuple[j.Design, list[j.Look]],
) -> None:
    """The guarantee itself, exact: whatever the data, were the candidate harmless, each assignment was equally likely."""
    plan, found = case
    per_stratum: dict[str, list[str]] = {}
    for unit in plan.units:
        per_stratum.setdefault(unit.stratum, []).append(unit.device)
    counts = {s: sum(u.candidate for u in plan.units if u.stratum == s) for s in per_stratum}
    choices = [itertools.combinations(devices, counts[s]) for s, devices in per_stratum.items()]
    failed = total = 0
    for parts in itertools.product(*choices):
        inside = set(itertools.chain(*parts))
        units = tuple(j.Unit(device=u.device, stratum=u.stratum, candidate=u.device in inside) for u in plan.units)
        other = j.Design(
            rollout=plan.rollout, stage=0, units=units, guardrails=plan.guardrails, planned=plan.planned, min_devices=1
        )
        memory, verdict = j.Memory(), ""
        for look in found:
            verdict, memory = j.verdict_of(other, look, memory)
        total += 1
        failed += verdict == "FAIL"
    alpha = plan.guardrails[0].alpha
    assert failed <= (int(alpha * total + 1e-9) if alpha * total >= 1 else 0)


@settings(max_examples=60)
@given(stages(), st.randoms(use_true_random=False))
def test_the_order_of_devices_changes_nothing(case: tuple[j.Design, list[j.Look]], random: Any) -> None:
    plan, found = case
    order = list(range(len(plan.units)))
    random.shuffle(order)

    def shuffled(column: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(column[i] for i in order)

    other = j.Design(
        rollout=plan.rollout,
        stage=0,
        units=tuple(plan.units[i] for i in order),
        guardrails=plan.guardrails,
        planned=plan.planned,
        min_devices=plan.min_devices,
    )
    moved = [
        j.Look(
            number=look.number,
            information=look.information,
            readings={
                name: j.Reading(n=shuffled(r.n), x=shuffled(r.x), pre_n=shuffled(r.pre_n), pre_x=shuffled(r.pre_x))
                for name, r in look.readings.items()
            },
        )
        for look in found
    ]
    assert j.replay(other, moved) == j.replay(plan, found)


@settings(max_examples=60)
@given(stages())
def test_stored_looks_replay_to_the_same_bytes(case: tuple[j.Design, list[j.Look]]) -> None:
    plan, found = case
    memory = j.Memory()
    told: list[bytes] = []
    for look in found:
        # As the server does it: everything goes through its stored form between two looks.
        kept = j.Memory.from_builtins(msgspec.json.decode(msgspec.json.encode(memory.to_builtins())))
        ruling, memory = j.judge(plan, look, kept)
        told.append(msgspec.json.encode(ruling.to_builtins()))
        assert j.Ruling.from_builtins(msgspec.json.decode(told[-1])) == ruling
        assert j.verdict_of(plan, look, kept) == (ruling.verdict, memory)
    again = j.replay(
        j.Design.from_builtins(plan.to_builtins()), [j.Look.from_builtins(look.to_builtins()) for look in found]
    )
    assert [msgspec.json.encode(ruling.to_builtins()) for ruling, _ in again] == told
    assert all(
        tail.count <= plan.guardrails[0].alpha * again[-1][0].findings[0].assignments for tail in memory.tails.values()
    )


@settings(max_examples=60)
@given(stages())
def test_every_ruling_has_a_reason_and_says_what_is_missing(case: tuple[j.Design, list[j.Look]]) -> None:
    plan, found = case
    for ruling, _ in j.replay(plan, found):
        (finding,) = ruling.findings
        assert finding.reason.startswith("g: ")
        assert finding.reason == ruling.reasons[0]
        assert bool(ruling.missing) == (ruling.verdict in ("INCONCLUSIVE", "NO_DATA"))


def test_p_values_are_uniform_when_nothing_is_wrong() -> None:
    plan = design()
    low = 0
    for seed in range(200):
        (*_, last) = looks(plan, seed=seed)
        finding = one_look(plan, last.readings["errors"], 1.0).findings[0]
        assert finding.at_least is not None
        low += finding.at_least / finding.assignments <= 0.2
    # Binomial(200, 0.2) is outside this once in 10,000.
    assert 19 <= low <= 64


def test_more_data_tell_smaller_effects() -> None:
    plan = design()
    found = [ruling.findings[0].detectable_ratio for ruling, _ in j.replay(plan, looks(plan, looks=8, per_look=300))]
    assert all(ratio is not None and ratio > 1 for ratio in found)
    assert found[-1] is not None and found[0] is not None and found[-1] < 0.9 * found[0]
    for ruling, _ in j.replay(plan, looks(plan, 1.2)):
        finding = ruling.findings[0]
        assert finding.upper is None or (finding.ratio is not None and finding.upper > finding.ratio)


# --- what it refuses ----------------------------------------------------------------------------------------------------


def test_a_memory_of_another_design_is_refused() -> None:
    plan = design()
    first, second, *_ = looks(plan)
    _, memory = j.judge(plan, first, j.Memory())
    with pytest.raises(ValueError, match="memory: of design"):
        j.judge(design(5, 11), second, memory)
    with pytest.raises(ValueError, match="does not follow"):
        j.judge(plan, first, memory)


def test_information_never_runs_backwards() -> None:
    plan = design()
    first, second, *_ = looks(plan)
    _, memory = j.judge(plan, j.Look(number=1, information=0.9, readings=first.readings), j.Memory())
    later, memory = j.judge(plan, j.Look(number=2, information=0.1, readings=second.readings), memory)
    assert (later.information, memory.information) == (0.9, 0.9)


@pytest.mark.parametrize(
    "reading", [j.Reading(n=(1,) * 15, x=(0,) * 16), j.Reading(n=(1,) * 16, x=(0,) * 16, pre_n=(1,))], ids=str
)
def test_a_reading_that_does_not_fit_is_refused(reading: j.Reading) -> None:
    with pytest.raises(ValueError, match=r"errors: reading: .* entries, wanted 16"):
        one_look(design(), reading)
    with pytest.raises(ValueError, match="no reading of errors"):
        j.judge(design(), j.Look(number=1, information=1, readings={}), j.Memory())


def test_an_impossible_design_is_refused() -> None:
    unit = j.Unit(device="d")
    for units, rails in (((unit, unit), (ERRORS,)), ((unit,), ()), ((unit,), (ERRORS, ERRORS))):
        with pytest.raises(ValueError, match=r"units|guardrails"):
            j.Design(rollout="r", stage=0, units=units, guardrails=rails)
    with pytest.raises(ValueError, match="alpha"):
        design(4, 12, j.Guardrail(name="g", kind="rate", alpha=0, margin=1.5))
    with pytest.raises(ValueError, match="margin"):
        design(4, 12, j.Guardrail(name="g", kind="rate", alpha=0.1, margin=1.0))
