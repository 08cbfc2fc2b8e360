"""Replacing a worker under clients that never retry: no request fails, and each is counted once."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from skerry_agent import workerwire as ww

from tests import models
from tests.integration.worker.rig import Rig

PATH = "/v2/models/gas/infer"


def body(n: int = 1, ident: str = "") -> bytes:
    x, _ = models.rows(n)
    tensor = {"name": "x", "shape": [n, 4], "datatype": "FP32", "data": x.ravel().tolist()}
    return json.dumps({"id": ident, "inputs": [tensor]}).encode()


def head(size: int) -> bytes:
    return f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n".encode()


class Clients:
    """Threads that ask in a loop on connections they keep, and never ask twice."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.answered: Counter[str] = Counter()
        self.failures: list[str] = []
        self.versions: Counter[str] = Counter()

    def add(self, name: str, *, think_s: tuple[float, float] = (0.0, 0.001), fresh: bool = False) -> None:
        thread = threading.Thread(target=self._ask, args=(name, think_s, fresh))
        self._threads.append(thread)
        thread.start()

    def _ask(self, name: str, think_s: tuple[float, float], fresh: bool) -> None:
        rng = random.Random(name)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        number = 0
        while not self._over.is_set():
            number += 1
            ident = f"{name}-{number}"
            try:
                connection.request("POST", PATH, body(ident=ident))
                response = connection.getresponse()
                answer = json.loads(response.read())
                if response.status != 200 or answer["id"] != ident:
                    self.failures.append(f"{name}: {response.status} {answer}")
                else:
                    self.answered[name] += 1
                    self.versions[answer["model_version"]] += 1
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(f"{name}: {type(error).__name__}: {error}")
                connection.close()
            if fresh:
                connection.close()
            time.sleep(rng.uniform(*think_s))
        connection.close()

    def finish(self) -> int:
        self._over.set()
        for thread in self._threads:
            thread.join()
        return sum(self.answered.values())


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_ten_swaps_under_keep_alive_clients_fail_no_request_and_count_each_once(
    rig: Rig, tmp_path: Path, loop: str
) -> None:
    if loop == "asyncio":
        rig.environment["SKERRY_NO_UVLOOP"] = "1"
    versions = ("1.0.0", "1.1.0")
    for version in versions:
        models.build_bundle(tmp_path / version, version=version)
    worker = rig.start(rig.served(tmp_path / "1.0.0"))
    clients = Clients(rig.port)
    for i in range(4):
        clients.add(f"busy{i}")
    for i in range(3):
        clients.add(f"idle{i}", think_s=(0.0, 1.0))
    clients.add("fresh", think_s=(0.0, 0.004), fresh=True)
    for i in range(10):
        version = versions[(i + 1) % 2]
        worker = rig.swap(worker, rig.served(tmp_path / version, version=version), fold_interval_s=0.05)
        time.sleep(0.1)
    answered = clients.finish()
    assert clients.failures == []
    assert min(clients.answered[f"busy{i}"] for i in range(4)) > 50
    assert set(clients.versions) == set(versions)
    rig.flush(worker)
    assert rig.stop(worker) == 0
    assert rig.total().ok == answered
    assert rig.total().invalid == rig.total().failed == rig.total().shed == 0


def test_slow_inferences_under_way_are_answered_by_the_old_worker_before_its_connections_go(
    rig: Rig, tmp_path: Path
) -> None:
    models.build_bundle(tmp_path / "b")
    old = rig.start(rig.served(tmp_path / "b"), inline_below_us=0.0)
    clients = Clients(rig.port)
    for i in range(4):
        clients.add(f"c{i}")
    for _ in range(3):
        old = rig.swap(old, rig.served(tmp_path / "b"), inline_below_us=0.0)
        time.sleep(0.1)
    answered = clients.finish()
    assert clients.failures == []
    rig.stop(old)
    assert rig.total().ok == answered > 50


