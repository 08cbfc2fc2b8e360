"""A worker that leaks or spins is replaced by a successor that takes its connections over; where it must be, by a kill."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest

from tests.integration.agent.rig import Device, Load, Server, wait_for


def serving(device: Device, orders: str = "well") -> Device:
    (device.folder / "unruly").write_text(orders)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    return device


def pid(device: Device) -> int:
    return int(device.status()["worker"]["pid"])


def order(device: Device, what: str) -> None:
    path = device.folder / "unruly"
    path.with_suffix(".new").write_text(what)
    path.with_suffix(".new").replace(path)


def test_a_leaking_worker_is_replaced_under_load_without_a_failed_request(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = serving(make_device())
    before = pid(device)
    with Load(device, clients=3) as load:
        wait_for(lambda: load.ok > 50, why="load")
        # Of 200 MB that the model may need and 64 MB of slack: past that, and not far past.
        order(device, "leak-once 320")
        wait_for(lambda: pid(device) not in (0, before), why=lambda: f"another worker: {device.log()[-3000:]}")
        replaced = load.ok
        wait_for(lambda: load.ok > replaced + 50, why="answers")
    assert load.failed == []
    (event,) = wait_for(lambda: server.events("worker"), why="the event")
    assert event.code == "worker_leaked" and "MB" in event.data["how"]
    assert device.status()["worker"]["ends"] == {"worker_leaked": 1}
    assert b'skerry_agent_worker_ends_total{code="worker_leaked"} 1' in device.call("GET", "/metrics").body
    assert device.running() == ("1.0.0", "confirmed")
    wait_for(lambda: server.inferences() == 20 + load.ok, why=f"{20 + load.ok} counted")


@pytest.mark.slow
def test_a_worker_that_leaked_far_too_much_is_killed_at_once(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = serving(make_device())
    device.infer(7)
    before = pid(device)
    order(device, "leak-once 600")
    wait_for(lambda: pid(device) not in (0, before), why=lambda: f"another worker: {device.log()[-3000:]}")
    assert "worker is killed" in device.log()
    wait_for(lambda: server.events("worker"), why="the event")
    assert [e.code for e in server.events("worker")] == ["worker_leaked"]
    device.infer(3)
    wait_for(lambda: server.inferences() == 30, why="30 counted")


def test_a_spinning_worker_is_replaced_and_one_in_use_is_not(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = serving(make_device(spin_s=2))
    before = pid(device)
    with Load(device, clients=2, pause_s=0.0) as load:
        time.sleep(4)
    assert load.failed == [] and pid(device) == before, "work was taken for spinning"
    order(device, "spin")
    wait_for(lambda: server.events("worker"), why="the event")
    order(device, "well")
    wait_for(lambda: pid(device) not in (0, before), why=lambda: f"another worker: {device.log()[-3000:]}")
    assert device.infer(3) == ["1.0.0"] * 3
    assert {e.code for e in server.events("worker")} == {"worker_spun"}


@pytest.mark.parametrize(
    ("orders", "code"),
    [("leak-once 320", "worker_leaked"), pytest.param("spin", "worker_spun", marks=pytest.mark.slow)],
)
def test_what_leaks_or_spins_on_trial_goes_back(
    make_device: Callable[..., Device], server: Server, orders: str, code: str
) -> None:
    device = serving(make_device(spin_s=2))
    old = pid(device)
    device.publish(device.bundle("1.1.0", seed=1))
    device.sync()
    device.wait_running("1.1.0", "trial")
    assert device.process is not None
    agent = psutil.Process(device.process.pid)
    wait_for(lambda: old not in [child.pid for child in agent.children()], why="the end of the old worker")
    order(device, orders)
    device.wait_update("idle", code, "1.1.0")
    order(device, "well")
    device.wait_running("1.0.0", "confirmed")
    assert device.infer(3) == ["1.0.0"] * 3
