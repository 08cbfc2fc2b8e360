"""An agent that dies soon after each start: the bundle that it confirmed last gives way to the one before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from skerry_agent.core.lifecycle import CRASHES

from tests.integration.agent.rig import Device, Server, wait_for
from tests.integration.agent.test_restore import ask_until
from tests.integration.agent.test_update import digest_of, offer


@pytest.mark.slow
def test_an_agent_that_is_killed_at_every_start_goes_back_and_one_that_lasts_does_not(
    make_device: Callable[..., Device], server: Server
) -> None:
    # A start has lasted after twelve seconds.
    device = make_device(backoff_scale=0.2)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    offer(device, "2.0.0", seed=2)
    device.wait_running("2.0.0", "trial")
    ask_until(device, "2.0.0")
    # What was fetched anew would end the test before it has seen anything.
    device.world["errors"] = {"manifest": ["transient", "unreachable", "no route"]}
    device.save()
    assert device.stop() == 0
    for _ in range(CRASHES):
        device.start()
        device.wait_running("2.0.0", "confirmed")
        device.kill()
    device.start()
    device.wait_running("1.0.0", "confirmed")
    assert device.infer(3) == ["1.0.0"] * 3
    event = wait_for(lambda: [e for e in server.events() if e.code == "crash_loop"], why="the event")[0]
    assert event.data["digest"] == digest_of(device, "2.0.0")
    assert "the agent itself ended 5 times in a row" in event.data["detail"]
    told = {one["about"]: one for one in device.call("GET", "/skerry/v1/why").body["told"]}
    assert "ended 5 times in a row" in told["agent"]["says"]
    # A power cut is as likely: it may try again, once.
    del device.world["errors"]
    device.save()
    device.sync()
    device.wait_running("2.0.0", "trial")
