"""The judge on a database: what devices send must neither stop it nor take gates and deadline with it, and pasts fit both arms."""

import dataclasses
import hashlib
import random
import zlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from skerry_contract import topics, wire
from skerry_contract import window as w
from skerry_server import judging, looks, recomputing, rollouts, why
from skerry_server.config import Rollouts as Pace
from skerry_server.console import overview, routes
from skerry_server.core import judge as j
from skerry_server.core import plan as p
from skerry_server.core.judge_values import Reading
from skerry_server.db import migrations
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from skerry_server.intake import Intake
from skerry_server.mqtt import Message
from skerry_server.orchestrator import Orchestrator
from sqlalchemy import Text, delete, insert, literal, select, update

from tests import models

NOW_MS = 1_000_000
CLASSES = 3
CANDIDATES, DEVICES = 4, 16
JUDGE = {"end_labels": 100_000, "guardrails": {"labelled_errors": {}, "trouble": {}}, "guard_s": 0, "silent_s": 86_400}
PLAN: dict[str, Any] = {
    "stages": [{"devices": 4, "max_seconds": 3600}, {"devices": 8, "max_seconds": 3600}, {"share": 1}],
    "judge": JUDGE,
}


@dataclass
class Fleet:
    """A rollout under way on 16 devices of one group, one device of another, and the loop that decides."""

    engine: Any
    stable: str
    candidate: str
    now_ms: int = NOW_MS

    def __post_init__(self) -> None:
        self.intake = Intake()
        self.seq = 0
        self.faults: list[str] = []
        pace = Pace()
        idle = SimpleNamespace(publish=lambda _bell: None, resign=lambda: None, clock_behind=False)
        self.loop = Orchestrator(
            self.engine, idle, None, pace, lambda: self.now_ms, lambda *_: None, self.faults.append
        )

    def send(self, device: str, body: Any, kind: str = "window") -> None:
        self.seq += 1
        record = wire.Record(seq=self.seq, kind=kind, body=wire.encode(body))
        payload = wire.encode_batch(wire.Batch(epoch="1" * 32, records=(record,)))
        with writing(self.engine) as conn:
            self.intake.take(conn, [Message(topics.up(device), payload, False, 1)], now_ms=self.now_ms)

    def count(self, device: str, arm: str, stage: int = 0, *, rollout: str = "r", **counts: Any) -> None:
        labels = counts.pop("labels", w.Labels())
        bundle = self.candidate if arm == "candidate" else self.stable
        # A device answered what it has labels for.
        counts.setdefault("rows", labels.matched)
        at = w.Instant("b" * 32, self.seq + 1, 1, True)
        key = w.Key("gas", bundle, "onnx-fp32", arm, rollout, stage if rollout else 0)
        self.send(device, w.Window(key=key, start=at, end=at, counts=w.Counts(**counts), labels=labels))

    def crash(self, device: str, code: str, models: Any) -> None:
        event = wire.Event(at=w.Instant("b" * 32, 1, 1, True), name="worker", code=code, data={"models": models})
        self.send(device, event, "event")

    def store_event(self, device: str, data: Any) -> None:
        """As an older release may have stored it."""
        with writing(self.engine) as conn:
            row = {"device": device, "received_ms": 5, "at_ms": 1, "name": "worker", "code": "runtime_crashed"}
            conn.execute(insert(t.events), [row | {"data": data}])

    def row(self) -> dict[str, Any]:
        with reading(self.engine) as conn:
            return rollouts.require(conn, "r")

    def last(self) -> dict[str, Any]:
        with reading(self.engine) as conn:
            found = rollouts.last_decision(conn, "r")
        assert found is not None
        return found

    def readings(self, stage: int = 0) -> tuple[tuple[j.Unit, ...], dict[str, Reading]]:
        row = self.row() | {"stage": stage}
        plan = p.read_plan(row["plan"])
        with reading(self.engine) as conn:
            made = judging.design(conn, row, plan, stage)
            assert plan.judge is not None
            return made.units, judging.read(conn, row, plan.judge, made.units, began_ms=0, now_ms=self.now_ms)

    def freeze(self, stage: int, candidates: int) -> None:
        rows = [
            {
                "rollout": "r",
                "stage": stage,
                "device": f"d{i:02}",
                "arm": "candidate" if i < candidates else "control",
                "stratum": "",
                "online": True,
            }
            for i in range(DEVICES)
        ]
        with writing(self.engine) as conn:
            conn.execute(insert(t.rollout_devices), rows)


