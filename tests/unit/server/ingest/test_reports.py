"""What devices say of a rollout's candidate: who is believed, and that no look costs more for a device that says it often."""

import pytest
from skerry_contract import group as g
from skerry_contract import ids, wire
from skerry_server import reports, rollouts
from skerry_server.core import rollout as core
from skerry_server.core.plan import read_plan
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from sqlalchemy import event as hooks
from sqlalchemy import insert, update

SALT = "0" * 32
PLAN = {"stages": [{"devices": 1}, {"share": 1}]}


@pytest.fixture
def fleet(server, make):
    return Fleet(server, make)


class Fleet:
    """A rollout with one candidate of the two devices, whichever hashes lower."""

    def __init__(self, server, make):
        self.server, self.make, self.seq = server, make, 0
        server.rollout(plan=read_plan(PLAN).to_builtins())
        self.candidate, self.control = sorted(("dev-a", "dev-b"), key=hashed)
        self.change(cuts={"*": str(hashed(self.candidate) + 1)})

    def change(self, **values):
        with writing(self.server.engine) as conn:
            conn.execute(update(t.rollouts).values(**values))

    def says(self, device, code="model_damaged", *, name="update", times=1, **data):
        data = data or {"model": "gas", "digest": self.make.CANDIDATE, "rollout": "r-1"}
        body = wire.encode(wire.Event(at=self.make.at(), name=name, code=code, data=data))
        records = [self.make.record(self.seq + i + 1, body, kind="event") for i in range(times)]
        self.seq += times
        self.server.take(self.make.up(device, *records))

    def gather(self):
        with reading(self.server.engine) as conn:
            return rollouts.gather(conn, rollouts.require(conn, "r-1"))

    def reports(self):
        with reading(self.server.engine) as conn:
            return reports.of_rollout(conn, rollouts.require(conn, "r-1"))

    def decision(self):
        with reading(self.server.engine) as conn:
            row = rollouts.require(conn, "r-1")
        return core.decide(rollouts.value(row), self.gather(), 10**6)


def hashed(device):
    return g.hash64(bytes.fromhex(SALT), ids.DeviceId(device))


def test_what_a_device_outside_the_stage_says_of_the_candidate_is_counted_and_decides_nothing(fleet):
    fleet.says(fleet.control)
    found = fleet.gather()
    assert (found.reverted, found.disbelieved) == ({}, 1)
    assert found.to_builtins()["disbelieved"] == 1
    assert fleet.decision().action == "hold"


def test_a_candidate_that_refuses_sends_the_rollout_back(fleet):
    fleet.says(fleet.candidate)
    found = fleet.gather()
    assert (found.reverted, found.disbelieved) == ({"model_damaged": 1}, 0)
    assert fleet.decision().action == "roll_back"


@pytest.mark.parametrize("code", ["hash_mismatch", "size_mismatch", "store_failed"])
def test_a_device_with_a_worn_disk_is_unable_and_sends_no_rollout_back(fleet, code):
    fleet.says(fleet.candidate, code)
    assert fleet.reports().unable == {fleet.candidate}
    assert fleet.decision().action == "hold"


@pytest.mark.parametrize("code", ["trial_crashed", "runtime_crashed"])
def test_one_power_cut_in_a_trial_sends_no_rollout_back_and_two_devices_or_the_same_one_twice_do(fleet, code):
    fleet.change(stage=1, cuts={"*": str(g.EVERYONE)})
    said = {"model": "gas", "digest": fleet.make.CANDIDATE, "rollout": "r-1", "at_boot": True}
    fleet.says(fleet.candidate, code, **said, attempt=1)
    assert (fleet.gather().reverted, fleet.decision().action) == ({}, "hold")
    fleet.says(fleet.candidate, code, **said, attempt=2)
    assert (fleet.gather().reverted, fleet.decision().action) == ({code: 1}, "roll_back")


def test_attempts_that_a_bad_link_ended_make_a_power_cut_no_second_one(fleet):
    fleet.change(stage=1, cuts={"*": str(g.EVERYONE)})
    said = {"model": "gas", "digest": fleet.make.CANDIDATE, "rollout": "r-1", "at_boot": True, "attempt": 3}
    fleet.says(fleet.candidate, "trial_crashed", **said, ended_so=1)
    assert fleet.decision().action == "hold"
    fleet.says(fleet.candidate, "trial_crashed", **said, ended_so=2)
    assert fleet.decision().action == "roll_back"


