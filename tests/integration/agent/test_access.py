"""``skerry-agent token`` and ``skerry-agent throttle`` against a whole agent."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from typing import Any

import pytest

from tests import models
from tests.integration.agent.rig import Device, Server, wait_for


def run(device: Device, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skerry_agent", *arguments, "--config", str(device.config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def infer(device: Device, token: str = "") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=30)
    x = models.rows(1)[0][0].tolist()
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": x}]}
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request("POST", "/v2/models/gas/infer", json.dumps(body), headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def doctor(device: Device, check: str) -> list[tuple[str, str]]:
    found = json.loads(run(device, "doctor", "--json").stdout)["findings"]
    return [(one["verdict"], one["detail"]) for one in found if one["check"] == check]


def test_tokens_are_added_and_removed_by_command_while_the_agent_serves(device: Device, server: Server) -> None:
    added = run(device, "token", "add", "early", "--model", "gas", "--read-only", "--rate", "100")
    assert added.returncode == 0
    assert "access.required is false" in added.stderr
    token = added.stdout.strip()
    device.config.write_text(device.config.read_text() + "[access]\nrequired = true\n")
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    wait_for(lambda: infer(device, token)[0] == 200)
    assert infer(device)[0] == 401
    assert run(device, "token", "list").stdout == "early  token  gas  asks only  100/s\n"
    again = run(device, "token", "add", "early")
    assert (again.returncode, again.stdout) == (2, "")
    assert "client_exists" in again.stderr
    assert doctor(device, "access") == [("ok", "1 clients may ask")]
    late = run(device, "token", "add", "late").stdout.strip()
    wait_for(lambda: infer(device, late)[0] == 200)
    assert run(device, "token", "remove", "early").returncode == 0
    wait_for(lambda: infer(device, token)[0] == 401)
    assert run(device, "token", "remove", "late").returncode == 0
    assert doctor(device, "access") == [("fail", "access.required, and no client is known: nobody may ask")]
    for text in (token, late):
        assert text not in device.log()


@pytest.mark.slow
def test_a_throttle_is_kept_over_an_update_and_a_restart_and_ends_when_it_was_told_to(
    device: Device, server: Server
) -> None:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(25)
    device.wait_running("1.0.0")
    assert device.status()["serving"]["throttle"] is None

    said = run(device, "throttle", "--rate", "0.2")
    assert (said.returncode, said.stdout) == (0, "throttle: 0.2 inferences/s, until --off\n")
    assert [infer(device)[0] for _ in range(3)] == [200, 429, 429]
    assert "throttled: 0.2 inferences/s" in run(device, "status").stdout
    assert doctor(device, "throttle")[0][0] == "warn"

    device.publish(device.bundle("1.0.1"))
    device.sync()
    device.wait_running("1.0.1", "trial")
    wait_for(lambda: infer(device)[0] == 429)
    device.kill()
    device.start()
    assert device.status()["serving"]["throttle"] == {"rate": 0.2, "left_s": None}
    wait_for(lambda: infer(device)[0] == 429)

    # It bounds until its end, and no longer.
    assert run(device, "throttle", "--rate", "0.1", "--for", "3s").returncode == 0
    assert 0 < device.status()["serving"]["throttle"]["left_s"] <= 3
    wait_for(lambda: device.status()["serving"]["throttle"] is None)
    assert [infer(device)[0] for _ in range(5)] == [200] * 5
    for wrong in (["--rate", "-1"], ["--rate", "nan"], ["--off", "--for", "3s"], ["--rate", "1", "--for", "3"]):
        assert run(device, "throttle", *wrong).returncode == 2
    run(device, "throttle", "--rate", "0.2")
    assert run(device, "throttle", "--off").stdout == "throttle: off\n"
    assert [infer(device)[0] for _ in range(5)] == [200] * 5


def test_who_asks_too_many_different_things_is_named_to_the_server(device: Device, server: Server) -> None:
    tokens = {name: run(device, "token", "add", name).stdout.strip() for name in ("sensor", "copier")}
    limits = "[access]\nrequired = true\ndistinct = true\ndistinct_most = 100\n"
    device.config.write_text(device.config.read_text() + limits)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")

    def ask(client: str, values: list[float]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=30)
        for number, value in enumerate(values):
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [value, 1.0, 2.0, 3.0]}
            # An id of its own makes no request another one.
            sent = json.dumps({"id": f"{client}-{number}", "inputs": [tensor]})
            headers = {"Authorization": f"Bearer {tokens[client]}"}
            connection.request("POST", "/v2/models/gas/infer", sent, headers)
            response = connection.getresponse()
            response.read()
            assert response.status == 200
        connection.close()

    ask("sensor", [float(i % 5) for i in range(300)])
    ask("copier", [i / 7 for i in range(200)])
    (event,) = wait_for(lambda: server.events("access"), why="the event")
    assert (event.code, event.data["client"], event.data["most"]) == ("requests_too_different", "copier", 100)

    def counts() -> dict[str, int]:
        return {name: one["distinct"] for name, one in device.status()["clients"].items()}

    # Within four standard errors.
    wait_for(lambda: abs(counts()["copier"] - 200) < 52 and abs(counts()["sensor"] - 5) <= 1, why=counts)
    assert (
        f'client_distinct_requests{{client="copier"}} {counts()["copier"]}'
        in device.call("GET", "/metrics").body.decode()
    )
    ask("copier", [i / 7 for i in range(200, 300)])
    wait_for(lambda: abs(counts()["copier"] - 300) < 78, why=counts)
    assert len(server.events("access")) == 1