def right(n: int, wrong: int = 0) -> w.Labels:
    return w.Labels(confusion=(n - wrong, wrong) + (0,) * (CLASSES**2 - 2), matched=n)


@pytest.fixture
def fleet(tmp_path):
    engine = open_engine(sqlite_url(tmp_path / "server.db"))
    migrations.migrate(engine)
    digests = []
    with writing(engine) as conn:
        for version in ("1.0.0", "2.0.0"):
            models.build_bundle(tmp_path / version, version=version)
            raw = (tmp_path / version / "manifest.json").read_bytes()
            digests.append(hashlib.sha256(raw).hexdigest())
            bundle = {"digest": digests[-1], "model": "gas", "version": version, "state": "approved"}
            conn.execute(insert(t.bundles), [bundle | {"manifest": raw, "submitter": "x", "pushed_ms": 0}])
        conn.execute(insert(t.groups), [{"name": "g", "created_ms": 0}, {"name": "other", "created_ms": 0}])
        devices = [(f"d{i:02}", "g") for i in range(DEVICES)] + [("thief", "other")]
        known = {"status": "enrolled", "enrolled_ms": 0, "public_key_sha256": "", "public_key_pem": ""}
        more = {"certificate_expires_ms": 0, "online": True, "seen_ms": NOW_MS}
        conn.execute(
            insert(t.devices), [{"id": d, "group": g, "certificate_serial": d} | known | more for d, g in devices]
        )
        conn.execute(
            insert(t.rollouts).values(
                id="r", group="g", model="gas", stable=digests[0], candidate=digests[1], salt="0" * 32,
                plan=p.read_plan(PLAN).to_builtins(), state="running", stage=0, stage_since_ms=0, entered_ms=0,
                created_by="x", created_ms=0,
            )
        )  # fmt: skip
    made = Fleet(engine, digests[0], digests[1])
    made.freeze(0, CANDIDATES)
    yield made
    engine.dispose()


# --- what raises in the judge -----------------------------------------------------------------------------------------


def break_judge(fleet: Fleet) -> None:
    """A stored look that no release can read: whatever makes the judge raise, it must look like this from outside."""
    row = {"rollout": "r", "stage": 0, "number": 1, "at_ms": 1, "information": 0.1}
    with writing(fleet.engine) as conn:
        conn.execute(insert(t.looks), [row | {"evidence": b"no zlib", "ruling": {}, "memory": b""}])


def test_gates_send_back_a_bad_candidate_although_the_judge_raises(fleet):
    break_judge(fleet)
    for i in range(CANDIDATES):
        fleet.count(f"d{i:02}", "candidate", failed=5000)
    fleet.loop.tick()
    assert fleet.row()["state"] == "rolling_back"
    assert "20000 of 20000 requests failed" in fleet.row()["reason"]


def test_the_deadline_pauses_although_the_judge_raises_and_the_reason_names_the_fault(fleet, caplog):
    break_judge(fleet)
    fleet.loop.tick()
    assert (fleet.row()["state"], fleet.last()["verdict"]) == ("running", "NO_DATA")
    unread = "the judge could not look (the stored look 1 of stage 1 of rollout r cannot be read: error: "
    assert unread in fleet.last()["reason"]
    assert "judge" in fleet.last()["evidence"]["missing"]
    fleet.now_ms += 3_600_000
    fleet.loop.tick()
    assert fleet.row()["state"] == "paused"
    assert "the judge could not look" in fleet.row()["reason"]
    assert fleet.faults == ["judge", "judge"]
    assert "judge failed rollout=r stage=0" in caplog.text


