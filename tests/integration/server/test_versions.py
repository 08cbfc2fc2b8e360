"""Two operators at once: the second, who names the version that they read, is refused and told what changed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.rig_server import Answer, DeviceRig, Operator, ServerRig


def moved_on(found: Answer) -> dict[str, Any]:
    """The details of the refusal."""
    assert (found.status, found.code) == (409, "moved_on"), found.data
    return dict(found.json()["error"]["details"])


@pytest.fixture(scope="module")
def other(server: ServerRig) -> str:
    """The token of a second operator."""
    return str(server.good("POST", "/api/v1/tokens", {"name": "bob", "role": "operator"})["token"])


def test_the_second_of_two_operators_does_not_overwrite_a_groups_settings(server: ServerRig, other: str) -> None:
    path = "/api/v1/groups/shared"
    made = server.good("PUT", path, {"settings": {"window_s": 10}, "version": 0})
    theirs = server.good("PUT", path, {"settings": {"sync_s": 33}, "version": made["version"]}, token=other)
    found = moved_on(server.ask("PUT", path, {"settings": {"window_s": 31}, "version": made["version"]}))
    assert found["now"] == {"settings": {"sync_s": 33}}
    assert (found["version"], found["last"]["actor"]) == (theirs["version"], "token:bob")
    assert server.good("GET", path)["settings"] == {"sync_s": 33}
    again = server.good("PUT", path, {"settings": {"sync_s": 33, "window_s": 31}, "version": found["version"]})
    assert again["settings"] == {"sync_s": 33, "window_s": 31}


def test_a_group_that_is_there_is_not_made_again(server: ServerRig) -> None:
    server.good("PUT", "/api/v1/groups/once", {"settings": {"window_s": 10}, "version": 0})
    assert moved_on(server.ask("PUT", "/api/v1/groups/once", {"settings": {}, "version": 0}))["version"] == 1
    assert moved_on(server.ask("PUT", "/api/v1/groups/never", {"settings": {}, "version": 4}))["version"] == 0
    assert server.ask("GET", "/api/v1/groups/never").status == 404


def test_membership_and_pins_share_one_version(server: ServerRig, operator: Operator, device: DeviceRig) -> None:
    digest = operator.publish("pinned", "1.0.0")
    path = f"/api/v1/devices/{device.id}"
    seen = server.good("GET", path)["membership_version"]
    pinned = server.good("PUT", f"{path}/pins/pinned", {"digest": digest, "version": seen})
    assert pinned["version"] == seen + 1 == server.good("GET", path)["membership_version"]
    for found in (
        server.ask("PUT", f"{path}/membership", {"tags": {"a": "b"}, "version": seen}),
        server.ask("PUT", f"{path}/pins/pinned", {"digest": digest, "version": seen}),
        server.ask("DELETE", f"{path}/pins/pinned?version={seen}"),
    ):
        details = moved_on(found)
        assert details["now"] == {"group": "press", "tags": {}, "pins": {"pinned": digest}}
        assert details["last"]["action"] == "device.pin"
    assert server.ask("DELETE", f"{path}/pins/pinned?version={seen + 1}").status == 204
    moved = server.good("PUT", f"{path}/membership", {"tags": {"a": "b"}, "version": seen + 2})
    assert moved["version"] == seen + 3


def test_a_rollout_that_moved_on_takes_no_command_about_its_past(server: ServerRig, operator: Operator) -> None:
    server.good("PUT", "/api/v1/groups/steered", {})
    candidate = operator.publish("steered", "1.0.0")
    body = {"id": "r-steered", "group": "steered", "model": "steered", "candidate": candidate, "stages": [{"share": 1}]}
    made = server.good("POST", "/api/v1/rollouts", body)
    path = "/api/v1/rollouts/r-steered"
    paused = server.good("POST", f"{path}/pause", {"reason": "look", "version": made["version"]})
    for verb in ("pause", "resume", "rollback", "abort"):
        found = moved_on(server.ask("POST", f"{path}/{verb}", {"version": made["version"]}))
        assert found["now"] == {"state": "paused", "stage": 0, "reason": "look"}
        assert found["last"]["action"] == "rollout.pause"
    assert server.good("POST", f"{path}/resume", {"version": paused["version"]})["state"] == "running"
    assert server.good("POST", f"{path}/abort")["state"] == "aborted", "without a version it means what is there"