@pytest.mark.parametrize("at", [1, 10, 60, 130])
def test_a_half_sent_request_goes_with_its_connection_and_is_answered_by_the_successor(
    rig: Rig, tmp_path: Path, at: int
) -> None:
    for version in ("1.0.0", "1.1.0"):
        models.build_bundle(tmp_path / version, version=version)
    old = rig.start(rig.served(tmp_path / "1.0.0"))
    sent = body(ident="half")
    whole = head(len(sent)) + sent
    with socket.create_connection(("127.0.0.1", rig.port), timeout=30) as sock:
        # A whole request and the beginning of the next one, then nothing while the swap goes on.
        sock.sendall(whole + whole[:at])
        first = sock.recv(10_000)
        assert b'"model_version":"1.0.0"' in first
        time.sleep(0.05)
        rig.swap(old, rig.served(tmp_path / "1.1.0", version="1.1.0"))
        sock.sendall(whole[at:])
        second = sock.recv(10_000)
        assert second.startswith(b"HTTP/1.1 200 OK")
        assert b'"id":"half"' in second
        assert b'"model_version":"1.1.0"' in second


def test_a_connection_that_lost_its_descriptor_is_reported_and_the_worker_serves_on(rig: Rig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b")
    worker = rig.start(rig.served(tmp_path / "b"))
    rig.send(worker, ww.Conn(head=b"GET / HTTP/1.1\r\n"))
    assert worker.wait_for(ww.Cut).connections == 1
    sent = body()
    with socket.create_connection(("127.0.0.1", rig.port), timeout=10) as sock:
        sock.sendall(head(len(sent)) + sent)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
    assert rig.stop(worker) == 0


def test_a_half_sent_body_larger_than_a_datagram_goes_along(rig: Rig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b")
    old = rig.start(rig.served(tmp_path / "b"))
    sent = body(2000) + b" " * 3_000_000
    with socket.create_connection(("127.0.0.1", rig.port), timeout=30) as sock:
        sock.sendall(head(len(sent)) + sent[:2_500_000])
        time.sleep(0.3)
        rig.swap(old, rig.served(tmp_path / "b"))
        sock.sendall(sent[2_500_000:])
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_pipelined_requests_survive_a_swap_in_order(rig: Rig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b")
    worker = rig.start(rig.served(tmp_path / "b"))
    n = 3000
    requests = []
    for i in range(n):
        sent = body(ident=f"<{i}>")
        requests.append(head(len(sent)) + sent)
    with socket.create_connection(("127.0.0.1", rig.port), timeout=30) as sock:
        sender = threading.Thread(target=sock.sendall, args=(b"".join(requests),))
        sender.start()
        found = bytearray()
        swaps = 0
        while found.count(b'"id":"<') < n:
            data = sock.recv(1 << 16)
            assert data, "closed in the middle"
            found += data
            if swaps < 3 and found.count(b'"id":"<') > swaps * 600:
                swaps += 1
                worker = rig.swap(worker, rig.served(tmp_path / "b"))
        sender.join()
    order = [int(part.split(b">", 1)[0]) for part in bytes(found).split(b'"id":"<')[1:]]
    assert order == list(range(n))
    rig.stop(worker)
    assert rig.total().ok == n


def test_a_client_that_does_not_read_its_reply_is_closed_at_the_deadline_and_counted(rig: Rig, tmp_path: Path) -> None:
    models.build_bundle(tmp_path / "b")
    old = rig.start(rig.served(tmp_path / "b"))
    sent = body(2000)
    stream = (head(len(sent)) + sent) * 200
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", rig.port))
        deaf.settimeout(1.0)
        with pytest.raises(TimeoutError):
            # Stops when both kernels' buffers are full of replies that nobody reads.
            deaf.sendall(stream)
        new = rig.start(rig.served(tmp_path / "b"))
        began = time.monotonic()
        assert rig.drain(old, new, deadline_s=0.5).unpassed == 1
        assert time.monotonic() - began < 10