def test_going_back_ends_although_the_judge_raises(fleet):
    break_judge(fleet)
    with writing(fleet.engine) as conn:
        conn.execute(update(t.rollouts).values(state="rolling_back"))
    fleet.loop.tick()
    assert fleet.row()["state"] == "rolled_back"


@pytest.fixture(params=["evidence", "memory", "ruling"])
def unread(fleet, request) -> Fleet:
    """The first look is stored with a float where whole numbers are read, or with a ruling that is no JSON."""
    for i in range(DEVICES):
        fleet.count(f"d{i:02}", "candidate" if i < CANDIDATES else "control", ok=500, labels=right(100, 10))
    fleet.loop.tick()
    with writing(fleet.engine) as conn:
        packed = conn.execute(select(t.looks.c.evidence, t.looks.c.memory)).one()
        look, memory = (msgspec.msgpack.decode(zlib.decompress(part)) for part in packed)
        look["readings"]["labelled_errors"]["n"][-1] = 9.3e18
        memory["looks"] = 1.5
        bad: Any = {
            "evidence": zlib.compress(msgspec.msgpack.encode(look)),
            "memory": zlib.compress(msgspec.msgpack.encode(memory)),
            "ruling": literal("no JSON", Text),
        }[request.param]
        conn.execute(update(t.looks).values({request.param: bad}))
    return fleet


UNREAD = "the judge could not look (the stored look 1 of stage 1 of rollout r cannot be read: "


def test_a_stored_look_that_cannot_be_read_leaves_the_page_standing_and_is_named_on_it(unread):
    with reading(unread.engine) as conn:
        found = overview.gather(conn, name="x", parts={}, now_ms=NOW_MS)
    (shown,) = found.rollouts
    assert UNREAD in shown.reason
    assert [side.inferences for side in shown.sides] == [12 * 500, 4 * 500]
    assert "the stored look 1 of stage 1 of rollout r" in routes._environment.get_template("live.html").render(o=found)


def test_a_stored_look_that_cannot_be_read_leaves_device_why_an_answer_that_names_it(unread):
    with writing(unread.engine) as conn:
        conn.execute(update(t.devices).where(t.devices.c.id == "d00").values(running={"gas": {"version": "1.0.0"}}))
    with reading(unread.engine) as conn:
        told = why.explain(conn, "d00", roles={}, now_ms=NOW_MS, seen_s=60)
        held = why._held(conn, rollouts.require(conn, "r"), NOW_MS)
    assert [one["model"] for one in told["models"]] == ["gas"]
    assert UNREAD in held


def test_a_stored_look_that_cannot_be_read_leaves_gates_and_deadline_at_work(unread):
    unread.now_ms += 60_000
    unread.loop.tick()
    assert UNREAD in unread.last()["reason"]
    for i in range(CANDIDATES):
        unread.count(f"d{i:02}", "candidate", failed=5000)
    unread.loop.tick()
    assert unread.row()["state"] == "rolling_back"


# --- the arms on the page -----------------------------------------------------------------------------------------------


def test_the_page_counts_an_arm_by_its_frozen_devices_and_its_bundle_alone(fleet):
    for i in range(DEVICES - 1):
        fleet.count(f"d{i:02}", "candidate" if i < CANDIDATES else "control", ok=90, failed=10, labels=right(50, 5))
    # Of another group, not of the list; of the list, with the name of the other arm; another bundle.
    fleet.count("thief", "candidate", failed=1 << 30, labels=right(1 << 20, 1 << 20))
    fleet.count("thief", "control", failed=1 << 30)
    fleet.count("d15", "candidate", failed=1 << 30)
    at = w.Instant("b" * 32, fleet.seq + 1, 1, True)
    key = w.Key("gas", "e" * 64, "onnx-fp32", "candidate", "r", 0)
    fleet.send("d00", w.Window(key=key, start=at, end=at, counts=w.Counts(failed=1 << 30)))
    with reading(fleet.engine) as conn:
        (shown,) = overview.gather(conn, name="x", parts={}, now_ms=NOW_MS).rollouts
    control, candidate = shown.sides
    assert (control.devices, control.reporting, control.inferences, control.failed) == (12, 11, 1100, 110)
    assert (candidate.devices, candidate.reporting, candidate.inferences, candidate.failed) == (4, 4, 400, 40)
    assert (candidate.labelled, candidate.wrong) == (200, 20)


