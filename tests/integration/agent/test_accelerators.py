"""A whole agent with an accelerator in its configuration that is not there, and with bundles that ask for guards and states."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from typing import Any

import pytest
from skerry_contract import manifest as mf

from tests import models, streaming
from tests.integration.agent.rig import Device, Server, wait_for
from tests.integration.agent.test_doctor import examine, verdict


def test_a_fallback_is_told_once_and_shown_in_status_and_doctor(device: Device, server: Server) -> None:
    text = device.config.read_text()
    device.config.write_text(f'{text}[runtime]\nonnx_providers = ["CUDAExecutionProvider"]\nthreads = 2\n')
    first, second = device.bundle("1.0.0"), device.bundle("1.1.0")
    device.publish(first)
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(25)
    device.wait_running("1.0.0")
    (event,) = wait_for(lambda: server.events("worker"), why="no event of the fallback came")
    assert event.code == "provider_fallback"
    assert (event.data["model"], event.data["digest"]) == ("gas", first)
    assert event.data["detail"].startswith("CUDAExecutionProvider is not in this onnxruntime")
    engine = device.status()["engines"]["gas"]
    assert (engine["runs_on"], engine["fallback"]) == (["cpu"], event.data["detail"])
    shown = subprocess.run(
        [sys.executable, "-m", "skerry_agent", "status", "--config", str(device.config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "on the CPU: CUDAExecutionProvider is not in this onnxruntime" in shown
    found = verdict(examine(device), "engine")
    assert found[0] == "warn"
    assert found[1].startswith("gas runs on cpu: CUDAExecutionProvider is not in")
    wait_for(lambda: sum(w.tallies.get("provider.fallback", 0) for w in server.windows()) == 25, why="25 were counted")
    # A crash starts the same bundle again, for the same reason: nothing new. Another bundle is.
    pid = device.status()["worker"]["pid"]
    subprocess.run(["kill", "-9", str(pid)], check=True)
    wait_for(lambda: device.status()["worker"]["pid"] not in (0, pid), why="no new worker")
    device.publish(second)
    device.sync()
    device.wait_running("1.1.0", "trial")
    wait_for(
        lambda: len([e for e in server.events("worker") if e.code == "provider_fallback"]) == 2, why="no second event"
    )
    assert [e.data["digest"] for e in server.events("worker") if e.code == "provider_fallback"] == [first, second]


@pytest.mark.parametrize("kind", ["guards", "states"])
def test_an_agent_takes_bundles_that_ask_for_guards_and_states(device: Device, server: Server, kind: str) -> None:
    folder = device.folder / "bundle-1.0.0"
    if kind == "states":
        streaming.build(folder)
    else:
        models.build_bundle(folder)
        features = json.loads((folder / "manifest.json").read_bytes())["features"]
        features[0].update(on_null="impute", impute=0.0)
        models.build_bundle(folder, changes={"features": features, "requires": ["guards"]})
    digest = mf.digest((folder / "manifest.json").read_bytes())
    device.world["bundles"][digest] = str(folder)
    device.save()
    device.publish(digest)
    device.start()
    device.wait_running("1.0.0", "trial")
    width = 2 if kind == "states" else 4
    data: list[Any] = [None if kind == "guards" else 1.0, *[1.0] * (width - 1)]
    given = {"name": "x", "shape": [1, width], "datatype": "FP32", "data": data}
    body = {"inputs": [given], "parameters": {"sequence_id": 7, "age_ms": 40}}
    answers = []
    for _ in range(2):
        connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=30)
        connection.request("POST", "/v2/models/gas/infer", json.dumps(body))
        response = connection.getresponse()
        answers.append((response.status, json.loads(response.read())["outputs"][0]["data"]))
        connection.close()
    assert [status for status, _ in answers] == [200, 200]
    if kind == "states":
        assert [y for _, y in answers] == [[1.0, 1.0], [2.0, 2.0]]
    wait_for(lambda: sum(w.counts.ok for w in server.windows()) == 2, why="both were counted")
    tallies = sum(w.tallies.get("null.imputed", 0) for w in server.windows())
    assert tallies == (2 if kind == "guards" else 0)
    assert sum(w.freshness.n for w in server.windows()) == 2
    state = wait_for(lambda: server.states and server.states[-1], why="no state")
    assert {"guards", "states"} <= set(state.abilities)
