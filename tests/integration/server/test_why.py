"""Why a device runs what it runs: the server's answer for each case, from rows that real messages and commands made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from skerry_contract import topics, wire
from skerry_contract import window as w

from tests.rig_server import DeviceRig, Operator, ServerRig

MODEL = "gas"


class Bench:
    """A group with one device per name, and bundles 1.0.0 and 2.0.0 of the model."""

    def __init__(self, server: ServerRig, operator: Operator, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.digests = {
            version: operator.publish(MODEL, version, seed=n) for n, version in enumerate(("1.0.0", "2.0.0"))
        }
        self._groups = 0
        self.devices: list[DeviceRig] = []

    def group(self, *names: str, stable: str = "1.0.0") -> dict[str, DeviceRig]:
        """A new group that runs ``stable``, with connected devices that have said nothing yet."""
        self._groups += 1
        group = f"why-{self._groups}"
        self.server.good("PUT", f"/api/v1/groups/{group}", {"settings": {"sync_s": 40, "jitter_s": 2}})
        if stable:
            body = {"stable": self.digests[stable]}
            self.server.good("PUT", f"/api/v1/groups/{group}/models/{MODEL}", body)
        made = {name: DeviceRig(self.server, f"{group}-{name}", self.folder, group=group) for name in names}
        for device in made.values():
            device.enrol()
            device.connect()
        self.devices += made.values()
        return made

    def runs(self, device: DeviceRig, version: str, state: str = "confirmed", **more: Any) -> None:
        running = {MODEL: {"digest": self.digests[version], "version": version, "state": state}} if version else {}
        device.report(running, arch="x86_64", **more)

    def update(self, device: DeviceRig, version: str, state: str, code: str = "", **data: str) -> None:
        """An event of the device's lifecycle, as an agent reports it."""
        whole = {"model": MODEL, "digest": self.digests[version], "version": version, "state": state, **data}
        event = wire.Event(at=w.Instant("b" * 32, 1, 1, True), name="update", code=code, data=whole)
        device.send(("event", wire.encode(event)))

    def under_way(self, version: str, state: str) -> wire.Update:
        return wire.Update(
            model=MODEL, digest=self.digests[version], state=state, since=w.Instant("b" * 32, 1, 1, True), attempt=2
        )

    def rollout(self, group: str, name: str, **stage: Any) -> None:
        stages = [{"devices": 1, "min_devices": 1, **stage}, {"share": 1.0}]
        wish = {"id": name, "group": group, "model": MODEL, "candidate": self.digests["2.0.0"], "stages": stages}
        self.server.good("POST", "/api/v1/rollouts", wish)

    def why(self, device: DeviceRig) -> dict[str, Any]:
        return dict(self.server.good("GET", f"/api/v1/devices/{device.id}/why"))

    def until(self, device: DeviceRig, state: str, also: Callable[[dict[str, Any]], Any] = bool) -> dict[str, Any]:
        """The one model's answer, once it has this state."""

        def found() -> dict[str, Any] | None:
            (one,) = self.why(device)["models"] or [{"state": ""}]
            return one if one["state"] == state and also(one) else None

        try:
            return dict(self.server.wait(state, found, 15.0))
        except AssertionError:
            pytest.fail(f"wanted {state}, got {self.why(device)}")


