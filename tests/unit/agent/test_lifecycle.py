"""The update's table: every path ends at rest, every failure keeps its reason, late answers change nothing."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_agent.core import effects as e
from skerry_agent.core import lifecycle as lc
from skerry_agent.core.effects import Effect
from skerry_contract.window import Instant

AT = Instant("b" * 32, 1, 2, True)
DIGEST = "a" * 64
EVENTS = st.one_of(
    st.just(e.Assigned(model="gas", digest=DIGEST, version="1.0.0", arm="candidate", rollout="r", stage=2)),
    st.just(e.ManifestFetched()),
    st.just(e.Admitted(variant="onnx-fp32")),
    st.just(e.FilesFetched()),
    st.just(e.Verified()),
    st.just(e.Staged()),
    st.just(e.Held(detail="the lock of a to end (b)")),
    st.just(e.Opened()),
    st.just(e.Proved()),
    st.just(e.HandedOver()),
    st.just(e.Rekeyed(arm="control", rollout="r", stage=3)),
    st.just(e.TrialKept()),
    st.just(e.TrialQuiet()),
    st.sampled_from(["hash_mismatch", "golden_failed", "trial_errors", "unreachable"]).map(lambda c: e.Failed(code=c)),
    st.just(e.Deadline()),
    st.just(e.Withdrawn()),
    st.just(e.Yielded()),
    st.just(e.RevertOrdered(model="gas", digest=DIGEST, version="1.0.0")),
    st.just(e.Reverted()),
    st.just(e.Booted()),
    st.just(e.Booted(further=True)),
    st.just(e.Stopped()),
    st.just(e.Cancelled(detail="by a person")),
)


def run(*events: e.Event, update: lc.Update | None = None) -> tuple[lc.Update, list[Effect]]:
    update, effects = update or lc.Update(), []
    for event in events:
        update, found = lc.step(update, event, AT)
        effects += found
    return update, effects


def to(state: lc.State) -> lc.Update:
    path = [
        e.Assigned(model="gas", digest=DIGEST, version="1.0.0"), e.ManifestFetched(), e.Admitted(variant="v"), e.FilesFetched(),
        e.Verified(), *([e.Held(detail="a lock")] if state == "ready" else []), e.Staged(), e.Proved(), e.HandedOver(), e.TrialKept(),
    ]  # fmt: skip
    update = lc.Update()
    for event in path:
        if update.state == state:
            return update
        update, _ = lc.step(update, event, AT)
    assert update.state == state
    return update


def test_the_good_path_confirms_only_after_the_trial() -> None:
    update, effects = run(
        e.Assigned(model="gas", digest=DIGEST, version="1.0.0"), e.ManifestFetched(), e.Admitted(variant="v"),
        e.FilesFetched(), e.Verified(), e.Staged(), e.Proved(), e.HandedOver(), e.TrialKept(),
    )  # fmt: skip
    assert (update.state, update.variant, update.code) == ("confirmed", "v", "")
    assert [effect for effect in effects if effect is not Effect.RECORD] == [
        Effect.FETCH_MANIFEST, Effect.ADMIT, Effect.FETCH_FILES, Effect.VERIFY_FILES, Effect.STAGE_SLOT, Effect.START_WORKER,
        Effect.HAND_OVER, Effect.WATCH_TRIAL, Effect.CONFIRM,
    ]  # fmt: skip


def test_what_is_held_waits_over_boots_and_begins_once_nothing_holds_it() -> None:
    update, effects = run(e.Held(detail="the lock of a to end (b)"), update=to("stage"))
    assert (update.state, update.detail, update.code, effects) == (
        "ready",
        "the lock of a to end (b)",
        "",
        [Effect.RECORD],
    )
    moves = update.moves
    for _ in range(100):
        update, effects = run(e.Booted(), e.Held(detail="another"), update=update)
    assert (update.state, update.detail, update.moves) == ("ready", "another", moves)
    update, effects = run(e.Opened(), update=update)
    assert (update.state, update.detail, effects) == ("prove", "", [Effect.RECORD, Effect.START_WORKER])


def test_a_lock_in_the_middle_of_a_proof_sends_it_back_to_ready_and_that_is_no_circle() -> None:
    update = to("prove")
    moves = update.moves
    for _ in range(100):
        update, _ = run(e.Held(detail="the lock of a to end (b)"), update=update)
        assert (update.state, update.detail, update.code) == ("ready", "the lock of a to end (b)", "")
        update, effects = run(e.Opened(), update=update)
        assert effects == [Effect.RECORD, Effect.START_WORKER]
    assert (update.state, update.moves) == ("prove", moves)


@pytest.mark.parametrize("state", ["fetch", "verify", "stage", "ready", "prove", "trial"])
def test_what_is_under_way_makes_way_without_a_word_against_it(state: lc.State) -> None:
    update, effects = run(e.Yielded(detail="for the way back of oil"), update=to(state))
    assert (update.state, update.code, update.detail) == ("revert", "yielded", "for the way back of oil")
    assert Effect.PENALISE not in effects
    assert run(e.Reverted(), update=update)[0].waits


def test_what_lay_ready_for_too_long_is_no_circle() -> None:
    update, _ = run(e.Deadline(), e.Reverted(), update=to("ready"))
    assert (update.state, update.code, update.waits) == ("idle", "activation_overdue", True)


@pytest.mark.parametrize("state", ["fetch", "verify", "stage", "ready", "prove", "trial"])
def test_a_failure_anywhere_goes_through_revert_to_idle_with_its_reason(state: lc.State) -> None:
    update, effects = run(e.Failed(code="hash_mismatch", detail="model.onnx"), update=to(state))
    assert (update.state, update.code, update.failed_in) == ("revert", "hash_mismatch", state)
    assert Effect.PENALISE in effects
    update, _ = run(e.Reverted(), update=update)
    assert (update.state, update.code, update.detail) == ("idle", "hash_mismatch", "model.onnx")


UNDER_WAY = [state for state in lc.STATES if state not in lc.RESTING]


def reverting(code: str = "trial_errors") -> lc.Update:
    return run(e.Failed(code=code), update=to("trial"))[0]


@pytest.mark.parametrize("state", UNDER_WAY)
def test_a_person_can_cancel_from_every_state_and_the_bundle_is_not_tried_again(state: lc.State) -> None:
    update, effects = run(e.Cancelled(detail="by a person"), update=reverting() if state == "revert" else to(state))
    if state == "revert":
        # The way back ends where it is, with the reason for which it began.
        assert (update.state, update.code, effects) == ("idle", "trial_errors", [Effect.GIVE_UP, Effect.RECORD])
        return
    assert (update.state, update.code, update.detail) == ("revert", "cancelled", "by a person")
    assert Effect.PENALISE in effects
    assert lc.ATTEMPTS["cancelled"] == 1
    assert run(e.Reverted(), update=update)[0].state == "idle"


@pytest.mark.parametrize("state", UNDER_WAY)
def test_every_state_under_way_ends_by_its_deadlines_alone(state: lc.State) -> None:
    update = reverting() if state == "revert" else to(state)
    passed = 0
    while not update.resting:
        update, effects = lc.step(update, e.Deadline(), AT)
        passed += 1
        assert passed <= 1 + lc.MOST_OVERDUE
    assert update.code
    assert Effect.GIVE_UP in effects


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (e.Cancelled(detail="cancelled by a person"), "cancelled by a person"),
        (e.Failed(code="not_enough_memory", detail="1 MB is free"), "not_enough_memory: 1 MB is free"),
        (e.Deadline(), "3 deadlines passed"),
    ],
)
def test_a_step_back_that_is_given_up_is_none_any_more(event: e.Event, told: str) -> None:
    looped = e.CrashLooped(model="gas", digest=DIGEST, version="2.0.0")
    update, _ = run(looped, update=lc.Update(state="confirmed"))
    assert lc.steps_back(update)
    while not update.resting:
        assert lc.steps_back(update)
        update, effects = lc.step(update, event, AT)
    assert (Effect.GIVE_UP in effects) == (not isinstance(event, e.Failed))
    assert (update.code, update.failed_in, lc.steps_back(update)) == ("crash_loop", "revert", False)
    assert update.detail == f"the way back was given up ({told}): 2.0.0 goes on"


def test_why_a_bundle_had_to_go_stays_where_what_ran_before_does_not_come() -> None:
    update, effects = run(e.Failed(code="start_timeout", detail="not ready after 180 s"), update=reverting())
    assert (update.state, update.code, update.failed_in, effects) == ("idle", "trial_errors", "trial", [Effect.RECORD])
    assert update.detail == "the way back: start_timeout: not ready after 180 s"


@pytest.mark.parametrize("state", ["fetch", "verify", "stage"])
def test_an_agent_that_dies_before_anything_is_started_waits_and_gives_nothing_up(state: lc.State) -> None:
    update, effects = run(e.Booted(), update=to(state))
    assert (update.state, update.code, update.waits) == ("idle", "interrupted", True)
    assert Effect.PENALISE in effects
    assert update.penalty not in lc.ATTEMPTS


@pytest.mark.parametrize("state", ["prove", "trial"])
def test_an_agent_that_dies_again_and_again_with_a_new_worker_stops_trying(state: lc.State) -> None:
    update, _ = run(e.Booted(), update=msgspec.structs.replace(to(state), moves=lc.MOST_MOVES))
    assert (update.state, update.penalty) == ("idle", "too_many_moves@boot")
    assert lc.ATTEMPTS[update.penalty] == 1


def test_a_fetch_that_gets_further_between_power_cuts_is_no_circle() -> None:
    update = lc.Update()
    for _ in range(100):
        assigned = e.Assigned(model="gas", digest=DIGEST, version="1.0.0", moves=update.moves)
        update, effects = run(assigned, e.Booted(further=True), update=update)
    assert update.code == "interrupted"
    assert Effect.PENALISE not in effects


def test_an_update_with_too_many_moves_goes_home_and_nowhere_else() -> None:
    update = msgspec.structs.replace(to("prove"), moves=lc.MOST_MOVES)
    update, effects = run(e.Proved(), update=update)
    assert (update.state, update.code, update.failed_in) == ("revert", "too_many_moves", "prove")
    assert Effect.STOP_NEW in effects
    assert Effect.HAND_OVER not in effects
    # The way home is not cut short by the count, and a confirmation is the end of all counting.
    assert run(e.Reverted(), update=update)[0].code == "too_many_moves"
    assert run(e.TrialKept(), update=msgspec.structs.replace(to("trial"), moves=99))[0].state == "confirmed"


@pytest.mark.parametrize(
    ("failed_in", "code", "at_boot", "waits"),
    [
        ("fetch", "unreachable", False, True),
        ("fetch", "not_enough_disk", False, True),
        ("trial", "withdrawn", False, True),
        ("fetch", "hash_mismatch", False, False),
        ("verify", "hash_mismatch", False, False),
        ("verify", "timeout", False, True),
        ("stage", "not_enough_disk", False, True),
        ("prove", "process_not_started", False, True),
        ("prove", "not_enough_memory", False, True),
        ("prove", "golden_failed", False, False),
        ("prove", "runtime_crashed", True, False),
        ("fetch", "mirror_wrong", False, True),
        ("fetch", "interrupted", True, True),
    ],
)
def test_only_what_waits_for_something_outside_may_go_on_for_ever(
    failed_in: str, code: str, at_boot: bool, waits: bool
) -> None:
    assert lc.Update(state="idle", failed_in=failed_in, code=code, at_boot=at_boot).waits == waits


@given(st.lists(EVENTS, max_size=30))
def test_any_events_in_any_order_keep_the_rules(events: list[e.Event]) -> None:
    update = lc.Update()
    for event in events:
        after, effects = lc.step(update, event, AT)
        if Effect.CONFIRM in effects and not isinstance(event, e.Booted):
            assert update.state == "trial"
        if Effect.HAND_OVER in effects:
            assert update.state == "prove"
        if after.state in ("confirmed", "confirmed_on_golden"):
            assert not after.code
        if after.state == "revert":
            assert after.code
            assert after.failed_in
        if after.digest != update.digest:
            assert isinstance(event, (e.Assigned, e.RevertOrdered))
        update = after


@given(st.lists(EVENTS, max_size=12))
def test_a_boot_in_any_state_leaves_an_update_at_rest_or_ready(events: list[e.Event]) -> None:
    update, _ = run(*events)
    booted, _ = lc.step(update, e.Booted(), AT)
    assert booted == update if update.state == "ready" else booted.resting
    again, _ = lc.step(booted, e.Booted(), AT)
    assert again == booted


def test_what_lies_ready_has_its_month_once_over_all_boots() -> None:
    day_ns, day_ms = 86_400 * 10**9, 86_400_000
    since = Instant("a" * 32, 2 * day_ns, 1000, False)
    assert lc.lain_s(0.0, since, Instant("a" * 32, 5 * day_ns, 0, False)) == 3 * 86_400
    # Another boot: what was noted, and how long this one lasts.
    assert lc.lain_s(3 * 86_400, since, Instant("b" * 32, 4 * day_ns, 0, False)) == 7 * 86_400
    # The wall clock counts where both moments trust it, also for the time switched off; and never takes back what was noted.
    trusted = Instant("a" * 32, 0, 0, True)
    assert lc.lain_s(0.0, trusted, Instant("b" * 32, day_ns, 30 * day_ms, True)) == 30 * 86_400
    assert lc.lain_s(0.0, trusted, Instant("b" * 32, day_ns, 30 * day_ms, False)) == 86_400
    assert lc.lain_s(86_400, trusted, Instant("b" * 32, day_ns, 0, True)) == 2 * 86_400
    assert lc.left_s("ready", 7 * 86_400) == 24 * 86_400
    assert lc.left_s("ready", 40 * 86_400) == 0
    assert lc.left_s("confirmed", 1) is None


def test_a_way_back_has_no_less_time_than_the_way_in() -> None:
    assert lc.DEADLINES_S["revert"] > lc.DEADLINES_S["prove"]


def test_a_stored_update_reads_back_as_it_was() -> None:
    update = to("trial")
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(update)), lc.Update) == update


def test_a_boot_in_the_trial_counts_less_than_a_crash_in_the_trial() -> None:
    booted, _ = run(e.Booted(), update=to("trial"))
    crashed, _ = run(e.Failed(code="trial_crashed"), update=to("trial"))
    assert booted.code == crashed.code == "trial_crashed"
    assert lc.ATTEMPTS[booted.penalty] > lc.ATTEMPTS[crashed.penalty]


def test_locks_that_come_and_go_have_no_month_begin_anew() -> None:
    update, _ = run(e.Held(detail="a lock"), update=to("stage"))
    since = update.since
    for number in range(1, 100):
        later = Instant("b" * 32, number * 60 * 10**9, number, True)
        update, _ = lc.step(update, e.Opened(), later)
        assert (update.state, update.since) == ("prove", later)
        update, _ = lc.step(update, e.Held(detail="a lock"), later)
        assert (update.state, update.since) == ("ready", since)
    proved, _ = run(e.Opened(), e.Proved(), update=update)
    assert proved.lay_since is None


@pytest.mark.parametrize("state", lc.STATES)
def test_an_agent_that_ends_in_order_holds_nothing_against_the_bundle(state: lc.State) -> None:
    before = reverting() if state == "revert" else lc.Update(state=state, digest=DIGEST, moves=lc.MOST_MOVES)
    update, effects = run(e.Stopped(), update=before)
    if state not in ("prove", "trial"):
        # What the next start finds in these says nothing against a bundle anyway.
        assert (update, effects) == (before, [])
        return
    assert (update.state, update.code, update.failed_in, update.at_boot) == ("idle", "interrupted", state, False)
    assert update.waits
    assert effects == ([Effect.PENALISE, Effect.RECORD] if state == "trial" else [Effect.RECORD])


@pytest.mark.parametrize("state", lc.STATES)
def test_an_answer_that_comes_too_late_changes_nothing(state: lc.State) -> None:
    update = lc.Update(state=state, digest=DIGEST)
    for event in (e.Verified(), e.Staged(), e.Proved(), e.TrialKept(), e.Reverted()):
        if (state, type(event)) not in lc.TABLE:
            assert lc.step(update, event, AT) == (update, ())


def test_the_table_prints_every_cell() -> None:
    lines = lc.printed().splitlines()
    assert len([line for line in lines if " -> " in line]) == len(lc.TABLE) + 1
    assert any(line.startswith("trial") and "TrialQuiet" in line and "confirmed_on_golden" in line for line in lines)


@pytest.mark.parametrize("state", sorted(lc.STATES))
def test_a_revert_brings_back_what_ran_before_exactly_where_the_bundle_served(state: lc.State) -> None:
    for event, move in ((event, move) for (of, event), move in lc.TABLE.items() if of == state):
        if state == "revert" or move.to != "revert":
            continue
        about = {"model": "gas", "digest": DIGEST, "version": "1.0.0", "code": "x", "detail": ""}
        made = msgspec.convert({k: v for k, v in about.items() if k in event.__struct_fields__}, event)
        update, effects = lc.step(lc.Update(state=state), made, AT)
        assert lc.restores(update) == (Effect.RESTORE in effects), event