# --- events -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [1, [1], "gas", None, True])
@pytest.mark.parametrize("device", ["d00", "thief"])
def test_an_event_of_a_wrong_type_stops_no_look(fleet, device, models):
    fleet.store_event(device, {"models": models})
    fleet.loop.tick()
    with reading(fleet.engine) as conn:
        assert looks.last(conn, "r", 0) is not None
    assert fleet.faults == []
    assert sum(fleet.readings()[1]["trouble"].x) == 0


def test_whatever_events_ingest_takes_the_candidate_is_still_looked_at_and_sent_back(fleet):
    chance = random.Random(5)
    words: list[Any] = [None, True, 0, -(1 << 62), 1e300, "", "gas", [], [[1]], {}, {"gas": 1}, {"gas": {"gas": []}}]
    for _ in range(120):
        keys = chance.sample(["models", "digest", "rollout", "how", ""], 3)
        event = wire.Event(
            at=w.Instant("b" * 32, 1, 1, True),
            name=chance.choice(["worker", "update"]),
            code=chance.choice(["runtime_crashed", "worker_hung", "golden_failed", "no_variant", ""]),
            data={key: chance.choice([*words, fleet.candidate, "r"]) for key in keys},
        )
        fleet.send(chance.choice(["d00", "d05", "thief"]), event, "event")
    fleet.loop.tick()
    with reading(fleet.engine) as conn:
        assert looks.last(conn, "r", 0) is not None
    for i in range(CANDIDATES):
        fleet.count(f"d{i:02}", "candidate", failed=5000)
    fleet.now_ms += 60_000
    fleet.loop.tick()
    assert (fleet.faults, fleet.row()["state"]) == ([], "rolling_back")


def test_a_workers_event_of_a_wrong_type_is_quarantined(fleet):
    fleet.crash("d00", "runtime_crashed", 1)
    with reading(fleet.engine) as conn:
        assert conn.execute(select(t.events.c.id)).all() == []
        assert conn.execute(select(t.quarantine.c.code)).scalars().all() == ["malformed_record"]


@pytest.mark.parametrize("code", ["runtime_crashed", "worker_hung"])
def test_a_worker_that_crashed_or_hung_is_trouble_of_a_frozen_device_only(fleet, code):
    fleet.crash("d01", code, {"gas": fleet.candidate})
    fleet.crash("d02", code, {"another": fleet.candidate})
    fleet.crash("thief", code, {"gas": fleet.candidate})
    units, found = fleet.readings()
    troubled = {unit.device for unit, x in zip(units, found["trouble"].x, strict=True) if x}
    assert troubled == {"d01"}


# --- a list that devices were lost of --------------------------------------------------------------------------------------


def lose(fleet: Fleet, *devices: str) -> None:
    with writing(fleet.engine) as conn:
        conn.execute(update(t.devices).where(t.devices.c.id.in_(devices)).values(status="revoked", online=False))


def steer(fleet: Fleet, action: Any) -> dict[str, Any]:
    with writing(fleet.engine) as conn:
        steps: dict[str, Any] = {"reason": "x", "actor": "me", "now_ms": fleet.now_ms, "seen_s": 3600}
        return rollouts.command(conn, "r", action, **steps)


def pause_and_resume(fleet: Fleet) -> dict[str, Any]:
    steer(fleet, "pause")
    return steer(fleet, "resume")


def arms(fleet: Fleet, stage: int) -> dict[str, list[str]]:
    with reading(fleet.engine) as conn:
        return rollouts.arms(conn, "r", stage)


def everyone_counts(fleet: Fleet, stage: int) -> None:
    listed = arms(fleet, stage)
    for arm, devices in listed.items():
        for device in devices:
            fleet.count(device, arm, stage, ok=500, labels=right(100, 10))


