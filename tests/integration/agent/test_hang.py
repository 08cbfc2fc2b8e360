"""A worker that hangs, in native code or altogether, is replaced; on trial it is no success."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable

import psutil
import pytest

from tests import models
from tests.integration.agent.rig import Device, Server, wait_for

FOREVER = 1e12
QUIET = {"trial_s": 3, "silent_s": 4, "inference_s": 5}


def serving(device: Device) -> str:
    first = device.bundle("1.0.0")
    device.publish(first)
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    return first


def send(device: Device, rows: int, largest: float) -> socket.socket:
    """Sends one request and does not wait for its answer."""
    x, _ = models.rows(rows)
    x[0, 0] = largest
    tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 4], "data": x.ravel().tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()
    sock = socket.create_connection(("127.0.0.1", device.port), 10)
    sock.sendall(b"POST /v2/models/gas/infer HTTP/1.1\r\nHost: d\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return sock


# One row is answered on the worker's event loop, which then stands still; many rows in its inference thread.
@pytest.mark.parametrize(("rows", "said"), [(1, "no report"), (2000, "one inference")])
def test_a_generation_that_hangs_on_the_first_real_row_goes_back_and_is_never_confirmed(
    make_device: Callable[..., Device], server: Server, rows: int, said: str
) -> None:
    # A trial long enough for a slow machine to get the request into it.
    device = make_device(**{**QUIET, "trial_s": 20})
    serving(device)
    old = device.status()["worker"]["pid"]
    device.publish(device.bundle("2.0.0", kind="slow-on-rows"))
    device.sync()
    device.wait_running("2.0.0", "trial")
    wait_for(lambda: not psutil.pid_exists(old), why="the end of the old worker, which might take the request")
    with send(device, rows, FOREVER):
        update = device.wait_update("idle", "trial_crashed", "2.0.0")
    assert said in update["detail"]
    device.wait_running("1.0.0", "confirmed")
    assert device.infer(3) == ["1.0.0"] * 3
    event = wait_for(lambda: server.events("worker"), why="the event")[0]
    assert (event.code, said in event.data["how"]) == ("worker_hung", True)
    assert not [e for e in server.events() if e.data["version"] == "2.0.0" and e.data["state"].startswith("confirmed")]


def test_a_confirmed_worker_that_stands_still_is_killed_and_replaced_and_its_counts_are_kept(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = make_device(**QUIET)
    serving(device)
    device.infer(7)
    pid = device.status()["worker"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: device.status()["worker"]["pid"] not in (0, pid), why="another worker")
    assert device.infer(5) == ["1.0.0"] * 5
    assert device.running() == ("1.0.0", "confirmed")
    wait_for(lambda: server.inferences() == 32, why=f"32 counted, got {server.inferences()}")
    wait_for(lambda: server.events("worker"), why="the event")
    assert [e.code for e in server.events("worker")] == ["worker_hung"]


def test_a_long_inference_and_a_supervisor_that_stood_still_are_no_hang(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = make_device(**{**QUIET, "inference_s": 60})
    device.publish(device.bundle("1.0.0", kind="slow-on-rows"))
    device.start()
    device.wait_running("1.0.0", "trial")
    pid = device.status()["worker"]["pid"]
    assert device.process is not None
    with send(device, 2000, 1e6) as asked:
        os.kill(device.process.pid, signal.SIGSTOP)
        time.sleep(QUIET["silent_s"] + 2)
        os.kill(device.process.pid, signal.SIGCONT)
        asked.settimeout(60)
        assert asked.recv(100).startswith(b"HTTP/1.1 200")
    device.wait_running("1.0.0")
    assert device.status()["worker"]["pid"] == pid
    assert server.events("worker") == []
