"""Stateful models in a real worker: each client's stream goes on for itself, and says when it begins anew."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from skerry_agent import clients
from skerry_agent import workerwire as ww
from skerry_contract import manifest as mf

from tests import streaming
from tests.integration.worker.rig import Rig


class Client:
    """One keep-alive connection."""

    def __init__(self, rig: Rig, token: str = "") -> None:
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)

    def ask(self, row: np.ndarray, sequence: int | str | None = None, **marks: Any) -> tuple[int, Any]:
        x = np.atleast_2d(row)
        body: dict[str, Any] = {
            "inputs": [{"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}]
        }
        outputs = marks.pop("outputs", None)
        if sequence is not None or marks:
            body["parameters"] = {**({"sequence_id": sequence} if sequence is not None else {}), **marks}
        if outputs:
            body["outputs"] = outputs
        self.connection.request("POST", "/v2/models/gas/infer", json.dumps(body), self.headers)
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())

    def y(self, row: np.ndarray, sequence: int | str | None = None, **marks: Any) -> tuple[list[float], bool]:
        """The answer, and whether the stream began with it."""
        status, body = self.ask(row, sequence, **marks)
        assert status == 200, body
        return body["outputs"][0]["data"], body.get("parameters", {}).get("sequence_begun", False)


@pytest.fixture
def summing(tmp_path: Path) -> Path:
    return streaming.build(tmp_path / "summing")


@pytest.mark.parametrize("inline_below_us", [1e9, 0.0], ids=["inline", "in the thread"])
def test_streams_of_several_clients_do_not_mix(rig: Rig, summing: Path, inline_below_us: float) -> None:
    worker = rig.start(rig.served(summing), inline_below_us=inline_below_us)
    faults: list[str] = []

    def run(number: int) -> None:
        x = streaming.rows(40, seed=number)
        client = Client(rig)
        for t, wanted in enumerate(streaming.sums(x)):
            found, begun = client.y(x[t], f"client-{number}" if number % 2 else number + 1)
            if found != wanted.tolist() or begun != (t == 0):
                faults.append(f"client {number}, row {t}: {found} {begun}")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    rig.flush(worker)
    assert rig.total().ok == 240


def test_a_request_without_a_sequence_is_a_stream_of_its_own_from_zeros(rig: Rig, summing: Path) -> None:
    rig.start(rig.served(summing))
    client = Client(rig)
    row = np.array([3.0, 4.0], np.float32)
    for _ in range(3):
        assert client.y(row) == ([3.0, 4.0], False)
    assert client.y(row, 7) == ([3.0, 4.0], True)
    assert client.y(row) == ([3.0, 4.0], False)
    assert client.y(row, 0) == ([3.0, 4.0], False)
    assert client.y(row, 7) == ([6.0, 8.0], False)


def test_tritonclient_starts_and_ends_sequences(rig: Rig, summing: Path) -> None:
    rig.start(rig.served(summing))
    x = streaming.rows(5)
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        assert "sequence" in client.get_server_metadata()["extensions"]
        for _ in range(2):
            for t, wanted in enumerate(streaming.sums(x)):
                given = triton.InferInput("x", [1, 2], "FP32")
                given.set_data_from_numpy(x[t : t + 1])
                found = client.infer("gas", [given], sequence_id=11, sequence_start=t == 0, sequence_end=t == 4)
                assert found.as_numpy("y")[0].tolist() == wanted.tolist()
                assert found.get_response().get("parameters", {}).get("sequence_begun", False) == (t == 0)
    client_after = Client(rig)
    # It ended: whoever goes on begins anew, and is told.
    assert client_after.y(x[0], 11) == (x[0].tolist(), True)


def test_the_quietest_stream_makes_room_and_its_client_is_told(rig: Rig, tmp_path: Path) -> None:
    settings = mf.Streams(states=(streaming.STATE,), most=2, idle_s=60.0)
    rig.start(rig.served(streaming.build(tmp_path / "b", streams=settings)))
    client = Client(rig)
    one = np.ones(2, np.float32)
    assert [client.y(one, name)[1] for name in "abac"] == [True, True, False, True]
    assert client.y(one, "a") == ([3.0, 3.0], False)
    assert client.y(one, "b") == ([1.0, 1.0], True)


def test_a_refused_request_leaves_its_stream_where_it_was(rig: Rig, summing: Path) -> None:
    worker = rig.start(rig.served(summing))
    client = Client(rig)
    one = np.ones(2, np.float32)
    client.y(one, 5)
    nan = np.array([np.nan, 0], np.float32)
    assert client.ask(nan, 5)[0] == 400
    assert client.ask(one, 5, outputs=[{"name": "h"}])[0] == 400
    assert client.ask(np.ones((2, 2), np.float32), 5)[0] == 400
    assert client.y(one, 5) == ([2.0, 2.0], False)
    status, body = client.ask(one, 5, outputs=[{"name": "hn"}])
    assert (status, body["error"]) == (400, "hn: wanted one of y, got an unknown output")
    rig.flush(worker)
    assert (rig.total().ok, rig.total().invalid) == (2, 4)


def test_after_a_hand_over_streams_begin_anew_and_say_so(rig: Rig, summing: Path) -> None:
    worker = rig.start(rig.served(summing))
    client = Client(rig)
    x = streaming.rows(4)
    wanted = [*streaming.sums(x[:2]).tolist(), *streaming.sums(x[2:]).tolist()]
    found = [client.y(x[0], "a"), client.y(x[1], "a")]
    rig.swap(worker, rig.served(summing))
    found += [client.y(x[2], "a"), client.y(x[3], "a")]
    assert [y for y, _ in found] == wanted
    assert [begun for _, begun in found] == [True, False, True, False]


def test_steps_look_back_over_requests_and_within_them(rig: Rig, tmp_path: Path) -> None:
    rig.start(rig.served(streaming.build(tmp_path / "b", "smoothing")))
    client = Client(rig)
    x = streaming.rows(9)
    wanted = streaming.means(x)
    found = [np.array(client.y(x[low:high], "a")[0]).reshape(-1, 2) for low, high in ((0, 1), (1, 4), (4, 9))]
    np.testing.assert_array_equal(np.concatenate(found).astype(np.float32), wanted)
    # Rows of one request are successive also where nothing came before.
    alone = np.array(client.y(x)[0], np.float32).reshape(-1, 2)
    np.testing.assert_array_equal(alone, wanted)


def test_a_row_that_the_fallback_model_answers_is_no_step_of_the_stream(rig: Rig, tmp_path: Path) -> None:
    feature = mf.Feature(name="f0", input="x", column=0, range=(-100.0, 100.0), on_outside="fallback")
    needs = ("guards", "states")
    first = streaming.build(tmp_path / "a", features=(feature,), requires=needs, fallback="spare")
    second = streaming.build(tmp_path / "b", model="spare")
    worker = rig.start(rig.served(first), rig.served(second, name="spare"))
    client = Client(rig)
    one = np.ones(2, np.float32)
    assert client.y(one, 3) == ([1.0, 1.0], True)
    status, body = client.ask(np.array([999.0, 1.0], np.float32), 3)
    assert (status, body["model_name"], body["outputs"][0]["data"]) == (200, "spare", [999.0, 1.0])
    assert client.y(one, 3) == ([2.0, 2.0], False)
    rig.flush(worker)
    assert (rig.total().ok, rig.total().fallback) == (3, 1)


def test_memory_stays_bounded_over_many_streams(rig: Rig, tmp_path: Path) -> None:
    settings = mf.Streams(states=(streaming.STATE,), most=8)
    worker = rig.start(rig.served(streaming.build(tmp_path / "b", streams=settings)))
    client = Client(rig)
    one = np.ones(2, np.float32)

    def rss_kb() -> int:
        return int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1]) * 4

    for i in range(1, 500):
        client.y(one, i)
    before = rss_kb()
    for i in range(500, 2000):
        client.y(one, i)
    assert rss_kb() - before < 2000


def test_clients_that_are_told_apart_may_use_one_name_for_two_streams(rig: Rig, summing: Path, tmp_path: Path) -> None:
    file = tmp_path / clients.FILE
    tokens = [clients.add(file, clients.Client(name=name), token=True) for name in ("first", "second")]
    rig.start(rig.served(summing), access=ww.Access(clients=str(file)))
    x = streaming.rows(6, seed=1)
    first, second = (Client(rig, token) for token in tokens)
    for t, wanted in enumerate(streaming.sums(x)):
        assert first.y(x[t], 1, sequence_start=t == 0) == (wanted.tolist(), t == 0)
        assert second.y(x[t], 1, sequence_start=t == 0) == (wanted.tolist(), t == 0)
    assert second.y(x[0], 1, sequence_end=True)[1] is False
    assert second.y(x[0], 1)[1] is True
    assert first.y(x[0], 1)[1] is False