def test_a_stage_whose_candidates_were_lost_begins_anew_when_it_is_resumed_and_its_looks_stay_explained(fleet):
    everyone_counts(fleet, 0)
    fleet.loop.tick()
    lose(fleet, "d00", "d01", "d02")
    fleet.now_ms += 1000
    resumed = pause_and_resume(fleet)
    assert (resumed["state"], resumed["stage"], resumed["entered_ms"]) == ("running", 1, fleet.now_ms)
    assert "1 of 4 candidates and 12 of 12 controls are left, so stage 1 begins anew as stage 2" in resumed["reason"]
    assert fleet.last()["reason"] == resumed["reason"]
    again = arms(fleet, 1)
    assert len(again["candidate"]) == 4
    assert not {"d00", "d01", "d02"} & {*again["candidate"], *again["control"]}
    plan = p.read_plan(fleet.row()["plan"])
    assert [stage.devices for stage in plan.stages] == [4, 4, 8, None]
    everyone_counts(fleet, 1)
    fleet.loop.tick()
    for stage in (0, 1):
        found = explained(fleet, stage=stage)
        assert (found["count"], found["identical"]) == (1, True)
    assert explained(fleet, stage=1)["arms"] == again
    assert explained(fleet, stage=1)["ruling"]["verdict"] != "NO_DATA"


def test_a_stage_in_which_nobody_was_there_to_be_frozen_begins_anew_when_it_is_resumed(fleet):
    with writing(fleet.engine) as conn:
        conn.execute(delete(t.rollout_devices))
    resumed = pause_and_resume(fleet)
    assert resumed["stage"] == 1
    assert len(arms(fleet, 1)["candidate"]) == 4
    assert "0 of 0 candidates and 0 of 0 controls are left" in resumed["reason"]


def test_a_resumed_stage_whose_list_is_still_large_enough_goes_on_with_it(fleet):
    lose(fleet, "d00", "d01")
    resumed = pause_and_resume(fleet)
    assert (resumed["stage"], resumed["reason"], resumed["entered_ms"]) == (0, "x", 0)
    assert len(fleet.row()["plan"]["stages"]) == 3


def test_a_new_list_forgets_no_candidate_that_fell_silent(fleet):
    with writing(fleet.engine) as conn:
        everyone = {"*": str(1 << 64)}
        conn.execute(update(t.rollouts).values(cuts=everyone))
        conn.execute(update(t.devices).where(t.devices.c.id == "d03").values(online=False, gone_ms=5))
    lose(fleet, "d00", "d01", "d02")
    resumed = pause_and_resume(fleet)
    assert resumed["stage"] == 0
    assert "1 silent still hold the stage" in resumed["reason"]


def test_too_few_devices_for_a_new_list_are_named_and_nothing_is_begun(fleet):
    lose(fleet, *(f"d{i:02}" for i in range(DEVICES - 1)))
    resumed = pause_and_resume(fleet)
    assert (resumed["stage"], len(fleet.row()["plan"]["stages"])) == (0, 3)
    assert "too few for another (1 and 0): the stage cannot pass" in resumed["reason"]


def test_a_plan_that_is_full_says_that_only_a_new_rollout_helps(fleet):
    stages = [{"devices": 4}] * (p.MAX_STAGES - 1) + [{"share": 1}]
    with writing(fleet.engine) as conn:
        conn.execute(update(t.rollouts).values(plan=p.read_plan(PLAN | {"stages": stages}).to_builtins()))
    lose(fleet, "d00", "d01", "d02")
    resumed = pause_and_resume(fleet)
    assert (resumed["stage"], len(fleet.row()["plan"]["stages"])) == (0, p.MAX_STAGES)
    assert "only a new rollout helps" in resumed["reason"]


# --- labels beyond all measure ------------------------------------------------------------------------------------------


def counters(fleet: Fleet) -> dict[str, int]:
    with reading(fleet.engine) as conn:
        return {row.name: row.n for row in conn.execute(select(t.ingest_counters))}


