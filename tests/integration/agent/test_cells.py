"""A model marked ``isolate`` has a worker of its own behind the same address; what happens to one worker touches no other."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests import models
from tests.integration.agent.rig import Device, Load, Server, wait_for

ALONE = {"isolate": True}


def body(rows: int = 1, value: float | None = None) -> bytes:
    x, _ = models.rows(rows)
    if value is not None:
        x[0, 0] = value
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 4], "data": x.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def request(model: str, sent: bytes, path: str = "infer") -> bytes:
    head = f"POST /v2/models/{model}/{path} HTTP/1.1\r\nHost: d\r\nContent-Length: {len(sent)}\r\n\r\n"
    return head.encode() + sent


def workers(device: Device) -> dict[str, int]:
    """Cell -> pid of its worker."""
    return {one["cell"]: one["pid"] for one in device.status()["workers"]}


@pytest.fixture
def apart(make_device: Callable[..., Device], server: Server) -> Device:
    """gas 1.0.0 in the shared worker, pump 2.0.0 in its own; both confirmed."""
    return start(make_device())


def start(device: Device, **choices: Any) -> Device:
    gas, pump = device.bundle("1.0.0"), device.bundle("2.0.0", model="pump", changes=ALONE, **choices)
    device.publish_models(gas=gas, pump=pump)
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0")
    device.wait_running("2.0.0", "trial", model="pump")
    device.infer(20, model="pump")
    device.wait_running("2.0.0", model="pump")
    return device


class Client:
    """One connection that is kept."""

    def __init__(self, device: Device) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=30)

    def ask(self, method: str, path: str, sent: bytes | None = None) -> tuple[int, Any]:
        self.connection.request(method, path, sent)
        response = self.connection.getresponse()
        return response.status, json.loads(response.read() or b"null")


def test_one_connection_asks_models_of_different_workers_and_each_counts_its_own(apart: Device, server: Server) -> None:
    cells = workers(apart)
    assert cells.keys() == {"", "pump"} and len(set(cells.values())) == 2
    client = Client(apart)
    sock = None
    for turn in range(30):
        model, version = (("gas", "1.0.0"), ("pump", "2.0.0"))[turn % 2]
        status, answer = client.ask("POST", f"/v2/models/{model}/infer", body())
        assert (status, answer["model_name"], answer["model_version"]) == (200, model, version)
        sock = sock or client.connection.sock
        assert client.connection.sock is sock, "the connection was not kept"
    for model in ("gas", "pump"):
        assert client.ask("GET", f"/v2/models/{model}/ready") == (200, {"name": model, "ready": True})
    index = {
        one["name"]: (one["version"], one["state"]) for one in client.ask("POST", "/v2/repository/index", b"{}")[1]
    }
    assert index == {"gas": ("1.0.0", "READY"), "pump": ("2.0.0", "READY")}
    assert client.ask("POST", "/v2/models/other/infer", body())[0] == 404
    assert client.ask("GET", "/v2/models/pump/versions/9.9.9")[0] == 404
    # More than is read in one go, and requests that do not wait for each other.
    assert client.ask("POST", "/v2/models/pump/infer", body(2000) + b" " * 300_000)[0] == 200
    with socket.create_connection(("127.0.0.1", apart.port), timeout=30) as pipelined:
        pipelined.sendall(b"".join(request(model, body()) for model in ("gas", "pump", "pump", "gas") * 3))
        found = b""
        while found.count(b"model_version") < 12:
            found += pipelined.recv(65536)
    order = [part.split(b'"')[0] for part in found.split(b'"model_name":"')[1:]]
    assert order == [b"gas", b"pump", b"pump", b"gas"] * 3
    wait_for(lambda: server.inferences() == 40 + 30 + 1 + 12, why=lambda: f"counted {server.inferences()}")
    by_model = {name: sum(w.counts.ok for w in server.windows() if w.key.model == name) for name in ("gas", "pump")}
    assert by_model == {"gas": 20 + 15 + 6, "pump": 20 + 15 + 1 + 6}


@pytest.mark.slow
def test_a_throttle_holds_for_all_workers_together(apart: Device) -> None:
    client = Client(apart)
    assert apart.call("POST", "/skerry/v1/throttle", {"rate": 3.0}).status == 200
    # A second's worth at once, whichever worker they meet; each alone would answer three of its six.
    begin = time.monotonic()
    found = [client.ask("POST", f"/v2/models/{('gas', 'pump')[i % 2]}/infer", body())[0] for i in range(12)]
    most = 3 + 3.0 * (time.monotonic() - begin)
    assert found[:3] == [200] * 3
    assert found.count(200) <= most + 1e-6
    assert set(found) == {200, 429}


def test_labels_reach_the_worker_of_their_model_whoever_holds_the_connection(apart: Device, server: Server) -> None:
    client = Client(apart)
    idents = {}
    for model in ("gas", "pump"):
        client.connection.request("POST", f"/v2/models/{model}/infer", body())
        response = client.connection.getresponse()
        idents[model] = response.headers["Skerry-Prediction-Id"]
        response.read()

    def told(*labels: dict[str, str]) -> list[str]:
        status, answer = client.ask("POST", "/skerry/v1/feedback", json.dumps({"feedback": labels}).encode())
        assert status == 200
        return [one["outcome"] for one in answer["feedback"]]

    # The connection is with pump's worker now.
    assert told({"id": idents["gas"], "label": "class-0"}) == ["matched"]
    assert told({"id": idents["pump"], "label": "class-0"}) == ["matched"]
    assert told({"id": "mine", "label": "class-0", "model": "gas"}) == ["unknown"]
    both = told({"id": idents["gas"], "label": "class-0"}, {"id": idents["pump"], "label": "class-0"})
    assert both == ["duplicate", "duplicate"]
    assert told({"id": "mine", "label": "class-0"}) == ["invalid"]
    # Questions about a prediction go the same way; neither bundle has medians, and each says so itself.
    for model in ("gas", "pump", "gas"):
        status, answer = client.ask("POST", "/skerry/v1/explain", json.dumps({"id": idents[model]}).encode())
        assert (status, answer["error"]) == (
            400,
            f"{model}: cannot be explained: the manifest names no explanations.medians",
        )


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGSEGV])
def test_an_isolated_model_that_dies_takes_no_other_request_along(
    apart: Device, server: Server, number: signal.Signals
) -> None:
    before = workers(apart)
    with Load(apart, clients=3) as others, Load(apart, clients=2, model="pump") as own:
        for _ in range(2):
            asked = own.ok
            wait_for(lambda asked=asked: own.ok > asked + 10, why="answers of pump")
            pid = workers(apart)["pump"]
            os.kill(pid, number)
            wait_for(lambda pid=pid: workers(apart)["pump"] not in (0, pid), why=lambda: apart.log()[-3000:])
        asked, other = own.ok, others.ok
        wait_for(lambda: own.ok > asked + 10 and others.ok > other + 50, why="answers")
    assert others.failed == [] and others.ok > 50
    assert workers(apart)[""] == before[""]
    for event in wait_for(lambda: len(found := server.events("worker")) == 2 and found, why="the events"):
        assert (event.code, set(event.data["models"])) == ("runtime_crashed", {"pump"})
    # Their connections broke; what they had asked by then is all that failed.
    assert 0 < len(own.failed) <= 4
    counted = 40 + others.ok + own.ok
    wait_for(lambda: counted <= server.inferences() <= counted + len(own.failed), why=f"{counted} counted")


@pytest.mark.slow
def test_the_shared_worker_s_death_keeps_nobody_from_an_isolated_model(make_device: Callable[..., Device]) -> None:
    device = start(make_device(backoff_scale=20))
    before = workers(device)
    assert [one["accepting"] for one in device.status()["workers"]] == [True, False]
    with Load(device, clients=2, model="pump") as load:
        wait_for(lambda: load.ok > 10, why="answers")
        os.kill(before[""], signal.SIGKILL)
        wait_for(lambda: workers(device)[""] == 0, why="its end")
        # New connections, too: another worker takes them meanwhile.
        assert [device.infer(1, model="pump") for _ in range(5)] == [["2.0.0"]] * 5
        assert workers(device)[""] == 0, "it was back too early to tell"
        wait_for(lambda: workers(device)[""] not in (0, before[""]), why="another worker")
    assert load.failed == []
    assert device.infer(2) == ["1.0.0"] * 2
    assert workers(device)["pump"] == before["pump"]
    assert [one["accepting"] for one in device.status()["workers"]] == [True, False]


def test_an_update_a_crash_on_trial_and_a_way_back_of_one_worker_touch_no_other(apart: Device, server: Server) -> None:
    before = workers(apart)
    bad = apart.bundle("2.1.0", "crash-on-rows", model="pump", changes=ALONE)
    with Load(apart, clients=3) as load:
        apart.publish_models(gas=next(d for d, f in apart.world["bundles"].items() if f.endswith("1.0.0")), pump=bad)
        apart.sync()
        apart.wait_running("2.1.0", "trial", model="pump")
        with pytest.raises((OSError, http.client.HTTPException)):
            apart.infer(1, value=models.CRASH_VALUE, model="pump")
        apart.wait_update("idle", "trial_crashed", "2.1.0")
        apart.wait_running("2.0.0", model="pump")
        assert apart.infer(1, model="pump") == ["2.0.0"]
    assert load.failed == []
    now = workers(apart)
    assert now[""] == before[""] and now["pump"] not in (0, before["pump"])


@pytest.mark.slow
def test_a_model_moves_into_a_worker_of_its_own_and_back_without_a_failed_request(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = start(make_device(trial_inferences=10))
    gas = next(d for d, f in device.world["bundles"].items() if f.endswith("1.0.0"))
    with Load(device, clients=2) as others, Load(device, clients=2, model="pump") as own:
        for version, changes, cells in (("2.1.0", {}, {""}), ("2.2.0", ALONE, {"", "pump"})):
            device.publish_models(gas=gas, pump=device.bundle(version, model="pump", changes=changes))
            device.sync()
            device.wait_running(version, model="pump")
            assert workers(device).keys() == cells
            assert device.infer(1, model="pump") == [version]
    assert others.failed == [] and own.failed == []
    assert own.versions >= {"2.0.0", "2.1.0", "2.2.0"}
    counted = 40 + 2 + others.ok + own.ok
    wait_for(lambda: server.inferences() == counted, why=lambda: f"{counted} counted, got {server.inferences()}")


def test_requests_wait_for_the_worker_of_their_model_and_are_turned_away_when_it_does_not_come(
    make_device: Callable[..., Device], server: Server
) -> None:
    # The draw of a wait may be near nothing: even a hundredth of this one is longer than requests wait.
    device = make_device(backoff_scale=1000)
    device.config.write_text(device.config.read_text() + "[pool]\nwaiting = 2\nwait_s = 1.5\n")
    start(device)
    assert device.process is not None
    pid = workers(device)["pump"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(pid), why="its end")
    clients = [Client(device) for _ in range(3)]
    for client in clients:
        client.connection.request("POST", "/v2/models/pump/infer", body())
    # The third finds two waiting; those are turned away when they have waited for long enough.
    began = time.monotonic()
    answers = [client.connection.getresponse() for client in reversed(clients)]
    assert 1.0 < time.monotonic() - began < 10
    assert [answer.status for answer in answers] == [503] * 3
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers)
    for answer in answers:
        answer.read()
    # The connection is as good as before, for models that are served.
    assert clients[0].ask("POST", "/v2/models/gas/infer", body())[0] == 200
    assert b"skerry_agent_requests_refused_total 3" in device.call("GET", "/metrics").body
    running = device.status()["running"]
    assert (running["gas"]["state"], running["pump"]["state"]) == ("confirmed", "stopped")
    told = {one["about"]: one["says"] for one in device.call("GET", "/skerry/v1/why").body["told"]}
    assert told["gas"].startswith("answers as ") and told["pump"].startswith("nothing answers: ")


def crash(device: Device, model: str) -> None:
    before = workers(device)
    with pytest.raises((OSError, http.client.HTTPException)):
        device.infer(1, value=models.CRASH_VALUE, model=model)
    cell = model if model in before else ""
    wait_for(lambda: workers(device).get(model, workers(device)[""]) not in (0, before[cell]), why=device.log)


def shared(device: Device, *pumps: str) -> None:
    """gas 1.0.0 and the versions of pump, one after the other, in one worker."""
    gas = device.bundle("1.0.0")
    for i, version in enumerate(pumps):
        device.publish_models(gas=gas, pump=device.bundle(version, "crash-on-rows", model="pump", seed=i))
        if i == 0:
            device.start()
            device.wait_running("1.0.0", "trial")
            device.infer(20)
        device.sync()
        device.wait_running(version, "trial", model="pump")
        device.infer(20, model="pump")
        device.wait_running(version, model="pump")
    device.wait_running("1.0.0")
    assert workers(device).keys() == {""}


def test_the_model_that_brings_a_shared_worker_down_again_and_again_is_named_and_goes_back(
    device: Device, server: Server
) -> None:
    shared(device, "2.0.0", "2.1.0")
    for number in range(1, 6):
        device.infer(3)
        crash(device, "pump")
        if number < 5:
            assert device.status()["worker"]["suspects"] == {"pump": number}
    update = device.wait_update("idle", "crash_loop", "2.1.0")
    assert update["model"] == "pump"
    device.wait_running("2.0.0", model="pump")
    assert (device.infer(2), device.infer(2, model="pump")) == (["1.0.0"] * 2, ["2.0.0"] * 2)
    assert device.running() == ("1.0.0", "confirmed")
    events = wait_for(lambda: len(found := server.events("worker")) >= 5 and found, why="the events")
    assert {(e.code, *e.data["suspects"]) for e in events} == {("runtime_crashed", "pump")}


@pytest.mark.slow
def test_a_culprit_without_a_bundle_before_it_goes_on_alone_and_takes_nobody_along(
    device: Device, server: Server
) -> None:
    shared(device, "2.0.0")
    for _ in range(5):
        crash(device, "pump")
    wait_for(lambda: workers(device).keys() == {"", "pump"} and all(workers(device).values()), why=device.log)
    (event,) = wait_for(lambda: [e for e in server.events("worker") if e.code == "model_set_apart"], why="the event")
    assert event.data["model"] == "pump"
    assert (device.infer(2), device.infer(2, model="pump")) == (["1.0.0"] * 2, ["2.0.0"] * 2)
    with Load(device, clients=2) as others:
        wait_for(lambda: others.ok > 10, why="answers")
        crash(device, "pump")
        asked = others.ok
        wait_for(lambda: others.ok > asked + 10, why="answers")
    assert others.failed == []
    # Another bundle gets another chance.
    device.publish_models(
        gas=next(d for d, f in device.world["bundles"].items() if f.endswith("1.0.0")),
        pump=device.bundle("2.1.0", model="pump"),
    )
    device.sync(pardon=True)
    device.wait_running("2.1.0", "trial", model="pump")
    assert workers(device).keys() == {""}
