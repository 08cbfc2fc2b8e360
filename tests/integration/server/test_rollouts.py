"""Rollouts on a real server: evidence comes over MQTT, documents go out signed, and a killed server goes on where it was."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from skerry_contract import group as g
from skerry_contract import window as w
from skerry_contract import wire

from tests.integration.server.rollout_fleet import (
    BOOT,
    MODEL,
    Fleet,
    audited,
    decisions,
    first_version,
    published,
    start,
    window,
)
from tests.rig_server import DeviceRig, Operator, ServerRig


def test_a_good_version_goes_to_all_then_the_next_to_exactly_three_and_then_to_all(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    one = maker.publish(MODEL, "1.0.0")
    first = fleet.start(one, [{"devices": 2}, {"share": 1, "min_devices": 8, "min_inferences": 50}])
    fleet.drive(first, {"completed"})
    assert decisions(rig, first) == [("start", ""), ("complete", "PASS"), ("finish", "PASS")]
    assert fleet.runs(one) == {device.id for device in fleet.devices}, "nothing to compare with: one stage of everyone"

    two = maker.publish(MODEL, "1.1.0", seed=1)
    stages = [
        {"devices": 3, "min_devices": 3, "min_inferences": 100, "min_seconds": 1.0},
        {"share": 1, "min_devices": 8, "min_inferences": 200},
    ]
    second = fleet.start(two, stages, id="r-second")
    assert second == "r-second"
    seen: set[int] = set()
    while rig.good("GET", f"/api/v1/rollouts/{second}")["stage"] == 0:
        fleet.follow()
        if rig.good("GET", f"/api/v1/rollouts/{second}")["stage"] == 0:
            seen.add(len(fleet.runs(two)))
        time.sleep(0.1)
    assert max(seen) == 3
    found = fleet.drive(second, {"completed"})
    assert fleet.runs(two) == {device.id for device in fleet.devices}
    assert decisions(rig, second) == [("start", ""), ("advance", "PASS"), ("complete", "PASS"), ("finish", "PASS")]
    items = rig.good("GET", f"/api/v1/rollouts/{second}/decisions")["items"]
    advance = next(item for item in items if item["action"] == "advance")
    assert "3 devices confirmed (wanted 3)" in advance["reason"]
    assert advance["evidence"]["candidates"] == 3
    assert found["reason"]
    # Everyone runs it as the stable bundle, and the arms of the stage were frozen for the judge.
    document = fleet.published()
    assert document.models[MODEL].stable.digest == two
    assert document.models[MODEL].rollout is None
    rows = audited(rig)
    assert [r["action"] for r in rows if r["subject"] == "rollout:r-second"] == [
        "rollout.start", "rollout.advance", "rollout.complete", "rollout.finish",
    ]  # fmt: skip
    # What the devices sent is what the server counts.
    rig.wait("all acknowledged", lambda: all(d.acked == d.seq for d in fleet.devices))
    for device in fleet.devices:
        counts = rig.good("GET", f"/api/v1/telemetry/counts?model={MODEL}&device={device.id}")
        assert {item["device"] for item in counts["items"]} == {device.id}
        assert sum(item["ok"] + item["failed"] for item in counts["items"]) == fleet.sent[device.id]
        assert {item["version"] for item in counts["items"]} == {"1.0.0", "1.1.0"}
        (stream,) = [stream for stream in counts["streams"] if stream["device"] == device.id]
        assert stream["upto"] == device.seq and not stream["duplicates"]


def test_a_candidate_that_fails_is_rolled_back_by_itself(rig: ServerRig, maker: Operator, fleet: Fleet) -> None:
    one = first_version(maker, fleet)
    bad = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.failing[bad] = 0.5
    rollout = fleet.start(bad, [{"devices": 2, "min_devices": 2, "min_inferences": 50}, {"share": 1}])
    found = fleet.drive(rollout, {"rolled_back"})
    assert decisions(rig, rollout) == [("start", ""), ("roll_back", "FAIL"), ("rolled_back", "")]
    assert fleet.runs(bad) == set()
    assert fleet.runs(one) == {device.id for device in fleet.devices}
    failed = rig.good("GET", f"/api/v1/rollouts/{rollout}/decisions")["items"]
    verdict = next(item for item in failed if item["verdict"] == "FAIL")
    assert "requests failed" in verdict["reason"]
    assert verdict["evidence"]["failed"] > 0
    assert found["ended_ms"]
    # The same candidate may be tried again, in a new rollout that starts from nothing.
    fleet.failing.clear()
    again = fleet.start(bad, [{"share": 1, "min_inferences": 20}])
    fleet.drive(again, {"completed"})


def test_devices_that_go_back_fail_the_rollout_at_the_stated_count(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    first_version(maker, fleet)
    bad = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.refused[bad] = "trial_crashed"
    rollout = fleet.start(bad, [{"devices": 3}], gates={"max_reverts": 1})
    fleet.drive(rollout, {"rolled_back"})
    items = rig.good("GET", f"/api/v1/rollouts/{rollout}/decisions")["items"]
    verdict = next(item for item in items if item["verdict"] == "FAIL")
    assert "trial_crashed" in verdict["reason"]
    assert sum(verdict["evidence"]["reverted"].values()) >= 2


@pytest.mark.parametrize("paused", [False, True])
def test_a_person_rolls_back_and_it_ends_when_no_device_answers_with_the_candidate(
    rig: ServerRig, maker: Operator, fleet: Fleet, paused: bool
) -> None:
    one = first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = fleet.start(two, [{"devices": 2, "min_inferences": 10**6}, {"share": 1}])
    path = f"/api/v1/rollouts/{rollout}"
    rig.wait("candidates", lambda: fleet.follow() or len(fleet.runs(two)) == 2)
    rig.wait("their word", lambda: fleet.follow() or rig.good("GET", path)["now"]["evidence"]["still"] == 2)
    if paused:
        rig.good("POST", f"{path}/pause", {"reason": "odd noises"})
    found = rig.good("POST", f"{path}/rollback", {"reason": "it hums"})
    assert (found["state"], found["reason"]) == ("rolling_back", "it hums")
    assert rig.ask("POST", f"{path}/rollback").code == "not_allowed"
    rig.wait("stable for all", lambda: fleet.published().models[MODEL].rollout is None)
    assert rig.good("GET", path)["state"] == "rolling_back", "two devices answer with the candidate still"
    fleet.drive(rollout, {"rolled_back"})
    assert fleet.runs(one) == {device.id for device in fleet.devices}
    assert ("roll_back", "") in decisions(rig, rollout)
    (row,) = [
        item
        for item in audited(rig)
        if item["action"] == "rollout.roll_back" and item["subject"] == f"rollout:{rollout}"
    ]
    assert (row["reason"], row["actor"]) == ("it hums", "token:admin")


def test_a_first_bundle_cannot_be_rolled_back_and_the_answer_names_abort(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    one = maker.publish(MODEL, "1.0.0")
    rollout = fleet.start(one, [{"share": 1}])
    path = f"/api/v1/rollouts/{rollout}"
    refused = rig.ask("POST", f"{path}/rollback")
    assert (refused.status, refused.code) == (409, "first_bundle")
    rig.good("POST", f"{path}/pause")
    assert "it can abort, resume" in (told := rig.ask("POST", f"{path}/pause").data.decode())
    assert "roll back" not in told
    rig.good("POST", f"{path}/abort")


def test_a_quiet_candidate_never_passes_and_a_deadline_only_pauses(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    one = first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = fleet.start(two, [{"devices": 2, "min_inferences": 10, "max_seconds": 1}, {"share": 1}])
    rig.wait("the deadline", lambda: rig.good("GET", f"/api/v1/rollouts/{rollout}")["state"] == "paused")
    assert decisions(rig, rollout)[-1] == ("pause", "NO_DATA")
    assert fleet.published().models[MODEL].rollout is not None, "a pause takes nothing back"
    taken = rig.ask(
        "POST",
        "/api/v1/rollouts",
        {"group": fleet.group, "model": MODEL, "candidate": two, "stages": [{"share": 1}]},
    )
    assert (taken.status, taken.code) == (409, "rollout_active")
    again = rig.ask("POST", f"/api/v1/rollouts/{rollout}/pause")
    assert again.code == "not_allowed"
    assert "it can abort, resume, roll back" in again.data.decode()
    rig.good("POST", f"/api/v1/rollouts/{rollout}/resume", {"reason": "traffic is back"})
    fleet.follow()
    found = rig.good("POST", f"/api/v1/rollouts/{rollout}/abort", {"reason": "not today"})
    assert (found["state"], found["reason"]) == ("aborted", "not today")
    rig.wait("stable for all", lambda: fleet.published().models[MODEL].rollout is None)
    fleet.follow()
    assert fleet.runs(one) == {device.id for device in fleet.devices}
    assert rig.ask("POST", f"/api/v1/rollouts/{rollout}/resume").code == "not_allowed"


def test_an_offline_device_neither_counts_nor_blocks_and_takes_the_version_when_it_returns(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    lost = fleet.devices[3]
    fleet.offline.add(lost.id)
    lost.vanish()
    rig.wait("the will", lambda: fleet.online() == 7)
    rollout = fleet.start(two, [{"devices": 3, "min_devices": 3, "min_inferences": 60}, {"share": 1, "min_devices": 7}])
    assert lost.id not in rig.good("GET", f"/api/v1/rollouts/{rollout}")["devices"]["candidate"]
    fleet.drive(rollout, {"completed"})
    assert lost.id not in fleet.runs(two)
    lost.birth += 1
    lost.connect()
    fleet.offline.clear()
    fleet.follow()
    assert lost.id in fleet.runs(two)


def go(fleet: Fleet, *lost: DeviceRig) -> None:
    """These lose their network, and the broker sends their wills."""
    before = fleet.online()
    for device in lost:
        fleet.offline.add(device.id)
        device.vanish()
    fleet.server.wait("the wills", lambda: fleet.online() == before - len(lost))


def back(fleet: Fleet, *found: DeviceRig) -> None:
    for device in found:
        fleet.offline.discard(device.id)
        fleet.running.pop(device.id, None)
        device.birth += 1
        device.connect()


def test_canaries_that_fall_silent_hold_the_stage_pause_it_and_pass_only_when_they_are_back(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    away = fleet.devices[0]
    go(fleet, away)
    stages = [{"devices": 4, "min_inferences": 10_000, "max_seconds": 10}, {"share": 1, "max_seconds": 60}]
    rollout = fleet.start(two, stages)
    path = f"/api/v1/rollouts/{rollout}"
    names = rig.good("GET", path)["devices"]["candidate"]
    assert away.id not in names
    canaries = [device for device in fleet.devices if device.id in names]

    def confirmed() -> bool:
        fleet.follow()
        return bool(rig.good("GET", path)["now"]["evidence"]["confirmed"] == 4)

    rig.wait("four confirmed", confirmed)
    go(fleet, *canaries[:3])
    # The one that is left meets every minimum that it can, and is not the four that were asked for.
    fleet.follow(12_000)
    rig.wait("the deadline", lambda: rig.good("GET", path)["state"] == "paused")
    held = [item for item in rig.good("GET", f"{path}/decisions")["items"] if item["verdict"] == "INCONCLUSIVE"]
    assert held[-1]["action"] == "pause"
    assert held[-1]["evidence"]["missing"][0] == "silent"
    for device in canaries[:3]:
        assert device.id in held[-1]["reason"]
    # Resuming it does not make up for them.
    rig.good("POST", f"{path}/resume", {"reason": "try"})
    for _ in range(8):
        fleet.follow()
        assert rig.good("GET", path)["stage"] == 0
        time.sleep(0.2)
    back(fleet, *canaries[:3])
    fleet.drive(rollout, {"completed"})
    assert away.id not in fleet.runs(two), "it was offline before, and held up neither stage nor completion"
    assert decisions(rig, rollout)[-3:] == [("advance", "PASS"), ("complete", "PASS"), ("finish", "PASS")]


def test_a_silent_canary_that_is_pinned_or_revoked_is_waited_for_no_longer(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    one = first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = fleet.start(two, [{"devices": 3}, {"share": 1}])
    path = f"/api/v1/rollouts/{rollout}"
    names = rig.good("GET", path)["devices"]["candidate"]
    pinned, revoked = [device for device in fleet.devices if device.id in names][:2]
    go(fleet, pinned, revoked)
    rig.wait("silence", lambda: rig.good("GET", path)["now"]["evidence"]["silent"] == 2)
    for _ in range(4):
        fleet.follow()
        assert rig.good("GET", path)["stage"] == 0
        time.sleep(0.2)
    pin = rig.good("PUT", f"/api/v1/devices/{pinned.id}/pins/{MODEL}", {"digest": one, "reason": "in the workshop"})
    assert pin["floor"] == "", "whoever pins hears of the floor, above which the device alone takes it"
    rig.good("POST", f"/api/v1/devices/{revoked.id}/revoke", {"reason": "fell into the water"})
    found = fleet.drive(rollout, {"completed"})
    assert found["state"] == "completed"


def test_a_resumed_stage_gets_another_canary_for_the_one_that_was_revoked(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = fleet.start(two, [{"devices": 2, "min_devices": 2, "min_inferences": 10, "max_seconds": 2}, {"share": 1}])
    path = f"/api/v1/rollouts/{rollout}"
    before = set(rig.good("GET", path)["devices"]["candidate"])
    revoked = next(device for device in fleet.devices if device.id in before)
    fleet.offline.add(revoked.id)
    rig.good("POST", f"/api/v1/devices/{revoked.id}/revoke", {"reason": "fell into the water"})
    rig.wait("a pause", lambda: rig.good("GET", path)["state"] == "paused", timeout_s=40)
    assert "1 of 2 devices" in rig.good("GET", path)["reason"] or "0 of 2 devices" in rig.good("GET", path)["reason"]
    rig.good("POST", f"{path}/resume", {"reason": "another one will do"})
    assert rig.good("GET", path)["now"]["evidence"]["candidates"] == 2
    found = fleet.drive(rollout, {"completed"})
    assert found["state"] == "completed"


def _of_stage(document: g.GroupDocument, stage: int) -> g.GroupDocument | None:
    part = document.models[MODEL].rollout
    return document if part is not None and part.stage == stage else None


def test_completing_waits_for_requests_made_after_it_began(rig: ServerRig, maker: Operator, fleet: Fleet) -> None:
    first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = fleet.start(two, [{"share": 0.5, "min_inferences": 100}])
    path = f"/api/v1/rollouts/{rollout}"
    while rig.good("GET", path)["state"] != "completing":
        fleet.follow(5)
        time.sleep(0.1)
    # Whoever applications were, they have stopped asking: devices report, and nothing is counted.
    document = rig.wait("everyone's document", lambda: _of_stage(fleet.published(), 1))
    for device in fleet.devices:
        found = g.assign(document, device.id, MODEL, "")
        assert found is not None
        fleet.running[device.id] = (found.digest, found.version)
        device.report({MODEL: {"digest": found.digest, "version": found.version, "state": "confirmed"}})
    rig.wait("all confirmed", lambda: rig.good("GET", path)["now"]["evidence"]["confirmed"] == 8)
    time.sleep(1.0)
    found = rig.good("GET", path)
    assert (found["state"], found["now"]["verdict"]) == ("completing", "NO_DATA")
    assert "of 100 inferences" in found["now"]["reason"]
    fleet.drive(rollout, {"completed"})


def test_completing_holds_when_the_fleet_falls_silent_in_it(rig: ServerRig, maker: Operator, fleet: Fleet) -> None:
    first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = fleet.start(two, [{"share": 0.5, "min_inferences": 100}])
    path = f"/api/v1/rollouts/{rollout}"
    while rig.good("GET", path)["state"] != "completing":
        fleet.follow(5)
        time.sleep(0.1)
    go(fleet, *fleet.devices[:5])
    for _ in range(6):
        fleet.follow(60)
        assert rig.good("GET", path)["state"] == "completing"
        time.sleep(0.3)
    assert rig.good("GET", path)["now"]["verdict"] == "INCONCLUSIVE"
    back(fleet, *fleet.devices[:5])
    fleet.drive(rollout, {"completed"})


def test_what_others_say_of_the_bundle_moves_no_rollout(
    rig: ServerRig, maker: Operator, fleet: Fleet, tmp_path: Path
) -> None:
    first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rig.good("PUT", "/api/v1/groups/elsewhere", {})
    stranger = DeviceRig(rig, "stranger", tmp_path, group="elsewhere")
    stranger.enrol()
    stranger.connect()
    rollout = fleet.start(
        two, [{"devices": 2, "min_devices": 2, "min_inferences": 100}, {"share": 1, "min_devices": 8}]
    )

    def crashed(device: DeviceRig, **about: str) -> None:
        at = w.Instant(BOOT, 1, 1, True)
        data = {"model": MODEL, "digest": two, **about}
        device.send(("event", wire.encode(wire.Event(at=at, name="update", code="trial_crashed", data=data))))

    crashed(stranger, rollout=rollout)
    crashed(fleet.devices[0], rollout="r-another")
    crashed(fleet.devices[1])
    crashed(fleet.devices[2], rollout="")
    # It also counts under the rollout's key: enough to pass the stage, and to fail it.
    key = w.Key(MODEL, two, "onnx-fp32", "candidate", rollout, 0)
    stranger.send(("window", window(key, 500_000, 500_000)))
    rig.wait("all taken", lambda: all(d.acked == d.seq for d in (stranger, *fleet.devices[:3])))
    evidence = rig.good("GET", f"/api/v1/rollouts/{rollout}")["now"]["evidence"]
    assert (evidence["inferences"], evidence["failed"]) == (0, 0)
    assert rig.good("GET", f"/api/v1/rollouts/{rollout}")["now"]["evidence"]["reverted"] == {}
    fleet.drive(rollout, {"completed"})
    stranger.disconnect()


def test_a_device_that_was_lost_with_the_server_is_not_taken_for_confirmed(
    lone_rig: ServerRig, lone_maker: Operator, lone_fleet: Fleet
) -> None:
    """A broker that is killed sends no will: the database goes on saying online."""
    rig, maker, fleet = lone_rig, lone_maker, lone_fleet
    first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = fleet.start(two, [{"devices": 2, "min_inferences": 100}, {"share": 1}])
    path = f"/api/v1/rollouts/{rollout}"
    names = rig.good("GET", path)["devices"]["candidate"]
    canaries = [device for device in fleet.devices if device.id in names]

    def confirmed() -> int:
        return int(rig.good("GET", path)["now"]["evidence"]["confirmed"])

    def step() -> bool:
        fleet.follow(2)
        return confirmed() == 2

    rig.wait("two confirmed", step)
    rig.kill()
    for device in fleet.devices:
        device.disconnect()
    rig.start()
    lost = canaries[0]
    fleet.offline.add(lost.id)
    back(fleet, *(device for device in fleet.devices if device is not lost))
    for _ in range(8):
        fleet.follow(40)
        found = rig.good("GET", path)
        assert (found["stage"], found["state"]) == (0, "running"), found["reason"]
        time.sleep(0.2)
    assert confirmed() == 1
    back(fleet, lost)
    fleet.drive(rollout, {"completed"})


def test_a_pin_beats_the_rollout_and_leaves_it(rig: ServerRig, maker: Operator, fleet: Fleet) -> None:
    one = first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    pinned = fleet.devices[0].id
    assert rig.ask("PUT", f"/api/v1/devices/{pinned}/pins/other", {"digest": one}).code == "wrong_model"
    assert rig.ask("PUT", f"/api/v1/devices/{pinned}/pins/{MODEL}", {"digest": "0" * 64}).status == 404
    rig.good("PUT", f"/api/v1/devices/{pinned}/pins/{MODEL}", {"digest": one, "reason": "under the microscope"})
    rig.wait("the pin", lambda: fleet.published().pins)
    assert pinned.encode() not in g.encode(fleet.published()), "a public document holds no plain ids"
    rollout = fleet.start(two, [{"share": 1, "min_devices": 7, "min_inferences": 50}])
    fleet.drive(rollout, {"completed"})
    assert fleet.runs(one) == {pinned}
    rig.ask("DELETE", f"/api/v1/devices/{pinned}/pins/{MODEL}")
    rig.wait("no pin", lambda: not fleet.published().pins)
    fleet.follow()
    assert fleet.runs(two) == {device.id for device in fleet.devices}


def test_a_server_killed_again_and_again_in_a_rollout_ends_it_once_and_right(
    lone_rig: ServerRig, lone_maker: Operator, lone_fleet: Fleet
) -> None:
    rig, maker, fleet = lone_rig, lone_maker, lone_fleet
    first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    stages = [{"devices": n, "min_devices": n, "min_inferences": 40 * n} for n in (1, 2, 3, 5)]
    rollout = fleet.start(two, [*stages, {"share": 1, "min_devices": 8}])
    ports = (rig.url, rig.mqtt)
    # The answer comes before the publication.
    first = rig.wait("the first stage's document", lambda: _of_stage(fleet.published(), 0))
    generations = [first.generation]
    cuts = [int(first.models[MODEL].rollout.cuts["*"])]
    for round_ in range(4):
        # Killed at another moment each time: while records are on their way and a decision is near.
        stopper = threading.Timer(0.2 + 0.23 * round_, rig.kill)
        stopper.start()
        try:
            for _ in range(4):
                fleet.follow(40)
                time.sleep(0.12)
        except Exception as error:  # whatever the cut did to the request under way
            print(f"cut: {error!r}")
        stopper.join()
        for device in fleet.devices:
            device.disconnect()
        rig.start()
        assert (rig.url, rig.mqtt) == ports, "devices find it where it was"
        for device in fleet.devices:
            device.birth += 1
            device.connect()
            fleet.running.pop(device.id, None)
        document = fleet.published()
        held = rig.good("GET", f"/api/v1/groups/{fleet.group}")
        assert g.parse(json.dumps(held["document"], sort_keys=True, separators=(",", ":")).encode()) == document
        generations.append(document.generation)
        part = document.models[MODEL].rollout
        cuts.append(int(part.cuts["*"]) if part else g.EVERYONE)
    assert generations == sorted(generations)
    assert cuts == sorted(cuts), "cuts only grow"
    fleet.drive(rollout, {"completed"}, timeout_s=60)
    made = decisions(rig, rollout)
    assert [a for a, _ in made] == ["start", "advance", "advance", "advance", "advance", "complete", "finish"]
    assert fleet.runs(two) == {device.id for device in fleet.devices}
    from skerry_server import audit

    rows = audited(rig)
    assert audit.first_break(rows) is None


def test_a_candidate_that_the_catalog_drops_goes_back_by_itself(
    rig: ServerRig, maker: Operator, group: str, tmp_path: Path
) -> None:
    model = "dropped"
    fleet = Fleet(rig, group, tmp_path, 2, model=model)
    one = maker.publish(model, "1.0.0")
    first = fleet.start(one, [{"share": 1, "min_devices": 2, "min_inferences": 20}])
    fleet.drive(first, {"completed"})
    two = maker.publish(model, "1.1.0", seed=1)
    rollout = fleet.start(two, [{"devices": 1, "min_devices": 1, "min_inferences": 1_000_000}, {"share": 1}])
    rig.wait("the candidate runs", lambda: fleet.follow() or two in {digest for digest, _ in fleet.running.values()})
    answer = maker.delist(model, "1.1.0")
    assert answer["in_use"] == {two: [f"rollout:{rollout}"]}
    fleet.drive(rollout, {"rolled_back"})
    items = rig.good("GET", f"/api/v1/rollouts/{rollout}/decisions")["items"]
    why = next(item["reason"] for item in items if item["action"] == "roll_back")
    assert why == "the signed catalog no longer lists the candidate"
    assert fleet.runs(one) == {device.id for device in fleet.devices}
    assert fleet.published().models[model].rollout is None
    # What a group runs may be taken out too, since a bad bundle must go; the answer and the audit say who runs it.
    assert maker.delist(model, "1.0.0")["in_use"] == {one: [f"group:{group}"]}
    rows = audited(rig)
    assert f"in use by group:{group}" in next(
        r["reason"] for r in rows if r["subject"] == f"bundle:{one}" and "delist" in r["action"]
    )
    fleet.close()


def test_the_first_bundle_of_a_model_that_the_catalog_drops_waits_for_a_person(
    rig: ServerRig, maker: Operator, group: str
) -> None:
    model = "dropped-first"
    one = maker.publish(model, "1.0.0")
    rollout = start(rig, group, one, [{"share": 1}], model=model)
    maker.delist(model, "1.0.0")
    path = f"/api/v1/rollouts/{rollout}"
    rig.wait("the pause", lambda: rig.good("GET", path)["state"] == "paused")
    assert "no longer lists the candidate" in rig.good("GET", path)["reason"]
    rig.good("POST", f"{path}/abort", {"reason": "another one then"})
    rig.wait("nothing to run", lambda: model not in published(rig, group).models)


def test_a_plan_is_refused_with_every_fault_in_it(rig: ServerRig, maker: Operator, group: str) -> None:
    digest = maker.publish(MODEL, "1.0.0")
    plan = {
        "stages": [{"devices": 0}, {"share": 2}, {"devices": 4, "share": 0.5}, {"shares": 1}],
        "gates": {"max_error_rate": "none", "p99": 1},
    }
    found = rig.ask("POST", "/api/v1/rollouts", {"group": group, "model": MODEL, "candidate": digest, **plan})
    assert (found.status, found.code) == (422, "bad_plan")
    faults = " ".join(found.json()["error"]["details"]["faults"])
    for where in (
        "stages[0].devices",
        "stages[1].share",
        "stages[2]",
        "stages[3].shares",
        "gates.max_error_rate",
        "gates.p99",
    ):
        assert where in faults, where
    # One candidate is fewer than the judge compares.
    blind = {"stages": [{"devices": 1}, {"share": 1}], "judge": {"end_labels": 1000}}
    found = rig.ask("POST", "/api/v1/rollouts", {"group": group, "model": MODEL, "candidate": digest, **blind})
    assert (found.status, found.code) == (422, "bad_plan")
    assert "no fewer than 2 candidates" in " ".join(found.json()["error"]["details"]["faults"])