@pytest.mark.parametrize(
    "confusion",
    [((1 << 40) - 1,) * CLASSES**2, (5,) * 4, (5,) * 5, (1,) * 65_536],
    ids=["huge", "four", "five", "wide"],
)
def test_labels_that_nobody_can_have_counted_are_dropped_and_the_rest_of_the_window_counts(fleet, confusion):
    fleet.count("d00", "candidate", ok=10, labels=w.Labels(confusion=confusion))
    fleet.count("d00", "candidate", ok=10, labels=right(7, 2))
    assert counters(fleet)["labels_unfit"] == 1
    units, found = fleet.readings()
    assert (units[0].device, found["labelled_errors"].n[0], found["labelled_errors"].x[0]) == ("d00", 7, 2)
    assert found["failures"].n[0] == 20


def test_sums_stop_before_the_database_leaves_whole_numbers_and_looks_stay_readable(fleet):
    most = (1 << 40) - 1
    for i in range(DEVICES):
        fleet.count(f"d{i:02}", "candidate" if i < CANDIDATES else "control", ok=500, labels=right(100, 10))
    for _ in range(3):
        fleet.count("d15", "control", ok=most, rows=0, failed=most, shed=most, labels=right(1 << 32, 5))
    with writing(fleet.engine) as conn:
        # As 2**31 such windows would leave it.
        conn.execute(update(t.evidence).where(t.evidence.c.device == "d15").values(labelled=most - 5, wrong=most - 5))
    fleet.count("d15", "control", ok=1, labels=right(1 << 32, 1 << 32))
    with reading(fleet.engine) as conn:
        found = conn.execute(select(t.evidence).where(t.evidence.c.device == "d15")).mappings().one()
    assert [found[name] for name in ("ok", "failed", "shed", "labelled", "wrong")] == [most] * 5
    fleet.loop.tick()
    fleet.now_ms += 60_000
    fleet.loop.tick()
    with reading(fleet.engine) as conn:
        assert [taken.look.number for taken in looks.all_of(conn, "r", 0)] == [1, 2]
    assert explained(fleet)["identical"]
    assert fleet.faults == []


def test_a_look_that_could_not_be_read_again_is_not_stored(fleet):
    for i in range(DEVICES):
        fleet.count(f"d{i:02}", "candidate" if i < CANDIDATES else "control", ok=500, labels=right(100, 10))
    # What a database that has gone over to floating point gives.
    with writing(fleet.engine) as conn:
        conn.execute(update(t.evidence).where(t.evidence.c.device == "d15").values(labelled=9.3e18))
    fleet.loop.tick()
    with reading(fleet.engine) as conn:
        assert looks.all_of(conn, "r", 0) == []
    assert fleet.faults == ["judge"]
    assert "the judge could not look" in fleet.last()["reason"]


# --- looks held against what they rest on ---------------------------------------------------------------------------------


def explained(fleet: Fleet, stage: int = 0, **asked: int) -> dict[str, Any]:
    row = fleet.row()
    with reading(fleet.engine) as conn:
        found = recomputing.explain(conn, row, stage, **asked)
    return found.to_builtins()


LOOKS = 7


@pytest.fixture
def looked(fleet) -> Fleet:
    """A stage that goes badly, so that its looks remove assignments and remember it."""
    for number in range(LOOKS):
        for i in range(DEVICES if number else 0):
            inside = i < CANDIDATES
            labels = right(3000, 900 if inside else 300 + i)
            fleet.count(f"d{i:02}", "candidate" if inside else "control", ok=500, labels=labels)
        # Past a verdict too: the row is held in its stage.
        fleet.loop.tick()
        with writing(fleet.engine) as conn:
            conn.execute(update(t.rollouts).values(state="running"))
        fleet.now_ms += 60_000
    return fleet


