"""Updates that are held back, on a whole device: fetched and checked at once, and begun when nothing holds them any more."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from skerry_agent import sdk
from skerry_agent.core import holds
from skerry_contract import group, opening

from tests.integration.agent import held as held_back
from tests.integration.agent.rig import Device, Server, wait_for


@pytest.fixture
def serving(device: Device, server: Server) -> Device:
    """A device that confirmed 1.0.0; a lock was no hindrance to its first bundle."""
    device.publish(device.bundle("1.0.0"))
    device.start()
    lock(device, for_s=2.0)
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    return device


def lock(device: Device, *, owner: str = "welder", for_s: float = 3600.0) -> Any:
    return device.call("POST", "/skerry/v1/lock", {"owner": owner, "reason": "a seam", "for_s": for_s})


def offer(device: Device, version: str) -> None:
    device.publish(device.bundle(version))
    device.sync()


def held(device: Device, version: str) -> dict[str, Any]:
    return device.wait_update("ready", version=version)


def test_a_locked_update_is_fetched_waits_over_a_restart_and_begins_when_it_is_unlocked(
    serving: Device, server: Server
) -> None:
    assert lock(serving).status == 200
    offer(serving, "2.0.0")
    assert held(serving, "2.0.0")["detail"] == "the lock of welder to end (a seam)"
    told = {one["about"]: one for one in serving.call("GET", "/skerry/v1/why").body["told"]}["update to gas 2.0.0"]
    assert "the lock of welder to end (a seam)" in told["waits_for"]
    assert wait_for(lambda: [e for e in server.events() if e.data["state"] == "ready"], why="the server hears of it")
    serving.kill()
    # What it needs lies here: the repository has nothing any more.
    serving.world["bundles"] = {}
    serving.save()
    serving.start()
    serving.wait_running("1.0.0", "confirmed")
    assert held(serving, "2.0.0")["detail"] == "the lock of welder to end (a seam)"
    assert serving.infer(3) == ["1.0.0"] * 3
    assert [one["owner"] for one in serving.status()["locks"]] == ["welder"]
    refused = serving.call("POST", "/skerry/v1/unlock", {"owner": "painter"})
    assert (refused.status, refused.body["code"]) == (409, "not_locked")
    assert "welder" in refused.body["error"]
    assert serving.call("POST", "/skerry/v1/unlock", {"owner": "welder"}).status == 200
    serving.wait_running("2.0.0", "trial")
    serving.infer(20)
    serving.wait_running("2.0.0", "confirmed")


def test_a_lock_ends_by_itself_and_a_new_bundle_takes_the_place_of_the_held_one(serving: Device) -> None:
    lock(serving)
    offer(serving, "2.0.0")
    held(serving, "2.0.0")
    offer(serving, "3.0.0")
    held(serving, "3.0.0")
    lock(serving, for_s=0.5)
    serving.wait_running("3.0.0", "trial")


def test_a_lock_that_is_taken_while_a_bundle_is_proved_holds_it(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = make_device()
    hold = device.folder / "hold.json"
    held_back.write(hold, held=[], deadlines={})
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    held_back.write(hold, held=["worker"], deadlines={})
    offer(device, "2.0.0")
    device.wait_update("prove", version="2.0.0")
    assert lock(device).status == 200
    held_back.write(hold, held=[], deadlines={})
    assert held(device, "2.0.0")["detail"] == "the lock of welder to end (a seam)"
    assert device.infer(3) == ["1.0.0"] * 3
    assert device.call("POST", "/skerry/v1/unlock", {"owner": "welder"}).status == 200
    device.wait_running("2.0.0", "trial")


def test_a_held_update_is_cancelled_as_any_other(serving: Device) -> None:
    lock(serving)
    offer(serving, "2.0.0")
    held(serving, "2.0.0")
    assert serving.call("POST", "/skerry/v1/cancel", {}).status == 200
    serving.wait_update("idle", "cancelled", version="2.0.0")
    assert serving.infer(1) == ["1.0.0"]


def test_a_forced_floor_waits_for_no_lock(serving: Device) -> None:
    lock(serving)
    offer(serving, "2.0.0")
    held(serving, "2.0.0")
    serving.world["floors"] = serving.world["forced"] = {"gas": "2.0.0"}
    serving.save()
    serving.sync()
    serving.wait_running("2.0.0", "trial")


def test_a_device_that_activates_by_command_waits_for_it(device: Device, server: Server) -> None:
    device.config.write_text(device.config.read_text() + '[updates]\nactivate = "command"\n')
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    nothing = device.call("POST", "/skerry/v1/activate", {})
    assert (nothing.status, nothing.body["code"]) == (409, "nothing_to_activate")
    offer(device, "2.0.0")
    assert "skerry-agent activate" in held(device, "2.0.0")["detail"]
    lock(device)
    wait_for(lambda: "welder" in held(device, "2.0.0")["detail"], why="what holds it is told anew")
    waits = device.call("POST", "/skerry/v1/activate", {})
    assert (waits.status, waits.body["waits_for"]) == (200, "the lock of welder to end (a seam)")
    assert held(device, "2.0.0")
    now = device.call("POST", "/skerry/v1/activate", {"despite_locks": True})
    assert (now.status, now.body["waits_for"]) == (200, "")
    device.wait_running("2.0.0", "trial")


def test_a_group_with_windows_updates_in_no_other_hours_but_goes_back_at_once(device: Device, server: Server) -> None:
    first, second = device.bundle("1.1.0"), device.bundle("2.0.0")
    device.config.write_text(device.config.read_text() + '[updates]\nclock = "wall"\n')
    # Of all weekdays the one that is farthest from today, wherever midnight is.
    far = opening.DAYS[(time.localtime().tm_wday + 3) % 7]
    closed = group.Settings(windows=(opening.Window(start="10:00", end="11:00", days=(far,)),))
    device.publish(first, requires=("windows",), settings=closed)
    device.start()
    device.wait_running("1.1.0", "trial")
    device.infer(20)
    device.wait_running("1.1.0", "confirmed")
    device.publish(second, requires=("windows",), settings=closed)
    device.sync()
    assert held(device, "2.0.0")["detail"] == f"its group's hours by local time: {far} 10:00-11:00"
    device.publish(device.bundle("1.0.0"), requires=("windows",), settings=closed)
    device.sync()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    device.publish(second, requires=("windows",), settings=closed)
    device.sync()
    held(device, "2.0.0")
    wide = group.Settings(windows=(opening.Window(start="00:00", end="24:00"),))
    device.publish(second, requires=("windows",), settings=wide)
    device.sync()
    device.wait_running("2.0.0", "trial")


def test_a_lock_that_cannot_be_is_refused(device: Device) -> None:
    device.start()
    for body, named in (({}, "owner"), ({"owner": "a", "reason": "b", "for_s": 1e9}, "updates.lock_s")):
        answer = device.call("POST", "/skerry/v1/lock", body)
        assert (answer.status, answer.body["code"]) == (400, "bad_lock")
        assert named in answer.body["error"]
    assert device.call("GET", "/skerry/v1/locks").body == {"locks": []}


def test_a_version_that_must_be_passed_is_confirmed_on_the_way_and_named_where_it_is_missing(serving: Device) -> None:
    between = serving.bundle("2.0.0")
    last = serving.bundle("3.0.0", changes={"after": "2.0.0", "requires": ["after"]})
    serving.publish(last)
    serving.sync()
    refused = serving.wait_update("idle", "must_pass_first", version="3.0.0")
    assert "goes after 2.0.0" in refused["detail"]
    assert serving.running() == ("1.0.0", "confirmed")
    serving.publish(last, via=(between,))
    serving.sync()
    serving.wait_running("2.0.0", "trial")
    serving.infer(20)
    serving.wait_running("3.0.0", "trial")
    serving.infer(20)
    serving.wait_running("3.0.0", "confirmed")


def test_an_update_is_here_before_its_time_and_begins_then(serving: Device) -> None:
    serving.config.write_text(serving.config.read_text() + '[updates]\nclock = "wall"\n')
    assert serving.call("POST", "/skerry/v1/reload", {}).status == 200
    digest, now = serving.bundle("2.0.0"), int(time.time())
    serving.publish(digest, settings=group.Settings(opens_at=now + 3600))
    serving.sync()
    wait_for(lambda: held(serving, "2.0.0")["detail"].startswith("its time, "), why="what holds it")
    assert serving.running() == ("1.0.0", "confirmed")
    serving.publish(digest, settings=group.Settings(opens_at=now))
    serving.sync()
    serving.wait_running("2.0.0", "trial")


def test_a_bundle_is_downloaded_over_the_groups_networks_only(serving: Device, server: Server) -> None:
    def on(kind: str) -> None:
        text = serving.config.read_text().partition("[network]")[0]
        serving.config.write_text(f'{text}[network]\ntype = "{kind}"\n')
        assert serving.call("POST", "/skerry/v1/reload", {}).body["restart"] == []

    on("cellular")
    serving.publish(serving.bundle("2.0.0"), settings=group.Settings(networks=("unmetered",)))
    serving.sync()
    update = serving.wait_update("idle", "network_not_allowed", version="2.0.0")
    assert "cellular, metered" in update["detail"]
    wait_for(lambda: [e for e in server.events() if e.code == "network_not_allowed"], why="the server hears of it")
    on("ethernet")
    serving.wait_running("2.0.0", "trial")


def test_what_nothing_holds_goes_before_what_lies_ready_which_is_taken_up_again(serving: Device) -> None:
    lock(serving, owner="painter")
    offer(serving, "2.0.0")
    held(serving, "2.0.0")
    # A first bundle of another model: no lock is asked about it.
    other = serving.bundle("5.0.0", model="oil")
    second = next(digest for digest, folder in serving.world["bundles"].items() if folder.endswith("bundle-2.0.0"))
    serving.publish_models(gas=second, oil=other)
    serving.sync()
    serving.wait_running("5.0.0", "trial", model="oil")
    assert serving.running() == ("1.0.0", "confirmed")
    serving.infer(20, model="oil")
    serving.wait_running("5.0.0", "confirmed", model="oil")
    assert "the lock of painter to end" in held(serving, "2.0.0")["detail"]
    # And it lies there in peace: what would be held as well waits behind it.
    third = serving.bundle("6.0.0", model="oil")
    serving.publish_models(gas=second, oil=third)
    serving.synced()
    assert held(serving, "2.0.0")["version"] == "2.0.0"
    assert serving.call("POST", "/skerry/v1/unlock", {"owner": "painter"}).status == 200
    serving.wait_running("2.0.0", "trial")


def test_an_application_locks_updates_over_its_own_socket_and_no_other_users_lock(serving: Device) -> None:
    at = serving.state_dir / "run" / "apps.sock"
    sdk.lock_updates("a picture", for_s=600.0, owner="camera", socket=at)
    wait_for(lambda: len(serving.status()["locks"]) == 1, why="the lock of the fixture to end")
    whose = f"camera (user {os.getuid()})"
    assert [(one["owner"], one["reason"]) for one in serving.status()["locks"]] == [(whose, "a picture")]
    offer(serving, "2.0.0")
    assert held(serving, "2.0.0")["detail"] == f"the lock of {whose} to end (a picture)"
    # Of another user, as the agent calls it: this one's application cannot name it.
    assert lock(serving, owner="camera (user 4242)").status == 200
    with pytest.raises(sdk.Rejected, match="not_locked"):
        sdk.unlock_updates(owner="camera (user 4242)", socket=at)
    assert serving.call("POST", "/skerry/v1/unlock", {"owner": "camera (user 4242)"}).status == 200
    with pytest.raises(sdk.Rejected, match="bad_lock"):
        sdk.lock_updates("for ever", for_s=1e9, socket=at)
    with pytest.raises(sdk.Rejected, match="bad_lock"):
        sdk.lock_updates("not a number", for_s=float("nan"), socket=at)
    for number in range(holds.MOST_OF_A_USER - 1):
        sdk.lock_updates("many", for_s=60.0, owner=f"camera-{number}", socket=at)
    with pytest.raises(sdk.Rejected, match="too_many_locks"):
        sdk.lock_updates("one more", for_s=60.0, owner="camera-x", socket=at)
    assert lock(serving, owner="a person").status == 200
    for one in serving.status()["locks"]:
        assert serving.call("POST", "/skerry/v1/unlock", {"owner": one["owner"]}).status == 200
    serving.wait_running("2.0.0", "trial")
    with pytest.raises(sdk.Degraded, match="not_running"):
        sdk.lock_updates("nobody there", for_s=60.0, socket=serving.folder / "nowhere.sock")
