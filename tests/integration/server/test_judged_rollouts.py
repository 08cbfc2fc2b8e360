"""Rollouts that are judged, on a real server: verdicts from labels and counts over MQTT, recomputed from what was stored."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import time
import zlib
from typing import Any

import msgspec
import pytest

from tests import warm
from tests.integration.server.rollout_fleet import MODEL, Fleet, decisions, first_version
from tests.rig_server import Operator, ServerRig

JUDGE = {
    "guardrails": {"labelled_errors": {"alpha": 0.04, "margin": 3.0, "min_n": 100}, "trouble": {"alpha": 0.03}},
    "look_s": 0.3,
    "end_s": 4,
    "guard_s": 0.5,
}


def judged(rig: ServerRig, rollout: str) -> dict[str, Any]:
    return rig.good("GET", f"/api/v1/rollouts/{rollout}/explain")


def explain(rig: ServerRig, rollout: str, *options: str) -> subprocess.CompletedProcess[str]:
    """As a person asks for it."""
    environment = {"SKERRY_SERVER": rig.url, "SKERRY_TOKEN": rig.token, "SKERRY_CA": str(rig.ca_file)}
    return warm.run(
        "skerry_cli",
        ["rollout", "explain", rollout, *options],
        env={**os.environ, "SKERRY_CONFIG": "", "COLUMNS": "200", **environment},
        timeout=60,
    )


@pytest.mark.parametrize("past", [True, False])
def test_devices_are_held_against_their_past_unless_the_plan_says_that_the_world_moved(
    rig: ServerRig, maker: Operator, fleet: Fleet, past: bool
) -> None:
    one = first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.wrong = {one: 0.05}
    for _ in range(5):
        fleet.follow(40)
    fleet.wrong = {one: 0.4, two: 0.4}
    rails = {**JUDGE["guardrails"], "labelled_errors": {"alpha": 0.04, "min_n": 100, "past": past}}
    judge = {**JUDGE, "guardrails": rails, "end_s": 600}
    rollout = fleet.start(two, [{"devices": 3, "min_devices": 3}, {"share": 1, "min_devices": 8}], judge=judge)
    deadline = time.monotonic() + 40
    foretold = None
    while foretold is None:
        assert time.monotonic() < deadline, "no look compared anything"
        fleet.follow()
        time.sleep(0.1)
        looks = rig.good("GET", f"/api/v1/rollouts/{rollout}/looks?limit=1000")["items"]
        found = [item["ruling"]["findings"][0] for item in looks if item["ruling"]["verdict"] == "INCONCLUSIVE"]
        foretold = found[-1]["prior_mean"] if found else None
    assert (foretold < 0.15) == past, foretold
    assert past or foretold > 0.25, foretold


def test_a_candidate_no_worse_than_its_controls_passes_at_the_planned_end_and_the_verdict_can_be_recomputed(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    one = first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.wrong = {one: 0.15, two: 0.1}
    for _ in range(10):
        fleet.follow(40)
    # The end is a number of labels: by seconds, a slow machine would not have sent enough of them for so narrow a bound.
    judge = {name: value for name, value in JUDGE.items() if name != "end_s"} | {"end_labels": 800}
    rollout = fleet.start(two, [{"devices": 3, "min_devices": 3}, {"share": 1, "min_devices": 8}], judge=judge)
    fleet.drive(rollout, {"completed"}, timeout_s=60)
    made = decisions(rig, rollout)
    assert [action for action, _ in made] == ["start", "advance", "complete", "finish"]
    items = rig.good("GET", f"/api/v1/rollouts/{rollout}/looks")["items"]
    assert [item["number"] for item in items] == list(range(1, len(items) + 1))
    assert {item["stage"] for item in items} == {0}, "a stage of everyone has nothing to compare with"
    assert [item["ruling"]["verdict"] for item in items][-1] == "PASS"
    assert {item["ruling"]["verdict"] for item in items[:-1]} <= {"NO_DATA", "INCONCLUSIVE"}
    told = judged(rig, rollout)
    assert (told["identical"], len(told["looks"])) == (True, len(items))
    path = f"/api/v1/rollouts/{rollout}/explain?stage=0"
    part = rig.good("GET", f"{path}&limit=1")
    assert (part["looks"], part["next"], part["count"]) == (told["looks"][:1], "1", len(items))
    assert rig.good("GET", f"{path}&after=1")["looks"] == told["looks"][1:]
    assert rig.ask("GET", f"{path}&limit=51").code == "bad_request"
    finding = told["ruling"]["findings"][0]
    assert (finding["candidate"]["of"], finding["control"]["of"], finding["assignments"]) == (3, 5, 56)
    assert finding["upper"] < 3
    advance = next(
        item
        for item in rig.good("GET", f"/api/v1/rollouts/{rollout}/decisions")["items"]
        if item["action"] == "advance"
    )
    assert "the 95 % bound" in advance["reason"]
    shown = explain(rig, rollout)
    assert shown.returncode == 0, shown.stderr
    assert f"recomputed: identical ({len(items)} looks)" in shown.stdout
    assert "3 of 3 devices" in shown.stdout
    assert "5 of 5 devices" in shown.stdout
    assert json.loads(explain(rig, rollout, "--stage", "1", "--json").stdout)["identical"]
    assert f"Stage 2 of rollout {rollout} was not looked at" in explain(rig, rollout, "--stage", "2").stdout
    assert f"Rollout {rollout}, stage 1: PASS" in shown.stdout
    # Who changes what is stored is found out.
    with sqlite3.connect(rig.data / "server.db") as db:
        (packed,) = db.execute(
            "SELECT evidence FROM looks WHERE rollout = ? AND number = ?", (rollout, len(items))
        ).fetchone()
        look = msgspec.msgpack.decode(zlib.decompress(packed))
        look["readings"]["labelled_errors"]["x"][0] += 1
        changed = zlib.compress(msgspec.msgpack.encode(look))
        db.execute("UPDATE looks SET evidence = ? WHERE rollout = ? AND number = ?", (changed, rollout, len(items)))
    doubted = explain(rig, rollout)
    assert doubted.returncode == 1
    assert f"recomputed: different at look {len(items)}" in doubted.stdout


def test_a_candidate_whose_answers_are_wrong_is_judged_and_rolled_back_also_on_a_device_that_was_offline_then(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    one = first_version(maker, fleet)
    bad = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.wrong = {one: 0.1, bad: 0.6}
    for _ in range(10):
        fleet.follow(40)
    # One of 56 ways may be removed from 45 % of the way on: no verdict before 13 s.
    judge = JUDGE | {"end_s": 30}
    rollout = fleet.start(bad, [{"devices": 3, "min_devices": 2}, {"share": 1}], judge=judge)
    while len(fleet.runs(bad)) < 3:
        fleet.follow()
    lost = next(device for device in fleet.devices if device.id in fleet.runs(bad))
    for _ in range(8):
        fleet.follow()
        time.sleep(0.1)
    fleet.offline.add(lost.id)
    lost.vanish()
    fleet.drive(rollout, {"rolled_back"}, timeout_s=60)
    items = rig.good("GET", f"/api/v1/rollouts/{rollout}/decisions")["items"]
    verdict = next(item for item in items if item["action"] == "roll_back")
    assert verdict["verdict"] == "FAIL"
    assert verdict["reason"].startswith("labelled_errors: ")
    assert "of 56 ways" in verdict["reason"]
    told = judged(rig, rollout)
    assert told["identical"]
    assert told["ruling"]["verdict"] == "FAIL"
    assert told["state"] == "rolled_back"
    assert fleet.runs(bad) == {lost.id}, "it cannot know yet"
    lost.birth += 1
    lost.connect()
    fleet.offline.clear()
    fleet.follow()
    assert fleet.runs(bad) == set()
    assert fleet.runs(one) == {device.id for device in fleet.devices}


def test_without_labels_a_judged_stage_pauses_at_its_deadline(rig: ServerRig, maker: Operator, fleet: Fleet) -> None:
    first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    stages = [{"devices": 3, "max_seconds": 3}, {"share": 1}]
    rollout = fleet.start(two, stages, judge=JUDGE | {"end_s": 1})
    fleet.drive(rollout, {"paused"})
    assert decisions(rig, rollout)[-1] == ("pause", "NO_DATA")
    looks = judged(rig, rollout)["looks"]
    assert looks[-1]["verdict"] == "NO_DATA"
    # A look that is stored and cannot be read is a fault of the judge, told as such, and of nobody who asks.
    with sqlite3.connect(rig.data / "server.db") as db:
        db.execute("UPDATE looks SET memory = ? WHERE rollout = ? AND number = ?", (b"no zlib", rollout, len(looks)))
    now = rig.good("GET", f"/api/v1/rollouts/{rollout}")["now"]
    assert f"the stored look {len(looks)} of stage 1 of rollout {rollout} cannot be read" in now["reason"]
    assert now["verdict"] == "NO_DATA"
    assert rig.good("GET", f"/api/v1/devices/{fleet.devices[0].id}/why")["models"][0]["model"] == MODEL


def test_a_fleet_too_small_to_compare_is_promoted_only_where_the_operator_said_so(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    one = first_version(maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.wrong = {one: 0.1, two: 0.1}
    # One of eight: as many ways as there are devices, fewer than 1/alpha.
    rails = {"labelled_errors": {"alpha": 0.04, "limit": 0.3, "min_n": 100}}
    judge = {"guardrails": rails, "look_s": 0.3, "end_s": 2, "min_devices": 1, "guard_s": 0}
    stages = [{"devices": 1}, {"share": 1}]
    rollout = fleet.start(two, stages, judge=judge)
    deadline = time.monotonic() + 60
    while (ruling := judged(rig, rollout)["ruling"]) is None or ruling["verdict"] in ("NO_DATA", "INCONCLUSIVE"):
        assert time.monotonic() < deadline, ruling
        fleet.follow(40)
    assert (ruling["verdict"], ruling["uncontrolled"]) == ("PASS", True)
    now = rig.good("GET", f"/api/v1/rollouts/{rollout}")
    assert (now["state"], now["stage"], now["now"]["verdict"]) == ("running", 0, "INCONCLUSIVE")
    assert "--small-fleet" in now["now"]["reason"]
    rig.good("POST", f"/api/v1/rollouts/{rollout}/abort", {"reason": "again, with consent"})
    rig.wait("the abort", lambda: fleet.published().models[MODEL].rollout is None)
    again = fleet.start(two, stages, judge=judge | {"small_fleet": True})
    fleet.drive(again, {"completed"}, timeout_s=60)
    assert "uncontrolled" in judged(rig, again)["looks"][-1]["reasons"][0]