def test_looks_come_out_the_same_in_parts_of_any_size_and_as_a_replay_from_the_first(looked):
    whole = explained(looked)
    assert [look["number"] for look in whole["looks"]] == list(range(1, LOOKS + 1))
    assert (whole["identical"], whole["count"], whole["next"]) == (True, LOOKS, None)
    assert whole["looks"][0]["verdict"] != whole["looks"][-1]["verdict"] == whole["ruling"]["verdict"] == "FAIL"
    for size in range(1, LOOKS + 2):
        parts, after = [], 0
        while True:
            part = explained(looked, after=after, limit=size)
            assert len(part["looks"]) <= size
            parts += part["looks"]
            if part["next"] is None:
                break
            after = int(part["next"])
        assert parts == whole["looks"], size
    with reading(looked.engine) as conn:
        stored = looks.all_of(conn, "r", 0)
        made = judging.design(conn, rollouts.require(conn, "r"), p.read_plan(PLAN), 0)
    replayed = j.replay(made, [one.look for one in stored])
    assert replayed == [(one.ruling, one.memory) for one in stored]


def change_look(fleet: Fleet, number: int, part: str, change: Any) -> None:
    where = (t.looks.c.rollout == "r", t.looks.c.number == number)
    with writing(fleet.engine) as conn:
        packed = conn.execute(select(t.looks.c[part]).where(*where)).scalar_one()
        value = msgspec.msgpack.decode(zlib.decompress(packed))
        change(value)
        conn.execute(update(t.looks).where(*where).values({part: zlib.compress(msgspec.msgpack.encode(value))}))


def faults_of(found: dict[str, Any]) -> dict[int, str]:
    return {look["number"]: look.get("fault", "differs") for look in found["looks"] if not look["identical"]}


def test_who_changes_evidence_or_memory_of_a_look_is_found_out_at_whatever_look_the_question_begins(looked):
    def forget(memory: Any) -> None:
        memory["tails"]["labelled_errors"] |= {"removed": b"", "count": 0, "failed_at": 0}

    def one_more(look: Any) -> None:
        look["readings"]["labelled_errors"]["x"][0] += 1

    change_look(looked, 3, "evidence", one_more)
    change_look(looked, 5, "memory", forget)
    found = explained(looked)
    assert {3, 5} <= set(faults_of(found)) <= {3, 5, 6}
    assert set(faults_of(explained(looked, after=2, limit=1))) == {3}
    assert set(faults_of(explained(looked, after=4, limit=1))) == {5}
    assert not found["identical"]


def test_a_look_that_is_missing_or_stands_in_the_place_of_another_is_found_out(looked):
    with writing(looked.engine) as conn:
        conn.execute(delete(t.looks).where(t.looks.c.number == 3))
        conn.execute(update(t.looks).where(t.looks.c.number == 7).values(number=8))
    assert faults_of(explained(looked)) == {
        4: "cannot be recomputed: the look before it is missing",
        8: "cannot be recomputed: what is stored is of look 7",
    }
    assert faults_of(explained(looked, after=3, limit=1)) == {4: "cannot be recomputed: the look before it is missing"}


def test_a_stored_look_that_cannot_be_read_is_named_among_those_that_can(looked):
    change_look(looked, 4, "evidence", lambda look: look["readings"]["labelled_errors"]["n"].__setitem__(-1, 9.3e18))
    found = explained(looked)
    assert set(faults_of(found)) == {4, 5}
    assert faults_of(found)[4].startswith("cannot be read: ValidationError: Expected `int`, got `float`")
    assert "the stored look 4 of stage 1" in faults_of(found)[5]
    assert found["ruling"]["verdict"] == "FAIL"


def test_a_stage_without_looks_has_nothing_to_recompute(fleet):
    found = explained(fleet)
    assert (found["looks"], found["count"], found["next"], found["ruling"]) == ([], 0, None, None)


