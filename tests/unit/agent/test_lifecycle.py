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
    st.just(e.Proved()),
    st.just(e.HandedOver()),
    st.just(e.Rekeyed(arm="control", rollout="r", stage=3)),
    st.just(e.TrialKept()),
    st.just(e.TrialQuiet()),
    st.sampled_from(["hash_mismatch", "golden_failed", "trial_errors", "unreachable"]).map(lambda c: e.Failed(code=c)),
    st.just(e.Deadline()),
    st.just(e.Withdrawn()),
    st.just(e.RevertOrdered(model="gas", digest=DIGEST, version="1.0.0")),
    st.just(e.Reverted()),
    st.just(e.Booted()),
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
        e.Verified(), e.Staged(), e.Proved(), e.HandedOver(), e.TrialKept(),
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


@pytest.mark.parametrize("state", ["fetch", "verify", "stage", "prove", "trial"])
def test_a_failure_anywhere_goes_through_revert_to_idle_with_its_reason(state: lc.State) -> None:
    update, effects = run(e.Failed(code="hash_mismatch", detail="model.onnx"), update=to(state))
    assert (update.state, update.code, update.failed_in) == ("revert", "hash_mismatch", state)
    assert Effect.PENALISE in effects
    update, _ = run(e.Reverted(), update=update)
    assert (update.state, update.code, update.detail) == ("idle", "hash_mismatch", "model.onnx")


@pytest.mark.parametrize("state", ["fetch", "verify", "stage", "prove", "revert"])
def test_every_state_that_can_hang_has_a_deadline(state: lc.State) -> None:
    assert lc.DEADLINES_S[state] > 0
    assert (state, e.Deadline) in lc.TABLE


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
def test_a_boot_in_any_state_leaves_an_update_at_rest(events: list[e.Event]) -> None:
    update, _ = run(*events)
    booted, _ = lc.step(update, e.Booted(), AT)
    assert booted.resting
    again, _ = lc.step(booted, e.Booted(), AT)
    assert again == booted


def test_a_stored_update_reads_back_as_it_was() -> None:
    update = to("trial")
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(update)), lc.Update) == update


def test_a_boot_in_the_trial_counts_less_than_a_crash_in_the_trial() -> None:
    booted, _ = run(e.Booted(), update=to("trial"))
    crashed, _ = run(e.Failed(code="trial_crashed"), update=to("trial"))
    assert booted.code == crashed.code == "trial_crashed"
    assert lc.ATTEMPTS[booted.penalty] > lc.ATTEMPTS[crashed.penalty]


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
