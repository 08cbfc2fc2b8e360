"""What comes back: after damage on the disk, after an order, after a crash loop, and in the middle of a drain."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from skerry_agent.core import backoff
from skerry_contract import group

from tests import models
from tests.integration.agent.rig import DEVICE, GROUP, Device, Load, Server, wait_for
from tests.integration.agent.test_update import digest_of, offer


@pytest.fixture
def updated(device: Device, server: Server) -> Device:
    """A device that confirmed 2.0.0 and had 1.0.0 before."""
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    offer(device, "2.0.0", seed=2)
    device.wait_running("2.0.0", "trial")
    ask_until(device, "2.0.0")
    return device


def ask_until(device: Device, version: str) -> None:
    """Asks until the trial has seen enough: the first answers after a hand-over may still be the old worker's."""
    wait_for(lambda: device.infer(20) and device.running() == (version, "confirmed"), why=f"{version} confirmed")


def rot(device: Device, version: str) -> Path:
    """Flips one bit of a slot's model file; its size stays."""
    path = device.state_dir / "slots" / digest_of(device, version) / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def pointers(device: Device) -> dict[str, str]:
    found = json.loads((device.state_dir / "slots" / "pointers.json").read_bytes())["models"]["gas"]
    return {name: slot["version"] for name, slot in found.items() if slot}


def test_an_ordered_revert_to_a_damaged_bundle_keeps_what_serves(updated: Device) -> None:
    rot(updated, "1.0.0")
    with Load(updated) as load:
        assert updated.call("POST", "/skerry/v1/revert", {"model": "gas"}).status == 200
        assert "hash_mismatch" in updated.wait_update("idle", "reverted_by_operator")["detail"]
    assert load.failed == []
    assert updated.running()[0] == "2.0.0"
    assert pointers(updated)["confirmed"] == "2.0.0"
    # Nothing is left to go back to, and the device says so instead of trying it again.
    assert updated.call("POST", "/skerry/v1/revert", {"model": "gas"}).status == 409
    # The bundle that stayed was pardoned, and the next update comes through.
    offer(updated, "3.0.0", seed=3)
    updated.wait_running("3.0.0", "trial")


def test_an_ordered_revert_moves_the_pointers_after_the_proof(updated: Device) -> None:
    with Load(updated) as load:
        assert updated.call("POST", "/skerry/v1/revert", {"model": "gas"}).status == 200
        updated.wait_running("1.0.0", "confirmed")
        wait_for(lambda: pointers(updated) == {"confirmed": "1.0.0", "active": "1.0.0"}, why="the pointers")
    assert load.failed == []


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "repository there"])
def test_a_confirmed_bundle_that_rotted_is_replaced_at_the_start_and_fetched_again(
    updated: Device, offline: bool
) -> None:
    assert updated.stop() == 0
    rot(updated, "2.0.0")
    if offline:
        (updated.folder / "world.json").rename(updated.folder / "world.away")
    updated.start()
    updated.wait_running("1.0.0")
    assert updated.infer() == ["1.0.0"]
    if offline:
        time.sleep(1.0)
        assert updated.infer() == ["1.0.0"]
        (updated.folder / "world.away").rename(updated.folder / "world.json")
        updated.sync()
    updated.wait_running("2.0.0", "trial")
    ask_until(updated, "2.0.0")


def test_going_back_to_a_rotten_slot_fetches_it_again(updated: Device) -> None:
    rot(updated, "1.0.0")
    updated.publish(digest_of(updated, "1.0.0"))
    updated.sync()
    updated.wait_running("1.0.0", "trial")
    assert updated.status()["update"]["code"] == ""


def test_going_back_in_the_middle_of_a_drain_cuts_nobody(device: Device, server: Server) -> None:
    first = device.bundle("1.0.0")
    device.publish(first)
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    with Load(device, clients=4) as load:
        time.sleep(0.3)
        # A client that does not read its replies keeps the old worker in its drain.
        lazy = socket.create_connection(("127.0.0.1", device.port))
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.setblocking(False)
        x, _ = models.rows(1)
        body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": x[0].tolist()}]})
        request = f"POST /v2/models/gas/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                lazy.send(request * 50)
            except BlockingIOError:
                break
        offer(device, "2.0.0", seed=2)
        # Under this load a trial may be over before anybody looks; then it goes back by an update.
        device.wait_running("2.0.0", "trial", "confirmed")
        device.publish(first)
        device.sync()
        device.wait_running("1.0.0", "confirmed")
        time.sleep(0.5)
        lazy.close()
    assert load.failed == []
    assert load.versions == {"1.0.0", "2.0.0"}