def test_labels_of_a_device_weigh_no_more_than_what_it_answered_with_the_bundle(fleet):
    for i in range(DEVICES):
        arm = "candidate" if i < CANDIDATES else "control"
        fleet.count(f"d{i:02}", "none", rollout="", ok=200, rows=200, labels=right(200, 2))
        fleet.count(f"d{i:02}", arm, ok=100, rows=100, labels=right(100, 10))
    fleet.count("d15", "control", ok=0, rows=0, labels=right(1 << 32, 1 << 31))
    fleet.count("d00", "candidate", ok=0, rows=0, labels=right(300, 290))
    units, found = fleet.readings()
    told = dict(
        zip(
            (unit.device for unit in units),
            zip(*dataclasses.astuple(found["labelled_errors"]), strict=True),
            strict=True,
        )
    )
    # Four of its rows in labels: all weigh a quarter. Its past is of the stable bundle, of which it answered all.
    assert told["d00"] == (100, 300 // 4, 200, 2)
    assert told["d01"] == (100, 10, 200, 2)
    answered = told["d15"][0] + told["d15"][2]
    assert answered <= 300
    assert told["d15"][1] / told["d15"][0] == pytest.approx(0.5, abs=0.01)
    with reading(fleet.engine) as conn:
        (shown,) = overview.gather(conn, name="x", parts={}, now_ms=NOW_MS).rollouts
    control, candidate = shown.sides
    assert (candidate.labelled, candidate.wrong, candidate.labels_held) == (400, 75 + 30, 300)
    assert control.labelled <= 1100 + 300 < control.labels_held


def test_labels_that_overtake_the_answers_they_are_about_count_when_those_are_here(fleet):
    fleet.count("d00", "candidate", ok=0, rows=0, labels=right(80, 8))
    units, found = fleet.readings()
    assert units[0].device == "d00"
    assert (found["labelled_errors"].n[0], found["labelled_errors"].x[0]) == (0, 0)
    # Another variant of the bundle, in another stage: over its life. Rows may be more than requests, and requests are rows.
    fleet.count("d00", "candidate", 1, ok=30, rows=0)
    _, found = fleet.readings()
    assert (found["labelled_errors"].n[0], found["labelled_errors"].x[0]) == (30, 3)
    fleet.count("d00", "candidate", ok=2, rows=50)
    _, found = fleet.readings()
    assert (found["labelled_errors"].n[0], found["labelled_errors"].x[0]) == (50, 5)
    fleet.count("d00", "candidate", ok=2, rows=30)
    _, found = fleet.readings()
    assert (found["labelled_errors"].n[0], found["labelled_errors"].x[0]) == (80, 8)


# --- pasts of later stages ----------------------------------------------------------------------------------------------


def test_in_a_later_stage_every_arm_has_its_past_from_before_the_rollout(fleet):
    fleet.freeze(1, 8)
    world = {"before": 10, "now": 20}
    for i in range(DEVICES):
        name = f"d{i:02}"
        fleet.count(name, "none", rollout="", ok=1000, failed=5, labels=right(1000, world["before"]))
        fleet.count(name, "candidate" if i < 4 else "control", 0, ok=1000, failed=9, labels=right(1000, world["now"]))
    for i in range(DEVICES):
        fleet.count(f"d{i:02}", "candidate" if i < 8 else "control", 1, ok=900, failed=9, labels=right(900, 18))
    _, found = fleet.readings(1)
    assert set(zip(found["labelled_errors"].pre_n, found["labelled_errors"].pre_x, strict=True)) == {(1000, 10)}
    assert set(zip(found["failures"].pre_n, found["failures"].pre_x, strict=True)) == {(1005, 5)}
    assert found["labelled_errors"].n == (900,) * DEVICES


def test_what_a_device_counts_of_no_rollout_between_stages_changes_no_past(fleet):
    fleet.freeze(1, 8)
    fleet.count("d04", "none", rollout="", ok=100, labels=right(100, 1))
    fleet.count("d04", "control", 0, ok=100, labels=right(100, 2))
    # The truth of an old answer comes late, and a candidate's worker has forgotten it.
    fleet.count("d04", "none", rollout="", ok=0, labels=right(50, 50))
    fleet.count("d04", "candidate", 1, ok=100, labels=right(100, 2))
    units, found = fleet.readings(1)
    at = [unit.device for unit in units].index("d04")
    assert (found["labelled_errors"].pre_n[at], found["labelled_errors"].pre_x[at]) == (100, 1)
