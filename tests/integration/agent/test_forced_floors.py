"""A forced floor stops what serves below it, on a whole device: real workers, real broker; the repository is a stand-in's folder."""

from __future__ import annotations

import http.client
from collections.abc import Callable

import pytest

from tests.integration.agent import held
from tests.integration.agent.rig import Device, Server, wait_for


def confirm(device: Device, version: str) -> None:
    """Makes a bundle stable, and brings it through its trial."""
    device.publish(device.bundle(version))
    device.sync()
    device.wait_running(version, "trial")
    device.infer(20)
    device.wait_running(version, "confirmed")


def force(device: Device, version: str) -> None:
    device.world["floors"] = device.world["forced"] = {"gas": version}
    device.save()
    device.sync()


@pytest.fixture
def serving(device: Device, server: Server) -> Device:
    """A device that confirmed 1.0.0."""
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    return device


def nothing_answers(device: Device) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=5)
    try:
        connection.request("GET", "/v2/models/gas/ready")
        return connection.getresponse().status != 200
    except (OSError, http.client.HTTPException):
        return True
    finally:
        connection.close()


@pytest.mark.attack("rollback of a model", "signed floors")
def test_what_serves_stops_and_the_bundle_before_it_comes_back_where_it_may(serving: Device, server: Server) -> None:
    confirm(serving, "2.0.0")
    confirm(serving, "1.1.0")
    force(serving, "2.0.0")
    serving.wait_running("2.0.0", "confirmed")
    assert serving.infer(3) == ["2.0.0"] * 3
    (event,) = wait_for(
        lambda: [e for e in server.events() if (e.code, e.data["state"]) == ("below_forced_floor", "idle")],
        why="the event",
    )
    assert (event.data["version"], event.data["detail"]) == (
        "1.1.0",
        "gas 1.1.0 is below the forced floor 2.0.0",
    )
    # The group still names 1.1.0, and a catalog that forgot the floor changes nothing.
    serving.world["floors"] = serving.world["forced"] = {}
    serving.save()
    serving.synced()
    serving.wait_update("idle", "below_floor", version="1.1.0")
    serving.kill()
    serving.start()
    serving.wait_running("2.0.0", "confirmed")
    assert serving.infer(1) == ["2.0.0"]


def test_without_a_permitted_bundle_nothing_answers_until_one_is_assigned(serving: Device, server: Server) -> None:
    force(serving, "1.5.0")
    wait_for(lambda: serving.running() == ("", "") and nothing_answers(serving), why="it stops")
    wait_for(lambda: any(e.code == "below_forced_floor" for e in server.events()), why="the event")
    serving.kill()
    serving.start()
    serving.synced()
    assert serving.running() == ("", ""), "nor after a start"
    assert nothing_answers(serving)
    confirm(serving, "1.5.0")
    assert serving.infer(2) == ["1.5.0"] * 2


def test_a_forbidden_bundle_answers_no_more_though_no_worker_can_take_its_place_and_its_fix_waits_for_no_other_model(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = make_device()
    hold = device.folder / "hold.json"
    held.write(hold, held=[], deadlines={})
    gas, oil = device.bundle("1.0.0"), device.bundle("5.0.0", model="oil")
    device.publish_models(gas=gas, oil=oil)
    device.start()
    for model, version in (("gas", "1.0.0"), ("oil", "5.0.0")):
        device.wait_running(version, "trial", model=model)
        device.infer(20, model=model)
        device.wait_running(version, "confirmed", model=model)
    # Oil's update lies ready, and no worker starts any more.
    device.call("POST", "/skerry/v1/lock", {"owner": "w", "reason": "r", "for_s": 3600.0})
    oil6 = device.bundle("6.0.0", model="oil")
    device.publish_models(gas=gas, oil=oil6)
    device.sync()
    device.wait_update("ready", version="6.0.0")
    held.write(hold, held=["worker"], deadlines={})
    force(device, "2.0.0")
    wait_for(lambda: nothing_answers(device), why="gas stops")
    assert device.running()[1] == "stopped"
    assert device.infer(3, model="oil") == ["5.0.0"] * 3
    held.write(hold, held=[], deadlines={})
    fix = device.bundle("2.0.0")
    device.publish_models(gas=fix, oil=oil6)
    device.sync()
    device.wait_running("2.0.0", "trial")
    assert set(device.infer(20)) == {"2.0.0"}
    device.wait_running("2.0.0", "confirmed")
    device.wait_update("ready", version="6.0.0")


def test_an_update_of_a_bundle_that_is_forbidden_meanwhile_ends(serving: Device, server: Server) -> None:
    serving.publish(serving.bundle("1.1.0"))
    serving.sync()
    serving.wait_running("1.1.0", "trial")
    force(serving, "1.5.0")
    wait_for(lambda: serving.running() == ("", ""), why="neither the trial's bundle nor the one before it serves")
    found = wait_for(lambda: [e for e in server.events() if e.code == "below_forced_floor"], why="the event")
    assert found[0].data["failed_in"] == "trial"


@pytest.mark.attack("rollback of a model")
def test_a_forced_floor_outlives_a_damaged_store(serving: Device, server: Server) -> None:
    force(serving, "2.0.0")
    wait_for(lambda: serving.running() == ("", "") and nothing_answers(serving), why="it stops")
    serving.world["floors"] = serving.world["forced"] = {}
    serving.world["down"] = True
    serving.save()
    serving.kill()
    database = serving.state_dir / "state.db"
    data = bytearray(database.read_bytes())
    data[100:4096] = bytes(3996)
    database.write_bytes(data)
    for suffix in ("-wal", "-shm"):
        database.with_name(f"state.db{suffix}").unlink(missing_ok=True)
    serving.start()
    wait_for(lambda: serving.status()["outbox"]["lost"].get("store_damaged") == 1, why="the store was set aside")
    assert serving.running() == ("", "")
    assert nothing_answers(serving)
