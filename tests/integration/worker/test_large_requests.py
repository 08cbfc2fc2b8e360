"""A real worker to which clients send much: it goes on answering and reporting, and keeps no more than it may."""

from __future__ import annotations

import gzip
import http.client
import itertools
import json
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skerry_agent import clients
from skerry_agent import workerwire as ww

from tests import models
from tests.integration.worker.echo import echo_bundle
from tests.integration.worker.rig import Rig, Worker

INFER = "/v2/models/gas/infer"
_MB = 1 << 20


def ask(rig: Rig, body: bytes, headers: dict[str, str] | None = None, path: str = INFER) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", rig.port, timeout=60)
    connection.request("POST", path, body, headers or {})
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def body(x: np.ndarray) -> bytes:
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def begin(rig: Rig, length: int, headers: str = "") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", rig.port), timeout=60)
    sock.sendall(f"POST {INFER} HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: {length}\r\n\r\n".encode())
    return sock


def reports(worker: Worker) -> list[ww.Health]:
    return [message for message in worker.heard if isinstance(message, ww.Health)]


def test_strings_without_end_in_few_bytes_hold_up_neither_reports_nor_memory(rig: Rig, tmp_path: Path) -> None:
    folder = echo_bundle(tmp_path / "echo")
    worker = rig.start(rig.served(folder), health_interval_s=0.1)
    before = worker.wait_for(ww.Health)
    many = 4_000_000
    text = b'{"inputs":[{"name":"in_BYTES","datatype":"BYTES","shape":[1,3],"data":[%b["a"]]}]}' % (b'["a"],' * many)
    packed = gzip.compress(text, 9)
    assert len(packed) < _MB
    for sent, headers in ((packed, {"Content-Encoding": "gzip"}), (text, {})):
        status, said = ask(rig, sent, headers)
        assert status == 400
        assert "in_BYTES.data: wanted 3, as its shape says, got more elements" in said["error"]
    last = reports(worker)[-1].at_s
    worker.wait_for(ww.Health, where=lambda m: m.at_s > last and m.own_mb - m.held_mb < before.own_mb + 40)
    said_at = [m.at_s for m in reports(worker)]
    # Decoded on the loop it was gone for more than ten seconds, and took a gigabyte.
    assert max(b - a for a, b in itertools.pairwise(said_at)) < 4
    assert max(m.own_mb for m in reports(worker)) - before.own_mb < 400
    rig.flush(worker)
    assert rig.total().invalid == 2


def test_a_body_that_no_input_needs_is_refused_at_its_header(rig: Rig, bundle: Path) -> None:
    worker = rig.start(rig.served(bundle), health_interval_s=0.1)
    with begin(rig, 60 * _MB) as sock:
        said = sock.recv(4096)
    assert said.startswith(b"HTTP/1.1 413 ")
    assert b'{"error":"body: at most 5242880 bytes for gas, got 62914560"}' in said
    bomb = gzip.compress(b" " * (60 * _MB))
    status, said = ask(rig, bomb, {"Content-Encoding": "gzip"})
    assert (status, said["error"]) == (413, "body: at most 5242880 bytes when inflated")
    for path in ("/skerry/v1/feedback", "/v2/repository/index"):
        status, said = ask(rig, bomb, {"Content-Encoding": "gzip"}, path)
        assert (status, said["error"]) == (413, "body: at most 1048576 bytes when inflated")
    x = models.rows(1)[0]
    assert ask(rig, body(x))[0] == 200
    # As large as it may be, plain and packed.
    rows = np.repeat(x, 2048, axis=0)
    for sent, headers in ((body(rows), {}), (gzip.compress(body(rows)), {"Content-Encoding": "gzip"})):
        status, said = ask(rig, sent, headers)
        assert status == 200
        assert said["outputs"][0]["shape"][0] == 2048
    rig.flush(worker)
    assert (rig.total().ok, rig.total().invalid) == (3, 1)


def test_half_sent_requests_together_have_a_bound_and_are_not_the_models_memory(rig: Rig, tmp_path: Path) -> None:
    worker = rig.start(rig.served(echo_bundle(tmp_path / "echo")), health_interval_s=0.1)
    before = worker.wait_for(ww.Health)
    part = b"x" * _MB
    half_sent = [begin(rig, 63 * _MB) for _ in range(6)]
    for sock in half_sent:
        sock.settimeout(5)
        try:
            for _ in range(50):
                sock.sendall(part)
        except OSError:
            # Turned away meanwhile, and closed.
            continue
    worker.wait_for(ww.Health, where=lambda m: m.held_mb > 60)
    time.sleep(0.3)
    found = reports(worker)
    assert max(m.held_mb for m in found) < 135
    assert max(m.own_mb - m.held_mb for m in found) - before.own_mb < 100
    assert max(m.own_mb for m in found) - before.own_mb < 300
    # Who sends little is served all the while.
    status, said = ask(rig, b'{"inputs":[]}')
    assert status == 400, said
    for sock in half_sent:
        sock.close()
    worker.wait_for(ww.Health, where=lambda m: m.at_s > found[-1].at_s and m.held_mb == 0)


def test_of_who_is_not_known_nothing_is_kept_nor_inflated(rig: Rig, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / clients.FILE
    token = clients.add(file, clients.Client(name="camera"), token=True)
    access = ww.Access(clients=str(file), rate=0.0, burst=0, distinct=False)
    worker = rig.start(rig.served(bundle), health_interval_s=0.1, access=access)
    before = reports(worker)[-1].at_s if reports(worker) else 0.0
    with begin(rig, 2 * _MB) as large, begin(rig, 500_000) as small:
        assert large.recv(4096).startswith(b"HTTP/1.1 401 ")
        small.sendall(b"x" * 300_000)
        worker.wait_for(ww.Health, where=lambda m: m.at_s > before + 0.5)
        assert max(m.held_mb for m in reports(worker)) == 0
        small.sendall(b"x" * 200_000)
        assert small.recv(4096).startswith(b"HTTP/1.1 401 ")
        # Its connection goes on: nothing of the body was taken for a request.
        small.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        assert small.recv(4096).startswith(b"HTTP/1.1 200 ")
    # That it is no gzip is not even found out.
    for headers, status in (({}, 401), ({"Authorization": f"Bearer {token}"}, 400)):
        assert ask(rig, b"no gzip", {"Content-Encoding": "gzip", **headers})[0] == status
    rig.flush(worker)
    assert (rig.total().shed, rig.total().invalid) == (3, 1)


@pytest.mark.parametrize("what", [b"GET /v2 HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"\r\n", b""])
def test_what_clients_do_is_told_as_work_of_the_worker(rig: Rig, bundle: Path, what: bytes) -> None:
    worker = rig.start(rig.served(bundle), health_interval_s=0.1)
    before = worker.wait_for(ww.Health)
    with socket.create_connection(("127.0.0.1", rig.port), timeout=60) as sock:
        sock.sendall(what)
        worker.wait_for(ww.Health, where=lambda m: m.work > before.work)
