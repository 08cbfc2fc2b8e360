"""What takes models of two workers for one request: the answer of a fallback model, labels for both."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from tests import models
from tests.integration.agent.rig import Device, Server, wait_for
from tests.integration.agent.test_access import run
from tests.integration.agent.test_cells import ALONE, Client, body, start, workers
from tests.integration.agent.test_on_demand import asleep, with_pool

NAN = float("nan")


def guarded(device: Device, **of_pump: Any) -> Device:
    """gas 1.0.0, whose nulls in f0 pump 2.0.0 answers; both confirmed."""
    models.build_bundle(device.folder / "plain")
    features = json.loads((device.folder / "plain" / "manifest.json").read_bytes())["features"]
    features[0]["on_null"] = "fallback"
    changes = {"features": features, "requires": ["guards"], "fallback": "pump"}
    features = [{**feature, "nullable": True} for feature in features]
    features[0].update(on_null="impute", impute=0.25)
    of_pump = {"seed": 5, **of_pump}
    of_pump["changes"] = {**of_pump.get("changes", {}), "features": features, "requires": ["guards"]}
    device.publish_models(
        gas=device.bundle("1.0.0", changes=changes), pump=device.bundle("2.0.0", model="pump", **of_pump)
    )
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0")
    device.wait_running("2.0.0", "trial", model="pump")
    device.infer(20, model="pump")
    device.wait_running("2.0.0", model="pump")
    return device


def ask(client: Client, x: np.ndarray) -> tuple[int, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    return client.ask("POST", "/v2/models/gas/infer", json.dumps({"id": "seven", "inputs": [tensor]}).encode())


def test_a_fallback_model_that_sleeps_in_another_cell_is_waked_and_answers(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = guarded(with_pool(make_device(), on_demand=["pump"], idle_s=1.0))
    wait_for(lambda: asleep(device), why="sleep")
    x, _ = models.rows(2)
    sent, read = x.copy(), x.copy()
    sent[1, 0], read[1, 0] = NAN, 0.25
    expected = models.probabilities(read, seed=5)
    client = Client(device)
    status, answer = ask(client, sent)
    assert (status, answer["model_name"], answer["model_version"], answer["id"]) == (200, "pump", "2.0.0", "seven")
    assert answer["parameters"] == {
        "fallback": True,
        "fallback_for": "gas",
        "fallback_reason": "x[1][0] (f0): wanted a number, got NaN",
    }
    given = {one["name"]: np.reshape(one["data"], one["shape"]) for one in answer["outputs"]}
    np.testing.assert_allclose(given["probabilities"], expected, atol=1e-5)
    assert device.status()["on_demand"]["pump"]["cold_starts"] == 1
    # The connection stayed, and what gas can answer it answers.
    assert ask(client, x)[1]["model_name"] == "gas"
    with triton.InferenceServerClient(f"127.0.0.1:{device.port}") as binary:
        tensor = triton.InferInput("x", list(sent.shape), "FP32")
        tensor.set_data_from_numpy(sent, binary_data=True)
        found = binary.infer("gas", [tensor], outputs=[triton.InferRequestedOutput("probabilities", binary_data=True)])
        assert found.get_response()["parameters"]["fallback_for"] == "gas"
        np.testing.assert_allclose(found.as_numpy("probabilities"), expected, atol=1e-5)
    # Counted once, under the model that was asked.
    wait_for(lambda: server.inferences() == 43, why=lambda: f"43 counted, got {server.inferences()}")
    gas = [w for w in server.windows() if w.key.model == "gas"]
    assert sum(w.counts.fallback for w in gas) == 2
    assert sum(w.tallies.get("null.fallback", 0) for w in gas) == 2
    assert sum(w.counts.ok for w in server.windows() if w.key.model == "pump") == 20


@pytest.mark.slow
def test_a_fallback_that_is_refused_does_not_fit_or_is_dead_is_told_to_the_client(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = guarded(with_pool(make_device(backoff_scale=40), wait_s=1.0), changes=ALONE)
    x, _ = models.rows(1)
    x[0, 0] = NAN
    client = Client(device)
    assert ask(client, x)[0] == 200
    os.kill(workers(device)["pump"], signal.SIGKILL)
    wait_for(lambda: workers(device)["pump"] == 0, why="its end")
    status, answer = ask(client, x)
    assert status == 503
    assert "wanted a number, got NaN; pump should answer instead: the model is not ready" in answer["error"]
    wait_for(lambda: workers(device)["pump"] != 0, why="another worker")
    assert ask(client, x)[0] == 200
    gas = next(d for d, f in device.world["bundles"].items() if f.endswith("1.0.0"))
    device.publish_models(gas=gas, pump=device.bundle("2.1.0", model="pump", n_features=5, changes=ALONE))
    device.sync()
    device.wait_running("2.1.0", "trial", model="pump")
    status, answer = ask(client, x)
    assert (status, answer["error"].rpartition(": ")[2]) == (503, "its tensors are not the same")
    wait_for(lambda: sum(w.counts.shed for w in server.windows() if w.key.model == "gas") == 2, why="both counted")


@pytest.mark.slow
def test_a_client_of_one_model_gets_the_answer_of_its_fallback_and_labels_no_other(
    make_device: Callable[..., Device], server: Server
) -> None:
    del server
    device = make_device()
    token = run(device, "token", "add", "app", "--model", "gas").stdout.strip()
    every = run(device, "token", "add", "every").stdout.strip()
    guarded(device, changes=ALONE)
    assert device.stop() == 0
    device.config.write_text(f"{device.config.read_text()}[access]\nrequired = true\n")
    device.start()
    device.wait_running("1.0.0")
    x, _ = models.rows(1)
    x[0, 0] = NAN

    def post(path: str, sent: dict[str, Any], bearer: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=30)
        connection.request("POST", path, json.dumps(sent), {"Authorization": f"Bearer {bearer}"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    asked = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": x[0].tolist()}]}
    status, answer = post("/v2/models/gas/infer", asked, token)
    assert (status, answer["model_name"]) == (200, "pump")
    assert post("/v2/models/pump/infer", asked, token)[0] == 403
    asked["inputs"][0]["data"] = [0.0] * 4
    idents = [post(f"/v2/models/{m}/infer", asked, every)[1]["parameters"]["prediction_id"] for m in ("gas", "pump")]
    labels = {"feedback": [{"id": ident, "label": "class-0"} for ident in idents]}
    status, answer = post("/skerry/v1/feedback", labels, token)
    assert (status, [one["outcome"] for one in answer["feedback"]]) == (200, ["matched", "invalid"])
    assert "may label gas only" in answer["feedback"][1]["error"]
    status, answer = post("/skerry/v1/feedback", labels, every)
    assert (status, [one["outcome"] for one in answer["feedback"]]) == (200, ["duplicate", "matched"])


@pytest.mark.slow
def test_labels_of_a_worker_that_is_away_are_told_apart_and_can_be_sent_again(
    make_device: Callable[..., Device], server: Server
) -> None:
    del server
    device = start(with_pool(make_device(backoff_scale=40), wait_s=1.0))
    client = Client(device)
    idents = {}
    for model in ("pump", "gas"):
        client.connection.request("POST", f"/v2/models/{model}/infer", body())
        response = client.connection.getresponse()
        idents[model] = response.headers["Skerry-Prediction-Id"]
        response.read()
    sent = json.dumps({"feedback": [{"id": ident, "label": "class-0"} for ident in idents.values()]}).encode()
    os.kill(workers(device)["pump"], signal.SIGKILL)
    wait_for(lambda: workers(device)["pump"] == 0, why="its end")
    status, answer = client.ask("POST", "/skerry/v1/feedback", sent)
    assert (status, [one["outcome"] for one in answer["feedback"]]) == (200, ["unavailable", "matched"])
    assert "not counted, to be sent again" in answer["feedback"][0]["error"]
    wait_for(lambda: workers(device)["pump"] != 0, why="another worker")
    status, answer = client.ask("POST", "/skerry/v1/feedback", sent)
    assert (status, [one["outcome"] for one in answer["feedback"]]) == (200, ["matched", "duplicate"])


def test_labels_of_two_workers_in_one_request_are_counted_by_both(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = start(make_device())
    client = Client(device)
    idents = []
    for model in ("gas", "pump") * 3:
        client.connection.request("POST", f"/v2/models/{model}/infer", body())
        response = client.connection.getresponse()
        idents.append(response.headers["Skerry-Prediction-Id"])
        response.read()

    def told(*labels: dict[str, str]) -> list[dict[str, Any]]:
        status, answer = client.ask("POST", "/skerry/v1/feedback", json.dumps({"feedback": labels}).encode())
        assert status == 200
        assert [one["id"] for one in answer["feedback"]] == [one["id"] for one in labels]
        return list(answer["feedback"])

    # Whoever holds the connection: pump's worker, and then gas's.
    first = told(*({"id": ident, "label": "class-0"} for ident in idents[:4]))
    assert [one["outcome"] for one in first] == ["matched"] * 4
    assert client.ask("POST", "/v2/models/gas/infer", body())[0] == 200
    mixed = [{"id": ident, "label": "class-1"} for ident in idents[2:]]
    second = told(*mixed, {"id": "mine", "label": "class-0", "model": "pump"}, {"id": idents[0], "label": "no-class"})
    assert [one["outcome"] for one in second] == ["conflicting"] * 2 + ["matched"] * 2 + ["unknown", "invalid"]
    assert "wanted one of" in second[-1]["error"]

    def counted() -> dict[str, tuple[int, int, int]]:
        found = {model: [w.labels for w in server.windows() if w.key.model == model] for model in ("gas", "pump")}
        return {
            model: (sum(x.matched for x in all_), sum(x.conflicting for x in all_), sum(x.unknown for x in all_))
            for model, all_ in found.items()
        }

    wait_for(lambda: counted() == {"gas": (3, 1, 0), "pump": (3, 1, 1)}, why=lambda: f"the labels, got {counted()}")