def test_a_kill_between_confirmed_and_its_pointer_ends_with_the_new_bundle(updated: Device) -> None:
    path = updated.state_dir / "slots" / "pointers.json"
    after = json.loads(path.read_bytes())
    before = json.loads(path.read_bytes())
    gas = before["models"]["gas"]
    # As it stands on disk when the state ``confirmed`` is stored and the pointer file is not written yet.
    before["models"]["gas"] = {
        "confirmed": gas["previous"],
        "previous": None,
        "active": gas["active"] | {"standing": "trial"},
    }
    updated.kill()
    path.write_text(json.dumps(before))
    updated.start()
    updated.wait_running("2.0.0", "confirmed")
    assert updated.infer() == ["2.0.0"]
    assert json.loads(path.read_bytes())["models"]["gas"]["confirmed"] == after["models"]["gas"]["confirmed"]


def test_a_confirmed_bundle_that_dies_again_and_again_goes_back(device: Device, server: Server) -> None:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    offer(device, "2.0.0", "crash-on-rows", seed=2)
    device.wait_running("2.0.0", "trial")
    ask_until(device, "2.0.0")

    def crash() -> bool:
        try:
            device.infer(value=666.0)
        except (OSError, http.client.HTTPException, AssertionError):
            pass
        return device.running()[0] == "1.0.0"

    wait_for(crash, why="the bundle before it")
    device.wait_running("1.0.0", "confirmed")
    device.wait_update("idle", "crash_loop")
    assert device.infer(5) == ["1.0.0"] * 5
    # It is not taken up again by itself.
    device.sync()
    time.sleep(0.5)
    assert device.running() == ("1.0.0", "confirmed")


def test_a_sync_asked_for_at_the_device_does_not_wait_for_the_jitter(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = make_device(jitter_s=600)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    wait_for(lambda: device.status()["link"]["connected"], why="the link")
    device.publish(device.bundle("2.0.0", seed=2))
    server.ring(7)
    # The bell was heard, and its sync lies somewhere within ten minutes.
    time.sleep(1.0)
    begun = time.monotonic()
    device.sync()
    device.wait_running("2.0.0", "trial")
    assert time.monotonic() - begun < 25


@pytest.mark.parametrize("alone", [True, False])
def test_the_only_device_of_a_fleet_answers_a_bell_at_once_and_one_of_many_at_its_place(
    make_device: Callable[..., Device], server: Server, alone: bool
) -> None:
    device = make_device(jitter_s=-1)
    device.world["membership"] = {"group": GROUP, "alone": alone}
    settings = group.Settings(jitter_s=600.0, trial_s=60.0)
    device.publish(device.bundle("1.0.0"), settings=settings)
    device.start()
    device.wait_running("1.0.0", "trial")
    wait_for(lambda: device.status()["link"]["connected"], why="the link")
    device.publish(device.bundle("2.0.0", seed=2), settings=settings)
    # One whose place lies far behind.
    server.ring(next(version for version in range(100) if backoff.spread(DEVICE, version) > 0.5))
    if alone:
        device.wait_running("2.0.0", "trial")
    else:
        time.sleep(3.0)
        assert device.running() == ("1.0.0", "trial")


@pytest.mark.attack("replayed bell")
def test_bells_that_bring_nothing_new_are_answered_ever_less_often(device: Device, server: Server) -> None:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    wait_for(lambda: device.status()["link"]["connected"], why="the link")
    synced = set()
    end = time.monotonic() + 8
    version = 100
    while time.monotonic() < end:
        version += 1
        server.ring(version)
        synced.add(device.status()["sync"]["at_ms"])
        time.sleep(0.05)
    # At 0, 1, 3 and 7 s, and what the start itself asked for.
    assert 2 <= len(synced) <= 7
    # A person is not kept waiting by them.
    device.publish(device.bundle("2.0.0", seed=2))
    device.sync()
    device.wait_running("2.0.0", "trial")
