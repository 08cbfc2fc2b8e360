"""A real worker, asked by the real tritonclient and by hand-written requests."""

from __future__ import annotations

import gzip
import http.client
import json
import math
import socket
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from skerry_agent import workerwire as ww
from tritonclient.utils import InferenceServerException

from tests import models
from tests.integration.worker.echo import ONNX, echo_bundle
from tests.integration.worker.rig import Rig

INFER = "/v2/models/gas/infer"


def ask(rig: Rig, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """One request on a connection of its own: status and decoded body."""
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
    try:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    finally:
        connection.close()


def tensor(x: np.ndarray, **changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist(), **changes}


def infer(rig: Rig, **changes: Any) -> tuple[int, Any]:
    x, _ = models.rows(1)
    return ask(rig, "POST", INFER, {"inputs": [tensor(x, **changes)]})


@pytest.mark.parametrize("binary", [False, True])
def test_tritonclient_gets_what_numpy_works_out(rig: Rig, bundle: Path, binary: bool) -> None:
    rig.start(rig.served(bundle))
    x, _ = models.rows(5)
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("gas")
        assert client.is_model_ready("gas", "1.0.0")
        assert not client.is_model_ready("gas", "9.9.9")
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        metadata = client.get_model_metadata("gas")
        assert metadata["platform"] == "onnx_onnxv1"
        assert metadata["versions"] == ["1.0.0"]
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
        given = triton.InferInput("x", [5, 4], "FP32")
        given.set_data_from_numpy(x, binary_data=binary)
        wanted = [triton.InferRequestedOutput("probabilities", binary_data=binary)]
        result = client.infer("gas", [given], outputs=wanted, request_id="seven", model_version="1.0.0")
        np.testing.assert_allclose(result.as_numpy("probabilities"), models.probabilities(x), atol=1e-5)
        assert result.get_response()["id"] == "seven"
        assert result.get_response()["model_version"] == "1.0.0"
        # Without a list of outputs the client asks for all of them in binary.
        again = client.infer("gas", [given]).as_numpy("probabilities")
        np.testing.assert_array_equal(again, result.as_numpy("probabilities"))


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_tritonclient_may_compress_its_request(rig: Rig, bundle: Path, coding: str) -> None:
    rig.start(rig.served(bundle))
    x, _ = models.rows(50)
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        given = triton.InferInput("x", [50, 4], "FP32")
        given.set_data_from_numpy(x)
        result = client.infer("gas", [given], request_compression_algorithm=coding)
        np.testing.assert_allclose(result.as_numpy("probabilities"), models.probabilities(x), atol=1e-5)


def test_text_outputs_and_transforms_reach_tritonclient(rig: Rig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b", transforms=True)
    worker = rig.start(rig.served(tmp_path / "b"))
    x, truth = models.rows(6)
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        for binary in (False, True):
            given = triton.InferInput("x", [6, 4], "FP32")
            given.set_data_from_numpy((10 * x + 5).astype("f4"))
            outputs = [triton.InferRequestedOutput("label", binary_data=binary)]
            found = client.infer("gas", [given], outputs=outputs).as_numpy("label")
            assert [v.decode() if isinstance(v, bytes) else v for v in found] == [models.labels()[k] for k in truth]
    rig.flush(worker)
    ((_, window),) = rig.windows
    # Features are counted raw, as the application sent them, and the transforms' time apart.
    assert window.features["f0"].moments.n == 12
    assert window.latency.transform.n == 2
    assert window.latency.transform.total > 0


def test_tritonclient_is_told_what_is_wrong(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    with triton.InferenceServerClient(f"127.0.0.1:{rig.port}") as client:
        given = triton.InferInput("x", [1, 3], "FP32")
        given.set_data_from_numpy(np.zeros((1, 3), np.float32))
        with pytest.raises(InferenceServerException, match=r"x: wanted shape \[-1, 4\], got shape \[1, 3\]"):
            client.infer("gas", [given])
        with pytest.raises(InferenceServerException, match="no such model: other"):
            client.infer("other", [given])


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("name", {"name": "y"}, ["y", "unknown input", "x"]),
    ("shape", {"shape": [1, 3], "data": [0, 0, 0]}, ["x", "[1, 3]", "[-1, 4]"]),
    ("rank", {"shape": [4]}, ["x", "[4]", "[-1, 4]"]),
    ("no rows", {"shape": [0, 4], "data": []}, ["x", "[0, 4]"]),
    ("datatype", {"datatype": "FP64"}, ["x", "FP64", "FP32"]),
    ("unknown datatype", {"datatype": "FLOAT"}, ["x.datatype", "FLOAT", "FP32"]),
    ("too few", {"data": [1, 2, 3]}, ["x.data", "3 elements", "4"]),
    ("text", {"data": ["1", "2", "3", "4"]}, ["x.data", "strings", "numbers"]),
    ("null", {"data": [1, 2, None, 4]}, ["x[0][2] (f2)", "NaN", "a number"]),
    ("NaN", {"data": [1, math.nan, 3, 4]}, ["x[0][1] (f1)", "NaN", "a number"]),
    ("overflow", {"data": [1, 1e300, 3, 4]}, ["x.data", "1e+300", "FP32"]),
    ("object", {"data": {"a": 1}}, ["x.data", "dict", "a list"]),
    ("no data", {"data": None}, ["x.data", "a list"]),
    ("negative size", {"shape": [-1, 4]}, ["x.shape", "[-1, 4]"]),
    ("shared memory", {"parameters": {"shared_memory_region": "r"}}, ["x.parameters", "shared_memory_region"]),
    ("binary size without binary", {"parameters": {"binary_data_size": 16}}, ["x.parameters.binary_data_size", "16"]),
]


def test_bytes_that_are_no_text_get_400_are_counted_and_the_connection_lives(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle))
    bodies = [
        b'{"inputs":[{"name":"\xff\xfe","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}',
        b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":["\xff",2,3,4]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["\xc3\x28"]}]}',
    ]
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
    for body in bodies:
        connection.request("POST", INFER, body)
        response = connection.getresponse()
        assert response.status == 400, body
        assert json.loads(response.read())["error"]
    connection.request("GET", "/v2/health/live")
    assert connection.getresponse().status == 200
    connection.close()
    rig.flush(worker)
    assert rig.total().invalid == len(bodies)


def test_outputs_named_again_and_again_are_refused_at_once(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    x, _ = models.rows(1)
    twice = {"inputs": [tensor(x)], "outputs": [{"name": "probabilities"}] * 2}
    status, answer = ask(rig, "POST", INFER, twice)
    assert (status, answer["error"].startswith("probabilities")) == (400, True), answer
    many = {"inputs": [tensor(x)], "outputs": [{"name": "probabilities"}] * 60_000}
    status, answer = ask(rig, "POST", INFER, many)
    assert status == 400
    assert "1024" in answer["error"]


def test_empty_lines_before_a_request_cost_nothing(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    with socket.create_connection(("127.0.0.1", rig.port), timeout=30) as client:
        client.sendall(b"\r\n" * 100_000 + b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_wrong_tensors_get_400_that_names_field_got_and_wanted_and_the_worker_lives(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle))
    for what, changes, words in REFUSED:
        status, answer = infer(rig, **changes)
        assert status == 400, (what, answer)
        assert set(answer) == {"error"}, what
        for word in words:
            assert word in answer["error"], (what, answer)
    for body in (b"", b"{", b"[]", b"null", b'{"inputs":1}', b"\xff\xfe", b"[" * 100_000, b'{"inputs":[{}]}'):
        status, answer = ask(rig, "POST", INFER, body, {"Content-Length": str(len(body))})
        assert status == 400, body[:40]
        assert "error" in answer
    status, answer = ask(rig, "POST", INFER, {"inputs": [tensor(models.rows(1)[0])], "outputs": [{"name": "no"}]})
    assert (status, "no: wanted one of probabilities" in answer["error"]) == (400, True)
    assert infer(rig)[0] == 200
    assert worker.process.poll() is None
    rig.flush(worker)
    ((_, window),) = rig.windows
    assert (window.counts.ok, window.counts.invalid, window.counts.failed) == (1, len(REFUSED) + 9, 0)
    assert window.features["f0"].moments.n == 1


def test_binary_requests_that_lie_about_their_sizes_get_400(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    raw = models.rows(1)[0].tobytes()
    for size, data, said in (
        (16, raw[:8], None),
        (8, raw, None),
        (16, raw + b"x", None),
        (-1, raw, None),
        (16, raw, 10**9),
    ):
        head = json.dumps(
            {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": size}}]}
        ).encode()
        headers = {"Inference-Header-Content-Length": str(len(head) if said is None else said)}
        status, answer = ask(rig, "POST", INFER, head + data, headers)
        assert (status, set(answer)) == (400, {"error"}), (size, len(data), said)
    assert infer(rig)[0] == 200


def test_paths_methods_and_lengths_have_the_right_status(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    for method, path, wanted in (
        ("GET", "/v2", 200), ("GET", "/v2/", 200), ("GET", "/v2/health/live", 200), ("GET", "/v2/health/ready", 200),
        ("GET", "/v2/models/gas", 200), ("GET", "/v2/models/gas/versions/1.0.0", 200),
        ("GET", "/v2/models/gas/versions/1.0.0/ready", 200), ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/gas/versions/2.0.0", 404), ("GET", "/v2/models/gas/nothing", 404), ("GET", "/", 404),
        ("GET", "/v1/models/gas", 404), ("GET", "/v2/models", 404), ("GET", "/v2/models/%67as/ready?x=1", 200),
        ("GET", INFER, 405), ("PUT", INFER, 405), ("POST", "/v2/health/live", 405), ("DELETE", "/v2/models/gas", 405),
    ):  # fmt: skip
        status, answer = ask(rig, method, path)
        assert status == wanted, (method, path)
        if status != 200:
            assert set(answer) == {"error"}
    status, answer = ask(rig, "HEAD", "/v2/health/live")
    assert (status, answer) == (200, None)


def whole_replies(found: bytes) -> int:
    """How many replies are there to their last byte."""
    n = 0
    while (end := found.find(b"\r\n\r\n")) >= 0:
        length = int(found[:end].lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(found) < end + 4 + length:
            break
        found, n = found[end + 4 + length :], n + 1
    return n


def exchange(rig: Rig, *parts: bytes, pause_s: float = 0.05, replies: int = 0) -> bytes:
    """Sends parts with pauses between them and reads until so many replies came, for 0 until the server closes."""
    with socket.create_connection(("127.0.0.1", rig.port), timeout=30) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            sock.sendall(part)
            time.sleep(pause_s)
        found = b""
        while (not replies or whole_replies(found) < replies) and (data := sock.recv(65536)):
            found += data
        return found


def request_bytes(n: int = 1, *, ident: str = "", extra: str = "") -> bytes:
    body = json.dumps({"id": ident, "inputs": [tensor(models.rows(n)[0])]}).encode()
    return f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


def test_pipelined_requests_are_answered_in_order(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle))
    found = exchange(rig, b"".join(request_bytes(ident=f"id-{i}") for i in range(100)), replies=100)
    places = [found.index(f'"id":"id-{i}"'.encode()) for i in range(100)]
    assert places == sorted(places)
    assert found.count(b"HTTP/1.1 200 OK") == 100
    rig.flush(worker)
    assert rig.total().ok == 100


def test_a_request_may_come_byte_by_byte_in_chunks_or_compressed(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    whole = request_bytes(ident="slow")
    parts = [whole[i : i + 1] for i in range(len(whole))]
    assert b'"id":"slow"' in exchange(rig, *parts, pause_s=0.0, replies=1)
    body = whole.split(b"\r\n\r\n", 1)[1]
    pieces = [body[i : i + 7] for i in range(0, len(body), 7)]
    chunked = b"".join(b"%x;a=b\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\nTrailer: x\r\n\r\n"
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    both = exchange(rig, head + chunked[:20], chunked[20:61], chunked[61:] + whole, replies=2)
    assert both.count(b'"id":"slow"') == 2
    packed = gzip.compress(body)
    assert ask(rig, "POST", INFER, packed, {"Content-Encoding": "gzip"})[0] == 200
    assert ask(rig, "POST", INFER, packed[:-9], {"Content-Encoding": "gzip"})[0] == 400
    assert ask(rig, "POST", INFER, packed, {"Content-Encoding": "br"})[0] == 415


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_large_answers_are_packed_as_the_request_accepts_and_small_ones_never(
    rig: Rig, tmp_path: Path, coding: str
) -> None:
    models.build_bundle(tmp_path / "b", kind="identity", n_features=1000)
    worker = rig.start(rig.served(tmp_path / "b"))
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
    unpack = {"gzip": gzip.decompress, "deflate": zlib.decompress}[coding]
    # In one go, packed at once, packed in the thread.
    for rows, packed in ((1, False), (9, True), (300, True)):
        x = np.arange(rows * 1000, dtype="f4").reshape(rows, 1000) % 100
        connection.request("POST", INFER, json.dumps({"inputs": [tensor(x)]}), {"Accept-Encoding": f"br, {coding}"})
        response = connection.getresponse()
        data = response.read()
        assert (response.status, response.headers["Content-Encoding"]) == (200, coding if packed else None), rows
        answer = json.loads(unpack(data) if packed else data)
        assert answer["outputs"][0]["data"] == x.ravel().tolist()
        connection.request("POST", INFER, json.dumps({"inputs": [tensor(x)]}), {"Accept-Encoding": f"{coding};q=0"})
        response = connection.getresponse()
        plain = json.loads(response.read())
        assert response.headers["Content-Encoding"] is None
        assert plain["outputs"] == answer["outputs"]
    connection.close()
    rig.flush(worker)
    assert rig.total().ok == 6


def test_what_does_not_get_smaller_goes_unpacked(rig: Rig, tmp_path: Path) -> None:
    others = tuple(name for name in ONNX if name != "UINT8")
    rig.start(rig.served(echo_bundle(tmp_path / "b", shape=(1000,), without=others)))
    noise = np.random.default_rng(0).integers(0, 256, (40, 1000), np.uint8)
    given = {"name": "in_UINT8", "datatype": "UINT8", "shape": [40, 1000]}
    given["parameters"] = {"binary_data_size": noise.nbytes}
    text = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=30)
    headers = {"Accept-Encoding": "gzip", "Inference-Header-Content-Length": str(len(text))}
    for array, smaller in ((noise, False), (np.zeros_like(noise), True)):
        connection.request("POST", INFER, text + array.tobytes(), headers)
        response = connection.getresponse()
        data = response.read()
        assert (response.headers["Content-Encoding"] == "gzip") is smaller
        data = gzip.decompress(data) if smaller else data
        # The header says where the tensors begin in what was packed.
        assert data[int(response.headers["Inference-Header-Content-Length"]) :] == array.tobytes()
    connection.close()


def test_half_precision_goes_and_comes_in_json_exactly(rig: Rig, tmp_path: Path) -> None:
    rig.start(rig.served(echo_bundle(tmp_path / "echo", without=tuple(name for name in ONNX if name != "FP16"))))
    for values in ([-65504.0, 5.960464477539063e-08, 0.0999755859375], [1, 2, None]):
        given = {"name": "in_FP16", "datatype": "FP16", "shape": [1, 3], "data": [values]}
        status, answer = ask(rig, "POST", INFER, {"inputs": [given]})
        assert (status, answer["outputs"][0]["datatype"], answer["outputs"][0]["data"]) == (200, "FP16", values)
    status, answer = ask(rig, "POST", INFER, {"inputs": [{**given, "data": [1, 2, 1e6]}]})
    assert status == 400
    assert "in_FP16" in answer["error"]


def test_the_index_takes_its_filter_and_nothing_else_and_loading_is_the_fleets(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    row = [{"name": "gas", "version": "1.0.0", "state": "READY", "reason": ""}]
    for body in (None, b"", {}, {"ready": True}, {"ready": False}):
        assert ask(rig, "POST", "/v2/repository/index", body) == (200, row)
    for wrong in ({"ready": 1}, {"name": "gas"}, b"[", []):
        assert ask(rig, "POST", "/v2/repository/index", wrong)[0] == 400
    for act in ("load", "unload"):
        status, answer = ask(rig, "POST", f"/v2/repository/models/gas/{act}", {})
        assert status == 400
        assert answer["error"].startswith(f"gas: {act}: not done here, rollouts")
    assert ask(rig, "GET", "/v2/repository/index")[0] == 405
    assert ask(rig, "GET", "/v2/repository/models/gas/load")[0] == 405
    assert ask(rig, "POST", "/v2/repository/nothing")[0] == 404


def test_statistics_go_on_when_windows_are_cut_and_keys_change(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle))
    path = "/v2/models/gas/versions/1.0.0/stats"
    assert ask(rig, "GET", path)[1]["model_stats"][0]["last_inference"] == 0
    for turn in range(1, 4):
        infer(rig)
        assert infer(rig, shape=[1, 3])[0] == 400
        ring = rig.ring_path()
        if turn == 1:
            rig.flush(worker)
        elif turn == 2:
            rig.send(worker, ww.Rekey(model="gas", ring=ring, arm="candidate", rollout="r-1", stage=1))
            worker.wait_for(ww.Rekeyed)
        status, answer = ask(rig, "GET", path)
        (stats,) = answer["model_stats"]
        assert status == 200
        assert (stats["inference_count"], stats["execution_count"]) == (turn, turn)
        parts = stats["inference_stats"]
        assert (parts["success"]["count"], parts["fail"]["count"]) == (turn, turn)
        assert parts["success"]["ns"] > 0
        assert abs(stats["last_inference"] - time.time() * 1e3) < 60_000
        # Whose counts they are, and since when.
        assert answer["worker"]["pid"] == worker.pid
        assert abs(answer["worker"]["since"] - time.time() * 1e3) < 60_000
    rig.send(worker, ww.Elsewhere(models={"pump": "2.0.0"}))
    answer = ask(rig, "GET", "/v2/models/stats")[1]
    assert [stats["name"] for stats in answer["model_stats"]] == ["gas"]
    assert answer["worker"]["pid"] == worker.pid
    # Another worker serves it, and is asked for it by its own path.
    assert answer["elsewhere"] == ["pump"]
    assert ask(rig, "GET", "/v2/models/gas/versions/2.0.0/stats")[0] == 404


def test_expect_100_continue_is_answered_before_the_body_comes(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    head, body = request_bytes(extra="Expect: 100-continue\r\n").split(b"\r\n\r\n", 1)
    with socket.create_connection(("127.0.0.1", rig.port), timeout=30) as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 OK")


def test_requests_that_two_readers_could_read_differently_are_refused_and_the_connection_closed(
    rig: Rig, bundle: Path
) -> None:
    rig.start(rig.served(bundle))
    post = f"POST {INFER} HTTP/1.1\r\nHost: a\r\n".encode()
    for bad in (
        post + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        post + b"Content-Length: +2\r\n\r\n{}",
        post + b"Content-Length: 0x2\r\n\r\n{}",
        post + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 2000,
        post + b"Content-Length : 2\r\n\r\n{}",
        b"GET /v2 HTTP/1.1\r\n\r\n",
        b"GET /v2 HTTP/1.1\nHost: a\n\n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ):
        found = exchange(rig, bad + b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        assert found.startswith(b"HTTP/1.1 400 "), bad
        assert b"Connection: close" in found
        assert b'{"error":' in found
        assert b"live" not in found, "bytes after the refused request were served"
    assert infer(rig)[0] == 200


def test_sizes_are_limited_before_they_are_read(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle))
    post = f"POST {INFER} HTTP/1.1\r\nHost: a\r\n".encode()
    assert exchange(rig, b"POST / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000).startswith(b"HTTP/1.1 431 ")
    assert exchange(rig, post + b"Content-Length: 100000000000\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    assert exchange(rig, post + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n").startswith(b"HTTP/1.1 413 ")
    padded = (b"1;" + b"x" * 1000 + b"\r\n{\r\n") * 5
    assert exchange(rig, post + b"Transfer-Encoding: chunked\r\n\r\n" + padded).startswith(b"HTTP/1.1 413 ")
    assert exchange(rig, post + b"\r\n", replies=1).startswith(b"HTTP/1.1 411 ")
    bomb = gzip.compress(b"[" + b" " * (65 << 20))
    assert ask(rig, "POST", INFER, bomb, {"Content-Encoding": "gzip"})[0] == 413
    status, answer = ask(rig, "POST", INFER, {"inputs": [tensor(np.zeros((3000, 4), "f4"))]})
    assert (status, answer["error"]) == (400, "x: wanted at most 2048 in one request, got 3000 rows")
    assert infer(rig)[0] == 200
    assert worker.process.poll() is None


def test_http_1_0_and_connection_close_end_the_connection_after_the_reply(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    for request in (
        b"GET /v2/health/live HTTP/1.0\r\n\r\n",
        b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", rig.port), timeout=30) as sock:
            sock.sendall(request)
            found = b""
            while data := sock.recv(1000):
                found += data
            assert found.startswith(b"HTTP/1.1 200 OK")
            assert b"Connection: close" in found


def test_a_client_that_ends_its_sending_still_gets_its_reply(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    with socket.create_connection(("127.0.0.1", rig.port), timeout=30) as sock:
        sock.sendall(request_bytes() * 3)
        sock.shutdown(socket.SHUT_WR)
        found = b""
        while data := sock.recv(10_000):
            found += data
        assert found.count(b"HTTP/1.1 200 OK") == 3


def test_a_client_that_never_reads_stops_neither_the_others_nor_the_worker(rig: Rig, bundle: Path) -> None:
    rig.start(rig.served(bundle))
    with socket.create_connection(("127.0.0.1", rig.port), timeout=30) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        sent = 0
        wanted = request_bytes(500)
        try:
            while sent < 200 << 20:
                sent += deaf.send(wanted)
                assert infer(rig)[0] == 200 if sent % 7 == 0 else True
        except BlockingIOError:
            pass
        assert sent < 200 << 20, "the worker read without end what it could not answer"
        assert infer(rig)[0] == 200


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("damaged", "model_damaged"), ("unknown-operator", "operator_unknown"), ("wrong-golden", "golden_failed"),
        ("always-one", "golden_failed"), ("quiet-defect", "golden_failed"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_serve_is_refused_with_its_reason_before_anything_is_accepted(
    rig: Rig, tmp_path: Path, kind: str, code: str
) -> None:
    models.build_bundle(tmp_path / "b", kind=kind)
    worker = rig.spawn(rig.served(tmp_path / "b"))
    failed = worker.wait_for(ww.Failed)
    assert (failed.model, failed.code) == ("gas", code)
    assert failed.detail
    assert worker.process.wait(60) == 1


def test_a_file_that_changed_in_its_slot_is_refused(rig: Rig, bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[100] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    assert rig.spawn(rig.served(bundle)).wait_for(ww.Failed).code == "hash_mismatch"


def test_a_runtime_that_dies_on_load_takes_only_its_own_worker(rig: Rig, bundle: Path, tmp_path: Path) -> None:
    old = rig.start(rig.served(bundle))
    models.build_bundle(tmp_path / "crash", kind="crash-on-load")
    new = rig.spawn(rig.served(tmp_path / "crash"))
    assert new.process.wait(60) < 0
    assert infer(rig)[0] == 200
    assert old.process.poll() is None


def test_one_worker_serves_several_models_and_counts_them_apart(rig: Rig, bundle: Path, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "echo", model="echo", kind="identity")
    worker = rig.start(rig.served(bundle), rig.served(tmp_path / "echo", name="echo"))
    body = {"inputs": [tensor(models.rows(1)[0])]}
    for path, times in ((INFER, 3), ("/v2/models/echo/infer", 2)):
        for _ in range(times):
            assert ask(rig, "POST", path, body)[0] == 200
    rig.flush(worker)
    assert {window.key.model: window.counts.ok for _, window in rig.windows} == {"gas": 3, "echo": 2}
