"""A real agent under its service manager: watchdog, reload, SIGTERM under load."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import models
from tests.integration.agent.rig import ROOT, TIMEOUT_S, Device, Server, wait_for
from tests.integration.agent.test_labels import UnixConnection


class Manager:
    """The service manager's end of ``NOTIFY_SOCKET``."""

    def __init__(self, path: Path) -> None:
        self.said: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while data := self._socket.recv(4096):
            self.said.append((time.monotonic(), data.decode()))

    def heard(self, words: str, since_s: float = 0.0) -> list[str]:
        return [line for at, line in list(self.said) if words in line and at >= since_s]

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    folder = Path(tempfile.mkdtemp(prefix="skerry-"))
    found = Manager(folder / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    yield found
    found.close()
    shutil.rmtree(folder)


def started(device: Device, **choices: object) -> Device:
    device.publish(device.bundle("1.0.0", **choices))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(25)
    device.wait_running("1.0.0")
    return device


def test_the_watchdog_is_told_only_while_the_endpoint_answers(
    manager: Manager, make_device: Callable[..., Device]
) -> None:
    device = make_device(silent_s=600, unserved_s=1.5)
    device.start()
    wait_for(lambda: len(manager.heard("WATCHDOG=1")) > 2, why="pings of an agent that has nothing to serve")
    device.publish(device.bundle("1.0.0"))
    device.sync()
    device.wait_running("1.0.0", "trial")
    device.infer(25)
    device.wait_running("1.0.0")
    worker = device.status()["worker"]["pid"]
    os.kill(worker, signal.SIGSTOP)
    try:
        # The loop turns, the control socket answers: the models do not.
        wait_for(lambda: "watchdog not told" in device.log(), why="the silence")
        since = time.monotonic()
        time.sleep(2.0)
        assert manager.heard("WATCHDOG=1", since) == []
        assert device.status()["device"]
    finally:
        os.kill(worker, signal.SIGCONT)
    back = time.monotonic()
    wait_for(lambda: manager.heard("WATCHDOG=1", back), why="pings again")
    assert device.stop() == 0
    wait_for(lambda: manager.heard("STOPPING=1"), why="STOPPING")


def test_a_reload_is_told_to_the_manager_and_a_broken_file_changes_nothing(manager: Manager, device: Device) -> None:
    started(device)
    wait_for(lambda: manager.heard("READY=1"), why="READY")
    good = device.config.read_text()
    device.config.write_text(
        good.replace("drain_s = 3", "drain_s = 4") + '[log]\nlevel = "warning"\n[mqtt]\nkeepalive_s = 7\n'
    )
    assert device.process is not None
    before = time.monotonic()
    device.process.send_signal(signal.SIGHUP)
    (told,) = wait_for(lambda: manager.heard("RELOADING=1", before), why="RELOADING")
    stamp = int(told.partition("MONOTONIC_USEC=")[2])
    assert before * 1e6 <= stamp <= time.monotonic() * 1e6
    wait_for(lambda: manager.heard("READY=1", before), why="READY")
    assert 'live=log.level,timing.drain_s next_worker="" restart=mqtt.keepalive_s' in device.log()

    device.config.write_text("nonsense = 1\n")
    done = agent(device, "reload")
    assert done.returncode == 2, "the command itself reads the file"
    answer = device.call("POST", "/skerry/v1/reload", {})
    assert (answer.status, answer.body["code"]) == (409, "bad_config")
    assert any("unknown key 'nonsense'" in fault for fault in answer.body["faults"])
    wait_for(lambda: manager.heard("STATUS=configuration not taken"), why="the state told to the manager")
    assert device.infer(1) == ["1.0.0"]

    before = time.monotonic()
    device.config.write_text(f"{good}\n[access]\nrate = inf\n")
    device.process.send_signal(signal.SIGHUP)
    wait_for(lambda: manager.heard("READY=1", before), why="READY after a number without an end")
    answer = device.call("POST", "/skerry/v1/reload", {})
    assert (answer.status, answer.body["code"]) == (409, "bad_config")

    device.config.write_text(good.replace("drain_s = 3", "drain_s = 5"))
    done = agent(device, "reload")
    assert done.stdout == "changed: log.level, timing.drain_s\n", done.stderr
    assert json.loads(agent(device, "reload", "--json").stdout) == {"live": [], "next_worker": [], "restart": []}


def test_the_last_lines_of_the_log_are_there_after_a_restart_without_what_was_secret(device: Device) -> None:
    started(device)
    assert agent(device, "logs").returncode == 0
    assert device.stop() == 0
    device.start()
    wait_for(lambda: device.running() == ("1.0.0", "confirmed"), why="the model")
    lines = [json.loads(line) for line in agent(device, "logs").stdout.splitlines()]
    ups = [line for line in lines if line["message"] == "agent up"]
    assert [line["fields"]["device"] for line in ups] == ["d-1", "d-1"], "of both lives"
    assert all({"at", "level", "logger", "message"} <= line.keys() for line in lines)
    assert len(agent(device, "logs", "--last", "2").stdout.splitlines()) == 2
    for path in (device.state_dir / "log.jsonl",):
        assert path.stat().st_mode & 0o777 == 0o600
    before = device.status()["worker"]["pid"]
    device.publish(device.bundle("1.1.0"))
    device.sync()
    device.wait_running("1.1.0", "trial")

    def drained() -> list[dict[str, object]]:
        said = [json.loads(line) for line in agent(device, "logs").stdout.splitlines()]
        return [line for line in said if line["logger"] == "worker.process" and "drained" in str(line["message"])]

    (line,) = wait_for(drained, why="a line of the worker that went")
    assert line["fields"] == {"pid": str(before)}


def agent(device: Device, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skerry_agent", *arguments, "--config", str(device.config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT)


class Client(threading.Thread):
    """Asks on one keep-alive connection until it ends. ``cut``: a request that was on its way had begun to be answered and was not."""

    def __init__(self, connect: Callable[[], http.client.HTTPConnection], data: list[float]) -> None:
        super().__init__(daemon=True)
        self.ok = 0
        self.cut: list[str] = []
        self.since_ok = 0.0
        self._connect = connect
        self._body = json.dumps(
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(data) // 4, 4], "data": data}]}
        )
        self.start()

    def run(self) -> None:
        connection = self._connect()
        while True:
            try:
                connection.request("POST", "/v2/models/gas/infer", self._body)
                response = connection.getresponse()
            except (OSError, http.client.RemoteDisconnected):
                # It had not been taken up: a client that may repeat asks the next agent.
                return
            try:
                body = response.read()
            except (OSError, http.client.HTTPException) as error:
                self.cut.append(repr(error))
                return
            if response.status != 200:
                self.cut.append(f"{response.status} {body!r}")
                return
            self.ok += 1
            self.since_ok = time.monotonic()


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_sigterm_under_load_answers_what_is_in_work_and_counts_exactly_what_was_answered(
    device: Device, server: Server, way: str
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="skerry-"))
    device.config.write_text(f'{device.config.read_text()}[serving]\nsocket = "{folder}/serving.sock"\n')
    started(device)
    port = device.port
    made: dict[str, Callable[[], http.client.HTTPConnection]] = {
        "tcp": lambda: http.client.HTTPConnection("127.0.0.1", port, timeout=30),
        "unix": lambda: UnixConnection(folder / "serving.sock"),
    }
    x, _ = models.rows(1)
    clients = [Client(made[way], x[0].tolist()) for _ in range(4)]
    wait_for(lambda: all(client.ok > 20 for client in clients), why="load")
    assert device.stop() == 0
    for client in clients:
        client.join(TIMEOUT_S)
    assert [cut for client in clients for cut in client.cut] == []
    device.start()
    wait_for(lambda: device.status()["outbox"]["pending"] == 0, why="the outbox")
    assert server.inferences() == sum(client.ok for client in clients) + 25
    assert device.status()["outbox"]["lost"] == {}
    device.stop()
    shutil.rmtree(folder)


def test_sigterm_waits_for_a_long_inference_as_long_as_the_configuration_says(
    make_device: Callable[..., Device],
) -> None:
    device = started(make_device(drain_s=50), kind="slow")
    begun = time.monotonic()
    device.infer(1, value=100_000.0)
    turns = 100_000.0 * 8 / (time.monotonic() - begun)
    x, _ = models.rows(1)
    x[0, 0] = turns
    port = device.port
    client = Client(lambda: http.client.HTTPConnection("127.0.0.1", port, timeout=60), x[0].tolist())
    time.sleep(0.5)
    assert client.ok == 0, "it is in work"
    assert device.stop() == 0
    client.join(TIMEOUT_S)
    assert client.ok, client.cut
