"""What is said of a device, from facts alone; and that the words are those of the reference."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from skerry_contract import group as g
from skerry_server.core import why
from skerry_server.core.why import Course, Device, Failure, Model, Silence, explain

REFERENCE = Path(__file__).parents[4] / "docs" / "reference"
OLD, NEW = "1" * 64, "2" * 64


def device(**changes: Any) -> Device:
    plain: dict[str, Any] = {
        "id": "press-1",
        "group": "press",
        "online": True,
        "since": "",
        "generation": 3,
        "published": 3,
        "lacks": (),
        "revoked": "",
        "runtimes": "onnx 1.20 on x86_64",
        "settings": g.Settings(sync_s=300, jitter_s=30),
    }
    return Device(**plain | changes)


def assigned(digest: str = NEW, **changes: Any) -> g.Assignment:
    plain: dict[str, Any] = {"arm": "none", "rollout": "", "stage": 0, "reason": "stable"}
    return g.Assignment(model="gas", digest=digest, version="2.0.0", **plain | changes)


def model(**changes: Any) -> Model:
    plain: dict[str, Any] = {
        "name": "gas",
        "assigned": assigned(),
        "running": {"digest": OLD, "version": "1.0.0", "variant": "onnx-int8", "state": "confirmed"},
        "update": {},
        "failure": None,
        "course": None,
        "wants": "onnx",
        "fits": True,
        "pinned_by": "",
    }
    return Model(**plain | changes)


def failure(code: str, failed_in: str = "") -> Failure:
    return Failure(event=7, at_ms=1, code=code, detail="so it says", failed_in=failed_in)


def course(**changes: Any) -> Course:
    plain: dict[str, Any] = {
        "id": "r-1",
        "state": "running",
        "candidate": NEW,
        "version": "2.0.0",
        "stage": 0,
        "stages": 3,
        "reason": "started",
        "held": "",
        "joins": None,
        "share": 0.6,
        "cut": 0.25,
    }
    return Course(**plain | changes)


@pytest.mark.parametrize(
    ("failed_in", "state"),
    [
        ("fetch", "refused"),
        ("verify", "refused"),
        ("prove", "refused"),
        ("", "refused"),
        ("trial", "reverted"),
        ("confirmed", "reverted"),
        ("confirmed_on_golden", "reverted"),
    ],
)
def test_a_bundle_that_had_answered_was_reverted_and_one_that_had_not_was_refused(failed_in: str, state: str) -> None:
    assert explain(device(), model(failure=failure("model_damaged", failed_in))).state == state


@pytest.mark.parametrize("code", ["trial_crashed", "trial_slow", "crash_loop", "reverted_by_operator"])
def test_codes_of_a_trial_say_by_themselves_that_it_went_back(code: str) -> None:
    assert explain(device(), model(failure=failure(code))).state == "reverted"


def test_a_device_that_must_pass_through_a_version_first_says_what_must_be_approved() -> None:
    found = explain(device(), model(failure=failure("must_pass_first", "fetch")))
    assert found.state == "unfit"
    assert found.waits_for.startswith("an approval of the version that goes before it")


def test_a_code_that_is_not_known_yet_is_told_as_it_is() -> None:
    found = explain(device(), model(failure=failure("eaten_by_dog", "stage")))
    assert found.state == "refused"
    assert "eaten_by_dog: a code that this server does not know (so it says)" in found.because


def test_what_the_device_said_goes_before_that_it_is_offline_and_the_network_after() -> None:
    away = device(online=False, since="since yesterday")
    assert explain(away, model(failure=failure("golden_failed", "prove"))).state == "refused"
    assert explain(away, model(fits=False)).state == "unfit"
    assert explain(away, model(failure=failure("unreachable", "fetch"))).state == "offline"
    assert explain(device(), model(failure=failure("unreachable", "fetch"))).state == "retrying"


def test_what_the_device_does_now_goes_before_what_it_refused_before() -> None:
    trying = {"digest": NEW, "state": "ready", "attempt": 2, "detail": "the lock of welder to end"}
    for code in ("cancelled", "golden_failed", "not_enough_memory", "unreachable"):
        found = explain(device(), model(failure=failure(code, "prove"), update=trying))
        assert (found.state, found.waits_for) == ("updating", "the lock of welder to end"), code
        assert code in found.because and "retry" not in found.do
        going_back = trying | {"state": "revert"}
        assert (
            explain(device(), model(failure=failure(code), update=going_back)).state != "updating"
            or code == "unreachable"
        )
    away = device(online=False, since="since yesterday")
    assert explain(away, model(failure=failure("golden_failed", "prove"), update=trying)).state == "offline"


def test_what_a_persons_word_forgave_is_told_as_over() -> None:
    over = Failure(event=7, at_ms=1, code="golden_failed", detail="", failed_in="prove", forgiven=True)
    found = explain(device(), model(failure=over))
    assert found.state == "retrying" and "obeyed a person's retry" in found.because and "device retry" not in found.do


def test_what_should_answer_and_does_not_start_is_said_unless_something_newer_is_known() -> None:
    dead = Silence(event=9, at_ms=1, digest=NEW, code="encryption_key_differs", detail="HTTP 403")
    found = explain(device(), model(running={}, silence=dead))
    assert found.state == "stopped" and "encryption_key_differs" in found.because and "HTTP 403" in found.because
    assert "device forget-key" in found.do
    assert explain(device(online=False, since="since noon"), model(running={}, silence=dead)).state == "offline"
    trying = {"digest": NEW, "state": "verify"}
    assert explain(device(), model(running={}, silence=dead, update=trying)).state == "updating"
    other = Silence(event=9, at_ms=1, digest=OLD, code="below_forced_floor", detail="")
    found = explain(device(), model(running={}, silence=other, failure=failure("golden_failed", "prove")))
    assert found.state == "refused" and "since below_forced_floor: what served is below a floor" in found.because


def test_no_retry_is_named_where_only_the_approvers_can_help() -> None:
    for code, wanted in (("below_forced_floor", "publish a version"), ("not_in_catalog", "skerry approve")):
        found = explain(device(), model(failure=failure(code, "confirmed")))
        assert wanted in found.do and "device retry" not in found.do
    forced = explain(device(), model(failure=failure("below_forced_floor", "confirmed")))
    assert "never takes a forced floor back" in forced.waits_for


def test_an_update_of_another_bundle_or_at_rest_is_not_under_way() -> None:
    assert explain(device(), model(update={"digest": NEW, "state": "verify"})).state == "updating"
    assert explain(device(), model(update={"digest": OLD, "state": "verify"})).state == "due"
    fetching = {"digest": NEW, "state": "fetch", "progress": {"done": 450_000, "size": 1_800_000}}
    assert "0.5 of 1.8 MB fetched (25%)" in explain(device(), model(update=fetching)).because
    assert explain(device(), model(update={"digest": NEW, "state": "idle"})).state == "due"


def test_a_device_that_has_read_the_document_is_not_said_to_lag() -> None:
    assert "generation 2 of 3" in explain(device(generation=2), model()).because
    assert "has not reported a try" in explain(device(), model()).because
    assert "within 330 s" in explain(device(), model()).waits_for


def test_a_control_waits_for_the_stage_that_will_take_it() -> None:
    kept = assigned(OLD, arm="control", rollout="r-1")
    waits = {
        joins: explain(device(), model(assigned=kept, course=course(joins=joins, held="0 of 7"))).waits_for
        for joins in (None, 1, 3)
    }
    assert waits[1] == "stage 2 of 3, as the fleet is now; stage 1 is held: 0 of 7"
    assert waits[3].startswith("the end of the rollout")
    assert waits[None].startswith("a later stage of the rollout")
    found = explain(device(), model(assigned=kept, course=course()))
    assert found.state == "waiting_for_stage"
    assert "stands 60.0% of the way" in found.because and "ends at 25.0%" in found.because
    assert "keeps it as a control" in found.assignment


def test_a_course_of_another_rollout_keeps_nobody_waiting() -> None:
    ended = course(state="completed", candidate=OLD)
    found = explain(device(), model(assigned=assigned(OLD), course=ended))
    assert (found.state, found.waits_for) == ("as_assigned", "")
    assert found.assignment.endswith("what group press runs; rollout r-1 brought it")


def test_every_combination_of_facts_has_an_answer_and_every_state_is_reached() -> None:
    reached = set()
    devices = [
        device(online=online, revoked=revoked, lacks=lacks, generation=generation)
        for online, revoked, lacks, generation in itertools.product(
            (True, False), ("", "by token:admin"), ((), ("pins",)), (2, 3)
        )
    ]
    assignments = (None, assigned(), assigned(OLD), assigned(OLD, arm="control", rollout="r-1"), assigned(reason="pin"))
    runs: tuple[dict[str, str], ...] = (
        {},
        *({"digest": OLD, "version": "1.0.0", "state": state} for state in ("trial", "confirmed", "stopped")),
    )
    failures = (
        None,
        *(failure(code, "trial") for code in ("trial_errors", "no_variant", "unreachable")),
        failure("hash_mismatch"),
    )
    courses = (None, *(course(state=state) for state in ("running", "paused", "completing", "rolling_back", "aborted")))
    updates: tuple[dict[str, str], ...] = ({}, {"digest": NEW, "state": "fetch"}, {"digest": NEW, "state": "trial"})
    for one, given, running, failed, on, update, fits in itertools.product(
        devices, assignments, runs, failures, courses, updates, (True, False)
    ):
        found = explain(
            one, model(assigned=given, running=running, failure=failed, course=on, update=update, fits=fits)
        )
        assert found.because and found.assignment
        assert found.waits_for or found.state in ("as_assigned", "unassigned")
        assert found.do or found.state in ("as_assigned", "unassigned", "waiting_for_stage")
        reached.add(found.state)
    assert reached == set(get_args(why.State))


def test_the_words_are_those_of_the_reference() -> None:
    page = (REFERENCE / "reason-codes.md").read_text()
    updates = page[page.index("## Updates") : page.index("## Enrolment")]
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \| [^|]*\|$", updates, re.MULTILINE)
    assert {code: means.strip() for codes, means in rows for code in re.findall(r"`([a-z_]+)`", codes)} == why.MEANINGS
    states = (REFERENCE / "http-api.md").read_text()
    section = states.split("### Why a device runs what it runs\n", 1)[1].split("\n##", 1)[0]
    assert set(re.findall(r"^\| `([a-z_]+)` \|", section, re.MULTILINE)) == set(get_args(why.State))