@pytest.fixture(scope="module")
def bench(server: ServerRig, operator: Operator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(server, operator, tmp_path_factory.mktemp("devices"))
    yield made
    for device in made.devices:
        device.disconnect()


def audit(server: ServerRig) -> dict[int, dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while True:
        page = server.good("GET", f"/api/v1/audit?limit=1000&after={rows[-1]['id'] if rows else 0}")
        rows += page["items"]
        if len(page["items"]) < 1000:
            return {row["id"]: row for row in rows}


def test_a_device_on_its_assigned_version(server: ServerRig, bench: Bench) -> None:
    device = bench.group("a")["a"]
    bench.runs(device, "1.0.0", generation=1)
    found = bench.until(device, "as_assigned")
    assert (found["assigned"]["version"], found["assigned"]["reason"], found["running"]["version"]) == (
        "1.0.0",
        "stable",
        "1.0.0",
    )
    assert f"what group {device.group} runs" in found["assignment"]
    assert (found["waits_for"], found["failure"]) == ("", None)
    rows = audit(server)
    assert [rows[n]["action"] for n in found["evidence"]["audit"]] == ["group.assign"]


def test_a_device_that_waits_for_its_stage_and_one_that_is_taken(server: ServerRig, bench: Bench) -> None:
    devices = bench.group("a", "b", "c")
    for device in devices.values():
        bench.runs(device, "1.0.0")
    for device in devices.values():
        bench.until(device, "as_assigned")
    group = next(iter(devices.values())).group
    bench.rollout(group, "why-stages", min_inferences=7)
    states = {name: bench.why(device)["models"][0] for name, device in devices.items()}
    taken = [name for name, one in states.items() if one["assigned"]["arm"] == "candidate"]
    assert len(taken) == 1
    candidate = devices[taken[0]]
    told = bench.until(candidate, "due")
    assert "candidate of rollout why-stages (running, stage 1 of 2)" in told["assignment"]
    assert "it runs gas 1.0.0 (onnx) instead" in told["because"]
    assert "within 42 s" in told["waits_for"]
    assert told["assigned"]["judged_as"] == "candidate"
    for name in set(devices) - set(taken):
        waiting = bench.until(devices[name], "waiting_for_stage", lambda one: "is held" in one["waits_for"])
        assert "rollout why-stages has not reached it" in waiting["because"]
        assert waiting["waits_for"].startswith("stage 2 of 2, as the fleet is now; stage 1 is held: ")
        assert "0 of 7 inferences" in waiting["waits_for"]
        assert waiting["assigned"]["judged_as"] == "control"
        assert waiting["evidence"]["decisions"]
        rows = audit(server)
        assert {rows[n]["subject"] for n in waiting["evidence"]["audit"]} == {"rollout:why-stages"}
    # It takes the update: under way, on trial, confirmed.
    half = wire.Progress(done=1_000_000, size=2_000_000)
    bench.runs(candidate, "1.0.0", update=bench.under_way("2.0.0", "fetch"), progress=half)
    fetching = bench.until(candidate, "updating")
    assert "in 'fetch', attempt 2, 1.0 of 2.0 MB fetched (50%)" in fetching["because"]
    assert fetching["update"]["progress"] == {"done": 1_000_000, "size": 2_000_000}
    bench.runs(candidate, "2.0.0", "trial", update=bench.under_way("2.0.0", "trial"))
    assert "100 inferences on trial, or the end of its 60 s" in bench.until(candidate, "on_trial")["waits_for"]
    bench.runs(candidate, "2.0.0")
    bench.until(candidate, "as_assigned")
    server.good("POST", "/api/v1/rollouts/why-stages/pause", {"reason": "lunch"})
    paused = bench.until(devices[next(iter(set(devices) - set(taken)))], "waiting_for_stage")
    assert paused["waits_for"] == "a person: the rollout is paused, because: lunch"


def test_a_refusal_is_told_with_its_code_and_until_the_bundle_is_confirmed(bench: Bench) -> None:
    device = bench.group("a", stable="2.0.0")["a"]
    bench.runs(device, "1.0.0")
    bench.update(device, "2.0.0", "fetch")
    bench.update(device, "2.0.0", "revert", "hash_mismatch", detail="model.onnx: wanted aa, got bb", failed_in="verify")
    bench.update(device, "2.0.0", "idle", "hash_mismatch", detail="model.onnx: wanted aa, got bb", failed_in="verify")
    found = bench.until(device, "refused")
    assert (
        "hash_mismatch: a file differs from the digest that was signed (model.onnx: wanted aa, got bb)"
        in found["because"]
    )
    assert (found["failure"]["code"], found["failure"]["failed_in"]) == ("hash_mismatch", "verify")
    assert found["failure"]["event"] in found["evidence"]["events"]
    assert f"skerry device retry {device.id}" in found["do"]
    assert found["since_ms"] == found["failure"]["received_ms"]
    # A new try does not make the old refusal untold; its success does.
    bench.update(device, "2.0.0", "fetch")
    assert bench.until(device, "refused")
    bench.runs(device, "2.0.0")
    bench.update(device, "2.0.0", "confirmed")
    assert bench.until(device, "as_assigned", lambda one: one["failure"] is None)


def test_an_update_that_a_person_ended_waits_for_a_persons_word(server: ServerRig, bench: Bench) -> None:
    device = bench.group("a", stable="2.0.0")["a"]
    bench.runs(device, "1.0.0")
    assert bench.why(device)["orders"] == []
    path = f"/api/v1/devices/{device.id}"
    given = server.good("POST", f"{path}/cancel", {"reason": "wrong machine"})
    assert device.ask("GET", "/device/v1/self").json()["orders"] == {"cancel": given["number"]}
    bench.update(device, "2.0.0", "idle", "cancelled", detail="cancelled by an operator", failed_in="fetch")
    told = wire.Event(
        at=w.Instant("b" * 32, 1, 1, True), name="order", data={"kind": "cancel", "number": given["number"]}
    )
    device.send(("event", wire.encode(told)))
    found = bench.until(device, "refused")
    assert "a person ended the update" in found["because"] and "skerry device retry" in found["do"]
    server.wait("the word", lambda: bench.why(device)["orders"][0]["obeyed_ms"])
    # Each order is one of its own, and the newest of a kind is the one to obey.
    first = server.good("POST", f"{path}/retry", {"reason": "mended"})["number"]
    second = server.good("POST", f"{path}/retry", {"reason": "mended again"})["number"]
    assert given["number"] < first < second
    assert device.ask("GET", "/device/v1/self").json()["orders"] == {"cancel": given["number"], "retry": second}
    orders = {one["kind"]: one for one in bench.why(device)["orders"]}
    assert (orders["retry"]["reason"], orders["retry"]["obeyed_ms"]) == ("mended again", None)
    row = next(row for row in audit(server).values() if (row["after"] or {}).get("number") == second)
    assert (row["action"], row["actor"], row["reason"]) == ("device.retry", "token:admin", "mended again")
    assert server.ask("POST", f"{path}/retry", {"reason": ""}).status == 422
    assert server.ask("POST", "/api/v1/devices/nobody/cancel", {"reason": "x"}).status == 404


def obeys(device: DeviceRig, kind: str, number: int) -> None:
    told = wire.Event(at=w.Instant("b" * 32, 1, 1, True), name="order", data={"kind": kind, "number": number})
    device.send(("event", wire.encode(told)))


def test_what_a_persons_retry_forgave_is_no_refusal_any_more_and_a_new_failure_is(
    server: ServerRig, bench: Bench
) -> None:
    device = bench.group("a", stable="2.0.0")["a"]
    bench.runs(device, "1.0.0")
    bench.update(device, "2.0.0", "idle", "cancelled", failed_in="ready")
    bench.until(device, "refused")
    number = server.good("POST", f"/api/v1/groups/{device.group}/retry", {"reason": "the mirror is mended"})
    assert number["devices"] == 1
    obeys(device, "retry", number["number"])
    found = bench.until(device, "retrying")
    assert "obeyed a person's retry" in found["because"] and "cancelled" in found["because"]
    assert "retry" not in found["do"]
    # The device holds it ready, then fails anew.
    bench.runs(device, "1.0.0", update=bench.under_way("2.0.0", "ready"))
    assert "in 'ready'" in bench.until(device, "updating")["because"]
    bench.update(device, "2.0.0", "idle", "golden_failed", failed_in="prove")
    bench.runs(device, "1.0.0")
    assert "skerry device retry" in bench.until(device, "refused")["do"]


def test_a_groups_order_reaches_each_of_its_devices_and_no_other(server: ServerRig, bench: Bench) -> None:
    mine, other = bench.group("a")["a"], bench.group("a")["a"]

    def told(device: DeviceRig) -> dict[str, int]:
        return dict(device.ask("GET", "/device/v1/self").json()["orders"])

    path = f"/api/v1/groups/{mine.group}/retry"
    first = server.good("POST", path, {"reason": "mended"})["number"]
    assert (told(mine), told(other)) == ({"retry": first}, {})
    own = server.good("POST", f"/api/v1/devices/{mine.id}/retry", {"reason": "this one above all"})["number"]
    assert own > first and told(mine) == {"retry": own}
    again = server.good("POST", path, {"reason": "again"})["number"]
    assert again > own and told(mine) == {"retry": again}
    (order,) = bench.why(mine)["orders"]
    assert (order["of"], order["reason"]) == (f"group:{mine.group}", "again")
    assert server.ask("POST", path, {"reason": ""}).status == 422


def test_a_device_that_went_back_says_why(bench: Bench) -> None:
    device = bench.group("a", stable="2.0.0")["a"]
    bench.runs(device, "1.0.0")
    bench.update(device, "2.0.0", "revert", "trial_errors", detail="12 of 30 failed", failed_in="trial")
    found = bench.until(device, "reverted")
    assert "it went back: trial_errors: too many requests failed on trial (12 of 30 failed)" in found["because"]
    # The network is no verdict on the bundle.
    other = bench.group("a", stable="2.0.0")["a"]
    bench.runs(other, "1.0.0")
    bench.update(other, "2.0.0", "idle", "unreachable", failed_in="fetch")
    assert "server or repository does not answer" in bench.until(other, "retrying")["because"]


def test_a_device_on_which_nothing_answers_says_what_keeps_its_bundle_from_starting(bench: Bench) -> None:
    device = bench.group("a")["a"]
    bench.runs(device, "1.0.0")
    bench.update(device, "1.0.0", "confirmed")
    bench.until(device, "as_assigned")
    data = {"models": {MODEL: bench.digests["1.0.0"]}, "detail": "HTTP 403", "starts": 1}
    event = wire.Event(at=w.Instant("b" * 32, 1, 1, True), name="worker", code="encryption_key_differs", data=data)
    device.send(("event", wire.encode(event)))
    bench.runs(device, "")
    found = bench.until(device, "stopped")
    assert (
        "no worker starts with it: encryption_key_differs: the server knows another encryption key" in found["because"]
    )
    assert found["do"].startswith(f"`skerry device forget-key {device.id} --reason WHY`")
    assert found["since_ms"] and found["evidence"]["events"]
    bench.runs(device, "1.0.0")
    bench.until(device, "as_assigned")
    # A forced floor stopped it, and what its group gives it is refused.
    bench.update(device, "2.0.0", "idle", "below_forced_floor")
    bench.update(device, "1.0.0", "idle", "below_floor", failed_in="fetch")
    bench.runs(device, "")
    found = bench.until(device, "refused")
    assert "it runs no gas instead, since below_forced_floor: what served is below a floor" in found["because"]
    assert "keeps the highest floor" in found["waits_for"] and "--lower` reaches only others" in found["do"]


def test_an_offline_device_keeps_its_reason_when_it_has_one(bench: Bench) -> None:
    devices = bench.group("a", "b", stable="2.0.0")
    for device in devices.values():
        bench.runs(device, "1.0.0")
        bench.until(device, "due")
    bench.update(devices["b"], "2.0.0", "idle", "golden_failed", failed_in="prove")
    bench.until(devices["b"], "refused")
    for device in devices.values():
        device.vanish()
    found = bench.until(devices["a"], "offline")
    assert "it is offline since 20" in found["because"] and "s ago)" in found["because"]
    assert found["waits_for"] == "the device to connect: it then takes gas 2.0.0 by itself"
    assert bench.why(devices["a"])["offline_since_ms"]
    assert bench.until(devices["b"], "refused")


def test_a_bundle_without_a_variant_for_the_device(bench: Bench) -> None:
    devices = bench.group("a", "b", "c", stable="2.0.0")
    devices["a"].report({}, arch="x86_64")
    assert bench.until(devices["a"], "due")
    # By what it reported of itself, before it has tried.
    bench.server.wait("its state", lambda: bench.why(devices["a"])["seen_ms"])
    state = wire.State(
        status="online", birth=devices["b"].birth, group=devices["b"].group, arch="armv7l", runtimes={"tflite": "2.14"}
    )
    publish(devices["b"], state)
    found = bench.until(devices["b"], "unfit")
    assert "the bundle is for onnx" in found["because"] and "the device has tflite 2.14 on armv7l" in found["because"]
    # By its own word.
    bench.update(devices["a"], "2.0.0", "idle", "no_variant", detail="onnx wants AVX", failed_in="fetch")
    found = bench.until(devices["a"], "unfit", lambda one: one["failure"])
    assert "no_variant: no variant for this architecture and runtime (onnx wants AVX)" in found["because"]
    # By what the group's document requires of every agent.
    path = f"/api/v1/devices/{devices['c'].id}/pins/{MODEL}"
    bench.server.good("PUT", path, {"digest": bench.digests["1.0.0"], "reason": "a test bench"})
    publish(
        devices["c"],
        wire.State(status="online", birth=devices["c"].birth, group=devices["c"].group, abilities=("canary",)),
    )
    found = bench.until(devices["c"], "unfit", lambda one: "agent_too_old" in one["because"])
    assert "(pins)" in found["because"] and found["waits_for"] == "a newer agent on the device"


def publish(device: DeviceRig, state: wire.State) -> None:
    assert device.client is not None
    device.client.publish(topics.state(device.id), wire.encode(state), qos=1, retain=True).wait_for_publish(10)


def test_a_pin_is_told_with_who_set_it_and_why(server: ServerRig, bench: Bench) -> None:
    device = bench.group("a")["a"]
    bench.runs(device, "1.0.0", abilities=("canary", "pins"))
    path = f"/api/v1/devices/{device.id}/pins/{MODEL}"
    server.good("PUT", path, {"digest": bench.digests["2.0.0"], "reason": "the loan bench"})
    found = bench.until(device, "due")
    assert "gas 2.0.0: pinned on this device by token:admin 20" in found["assignment"]
    assert "the loan bench" in found["assignment"] and "whatever its group runs" in found["assignment"]
    assert "generation 0 of " in found["because"]
    rows = audit(server)
    assert "device.pin" in {rows[n]["action"] for n in found["evidence"]["audit"]}


def test_a_revoked_device_and_one_whose_group_runs_nothing(server: ServerRig, bench: Bench) -> None:
    device = bench.group("a")["a"]
    bench.runs(device, "1.0.0")
    bench.until(device, "as_assigned")
    server.good("POST", f"/api/v1/devices/{device.id}/revoke", {"reason": "sold with the press"})
    found = bench.until(device, "revoked")
    assert "revoked by token:admin 20" in found["because"] and "sold with the press" in found["because"]
    assert found["assigned"] is None and found["waits_for"].startswith("nothing: a revoked id never comes back")
    assert "it goes on serving" in found["because"]
    pin = server.ask(
        "PUT", f"/api/v1/devices/{device.id}/pins/{MODEL}", {"digest": bench.digests["2.0.0"], "reason": "x"}
    )
    assert (pin.status, pin.code) == (409, "revoked"), "nobody would obey it"
    rows = audit(server)
    assert "device.revoke" in {rows[n]["action"] for n in found["evidence"]["audit"]}
    bare = bench.group("a", stable="")["a"]
    bench.runs(bare, "1.0.0")
    found = bench.until(bare, "unassigned")
    assert found["assignment"] == f"none: group {bare.group} does not run gas"
    silent = bench.group("a", stable="")["a"]
    assert bench.why(silent)["models"] == []


def test_candidates_of_a_rollout_that_went_back_are_told_so(server: ServerRig, bench: Bench) -> None:
    device = bench.group("a")["a"]
    bench.runs(device, "1.0.0")
    bench.until(device, "as_assigned")
    bench.rollout(device.group, "why-back")
    bench.runs(device, "2.0.0")
    bench.until(device, "as_assigned", lambda one: one["running"]["version"] == "2.0.0")
    server.good("POST", "/api/v1/rollouts/why-back/abort", {"reason": "it hums"})
    found = bench.until(device, "due", lambda one: one["assigned"]["version"] == "1.0.0")
    assert "rollout why-back of 2.0.0 was aborted: it hums" in found["assignment"]
    assert "it runs gas 2.0.0 (onnx) instead" in found["because"]


def test_how_far_behind_a_device_is(bench: Bench) -> None:
    device = bench.group("a")["a"]
    bench.update(device, "1.0.0", "fetch")
    bench.runs(
        device, "1.0.0", generation=1, epoch=device.epoch, seq=9, tuf={"root": 1, "timestamp": 1}, lost={"full": 3}
    )
    bench.until(device, "as_assigned")
    behind = bench.server.wait(
        "the record's commit",
        lambda: (found := bench.why(device)["behind"])["records"]["committed"] == 1 and found,
    )
    assert behind["group_document"]["device"] == 1 <= behind["group_document"]["server"]
    assert behind["records"]["reported"] == 9
    assert behind["metadata"]["root"] == {"device": 1, "server": 1}
    assert behind["metadata"]["timestamp"]["server"] > behind["metadata"]["timestamp"]["device"] == 1
    assert behind["lost"] == {"full": 3}


def test_an_unknown_device_is_not_found_and_a_viewer_may_ask(server: ServerRig, bench: Bench) -> None:
    token = server.good("POST", "/api/v1/tokens", {"name": "why-viewer", "role": "viewer"})["token"]
    missing = server.ask("GET", "/api/v1/devices/nobody/why", token=token)
    assert (missing.status, missing.code) == (404, "not_found")
    assert server.ask("GET", "/api/v1/devices/NOBODY/why", token=token).status == 422
    device = bench.group("a")["a"]
    assert server.ask("GET", f"/api/v1/devices/{device.id}/why", token=token).status == 200
    assert server.ask("GET", f"/api/v1/devices/{device.id}/why", token="").status == 401
