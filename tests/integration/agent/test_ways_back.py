"""Ways back beside an update that is held or under way, on a whole device with two models: they wait for none."""

from __future__ import annotations

import http.client
from typing import Any

import pytest

from tests.integration.agent.rig import Device, Server, wait_for


def confirm(device: Device, version: str, *, model: str, **stable: str) -> None:
    """Publishes, and brings a bundle of a model through its trial."""
    device.publish_models(**stable)
    device.sync()
    device.wait_running(version, "trial", model=model)
    device.infer(20, model=model)
    device.wait_running(version, "confirmed", model=model)


def lock(device: Device, for_s: float = 3600.0) -> None:
    assert device.call("POST", "/skerry/v1/lock", {"owner": "w", "reason": "r", "for_s": for_s}).status == 200


def wait_under_way(device: Device, model: str, state: str) -> dict[str, Any]:
    def found() -> Any:
        update = device.status()["update"]
        return update if (update["model"], update["state"]) == (model, state) else None

    update: dict[str, Any] = wait_for(found, why=lambda: f"{model} in {state}: {device.status()['update']}")
    return update


@pytest.fixture
def two(device: Device, server: Server) -> tuple[Device, dict[str, str]]:
    """Gas 1.0.0, and oil 6.0.0, which took the place of oil 5.0.0."""
    gas, oil5, oil6 = device.bundle("1.0.0"), device.bundle("5.0.0", model="oil"), device.bundle("6.0.0", model="oil")
    device.publish_models(gas=gas)
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    confirm(device, "5.0.0", model="oil", gas=gas, oil=oil5)
    confirm(device, "6.0.0", model="oil", gas=gas, oil=oil6)
    return device, {"1.0.0": gas, "5.0.0": oil5, "6.0.0": oil6}


def test_a_way_back_waits_for_no_update_of_another_model(two: tuple[Device, dict[str, str]], server: Server) -> None:
    device, digests = two
    gas2 = device.bundle("2.0.0")
    lock(device)
    device.publish_models(gas=gas2, oil=digests["6.0.0"])
    device.sync()
    wait_under_way(device, "gas", "ready")
    # A person's: no lock holds it, and what lies ready makes way.
    answer = device.call("POST", "/skerry/v1/revert", {"model": "oil"})
    assert (answer.status, answer.body["version"]) == (200, "5.0.0")
    device.wait_running("5.0.0", "confirmed", model="oil")
    assert device.infer(2, model="oil") == ["5.0.0"] * 2
    made_way = wait_for(lambda: [e for e in server.events() if e.code == "yielded"], why="the server hears of it")
    assert {(e.data["version"], e.data["detail"]) for e in made_way} == {("2.0.0", "for the way back of oil")}
    assert wait_under_way(device, "gas", "ready")["version"] == "2.0.0"
    assert device.running() == ("1.0.0", "confirmed")
    # The operator's, by the group's document, while the files of another model come.
    lock(device, for_s=0.3)
    device.wait_running("2.0.0", "trial")
    device.infer(20)
    device.wait_running("2.0.0", "confirmed")
    gas3 = device.bundle("3.0.0")
    device.world["slow_fetch"] = {gas3: 600.0}
    oil4 = device.bundle("4.0.0", model="oil")
    device.publish_models(gas=gas3, oil=digests["5.0.0"])
    device.sync()
    wait_under_way(device, "gas", "fetch")
    device.publish_models(gas=gas3, oil=oil4)
    device.sync()
    device.wait_running("4.0.0", "trial", model="oil")
    device.world["slow_fetch"] = {}
    device.save()
    device.infer(20, model="oil")
    device.wait_running("4.0.0", "confirmed", model="oil")
    device.wait_running("3.0.0", "trial")


@pytest.mark.slow
def test_a_bundle_that_crashes_on_and_on_is_given_up_while_its_successor_lies_ready(
    device: Device, server: Server
) -> None:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    device.publish(device.bundle("2.0.0", "crash-on-rows"))
    device.sync()
    device.wait_running("2.0.0", "trial")
    wait_for(lambda: device.infer(20) and device.running() == ("2.0.0", "confirmed"), why="2.0.0 confirmed")
    lock(device)
    device.publish(device.bundle("3.0.0"))
    device.sync()
    wait_under_way(device, "gas", "ready")

    def gone_back() -> bool:
        try:
            device.infer(value=666.0)
        except (OSError, http.client.HTTPException, AssertionError):
            pass
        return device.running()[0] == "1.0.0"

    wait_for(gone_back, timeout_s=90, why=lambda: device.log()[-3000:])
    wait_for(lambda: [e for e in server.events() if e.code == "crash_loop"], why="the server hears of it")
    assert wait_under_way(device, "gas", "ready")["version"] == "3.0.0"
    assert device.infer(1) == ["1.0.0"]
