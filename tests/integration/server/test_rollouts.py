"""Rollouts on a real server: evidence comes over MQTT, documents go out signed, and a killed server goes on where it was."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from skerry_contract import group as g
from skerry_contract import histogram as h
from skerry_contract import layout, wire
from skerry_contract import window as w
from tuf.api.metadata import Metadata, Targets

from tests.rig_server import DeviceRig, Operator, ServerRig

GROUP, MODEL = "press", "gas"
BOOT = "b" * 32


def published(server: ServerRig, group: str = GROUP) -> g.GroupDocument:
    """The group's document as a device finds it: timestamp, snapshot, fleet, target."""

    def read(path: str) -> bytes:
        found = server.ask("GET", f"/repository/{path}", token="")
        assert found.status == 200, path
        return found.data

    timestamp = Metadata.from_bytes(read("metadata/timestamp.json")).signed
    snapshot = Metadata.from_bytes(read(f"metadata/{timestamp.snapshot_meta.version}.snapshot.json")).signed
    version = snapshot.meta["fleet.json"].version
    fleet = Metadata[Targets].from_bytes(read(f"metadata/{version}.fleet.json")).signed
    target = fleet.targets[layout.group_target(group)]  # type: ignore[arg-type]
    return g.parse(read(layout.target_file(target.path, target.hashes["sha256"])))