@pytest.mark.parametrize("at_once", [True, False])
def test_what_a_device_found_before_its_power_cut_stays_a_verdict(fleet, at_once):
    fleet.change(stage=1, cuts={"*": str(g.EVERYONE)})
    about = {"model": "gas", "digest": fleet.make.CANDIDATE, "rollout": "r-1"}
    said = [("start_timeout", about), ("trial_crashed", {**about, "at_boot": True, "ended_so": 1})]
    if at_once:
        # As a device delivers that was offline meanwhile.
        bodies = [wire.encode(wire.Event(at=fleet.make.at(), name="update", code=c, data=d)) for c, d in said]
        records = [fleet.make.record(i, body, kind="event") for i, body in enumerate(bodies, 1)]
        fleet.server.take(fleet.make.up(fleet.candidate, *records))
    else:
        for code, data in said:
            fleet.says(fleet.candidate, code, **data)
    assert (fleet.gather().reverted, fleet.decision().action) == ({"start_timeout": 1}, "roll_back")
    fleet.says(fleet.control, said[1][0], **said[1][1])
    assert fleet.gather().reverted == {"start_timeout": 1}


@pytest.mark.parametrize("state", ["confirmed", "confirmed_on_golden"])
def test_a_device_that_confirms_the_bundle_takes_its_power_cut_back_and_nothing_else(fleet, state):
    fleet.change(stage=1, cuts={"*": str(g.EVERYONE)})
    about = {"model": "gas", "digest": fleet.make.CANDIDATE, "rollout": "r-1"}
    cut = about | {"at_boot": True, "attempt": 1, "ended_so": 1}
    fleet.says(fleet.candidate, "trial_crashed", **cut)
    fleet.says(fleet.candidate, "", **(about | {"state": state, "rollout": "r-2"}))
    fleet.says(fleet.candidate, "", **about, state="trial")
    fleet.says(fleet.control, "trial_crashed", **cut)
    assert fleet.gather().reverted == {"trial_crashed": 2}
    fleet.says(fleet.candidate, "", **about, state=state)
    assert (fleet.gather().reverted, fleet.decision().action) == ({}, "hold")
    fleet.says(fleet.control, "golden_failed", **about)
    fleet.says(fleet.control, "", **about, state=state)
    assert fleet.gather().reverted == {"golden_failed": 1}


@pytest.mark.parametrize("state", ["trial", "confirmed", "confirmed_on_golden"])
def test_a_device_that_was_unable_for_a_moment_is_missed_when_the_candidate_silences_it_later(fleet, state):
    about = {"model": "gas", "digest": fleet.make.CANDIDATE, "rollout": "r-1"}

    def goes():
        with writing(fleet.server.engine) as conn:
            here = t.devices.c.id == fleet.candidate
            conn.execute(update(t.devices).where(here).values(online=False, gone_ms=10**12))

    fleet.says(fleet.candidate, "store_busy", **about)
    goes()
    assert fleet.gather().silent_ids == (), "nobody waits for what cannot run it"
    fleet.says(fleet.candidate, "", **about, state="fetch")
    assert fleet.reports().unable == {fleet.candidate}
    fleet.says(fleet.candidate, "", **about, state=state)
    goes()
    assert (fleet.reports().unable, fleet.gather().silent_ids) == (frozenset(), (fleet.candidate,))


def test_agents_of_two_devices_that_go_without_a_word_speak_of_the_bundle(fleet):
    fleet.change(stage=1, cuts={"*": str(g.EVERYONE)})
    said = {"model": "gas", "digest": fleet.make.CANDIDATE, "rollout": "r-1", "at_boot": True, "attempt": 1}
    fleet.says(fleet.candidate, "trial_crashed", **said)
    fleet.says(fleet.control, "runtime_crashed", **said)
    assert fleet.gather().reverted == {"trial_crashed": 1, "runtime_crashed": 1}
    # What an agent saw itself is a verdict at once, whatever it says beside.
    fleet.says(fleet.control, "golden_failed", **said)
    assert fleet.gather().reverted == {"golden_failed": 1}


