"""Who may ask a real worker, how often, and what is counted of those who may not."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skerry_agent import clients
from skerry_agent import workerwire as ww
from skerry_contract import histogram as h

from tests import models
from tests.integration.worker.rig import Rig

INFER = "/v2/models/gas/infer"


def body(model_input: Any = None) -> bytes:
    x = models.rows(1)[0] if model_input is None else model_input
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


class Asking:
    """One keep-alive connection, on the port or on the unix socket."""

    def __init__(self, where: int | Path) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", where if isinstance(where, int) else 1, timeout=30)
        if isinstance(where, Path):
            self.connection.sock = socket.socket(socket.AF_UNIX)
            self.connection.sock.connect(str(where))

    def __call__(self, method: str, path: str, data: bytes | None = None, token: str = "") -> tuple[int, Any, Any]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.connection.request(method, path, data, headers)
        response = self.connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None, response.headers


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / clients.FILE


@pytest.fixture
def two(rig: Rig, bundle: Path, tmp_path: Path) -> tuple[ww.Served, ww.Served]:
    models.build_bundle(tmp_path / "other", model="other")
    return rig.served(bundle), rig.served(tmp_path / "other", name="other")


@pytest.fixture
def ask(rig: Rig) -> Iterator[Asking]:
    found = Asking(rig.port)
    yield found
    found.connection.close()


def tallies(rig: Rig) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, window in rig.windows:
        for name, n in window.tallies.items():
            found[name] = found.get(name, 0) + n
    return found


def test_only_known_tokens_are_answered_each_for_its_models_and_refusals_are_counted(
    rig: Rig, two: tuple[ww.Served, ww.Served], file: Path, ask: Asking
) -> None:
    all_of_it = clients.add(file, clients.Client(name="all"), token=True)
    gas_only = clients.add(file, clients.Client(name="gas-only", models=("gas",), label=False), token=True)
    worker = rig.start(*two, access=ww.Access(clients=str(file)))

    for token in ("", "x" * 43, all_of_it + "x", all_of_it[:-1]):
        status, answer, headers = ask("POST", INFER, body(), token)
        assert (status, set(answer)) == (401, {"error"})
        assert headers["WWW-Authenticate"] == "Bearer"
    assert ask("GET", "/v2/models/gas")[0] == 401
    assert ask("GET", "/v2")[0] == 401
    assert ask("GET", "/v2/health/ready")[0] == 200

    assert ask("POST", INFER, body(), all_of_it)[0] == 200
    assert ask("POST", "/v2/models/other/infer", body(), all_of_it)[0] == 200
    status, answer, _ = ask("POST", INFER, body(), gas_only)
    assert status == 200
    prediction = answer["parameters"]["prediction_id"]
    for path in ("/v2/models/other/infer", "/v2/models/%6fther/infer", "/v2/models/other/versions/1.0.0/infer"):
        status, answer, _ = ask("POST", path, body(), gas_only)
        assert (status, answer["error"]) == (403, "gas-only may not ask other")
    assert ask("GET", "/v2/models/other", None, gas_only)[0] == 403
    assert ask("GET", "/v2/models/other/stats", None, gas_only)[0] == 403
    assert [m["name"] for m in ask("POST", "/v2/repository/index", None, gas_only)[1]] == ["gas"]
    assert [m["name"] for m in ask("GET", "/v2/models/stats", None, gas_only)[1]["model_stats"]] == ["gas"]
    assert len(ask("GET", "/v2/models/stats", None, all_of_it)[1]["model_stats"]) == 2

    label = json.dumps({"feedback": [{"id": prediction, "label": 1}]}).encode()
    assert ask("POST", "/skerry/v1/feedback", label)[0] == 401
    status, answer, _ = ask("POST", "/skerry/v1/feedback", label, gas_only)
    assert (status, answer["error"]) == (403, "gas-only may not label")
    assert ask("POST", "/skerry/v1/feedback", label, all_of_it)[1]["feedback"][0]["outcome"] == "matched"

    rig.flush(worker)
    assert (rig.total().ok, rig.total().shed) == (3, 7)
    assert tallies(rig) == {"access.denied": 7}


def test_a_client_bound_to_models_labels_only_what_they_predicted(
    rig: Rig, two: tuple[ww.Served, ww.Served], file: Path, ask: Asking
) -> None:
    all_of_it = clients.add(file, clients.Client(name="all"), token=True)
    gas_only = clients.add(file, clients.Client(name="gas-only", models=("gas",)), token=True)
    rig.start(*two, access=ww.Access(clients=str(file)))
    of_gas = ask("POST", INFER, body(), gas_only)[1]["parameters"]["prediction_id"]
    of_other = ask("POST", "/v2/models/other/infer", body(), all_of_it)[1]["parameters"]["prediction_id"]
    given = [{"id": of_gas, "label": 1}, {"id": of_other, "label": 1}, {"id": "nobodys", "label": 1, "model": "other"}]
    answer = ask("POST", "/skerry/v1/feedback", json.dumps({"feedback": given}).encode(), gas_only)[1]
    assert [one["outcome"] for one in answer["feedback"]] == ["matched", "invalid", "invalid"]
    assert "may label gas only" in answer["feedback"][1]["error"]
    # Nothing was taken of what was not allowed: the first label that may is the first.
    answer = ask("POST", "/skerry/v1/feedback", json.dumps({"feedback": given[1:2]}).encode(), all_of_it)[1]
    assert answer["feedback"][0]["outcome"] == "matched"


def test_clients_are_added_and_removed_while_the_worker_serves_and_a_damaged_file_changes_nobody(
    rig: Rig, bundle: Path, file: Path, ask: Asking
) -> None:
    first = rig.start(rig.served(bundle), access=ww.Access(clients=str(file)))
    assert ask("POST", INFER, body())[0] == 401

    def until(status: int, token: str) -> None:
        end = time.monotonic() + 20
        while ask("POST", INFER, body(), token)[0] != status:
            assert time.monotonic() < end
            time.sleep(0.02)

    token = clients.add(file, clients.Client(name="late"), token=True)
    until(200, token)
    good = file.read_bytes()
    file.write_bytes(b"{")
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        assert ask("POST", INFER, body(), token)[0] == 200
    # Nor does the next worker forget them: after a crash, an update.
    rig.kill(first)
    ask.connection.close()
    rig.start(rig.served(bundle), access=ww.Access(clients=str(file)))
    assert ask("POST", INFER, body(), token)[0] == 200
    assert ask("POST", INFER, body(), token + "x")[0] == 401
    file.write_bytes(good)
    clients.remove(file, "late")
    until(401, token)


def test_on_the_unix_socket_the_process_is_known_and_stays_so_over_a_hand_over(bundle: Path, tmp_path: Path) -> None:
    path, file = tmp_path / "s", tmp_path / clients.FILE
    clients.add(file, clients.Client(name="me", uid=os.getuid(), models=("gas",)), token=False)
    with Rig(tmp_path, unix=path) as rig:
        access = ww.Access(clients=str(file))
        worker = rig.start(rig.served(bundle), access=access)
        inside, outside = Asking(path), Asking(rig.port)
        assert inside("POST", INFER, body())[0] == 200
        assert outside("POST", INFER, body())[0] == 401
        # A token that is wrong is not overlooked because the process is right.
        assert inside("POST", INFER, body(), "wrong")[0] == 401
        new = rig.swap(worker, rig.served(bundle), access=access)
        assert inside("POST", INFER, body())[0] == 200
        assert outside("POST", INFER, body())[0] == 401
        if os.getuid() == 0:
            code = (
                "import os,socket,sys; os.setgid(65534); os.setuid(65534); s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
                "s.sendall(b'GET /v2 HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n'); print(s.recv(100).split()[1].decode())"
            )
            os.chmod(path, 0o777)
            for folder in (tmp_path, *tmp_path.parents):
                if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
                    os.chmod(folder, folder.stat().st_mode | 0o001)
            ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
            assert ran.stdout.strip() == "401"
        for one in (inside, outside):
            one.connection.close()
        rig.stop(new)
        assert rig.total().ok == 2
        assert tallies(rig)["access.denied"] == 3


def test_a_rate_is_kept_and_who_comes_again_as_told_is_answered(
    rig: Rig, bundle: Path, file: Path, ask: Asking
) -> None:
    slow = clients.add(file, clients.Client(name="slow", rate=4.0, burst=3), token=True)
    free = clients.add(file, clients.Client(name="free", rate=0.0), token=True)
    worker = rig.start(rig.served(bundle), access=ww.Access(clients=str(file), rate=1.0))
    begun = time.monotonic()
    passed = refused = 0
    while time.monotonic() - begun < 1.5:
        status, answer, headers = ask("POST", INFER, body(), slow)
        if status == 200:
            passed += 1
            continue
        refused += 1
        assert (status, answer["error"]) == (429, "slow: more than 4 requests/s")
        wait_ms = int(headers["Skerry-Retry-After-Ms"])
        assert 1 <= wait_ms <= 250
        assert headers["Retry-After"] == "1"
        assert ask("POST", INFER, body(), free)[0] == 200
        if refused % 2:
            time.sleep(wait_ms / 1e3)
            assert ask("POST", INFER, body(), slow)[0] == 200
            passed += 1
    took = time.monotonic() - begun
    assert passed <= 3 + 4 * took + 1
    # Health is never bounded.
    assert all(ask("GET", "/v2/health/live", None, slow)[0] == 200 for _ in range(20))
    rig.flush(worker)
    assert tallies(rig) == {"access.rate": refused}
    assert (rig.total().shed, rig.total().ok) == (refused, passed + refused)


def test_without_clients_a_rate_holds_for_the_port_as_a_whole(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle), access=ww.Access(rate=0.5, burst=4))
    statuses = []
    for _ in range(3):
        one = Asking(rig.port)
        statuses += [one("POST", INFER, body())[0] for _ in range(2)]
        one.connection.close()
    assert statuses == [200] * 4 + [429] * 2
    rig.flush(worker)
    assert tallies(rig) == {"access.rate": 2}


def test_a_throttle_bounds_a_living_worker_and_its_successor_until_it_is_lifted(
    rig: Rig, bundle: Path, ask: Asking
) -> None:
    worker = rig.start(rig.served(bundle))
    assert all(ask("POST", INFER, body())[0] == 200 for _ in range(20))
    rig.send(worker, ww.Throttle(rate=0.5))
    rig.flush(worker)
    statuses = [ask("POST", INFER, body())[0] for _ in range(5)]
    assert statuses == [200, 429, 429, 429, 429]
    status, answer, headers = ask("POST", INFER, body())
    assert (status, answer["error"]) == (429, "the operator allows 0.5 inferences/s")
    assert headers["Retry-After"] == "2"
    assert 1000 < int(headers["Skerry-Retry-After-Ms"]) <= 2000
    # Not what costs nothing, and not labels.
    assert ask("GET", "/v2/models/gas")[0] == 200
    assert ask("POST", "/skerry/v1/feedback", b'{"feedback":[]}')[0] == 200
    new = rig.swap(worker, rig.served(bundle), throttle=0.5)
    assert [ask("POST", INFER, body())[0] for _ in range(3)] == [200, 429, 429]
    rig.send(new, ww.Throttle(rate=0.0))
    rig.flush(new)
    assert all(ask("POST", INFER, body())[0] == 200 for _ in range(20))
    rig.flush(new)
    assert tallies(rig) == {"access.throttled": 7}
    assert (rig.total().ok, rig.total().shed) == (42, 7)


def test_different_requests_are_counted_about_and_repeats_are_not(rig: Rig, bundle: Path, ask: Asking) -> None:
    worker = rig.start(rig.served(bundle), access=ww.Access(distinct=True))
    rng = np.random.default_rng(3)
    for i in range(60):
        ask("POST", INFER, body(rng.normal(size=(5, 4)).astype("f4") if i % 2 else None))
    rig.flush(worker)
    ((_, window),) = rig.windows
    assert abs(h.distinct_estimate(window.distinct) - 151) < 0.25 * 151
    assert window.counts.rows == 30 + 150


def test_without_any_of_it_windows_are_as_they_were(rig: Rig, bundle: Path, ask: Asking) -> None:
    worker = rig.start(rig.served(bundle))
    assert ask("POST", INFER, body(), "whatever")[0] == 200
    rig.flush(worker)
    ((_, window),) = rig.windows
    assert (window.distinct, window.tallies) == (b"", {})
