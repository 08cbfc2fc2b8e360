"""Models that are loaded at their first request and unloaded when nobody asks."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable

import psutil
import pytest

from tests.integration.agent.rig import Device, Load, Server, wait_for
from tests.integration.agent.test_cells import Client, body, workers
from tests.integration.agent.test_unruly import order


def with_pool(device: Device, **keys: object) -> Device:
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.items())
    device.config.write_text(f"{device.config.read_text()}[pool]\n{lines}")
    return device


def confirmed(device: Device, server: Server, *names: str) -> dict[str, str]:
    """Confirms a first version of each model. Returns their digests."""
    digests = {name: device.bundle(f"{i}.0.0", model=name) for i, name in enumerate(names, start=1)}
    device.publish_models(**digests)
    device.start()
    for i, name in enumerate(names, start=1):
        device.wait_running(f"{i}.0.0", "trial", model=name)
        device.infer(20, model=name)
        device.wait_running(f"{i}.0.0", model=name)
    return digests


def asleep(device: Device, model: str = "pump") -> bool:
    return bool(device.status()["on_demand"][model]["asleep"])


def test_a_model_on_demand_sleeps_when_nobody_asks_and_a_request_wakes_it(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = with_pool(make_device(), on_demand=["pump"], idle_s=1.0)
    confirmed(device, server, "gas", "pump")
    client = Client(device)
    wait_for(lambda: asleep(device), why="sleep")
    assert workers(device).keys() == {""}
    assert device.process is not None
    wait_for(lambda: len(psutil.Process(device.process.pid).children()) == 1, why="the end of its process")
    assert device.running("pump") == ("2.0.0", "confirmed")
    # What it counted was folded before it went.
    wait_for(lambda: server.inferences() == 40, why=lambda: f"40 counted, got {server.inferences()}")
    with Load(device, clients=2) as others:
        status, answer = client.ask("POST", "/v2/models/pump/infer", body())
        assert (status, answer["model_version"]) == (200, "2.0.0")
        assert not asleep(device) and workers(device).keys() == {"", "pump"}
        # A connection that its worker held survives its sleep.
        wait_for(lambda: asleep(device), why="sleep again")
        assert client.ask("POST", "/v2/models/gas/infer", body())[0] == 200
        assert client.ask("POST", "/v2/models/pump/infer", body())[0] == 200
    assert others.failed == []
    wait_for(lambda: server.inferences() == 43 + others.ok, why="all counted")
    found = device.status()["on_demand"]["pump"]
    assert found["cold_starts"] == 2
    assert 0.01 < found["cold_last_s"] <= found["cold_max_s"] < found["cold_start_s"]
    text = device.call("GET", "/metrics").body.decode()
    assert 'skerry_agent_cold_starts_total{model="pump"} 2' in text
    for name in ("last", "max"):
        (shown,) = [line for line in text.splitlines() if line.startswith(f"skerry_agent_cold_start_{name}_seconds{{")]
        assert float(shown.split()[-1]) == pytest.approx(found[f"cold_{name}_s"], rel=1e-3)
    # A window of each worker says so: of the two requests that woke it, nobody waited beside them.
    assert sum(w.tallies.get("load.cold", 0) for w in server.windows()) == 2
    assert not any("load.waiting" in w.tallies for w in server.windows())
    cold = [w.resources for w in server.windows() if "cold_start_n" in w.resources]
    assert [one["cold_start_n"] for one in cold] == [1, 1]
    assert all(10 < one["cold_start_ms_max"] < 60_000 for one in cold)
    peaks = [w.tallies["cold_ms_max"] for w in server.windows() if "cold_ms_max" in w.tallies]
    assert sorted(peaks) == sorted(one["cold_start_ms_max"] for one in cold)
    # Its own statistics have them since the agent started, not only this worker's.
    client.ask("POST", "/v2/models/pump/infer", body())
    (statistics,) = client.ask("GET", "/v2/models/pump/stats")[1]["model_stats"]
    assert statistics["cold_start"]["count"] in (2, 3)
    assert statistics["cold_start"]["max_ms"] >= max(peaks)


@pytest.mark.slow
def test_many_first_requests_start_one_worker_and_those_beyond_the_limit_are_turned_away(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = with_pool(make_device(), on_demand=["pump"], idle_s=1.0, waiting=4, wait_s=30.0)
    confirmed(device, server, "gas", "pump")
    wait_for(lambda: asleep(device), why="sleep")
    statuses: list[tuple[int, str | None]] = []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=60)
        connection.request("POST", "/v2/models/pump/infer", body())
        response = connection.getresponse()
        response.read()
        statuses.append((response.status, response.headers["Retry-After"]))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answered = sum(status == 200 for status, _ in statuses)
    refused = [retry for status, retry in statuses if status == 503]
    assert (answered, len(refused)) == (4, 8)
    assert all(retry is not None and int(retry) >= 1 for retry in refused)
    assert device.status()["on_demand"]["pump"]["cold_starts"] == 1
    wait_for(lambda: server.inferences() == 44, why="44 counted")
    tallies = [w.tallies for w in server.windows()]
    counted = [sum(one.get(f"load.{kind}", 0) for one in tallies) for kind in ("cold", "waiting")]
    assert counted == [1, 3]


@pytest.mark.slow
def test_a_device_with_nothing_but_models_on_demand_boots_asleep_and_takes_updates(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = with_pool(make_device(), on_demand=["gas"], idle_s=1.0)
    confirmed(device, server, "gas")
    assert device.stop() == 0
    device.start()
    wait_for(lambda: asleep(device, "gas"), why="a boot without its worker")
    assert workers(device).keys() == {""}
    assert device.infer(2) == ["1.0.0"] * 2
    wait_for(lambda: asleep(device, "gas"), why="sleep")
    device.publish_models(gas=device.bundle("1.1.0", seed=1))
    device.sync()
    device.wait_running("1.1.0", "trial")
    # On trial it stays awake, however long nobody asks.
    with pytest.raises(AssertionError):
        wait_for(lambda: asleep(device, "gas"), timeout_s=3)
    device.infer(20)
    device.wait_running("1.1.0")
    wait_for(lambda: asleep(device, "gas"), why="sleep")
    assert device.infer(1) == ["1.1.0"]
    wait_for(lambda: server.inferences() == 43, why=lambda: f"43 counted, got {server.inferences()}")


@pytest.mark.slow
def test_labels_wake_the_model_that_they_are_about(make_device: Callable[..., Device], server: Server) -> None:
    device = with_pool(make_device(), on_demand=["pump"], idle_s=1.0)
    confirmed(device, server, "gas", "pump")
    client = Client(device)
    client.connection.request("POST", "/v2/models/pump/infer", body())
    response = client.connection.getresponse()
    ident = response.headers["Skerry-Prediction-Id"]
    response.read()
    wait_for(lambda: asleep(device), why="sleep")
    told = json.dumps({"feedback": [{"id": ident, "label": "class-0"}]}).encode()
    status, answer = client.ask("POST", "/skerry/v1/feedback", told)
    assert (status, answer["feedback"][0]["outcome"]) == (200, "matched")


@pytest.mark.slow
def test_a_worker_that_was_started_ahead_takes_the_next_model_and_another_one_is_started(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = with_pool(make_device(), warm=True)
    confirmed(device, server, "gas")

    def spare() -> int:
        return int(device.status()["worker"]["spare_pid"])

    first = wait_for(spare, why="a spare worker")
    device.publish_models(gas=device.bundle("1.1.0", seed=1))
    device.sync()
    device.wait_running("1.1.0", "trial")
    assert workers(device)[""] == first
    assert device.infer(2) == ["1.1.0"] * 2
    second = wait_for(lambda: (pid := spare()) not in (0, first) and pid, why="another spare worker")
    # Also in the place of one that died; and a spare that dies is not missed.
    psutil.Process(second).kill()
    psutil.Process(first).kill()
    wait_for(lambda: workers(device)[""] not in (0, first, second), why="another worker")
    third = wait_for(spare, why="a spare worker")
    assert device.stop() == 0
    assert not psutil.pid_exists(third)


def updated(device: Device, orders: str = "well") -> None:
    """gas 1.0.0, and pump 2.1.0 after 2.0.0, confirmed; pump sleeps."""
    order(device, orders)
    gas = device.bundle("1.0.0")
    for i, version in enumerate(("2.0.0", "2.1.0")):
        device.publish_models(gas=gas, pump=device.bundle(version, model="pump", seed=i))
        if i == 0:
            device.start()
            device.wait_running("1.0.0", "trial")
            device.infer(20)
        device.sync()
        device.wait_running(version, "trial", model="pump")
        device.infer(20, model="pump")
        device.wait_running(version, model="pump")
    device.wait_running("1.0.0")
    wait_for(lambda: asleep(device), why="sleep")


def ask_until(device: Device, version: str) -> None:
    client = Client(device)

    def answered() -> bool:
        status, answer = client.ask("POST", "/v2/models/pump/infer", body())
        assert status in (200, 503)
        return status == 200 and answer["model_version"] == version

    wait_for(answered, why=lambda: f"an answer of {version}: {device.log()[-3000:]}")


@pytest.mark.slow
def test_a_model_on_demand_whose_worker_dies_at_every_load_goes_back_to_the_bundle_before_it(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = with_pool(make_device(), on_demand=["pump"], idle_s=1.0)
    updated(device)
    order(device, "die-loading 2.1.0")
    with Load(device, clients=1) as others:
        ask_until(device, "2.0.0")
    assert others.failed == []
    update = device.wait_update("idle", "crash_loop", "2.1.0")
    assert update["model"] == "pump"
    (told,) = wait_for(lambda: [e for e in server.events() if e.code == "crash_loop" and e.data["state"] == "idle"])
    assert "did not start 5 times" in told.data["detail"] and "runtime_crashed" in told.data["detail"]
    # Of the same failure less is said each time.
    assert [e.data["starts"] for e in server.events("worker") if e.code == "runtime_crashed"] == [1, 2, 4]
    # It sleeps and wakes as before, and what failed is not taken up again by itself.
    order(device, "well")
    device.sync()
    wait_for(lambda: asleep(device), why="sleep")
    assert device.infer(2, model="pump") == ["2.0.0"] * 2
    assert device.running("pump")[0] == "2.0.0"


@pytest.mark.slow
def test_a_model_on_demand_whose_files_rotted_in_its_sleep_is_fetched_again(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = with_pool(make_device(), on_demand=["pump"], idle_s=1.0)
    updated(device)
    digest = device.status()["running"]["pump"]["digest"]
    (path,) = (device.state_dir / "slots" / digest).glob("**/*.onnx")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ask_until(device, "2.1.0")
    (event,) = [e for e in server.events("slot") if e.code == "model_damaged"]
    assert event.data["digest"] == digest


@pytest.mark.slow
def test_a_model_on_demand_whose_files_rotted_far_from_any_network_goes_back_until_they_can_be_fetched(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = with_pool(make_device(), on_demand=["pump"], idle_s=1.0)
    updated(device)
    device.world["down"] = True
    device.save()
    digest = device.status()["running"]["pump"]["digest"]
    (path,) = (device.state_dir / "slots" / digest).glob("**/*.onnx")
    path.write_bytes(b"")
    ask_until(device, "2.0.0")
    device.world["down"] = False
    device.save()
    device.sync()
    # Its own copy rotted: nothing is held against the bundle.
    device.wait_running("2.1.0", "trial", model="pump")
