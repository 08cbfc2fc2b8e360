"""Every state of an update, and everything that can end it: the device comes to rest with a reason and one version that answers.

One agent with real workers goes through all of it; it is held in each state from outside (``held``). Where a server is silent, what was
fetched goes on without it, and what was not says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from skerry_agent.core import lifecycle

from tests.integration.agent import held
from tests.integration.agent.rig import Broker, Device, Server, wait_for

STATES = ("fetch", "verify", "stage", "ready", "prove", "trial", "revert")
CAUSES = ("cancel", "deadline", "kill", "stop", "withdrawn", "silent")
SHORT_S = 0.5

ENDS: dict[tuple[str, str], tuple[str, str]] = {
    # What the update ends as, and its code. A way back keeps the reason for which it began.
    **{(state, "cancel"): ("idle", "cancelled") for state in STATES},
    **{(state, "withdrawn"): ("idle", "withdrawn") for state in STATES},
    **{(state, "silent"): ("confirmed", "") for state in STATES},
    **{(state, "deadline"): ("idle", "timeout") for state in STATES},
    **{(state, "kill"): ("idle", "interrupted") for state in STATES},
    # A disk that hangs keeps an agent from ending in order: of those states there is only the kill.
    **{(state, "stop"): ("idle", "interrupted") for state in STATES if state not in ("verify", "stage")},
    ("fetch", "silent"): ("idle", "unreachable"),
    ("ready", "deadline"): ("idle", "activation_overdue"),
    # What is held lies ready over restarts and without a server, until nothing holds it any more.
    ("ready", "kill"): ("confirmed", ""),
    ("ready", "stop"): ("confirmed", ""),
    ("prove", "deadline"): ("idle", "start_timeout"),
    ("prove", "kill"): ("idle", "runtime_crashed"),
    # A trial without traffic ends by its time: neither success nor failure.
    ("trial", "deadline"): ("confirmed_on_golden", ""),
    ("trial", "kill"): ("idle", "trial_crashed"),
    **{("revert", cause): ("idle", "reverted_by_operator") for cause in CAUSES},
}


class Bench:
    """A device that confirmed 1.0.0 and is offered 2.0.0."""

    def __init__(self, device: Device, broker: Broker) -> None:
        self.device, self.broker = device, broker
        self.hold()
        # What was kept loaded would come back at once, whatever holds a start.
        device.config.write_text(device.config.read_text() + "[pool]\nstandby = false\n")
        self.first, self.second = device.bundle("1.0.0"), device.bundle("2.0.0", seed=1)
        device.publish(self.first)
        device.start()
        device.wait_running("1.0.0", "trial")
        device.infer(20)
        device.wait_running("1.0.0", "confirmed")

    def hold(self, *what: str, **deadlines: float) -> None:
        held.write(self.device.folder / "hold.json", held=what, deadlines=deadlines)

    def set_trial_s(self, trial_s: float) -> None:
        text = self.device.config.read_text()
        self.device.config.write_text(re.sub(r"(?m)^trial_s = .*$", f"trial_s = {trial_s}", text))
        assert self.device.call("POST", "/skerry/v1/reload", {}).status == 200

    def lock(self, what: str, **more: Any) -> None:
        assert self.device.call("POST", f"/skerry/v1/{what}", {"owner": "welder", **more}).status == 200

    def update(self) -> dict[str, Any]:
        return dict(self.device.status()["update"])

    def enter(self, state: str, **deadlines: float) -> None:
        """Offers 2.0.0, and holds its update in the state."""
        device = self.device
        # So slow that it gets no further: what does is under way for as long as it likes.
        device.world["slow_fetch"] = {self.second: 1e9 if state == "fetch" else 0.0}
        if state == "ready":
            self.lock("lock", reason="a seam", for_s=3600.0)
        self.hold(*{"verify": ["verify"], "stage": ["stage"], "prove": ["worker"]}.get(state, []), **deadlines)
        device.publish(self.second)
        device.sync(pardon=True)
        if state == "revert":
            device.wait_running("2.0.0", "trial")
            self.hold("worker", **deadlines)
            assert device.call("POST", "/skerry/v1/revert", {"model": "gas"}).status == 200

    def reached(self, state: str) -> None:
        wait_for(
            lambda: (u := self.update())["state"] == state and u["digest"] == self.second,
            why=lambda: f"{state}: {self.update()} {self.device.log()[-3000:]}",
        )

    def cause(self, state: str, cause: str) -> None:
        """What ends it. From then on nothing is held."""
        device = self.device
        if cause == "cancel":
            assert device.call("POST", "/skerry/v1/cancel", {}).status == 200
        elif cause in ("kill", "stop"):
            if cause == "kill":
                device.kill()
            else:
                assert device.stop() == 0
            if state == "ready":
                self.hold()
                device.start()
                self.reached(state)
                return
            # Whoever starts next finds nothing to do, and so keeps what it says of the last update.
            device.publish(self.first)
            self.hold()
            device.start()
        elif cause == "withdrawn":
            device.publish(self.first)
            device.sync()
        elif cause == "silent":
            self.broker.stop(kill=True)
            device.world["down"] = True
            device.save()

    def release(self) -> None:
        """The network is back, nothing is held, 1.0.0 is offered and confirmed."""
        device = self.device
        self.hold()
        if device.world.pop("down", None):
            self.broker.start()
        device.world.pop("errors", None)
        device.publish(self.first)
        device.sync(pardon=True)
        wait_for(lambda: device.running()[0] == "1.0.0", why=lambda: f"1.0.0 again: {device.log()[-3000:]}")
        if device.running()[1] == "trial":
            device.infer(20)
        device.wait_running("1.0.0", "confirmed", "confirmed_on_golden")
        wait_for(lambda: self.update()["state"] in lifecycle.RESTING, why="rest")


@pytest.fixture
def bench(make_device: Callable[..., Device], server: Server, broker: Broker) -> Bench:
    return Bench(make_device(), broker)


def comes_to_rest(bench: Bench, state: str, cause: str) -> None:
    device, wanted = bench.device, ENDS[state, cause]
    if (state, cause) == ("fetch", "silent"):
        device.world["errors"] = {"fetch": ["transient", "unreachable", "no answer"]}
        bench.enter("trial")
    elif cause == "deadline" and state == "trial":
        bench.set_trial_s(SHORT_S)
        bench.enter(state)
    elif cause == "deadline":
        bench.enter(state, **{state: SHORT_S})
    else:
        bench.enter(state)
        bench.reached(state)
        bench.cause(state, cause)
        if cause == "silent" or (state, cause) == ("revert", "withdrawn"):
            # It changes nothing of what is under way: that goes on.
            bench.hold()
    if state == "ready" and wanted == ("confirmed", ""):
        bench.lock("unlock")
    if wanted == ("confirmed", ""):
        # What is here goes on without any server.
        device.wait_running("2.0.0", "trial")
        device.infer(20)
    failed_in = "" if not wanted[1] else "trial" if state == "revert" else state
    ends = (*wanted, bench.second, failed_in)
    wait_for(
        lambda: (u := bench.update()) and (u["state"], u["code"], u["digest"], u["failed_in"]) == ends,
        why=lambda: f"{state} {cause}: wanted {ends}, got {bench.update()} {device.log()[-3000:]}",
    )
    told = {one["about"]: one for one in device.call("GET", "/skerry/v1/why").body["told"]}
    if wanted[1]:
        assert wanted[1] in told["update to gas 2.0.0"]["says"]
    bench.hold()
    version = "2.0.0" if wanted[0].startswith("confirmed") else "1.0.0"
    wait_for(lambda: device.running()[0] == version, why=lambda: f"{version} answers: {device.log()[-3000:]}")
    assert device.infer(3) == [version] * 3
    if (state, cause) == ("trial", "deadline"):
        bench.set_trial_s(120)
    if state == "ready" and wanted != ("confirmed", ""):
        bench.lock("unlock")
    bench.release()


DEFAULT = (("fetch", "deadline"), ("verify", "cancel"), ("stage", "withdrawn"), ("trial", "stop"), ("revert", "cancel"))


def test_an_update_that_is_cancelled_overdue_withdrawn_or_killed_comes_to_rest(bench: Bench) -> None:
    for state, cause in DEFAULT:
        comes_to_rest(bench, state, cause)


@pytest.mark.slow
@pytest.mark.parametrize("cause", CAUSES)
def test_every_state_and_everything_that_ends_it(bench: Bench, cause: str) -> None:
    for state in STATES:
        if (state, cause) in ENDS and (state, cause) not in DEFAULT:
            comes_to_rest(bench, state, cause)