class Fleet:
    """Devices that do what the published document says, and count made-up requests under its keys.

    ``failing`` is the share of failed requests of a digest; ``wrong`` the share of wrong answers of one whose answers get
    labels; ``refused`` digests that devices go back from, with the code; ``offline`` devices that are not connected.
    """

    def __init__(self, server: ServerRig, folder: Path, n: int) -> None:
        self.server = server
        self.devices = [DeviceRig(server, f"dev-{i:02d}", folder) for i in range(n)]
        self.failing: dict[str, float] = {}
        self.wrong: dict[str, float] = {}
        self._chance = random.Random(7)
        self.refused: dict[str, str] = {}
        self.running: dict[str, tuple[str, str]] = {}
        self.keys: dict[str, w.Key] = {}
        self.sent: dict[str, int] = {}
        self.offline: set[str] = set()
        self._told: set[tuple[str, str]] = set()
        for device in self.devices:
            device.enrol()
        for device in self.devices:
            device.connect()
            device.report()
        server.wait("all online", lambda: self.online() == n)

    def online(self) -> int:
        return len(self.server.good("GET", "/api/v1/devices?online=true&limit=1000")["items"])

    def live(self) -> list[DeviceRig]:
        return [device for device in self.devices if device.id not in self.offline]

    def follow(self, requests: int = 20) -> None:
        """One step of every connected device: obey the document, report, count some requests."""
        document = published(self.server)
        for device in self.live():
            found = g.assign(document, device.id, MODEL, "")
            if found is None:
                continue
            if found.digest in self.refused:
                self._refuse(device, found)
                continue
            key = w.Key(MODEL, found.digest, "onnx-int8", found.arm, found.rollout, found.stage)
            if self.running.get(device.id) != (found.digest, found.version):
                self.running[device.id] = (found.digest, found.version)
                device.report({MODEL: {"digest": found.digest, "version": found.version, "state": "confirmed"}})
            failed = round(requests * self.failing.get(found.digest, 0.0))
            wrong = None
            if found.digest in self.wrong:
                wrong = sum(self._chance.random() < self.wrong[found.digest] for _ in range(requests))
            device.send(("window", _window(key, requests - failed, failed, wrong)))
            self.keys[device.id] = key
            self.sent[device.id] = self.sent.get(device.id, 0) + requests

    def _refuse(self, device: DeviceRig, found: g.Assignment) -> None:
        if (device.id, found.digest) in self._told:
            return
        self._told.add((device.id, found.digest))
        at = w.Instant(BOOT, 1, 1, True)
        data = {"model": MODEL, "digest": found.digest, "rollout": found.rollout}
        event = wire.Event(at=at, name="update", code=self.refused[found.digest], data=data)
        device.send(("event", wire.encode(event)))

    def drive(self, rollout: str, until: set[str], timeout_s: float = 40.0) -> dict[str, Any]:
        """Follows the document until the rollout is in one of the states."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.follow()
            found = self.server.good("GET", f"/api/v1/rollouts/{rollout}")
            if found["state"] in until:
                return found
            time.sleep(0.1)
        raise AssertionError(f"{rollout} is {found['state']}: {found['now']}\n{self.server.log()[-2000:]}")

    def runs(self, digest: str) -> set[str]:
        return {device for device, (running, _) in self.running.items() if running == digest}

    def close(self) -> None:
        for device in self.devices:
            device.disconnect()


def _window(key: w.Key, ok: int, failed: int, wrong: int | None = None) -> bytes:
    at = w.Instant(BOOT, time.time_ns(), time.time_ns() // 1_000_000, True)
    latency = w.Latency(total=h.exponential_of([2_000_000] * (ok + failed)))
    labels = w.Labels() if wrong is None else w.Labels(confusion=(ok + failed - wrong, wrong, *[0] * 7))
    counts = w.Counts(ok=ok, failed=failed, rows=ok)
    return wire.encode(w.Window(key=key, start=at, end=at, counts=counts, latency=latency, labels=labels))


def start(server: ServerRig, candidate: str, stages: list[dict[str, Any]], **more: Any) -> str:
    body = {"group": GROUP, "model": MODEL, "candidate": candidate, "stages": stages, **more}
    return str(server.good("POST", "/api/v1/rollouts", body)["id"])


def decisions(server: ServerRig, rollout: str) -> list[tuple[str, str]]:
    items = server.good("GET", f"/api/v1/rollouts/{rollout}/decisions")["items"]
    return [(item["action"], item["verdict"]) for item in items if item["action"] != "hold"]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ServerRig]:
    """A server of its own, which the test may kill. Devices are few seconds away from being offline."""
    found = ServerRig(tmp_path / "server").start()
    found.good("PUT", f"/api/v1/groups/{GROUP}", {"settings": {"window_s": 1}})
    yield found
    found.close()


@pytest.fixture
def maker(rig: ServerRig, tmp_path: Path) -> Operator:
    """The operator of that server, trust installed."""
    found = Operator(rig, tmp_path / "operator")
    found.install_trust()
    return found


@pytest.fixture
def fleet(rig: ServerRig, maker: Operator, tmp_path: Path) -> Iterator[Fleet]:
    """Eight devices."""
    found = Fleet(rig, tmp_path, 8)
    yield found
    found.close()


def first_version(rig: ServerRig, maker: Operator, fleet: Fleet) -> str:
    digest = maker.publish(MODEL, "1.0.0")
    rollout = start(rig, digest, [{"share": 1, "min_devices": 8, "min_inferences": 50}])
    fleet.drive(rollout, {"completed"})
    return digest


def test_a_good_version_goes_to_all_then_the_next_to_exactly_three_and_then_to_all(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    one = maker.publish(MODEL, "1.0.0")
    first = start(rig, one, [{"devices": 2}, {"share": 1, "min_devices": 8, "min_inferences": 50}])
    fleet.drive(first, {"completed"})
    assert decisions(rig, first) == [("start", ""), ("complete", "PASS"), ("finish", "PASS")]
    assert fleet.runs(one) == {device.id for device in fleet.devices}, "nothing to compare with: one stage of everyone"

    two = maker.publish(MODEL, "1.1.0", seed=1)
    stages = [
        {"devices": 3, "min_devices": 3, "min_inferences": 100, "min_seconds": 1.0},
        {"share": 1, "min_devices": 8, "min_inferences": 200},
    ]
    second = start(rig, two, stages, id="r-second")
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
    document = published(rig)
    assert document.models[MODEL].stable.digest == two
    assert document.models[MODEL].rollout is None
    rows = rig.good("GET", "/api/v1/audit?limit=1000")["items"]
    assert [r["action"] for r in rows if r["subject"] == "rollout:r-second"] == [
        "rollout.start", "rollout.advance", "rollout.complete", "rollout.finish",
    ]  # fmt: skip
    # What the devices sent is what the server counts.
    rig.wait("all acknowledged", lambda: all(d.acked == d.seq for d in fleet.devices))
    counts = rig.good("GET", f"/api/v1/telemetry/counts?model={MODEL}")
    for device in fleet.devices:
        mine = [item for item in counts["items"] if item["device"] == device.id]
        assert sum(item["ok"] + item["failed"] for item in mine) == fleet.sent[device.id]
        assert {item["version"] for item in mine} == {"1.0.0", "1.1.0"}
    streams = {stream["device"]: stream for stream in counts["streams"]}
    assert all(streams[d.id]["upto"] == d.seq and not streams[d.id]["duplicates"] for d in fleet.devices)


def test_a_candidate_that_fails_is_rolled_back_by_itself(rig: ServerRig, maker: Operator, fleet: Fleet) -> None:
    one = first_version(rig, maker, fleet)
    bad = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.failing[bad] = 0.5
    rollout = start(rig, bad, [{"devices": 2, "min_devices": 2, "min_inferences": 50}, {"share": 1}])
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
    again = start(rig, bad, [{"share": 1, "min_inferences": 20}])
    fleet.drive(again, {"completed"})


def test_devices_that_go_back_fail_the_rollout_at_the_stated_count(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    first_version(rig, maker, fleet)
    bad = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.refused[bad] = "trial_crashed"
    rollout = start(rig, bad, [{"devices": 3}], gates={"max_reverts": 1})
    fleet.drive(rollout, {"rolled_back"})
    items = rig.good("GET", f"/api/v1/rollouts/{rollout}/decisions")["items"]
    verdict = next(item for item in items if item["verdict"] == "FAIL")
    assert "trial_crashed" in verdict["reason"]
    assert sum(verdict["evidence"]["reverted"].values()) >= 2


def test_a_quiet_candidate_never_passes_and_a_deadline_only_pauses(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    one = first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = start(rig, two, [{"devices": 2, "min_inferences": 10, "max_seconds": 1}, {"share": 1}])
    rig.wait("the deadline", lambda: rig.good("GET", f"/api/v1/rollouts/{rollout}")["state"] == "paused")
    assert decisions(rig, rollout)[-1] == ("pause", "NO_DATA")
    assert published(rig).models[MODEL].rollout is not None, "a pause takes nothing back"
    taken = rig.ask(
        "POST", "/api/v1/rollouts", {"group": GROUP, "model": MODEL, "candidate": two, "stages": [{"share": 1}]}
    )
    assert (taken.status, taken.code) == (409, "rollout_active")
    assert rig.ask("POST", f"/api/v1/rollouts/{rollout}/pause").code == "not_allowed"
    rig.good("POST", f"/api/v1/rollouts/{rollout}/resume", {"reason": "traffic is back"})
    fleet.follow()
    found = rig.good("POST", f"/api/v1/rollouts/{rollout}/abort", {"reason": "not today"})
    assert (found["state"], found["reason"]) == ("aborted", "not today")
    rig.wait("stable for all", lambda: published(rig).models[MODEL].rollout is None)
    fleet.follow()
    assert fleet.runs(one) == {device.id for device in fleet.devices}
    assert rig.ask("POST", f"/api/v1/rollouts/{rollout}/resume").code == "not_allowed"


def test_an_offline_device_neither_counts_nor_blocks_and_takes_the_version_when_it_returns(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    lost = fleet.devices[3]
    fleet.offline.add(lost.id)
    lost.vanish()
    rig.wait("the will", lambda: fleet.online() == 7)
    rollout = start(rig, two, [{"devices": 3, "min_devices": 3, "min_inferences": 60}, {"share": 1, "min_devices": 7}])
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
    first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    away = fleet.devices[0]
    go(fleet, away)
    stages = [{"devices": 4, "min_inferences": 10_000, "max_seconds": 10}, {"share": 1, "max_seconds": 60}]
    rollout = start(rig, two, stages)
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
    one = first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = start(rig, two, [{"devices": 3}, {"share": 1}])
    path = f"/api/v1/rollouts/{rollout}"
    names = rig.good("GET", path)["devices"]["candidate"]
    pinned, revoked = [device for device in fleet.devices if device.id in names][:2]
    go(fleet, pinned, revoked)
    rig.wait("silence", lambda: rig.good("GET", path)["now"]["evidence"]["silent"] == 2)
    for _ in range(4):
        fleet.follow()
        assert rig.good("GET", path)["stage"] == 0
        time.sleep(0.2)
    rig.good("PUT", f"/api/v1/devices/{pinned.id}/pins/{MODEL}", {"digest": one, "reason": "in the workshop"})
    rig.good("POST", f"/api/v1/devices/{revoked.id}/revoke", {"reason": "fell into the water"})
    found = fleet.drive(rollout, {"completed"})
    assert found["state"] == "completed"


def test_a_resumed_stage_gets_another_canary_for_the_one_that_was_revoked(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = start(rig, two, [{"devices": 2, "min_devices": 2, "min_inferences": 10, "max_seconds": 2}, {"share": 1}])
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
    first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = start(rig, two, [{"share": 0.5, "min_inferences": 100}])
    path = f"/api/v1/rollouts/{rollout}"
    while rig.good("GET", path)["state"] != "completing":
        fleet.follow(5)
        time.sleep(0.1)
    # Whoever applications were, they have stopped asking: devices report, and nothing is counted.
    document = rig.wait("everyone's document", lambda: _of_stage(published(rig), 1))
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
    first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = start(rig, two, [{"share": 0.5, "min_inferences": 100}])
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
    first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rig.good("PUT", "/api/v1/groups/elsewhere", {})
    stranger = DeviceRig(rig, "stranger", tmp_path, group="elsewhere")
    stranger.enrol()
    stranger.connect()
    rollout = start(rig, two, [{"devices": 2, "min_devices": 2, "min_inferences": 100}, {"share": 1, "min_devices": 8}])

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
    stranger.send(("window", _window(key, 500_000, 500_000)))
    rig.wait("all taken", lambda: all(d.acked == d.seq for d in (stranger, *fleet.devices[:3])))
    evidence = rig.good("GET", f"/api/v1/rollouts/{rollout}")["now"]["evidence"]
    assert (evidence["inferences"], evidence["failed"]) == (0, 0)
    assert rig.good("GET", f"/api/v1/rollouts/{rollout}")["now"]["evidence"]["reverted"] == {}
    fleet.drive(rollout, {"completed"})
    stranger.disconnect()


def test_a_device_that_was_lost_with_the_server_is_not_taken_for_confirmed(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    """A broker that is killed sends no will: the database goes on saying online."""
    first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = start(rig, two, [{"devices": 2, "min_inferences": 100}, {"share": 1}])
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
    one = first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    pinned = fleet.devices[0].id
    assert rig.ask("PUT", f"/api/v1/devices/{pinned}/pins/other", {"digest": one}).code == "wrong_model"
    assert rig.ask("PUT", f"/api/v1/devices/{pinned}/pins/{MODEL}", {"digest": "0" * 64}).status == 404
    rig.good("PUT", f"/api/v1/devices/{pinned}/pins/{MODEL}", {"digest": one, "reason": "under the microscope"})
    rig.wait("the pin", lambda: published(rig).pins)
    assert pinned.encode() not in g.encode(published(rig)), "a public document holds no plain ids"
    rollout = start(rig, two, [{"share": 1, "min_devices": 7, "min_inferences": 50}])
    fleet.drive(rollout, {"completed"})
    assert fleet.runs(one) == {pinned}
    rig.ask("DELETE", f"/api/v1/devices/{pinned}/pins/{MODEL}")
    rig.wait("no pin", lambda: not published(rig).pins)
    fleet.follow()
    assert fleet.runs(two) == {device.id for device in fleet.devices}


def test_a_server_killed_again_and_again_in_a_rollout_ends_it_once_and_right(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    stages = [{"devices": n, "min_devices": n, "min_inferences": 40 * n} for n in (1, 2, 3, 5)]
    rollout = start(rig, two, [*stages, {"share": 1, "min_devices": 8}])
    ports = (rig.url, rig.mqtt)
    # The answer comes before the publication.
    first = rig.wait("the first stage's document", lambda: _of_stage(published(rig), 0))
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
        document = published(rig)
        held = rig.good("GET", f"/api/v1/groups/{GROUP}")
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

    rows = rig.good("GET", "/api/v1/audit?limit=1000")["items"]
    assert audit.first_break(rows) is None


def test_a_candidate_that_the_catalog_drops_goes_back_by_itself(
    rig: ServerRig, maker: Operator, tmp_path: Path
) -> None:
    fleet = Fleet(rig, tmp_path, 2)
    one = maker.publish(MODEL, "1.0.0")
    first = start(rig, one, [{"share": 1, "min_devices": 2, "min_inferences": 20}])
    fleet.drive(first, {"completed"})
    two = maker.publish(MODEL, "1.1.0", seed=1)
    rollout = start(rig, two, [{"devices": 1, "min_devices": 1, "min_inferences": 1_000_000}, {"share": 1}])
    rig.wait("the candidate runs", lambda: fleet.follow() or two in {digest for digest, _ in fleet.running.values()})
    answer = maker.delist(MODEL, "1.1.0")
    assert answer["in_use"] == {two: [f"rollout:{rollout}"]}
    fleet.drive(rollout, {"rolled_back"})
    items = rig.good("GET", f"/api/v1/rollouts/{rollout}/decisions")["items"]
    why = next(item["reason"] for item in items if item["action"] == "roll_back")
    assert why == "the signed catalog no longer lists the candidate"
    assert fleet.runs(one) == {device.id for device in fleet.devices}
    assert published(rig).models[MODEL].rollout is None
    # What a group runs may be taken out too, since a bad bundle must go; the answer and the audit say who runs it.
    assert maker.delist(MODEL, "1.0.0")["in_use"] == {one: [f"group:{GROUP}"]}
    rows = rig.good("GET", "/api/v1/audit?limit=1000")["items"]
    assert f"in use by group:{GROUP}" in next(
        r["reason"] for r in rows if r["subject"] == f"bundle:{one}" and "delist" in r["action"]
    )
    fleet.close()


def test_the_first_bundle_of_a_model_that_the_catalog_drops_waits_for_a_person(rig: ServerRig, maker: Operator) -> None:
    one = maker.publish(MODEL, "1.0.0")
    rollout = start(rig, one, [{"share": 1}])
    maker.delist(MODEL, "1.0.0")
    path = f"/api/v1/rollouts/{rollout}"
    rig.wait("the pause", lambda: rig.good("GET", path)["state"] == "paused")
    assert "no longer lists the candidate" in rig.good("GET", path)["reason"]
    rig.good("POST", f"{path}/abort", {"reason": "another one then"})
    rig.wait("nothing to run", lambda: MODEL not in published(rig).models)


def test_a_plan_is_refused_with_every_fault_in_it(rig: ServerRig, maker: Operator) -> None:
    digest = maker.publish(MODEL, "1.0.0")
    plan = {
        "stages": [{"devices": 0}, {"share": 2}, {"devices": 4, "share": 0.5}, {"shares": 1}],
        "gates": {"max_error_rate": "none", "p99": 1},
    }
    found = rig.ask("POST", "/api/v1/rollouts", {"group": GROUP, "model": MODEL, "candidate": digest, **plan})
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
    found = rig.ask("POST", "/api/v1/rollouts", {"group": GROUP, "model": MODEL, "candidate": digest, **blind})
    assert (found.status, found.code) == (422, "bad_plan")
    assert "no fewer than 2 candidates" in " ".join(found.json()["error"]["details"]["faults"])


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
    return subprocess.run(
        [sys.executable, "-m", "skerry_cli", "rollout", "explain", rollout, *options],
        env={**os.environ, "SKERRY_CONFIG": "", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("past", [True, False])
def test_devices_are_held_against_their_past_unless_the_plan_says_that_the_world_moved(
    rig: ServerRig, maker: Operator, fleet: Fleet, past: bool
) -> None:
    one = first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.wrong = {one: 0.05}
    for _ in range(5):
        fleet.follow(40)
    fleet.wrong = {one: 0.4, two: 0.4}
    rails = {**JUDGE["guardrails"], "labelled_errors": {"alpha": 0.04, "min_n": 100, "past": past}}
    judge = {**JUDGE, "guardrails": rails, "end_s": 600}
    rollout = start(rig, two, [{"devices": 3, "min_devices": 3}, {"share": 1, "min_devices": 8}], judge=judge)
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
    one = first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.wrong = {one: 0.15, two: 0.1}
    for _ in range(10):
        fleet.follow(40)
    rollout = start(rig, two, [{"devices": 3, "min_devices": 3}, {"share": 1, "min_devices": 8}], judge=JUDGE)
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
        (packed,) = db.execute("SELECT evidence FROM looks ORDER BY number DESC LIMIT 1").fetchone()
        look = msgspec.msgpack.decode(zlib.decompress(packed))
        look["readings"]["labelled_errors"]["x"][0] += 1
        changed = zlib.compress(msgspec.msgpack.encode(look))
        db.execute("UPDATE looks SET evidence = ? WHERE number = ?", (changed, len(items)))
    doubted = explain(rig, rollout)
    assert doubted.returncode == 1
    assert f"recomputed: different at look {len(items)}" in doubted.stdout


def test_a_candidate_whose_answers_are_wrong_is_judged_and_rolled_back_also_on_a_device_that_was_offline_then(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    one = first_version(rig, maker, fleet)
    bad = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.wrong = {one: 0.1, bad: 0.6}
    for _ in range(10):
        fleet.follow(40)
    # One of 56 ways may be removed from 45 % of the way on: no verdict before 13 s.
    judge = JUDGE | {"end_s": 30}
    rollout = start(rig, bad, [{"devices": 3, "min_devices": 2}, {"share": 1}], judge=judge)
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
    first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    stages = [{"devices": 3, "max_seconds": 3}, {"share": 1}]
    rollout = start(rig, two, stages, judge=JUDGE | {"end_s": 1})
    fleet.drive(rollout, {"paused"})
    assert decisions(rig, rollout)[-1] == ("pause", "NO_DATA")
    looks = judged(rig, rollout)["looks"]
    assert looks[-1]["verdict"] == "NO_DATA"
    # A look that is stored and cannot be read is a fault of the judge, told as such, and of nobody who asks.
    with sqlite3.connect(rig.data / "server.db") as db:
        db.execute("UPDATE looks SET memory = ? WHERE number = ?", (b"no zlib", len(looks)))
    now = rig.good("GET", f"/api/v1/rollouts/{rollout}")["now"]
    assert f"the stored look {len(looks)} of stage 1 of rollout {rollout} cannot be read" in now["reason"]
    assert now["verdict"] == "NO_DATA"
    assert rig.good("GET", f"/api/v1/devices/{fleet.devices[0].id}/why")["models"][0]["model"] == MODEL


def test_a_fleet_too_small_to_compare_is_promoted_only_where_the_operator_said_so(
    rig: ServerRig, maker: Operator, fleet: Fleet
) -> None:
    one = first_version(rig, maker, fleet)
    two = maker.publish(MODEL, "1.1.0", seed=1)
    fleet.wrong = {one: 0.1, two: 0.1}
    # One of eight: as many ways as there are devices, fewer than 1/alpha.
    rails = {"labelled_errors": {"alpha": 0.04, "limit": 0.3, "min_n": 100}}
    judge = {"guardrails": rails, "look_s": 0.3, "end_s": 2, "min_devices": 1, "guard_s": 0}
    stages = [{"devices": 1}, {"share": 1}]
    rollout = start(rig, two, stages, judge=judge)
    deadline = time.monotonic() + 60
    while (ruling := judged(rig, rollout)["ruling"]) is None or ruling["verdict"] in ("NO_DATA", "INCONCLUSIVE"):
        assert time.monotonic() < deadline, ruling
        fleet.follow(40)
    assert (ruling["verdict"], ruling["uncontrolled"]) == ("PASS", True)
    now = rig.good("GET", f"/api/v1/rollouts/{rollout}")
    assert (now["state"], now["stage"], now["now"]["verdict"]) == ("running", 0, "INCONCLUSIVE")
    assert "--small-fleet" in now["now"]["reason"]
    rig.good("POST", f"/api/v1/rollouts/{rollout}/abort", {"reason": "again, with consent"})
    rig.wait("the abort", lambda: published(rig).models[MODEL].rollout is None)
    again = start(rig, two, stages, judge=judge | {"small_fleet": True})
    fleet.drive(again, {"completed"}, timeout_s=60)
    assert "uncontrolled" in judged(rig, again)["looks"][-1]["reasons"][0]