def test_a_candidate_that_was_away_and_refuses_after_the_stage_has_grown_is_believed(fleet):
    fleet.change(stage=1, cuts={"*": str(g.EVERYONE)})
    fleet.says(fleet.candidate)
    assert fleet.gather().reverted == {"model_damaged": 1}


def test_while_completing_every_device_of_the_group_is_believed(fleet):
    fleet.change(stage=2, state="completing", cuts={"*": str(g.EVERYONE)})
    fleet.says(fleet.control)
    fleet.says(fleet.candidate, "golden_failed")
    assert fleet.gather().reverted == {"model_damaged": 1, "golden_failed": 1}


def test_a_frozen_candidate_is_believed_whatever_stratum_it_has_since(fleet):
    fleet.change(cuts={"old": str(g.EVERYONE)})
    listed = {"rollout": "r-1", "stage": 0, "device": fleet.candidate, "arm": "candidate", "stratum": "old"}
    with writing(fleet.server.engine) as conn:
        conn.execute(update(t.devices).values(stratum="new"))
        conn.execute(insert(t.rollout_devices), [listed, listed | {"device": fleet.control, "arm": "control"}])
    fleet.says(fleet.candidate)
    fleet.says(fleet.control)
    found = fleet.gather()
    assert (found.reverted, found.disbelieved) == ({"model_damaged": 1}, 1)


@pytest.mark.parametrize("wrong", [{"digest": "ef" * 32}, {"rollout": "r-2"}, {"digest": None}, {"rollout": ["r-1"]}])
def test_an_event_about_another_bundle_or_rollout_is_no_report(fleet, wrong):
    fleet.says(fleet.candidate, **({"model": "gas", "digest": fleet.make.CANDIDATE, "rollout": "r-1"} | wrong))
    assert fleet.reports() == reports.Reports(went_back={}, unable=frozenset(), disbelieved=0, crashed={})


def test_a_device_of_another_group_is_no_candidate_of_the_rollout(fleet):
    with writing(fleet.server.engine) as conn:
        conn.execute(insert(t.groups).values(name="other", created_ms=0))
        conn.execute(update(t.devices).where(t.devices.c.id == fleet.candidate).values(group="other"))
    fleet.says(fleet.candidate)
    assert fleet.reports().went_back == {}
    assert fleet.server.rows(t.rollout_reports) == []


def test_the_last_verdict_stands_and_being_unable_does_not_take_it_back(fleet):
    fleet.says(fleet.candidate, "model_damaged")
    fleet.says(fleet.candidate, "golden_failed")
    fleet.says(fleet.candidate, "not_enough_memory")
    fleet.says(fleet.candidate, "unreachable")
    found = fleet.reports()
    assert (found.went_back, found.unable) == ({fleet.candidate: "golden_failed"}, {fleet.candidate})


def test_a_crash_is_remembered_with_the_time_of_the_last_one_for_the_rollouts_model_alone(fleet):
    fleet.says(fleet.control, "runtime_crashed", name="worker", models={"another": "x"})
    assert fleet.reports().crashed == {}
    fleet.says(fleet.control, "runtime_crashed", name="worker", models={"gas": "x"})
    fleet.says(fleet.control, "worker_hung", name="worker", models={"gas": "x"})
    assert fleet.reports().crashed == {fleet.control: fleet.server.now_ms}


def test_a_device_that_says_it_thousands_of_times_adds_one_row_to_what_a_look_reads(fleet):
    for n in range(3):
        fleet.says(fleet.candidate, f"code_{n}", times=1000)
        fleet.says(fleet.candidate, "runtime_crashed", name="worker", times=1000, models={"gas": "x"})
    assert len(fleet.server.rows(t.rollout_reports)) == 1
    said = []

    def note(_conn, _cursor, statement, *_rest):
        said.append(statement)

    hooks.listen(fleet.server.engine, "before_cursor_execute", note)
    found = fleet.gather()
    hooks.remove(fleet.server.engine, "before_cursor_execute", note)
    assert found.reverted == {"code_2": 1}
    assert not [statement for statement in said if "FROM events" in statement]


@pytest.mark.parametrize("state", ["completed", "rolled_back", "aborted"])
def test_a_rollout_that_has_ended_is_told_nothing_more(fleet, state):
    fleet.change(state=state)
    fleet.says(fleet.candidate)
    assert fleet.server.rows(t.rollout_reports) == []
