"""Late labels and the unix socket on a whole device: predictions are remembered through swaps, kills and restarts."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from skerry_agent import config, local_socket
from skerry_agent.errors import Degraded

from tests import models
from tests.integration.agent.rig import Device, Server, wait_for


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=15)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def predict(connection: http.client.HTTPConnection) -> tuple[str, str]:
    """(prediction id, version) of one inference."""
    x, _ = models.rows(1)
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": x[0].tolist()}]}
    connection.request("POST", "/v2/models/gas/infer", json.dumps(body))
    answer = json.loads(connection.getresponse().read())
    return answer["parameters"]["prediction_id"], answer["model_version"]


def label(connection: http.client.HTTPConnection, *ids: str) -> list[str]:
    body = {"feedback": [{"id": one, "label": 1} for one in ids]}
    connection.request("POST", "/skerry/v1/feedback", json.dumps(body))
    answer = json.loads(connection.getresponse().read())
    return [one["outcome"] for one in answer["feedback"]]


def matched(server: Server, digest: str) -> int:
    return sum(window.labels.matched for window in server.windows() if window.key.bundle == digest)


def duplicates(server: Server, digest: str) -> int:
    return sum(window.labels.duplicate for window in server.windows() if window.key.bundle == digest)


@pytest.fixture
def running(device: Device) -> tuple[Device, str]:
    """A device that answers with 1.0.0."""
    digest = device.bundle("1.0.0")
    device.publish(digest)
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(25)
    device.wait_running("1.0.0")
    return device, digest


def worker_pid(device: Device) -> int:
    return int(device.status()["worker"]["pid"])


def test_labels_after_a_swap_reach_the_server_under_the_old_bundle(running: tuple[Device, str], server: Server) -> None:
    device, old = running
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=20)
    before = [predict(connection)[0] for _ in range(12)]
    new = device.bundle("1.1.0")
    device.publish(new)
    device.sync()
    device.wait_running("1.1.0", "trial", "confirmed")
    assert predict(connection)[1] == "1.1.0"
    # Twice over: the second of each is a duplicate, and the server hears of both.
    assert label(connection, *before) == ["matched"] * 12
    assert label(connection, *before[:5], predict(connection)[0]) == ["duplicate"] * 5 + ["matched"]
    wait_for(lambda: matched(server, old) == 12 and matched(server, new) == 1, why="the labels")
    (confusion,) = {w.labels.confusion for w in server.windows() if w.key.bundle == new and w.labels.matched}
    assert sum(confusion) == 1
    wait_for(lambda: duplicates(server, old) >= 5, why="the duplicates, which stand in a window of their own")
    assert duplicates(server, old) == 5


def test_kill_9_of_the_worker_and_then_of_the_agent_between_predictions_and_labels(
    running: tuple[Device, str], server: Server
) -> None:
    device, digest = running
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=20)
    first = [predict(connection)[0] for _ in range(20)]
    pid = worker_pid(device)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: worker_pid(device) not in (0, pid), why="the next worker")
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=20)
    second = [predict(connection)[0] for _ in range(5)]
    assert label(connection, *first[:10]) == ["matched"] * 10
    pid = worker_pid(device)
    device.kill()
    # The worker notices, finishes and leaves; its books stay.
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in state_of(pid), why="the orphan's end")
    device.start()
    wait_for(lambda: device.running()[0] == "1.0.0", why="the model")
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=20)
    assert label(connection, *first, *second) == ["duplicate"] * 10 + ["matched"] * 15
    wait_for(lambda: matched(server, digest) == 25, why="the labels")
    time.sleep(0.5)
    assert matched(server, digest) == 25
    assert server.inferences() == 25 + 25
    assert device.status()["outbox"]["lost"] == {}


def test_labels_for_a_worker_that_hangs_and_outlives_its_agent_wait_for_its_end_and_count_once(
    running: tuple[Device, str], server: Server
) -> None:
    device, digest = running
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=20)
    ids = [predict(connection)[0] for _ in range(10)]
    assert label(connection, *ids[:4]) == ["matched"] * 4
    pid = worker_pid(device)
    os.kill(pid, signal.SIGSTOP)
    device.kill()
    # Elsewhere: at the old address the next agent would end the worker before it serves itself.
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    device.config.write_text(f"{device.config.read_text()}[serving]\nport = {port}\n")
    device.start()
    wait_for(lambda: device.running()[0] == "1.0.0", why="the model")
    books = {path.name for path in (device.state_dir / "rings").glob("*.labels")}
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=30)
    assert label(connection, *ids) == ["duplicate"] * 4 + ["matched"] * 6
    assert not Path(f"/proc/{pid}").exists() or "Z" in state_of(pid)
    assert len(books) == 2
    wait_for(lambda: matched(server, digest) == 10, why="the labels")
    time.sleep(0.5)
    assert matched(server, digest) == 10
    assert sum(w.labels.duplicate for w in server.windows()) == 4
    assert server.inferences() == 25 + 10
    assert device.status()["outbox"]["lost"] == {}


def test_the_unix_socket_of_a_worker_that_hangs_and_outlives_its_agent_is_taken_over(
    device: Device, short_folder: Path
) -> None:
    path = short_folder / "a.sock"
    device.config.write_text(device.config.read_text() + f'[serving]\nsocket = "{path}"\n')
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(25)
    device.wait_running("1.0.0")
    pid = worker_pid(device)
    os.kill(pid, signal.SIGSTOP)
    device.kill()
    device.config.write_text(device.config.read_text().replace("[serving]\n", "[serving]\nport = 0\n"))
    (device.state_dir / "run" / "serving.json").unlink()
    device.start()
    wait_for(lambda: device.running()[0] == "1.0.0", why="the model")
    assert predict(UnixConnection(path))[1] == "1.0.0"
    assert not Path(f"/proc/{pid}").exists() or "Z" in state_of(pid)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_books_go_when_no_label_can_come_any_more(device: Device, server: Server) -> None:
    device.config.write_text(device.config.read_text() + "[labels]\nmax_age_s = 0.5\n")
    first, second = device.bundle("1.0.0"), device.bundle("1.1.0")
    device.publish(first)
    device.start()
    device.wait_running("1.0.0", "trial")
    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=20)
    prediction = [predict(connection)[0] for _ in range(30)][-1]
    time.sleep(2.1)
    assert label(connection, prediction) == ["late"]
    device.wait_running("1.0.0")
    device.publish(second)
    device.sync()
    device.wait_running("1.1.0", "trial")
    books = device.state_dir / "rings"
    wait_for(lambda: len(list(books.glob("*.labels"))) == 1, why="one book")
    assert label(connection, prediction) == ["unknown"]
    wait_for(lambda: sum(w.labels.late for w in server.windows()) == 1, why="the late one")
    assert device.status()["outbox"]["lost"] == {}


@pytest.fixture
def short_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


def test_without_a_port_only_the_unix_socket_answers(device: Device, short_folder: Path) -> None:
    path = short_folder / "a.sock"
    device.config.write_text(device.config.read_text() + f'[serving]\nport = "none"\nsocket = "{path}"\n')
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    connection = UnixConnection(path)
    ids = [predict(connection)[0] for _ in range(25)]
    device.wait_running("1.0.0")
    assert label(connection, *ids) == ["matched"] * 25
    assert json.loads((device.state_dir / "run" / "serving.json").read_bytes()) == {"socket": str(path)}
    assert device.process is not None
    agent = psutil.Process(device.process.pid)
    listening = [c.laddr for p in (agent, *agent.children()) for c in p.net_connections("inet") if c.status == "LISTEN"]
    assert listening == []
    told = subprocess.run(
        [sys.executable, "-m", "skerry_agent", "status", "--config", str(device.config)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"answers at {path}\n" in told.stdout, told


def test_the_unix_socket_answers_as_the_address_does_and_no_swap_fails_a_request_on_it(
    device: Device, server: Server, short_folder: Path
) -> None:
    path = short_folder / "a.sock"
    # Left over from an agent that was killed.
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    device.config.write_text(device.config.read_text() + f'[serving]\nsocket = "{path}"\n')
    digests = [device.bundle(version) for version in ("1.0.0", "1.1.0")]
    device.publish(digests[0])
    device.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert device.status()["serving"]["socket"] == str(path)
    device.wait_running("1.0.0", "trial")
    over = threading.Event()
    failures: list[str] = []
    answers: list[str] = []

    def loop(pause_s: float) -> None:
        connection = UnixConnection(path)
        while not over.is_set():
            try:
                answers.append(predict(connection)[1])
            except (OSError, http.client.HTTPException, KeyError) as error:
                failures.append(f"{type(error).__name__}: {error}")
                connection.close()
            time.sleep(pause_s)

    threads = [threading.Thread(target=loop, args=(pause_s,)) for pause_s in (0.005, 0.01, 0.3)]
    for thread in threads:
        thread.start()
    device.wait_running("1.0.0")
    for i in range(1, 4):
        device.publish(digests[i % 2])
        device.sync()
        device.wait_running(("1.0.0", "1.1.0")[i % 2])
    over.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(answers) == {"1.0.0", "1.1.0"}
    wait_for(lambda: server.inferences() == len(answers), why="every answer counted")
    assert device.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize("size", [97, 98, 100, 104, 107])
def test_a_socket_answers_at_every_path_that_the_configuration_takes(tmp_path: Path, size: int) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        path = folder / ("s" * (size - len(f"{folder}/")))
        assert len(str(path)) == size
        text = f'state_dir = "{tmp_path}"\n[serving]\nport = "none"\nsocket = "{path}"\n'
        (tmp_path / "agent.toml").write_text(text)
        found = local_socket.bind(Path(config.load(tmp_path / "agent.toml", {}).serving.socket), 0o600)
        found.socket.listen()
        with socket.socket(socket.AF_UNIX) as application:
            application.connect(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [entry.name for entry in folder.iterdir()] == [path.name]
        # A second agent finds it answering, also at the end of what a path may have.
        with pytest.raises(Degraded, match="another program answers there"):
            local_socket.bind(path, 0o600)
        found.close()
        assert list(folder.iterdir()) == []
    finally:
        shutil.rmtree(folder)


def test_a_socket_that_another_program_answers_on_is_left_to_it(device: Device, short_folder: Path) -> None:
    path = short_folder / "a.sock"
    device.config.write_text(device.config.read_text() + f'[serving]\nsocket = "{path}"\n')
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert "address_in_use" in refusal(device)
        with socket.socket(socket.AF_UNIX) as still:
            still.connect(str(path))


def test_a_file_in_the_place_of_the_socket_is_not_removed(device: Device, short_folder: Path) -> None:
    path = short_folder / "a.sock"
    path.write_text("precious")
    device.config.write_text(device.config.read_text() + f'[serving]\nsocket = "{path}"\n')
    assert "address_in_use" in refusal(device)
    assert path.read_text() == "precious"


def refusal(device: Device) -> str:
    """What an agent says that does not start."""
    command = [sys.executable, "-m", "skerry_agent", "run", "--config", str(device.config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    return ended.stderr
