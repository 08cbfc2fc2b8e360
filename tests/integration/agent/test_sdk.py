"""Applications that run the confirmed bundle in their own process: real processes, a real agent, and a server that counts."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import resource
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skerry_agent import appwire, sdk
from skerry_agent import workerwire as ww
from skerry_contract import window as w
from skerry_contract import wire

from tests import models
from tests.integration.agent.rig import HERE, ROOT, TIMEOUT_S, Device, Server, wait_for

NOBODY = 65534
ROW = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)


class Application:
    """An application in a process of its own; ``sdk_app.py``."""

    def __init__(
        self, device: Device, *, threads: int = 1, pause_s: float = 0.001, user: str = "", at: str = ""
    ) -> None:
        handle, self.tally = tempfile.mkstemp(dir=device.folder)
        os.write(handle, bytes(16 * threads))
        os.close(handle)
        where = at or str(apps_socket(device))
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "sdk_app.py"), where, self.tally, str(threads), str(pause_s), user],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "it says that it is ready"
        self.first = json.loads(line)["ready"]

    def counts(self) -> tuple[int, int]:
        """(ended, begun) inferences."""
        data = Path(self.tally).read_bytes()
        numbers = struct.unpack(f"<{len(data) // 8}Q", data)
        return sum(numbers[1::2]), sum(numbers[::2])

    def runs(self, more: int = 50) -> None:
        """Waits until it has made so many more inferences."""
        wanted = self.counts()[0] + more
        wait_for(lambda: self.counts()[0] >= wanted, why="inferences of the application")

    def stop(self) -> dict[str, Any]:
        self.process.terminate()
        out, _ = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode == 0
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found

    def kill(self) -> tuple[int, int]:
        """SIGKILL. (least, most) inferences that it was answered."""
        self.process.kill()
        self.process.communicate()
        return self.counts()


@pytest.fixture
def start(device: Device) -> Iterator[Callable[..., Application]]:
    made: list[Application] = []

    def begin(**choices: Any) -> Application:
        made.append(Application(device, **choices))
        return made[-1]

    yield begin
    for application in made:
        if application.process.poll() is None:
            application.kill()


def apps_socket(device: Device) -> Path:
    return device.state_dir / "run" / "apps.sock"


def confirm(device: Device, version: str, **choices: Any) -> str:
    """Brings the device to a confirmed version: 25 requests over HTTP."""
    digest = device.bundle(version, **choices)
    device.publish(digest)
    if device.process is None:
        device.start()
    else:
        device.sync()
    device.wait_running(version, "trial")
    device.infer(25)
    device.wait_running(version)
    return digest


@pytest.fixture
def running(device: Device) -> Device:
    confirm(device, "1.0.0")
    return device


def opened(device: Device, **choices: Any) -> sdk.Model:
    return sdk.open("gas", socket=apps_socket(device), **choices)


def counted(server: Server, device: Device) -> int:
    """What the applications made, once all of it has arrived: all less the 25 requests of each trial."""
    wait_for(lambda: device.status()["outbox"]["pending"] == 0 and not leftover_rings(device), why="all windows")
    return server.inferences()


def leftover_rings(device: Device) -> list[str]:
    return [path.name for path in (device.state_dir / "rings").glob("app*.ring")]


# --- swaps ---------------------------------------------------------------------------------------------------------------


def test_a_new_version_and_a_revert_swap_between_two_inferences_and_count_under_their_own_keys(
    running: Device, server: Server, start: Callable[..., Application]
) -> None:
    old = running.bundle("1.0.0")
    application = start(threads=2)
    application.runs()
    new = confirm(running, "1.1.0")
    wait_for(lambda: versions(running) == ["1.1.0"], why="the new version in the application")
    application.runs()
    assert running.call("POST", "/skerry/v1/revert", {}).status == 200
    wait_for(lambda: versions(running) == ["1.0.0"], why="the old version in the application")
    application.runs()
    told = application.stop()
    assert set(told["versions"]) == {"1.0.0", "1.1.0"}
    assert told["labels"] == {"matched": 2}
    total = counted(server, running)
    assert total == sum(told["versions"].values()) + 25 + 25
    assert server.inferences(bundle=old) == told["versions"]["1.0.0"] + 25
    assert server.inferences(bundle=new) == told["versions"]["1.1.0"] + 25
    assert running.status()["outbox"]["lost"] == {}


def versions(device: Device) -> list[str]:
    return sorted(v for one in device.status()["applications"]["connected"] for v in one["running"].values())


@pytest.mark.slow
def test_a_rollout_changes_the_key_and_not_the_model(running: Device, server: Server) -> None:
    stable, candidate = running.bundle("1.0.0"), running.bundle("1.1.0")
    with opened(running) as model:
        for _ in range(10):
            model.infer({"x": ROW})
        # Cut 0: this device is control.
        running.publish(stable, candidate, stage=2, cut=0)
        running.sync()
        wait_for(lambda: model.status()["arm"] == "control", why="the new key")
        for _ in range(7):
            model.infer({"x": ROW})
        assert model.version == "1.0.0"
    counted(server, running)
    assert server.inferences(arm="control", rollout="r-1", stage=2) == 7
    assert server.inferences(arm="none") == 10 + 25


def test_labels_of_predictions_before_a_swap_count_under_the_old_bundle_and_those_of_a_dead_process_by_the_endpoint(
    running: Device, server: Server
) -> None:
    old = running.bundle("1.0.0")
    with opened(running) as model:
        before = [model.infer({"x": ROW}).prediction_id for _ in range(5)]
        new = confirm(running, "1.1.0")
        wait_for(lambda: model.version == "1.1.0", why="the swap")
        after = model.infer({"x": ROW}).prediction_id
        assert [model.feedback(one, 1) for one in [*before[:3], after]] == ["matched"] * 4
        assert model.feedback(before[0], 1) == "duplicate"
        assert model.feedback(before[0], 2) == "conflicting"
        with pytest.raises(sdk.Rejected, match="invalid_label"):
            model.feedback(after, "no such class")
        with pytest.raises(sdk.Rejected, match="other_life"):
            model.feedback("gas-0123456789-0", 1)
        assert model.flush()
    wait_for(lambda: post_label(running, before[4]) == "matched", why="the book in the worker")
    with opened(running) as model, pytest.raises(sdk.Rejected, match="other_life"):
        model.feedback(before[3], 1)
    wait_for(lambda: matched(server, old) == 4 and matched(server, new) == 1, why="the labels")


def matched(server: Server, digest: str) -> int:
    return sum(window.labels.matched for window in server.windows() if window.key.bundle == digest)


def post_label(device: Device, ident: str) -> str:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", device.port, timeout=20)
    connection.request("POST", "/skerry/v1/feedback", json.dumps({"feedback": [{"id": ident, "label": 1}]}))
    answer = json.loads(connection.getresponse().read())
    return str(answer["feedback"][0]["outcome"])


# --- deaths --------------------------------------------------------------------------------------------------------------


def test_kill_9_of_the_application_loses_and_doubles_no_counted_inference(
    running: Device, server: Server, start: Callable[..., Application]
) -> None:
    least = most = 25
    for _ in range(3):
        application = start(threads=2, pause_s=0.0005)
        application.runs(300)
        ended, begun = application.kill()
        least, most = least + ended, most + begun
    assert least <= counted(server, running) <= most
    assert running.status()["outbox"]["lost"] == {}


def test_kill_9_of_the_agent_the_application_goes_on_and_nothing_is_lost_or_doubled(
    running: Device, server: Server, start: Callable[..., Application]
) -> None:
    application = start(threads=2)
    for _ in range(2):
        application.runs()
        running.kill()
        application.runs(200)
        running.start()
        wait_for(lambda: versions(running) == ["1.0.0"], why="the application's return")
    application.runs()
    told = application.stop()
    assert counted(server, running) == sum(told["versions"].values()) + 25
    assert running.status()["outbox"]["lost"] == {}


@pytest.mark.slow
def test_kill_9_of_the_agent_and_then_of_the_application_loses_nothing_that_the_ring_holds(
    running: Device, server: Server, start: Callable[..., Application]
) -> None:
    application = start(threads=2)
    application.runs()
    running.kill()
    application.runs(200)
    ended, begun = application.kill()
    running.start()
    running.wait_running("1.0.0")
    assert ended + 25 <= counted(server, running) <= begun + 25


@pytest.mark.slow
def test_an_agent_that_is_away_for_more_than_a_ring_is_told_everything_when_it_is_back(
    running: Device, server: Server
) -> None:
    made = 20_000
    with opened(running) as model:
        running.kill()
        wait_for(lambda: not model.status()["connected"], why="the end of the connection")
        for _ in range(made):
            model.infer({"x": ROW})
        assert model.status()["error"]["code"] in ("agent_away", "not_running")
        running.start()
        wait_for(model.flush, why="the windows")
    assert counted(server, running) == made + 25
    assert running.status()["outbox"]["lost"] == {}


@pytest.mark.slow
def test_two_applications_and_the_endpoint_are_counted_together(
    running: Device, server: Server, start: Callable[..., Application]
) -> None:
    one, other = start(), start(threads=3)
    one.runs()
    other.runs()
    running.infer(30)
    told = [one.stop(), other.stop()]
    assert counted(server, running) == sum(sum(t["versions"].values()) for t in told) + 25 + 30


# --- one process -----------------------------------------------------------------------------------------------------------


def test_threads_and_coroutines_share_one_model(running: Device, server: Server) -> None:
    with opened(running) as model:

        async def ask() -> list[str]:
            found = await asyncio.gather(*(asyncio.to_thread(model.infer, {"x": ROW}) for _ in range(60)))
            return [answer.prediction_id for answer in found]

        ids = asyncio.run(ask())
        threads = [
            threading.Thread(target=lambda: ids.extend(model.infer({"x": ROW}).prediction_id for _ in range(500)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(ids)) == 60 + 2000
    assert counted(server, running) == 2060 + 25


@pytest.mark.slow
def test_answers_are_those_of_the_worker_and_bad_input_is_refused_and_counted(running: Device, server: Server) -> None:
    with opened(running) as model:
        answer = model.infer({"x": ROW.tolist()})
        assert answer.outputs["probabilities"].shape == (1, 3)
        np.testing.assert_allclose(answer.outputs["probabilities"], models.probabilities(ROW), atol=1e-5)
        batch = model.infer({"x": np.repeat(ROW, 3, 0)})
        assert batch.outputs["probabilities"].shape == (3, 3)
        assert model.feedback(batch.prediction_id, 1, row=2) == "matched"
        for wrong in ({"y": ROW}, {"x": ROW[:, :2]}, {"x": "a"}, {"x": np.zeros((100_000, 4), np.float32)}):
            with pytest.raises(sdk.BadInput):
                model.infer(wrong)
    counted(server, running)
    windows = [window for window in server.windows() if window.counts.ok == 2]
    assert sum(window.counts.invalid for window in server.windows()) == 4
    assert windows
    assert all(window.features for window in windows), "values are counted as a worker counts them"


@pytest.mark.slow
def test_a_closed_model_and_the_child_of_a_fork_answer_no_more_and_the_parent_goes_on(
    running: Device, server: Server
) -> None:
    model = opened(running)
    model.infer({"x": ROW})
    child = os.fork()
    if child == 0:
        try:
            model.infer({"x": ROW})
        except sdk.Degraded as error:
            os._exit(0 if error.code == "forked" else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    time.sleep(1.2)
    model.infer({"x": ROW})
    assert model.flush()
    model.close()
    with pytest.raises(sdk.Degraded, match="closed"):
        model.infer({"x": ROW})
    assert counted(server, running) == 2 + 25


# --- what does not open ----------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_named(device: Device) -> None:
    with pytest.raises(sdk.Degraded, match=r"not_running: no agent answers at .*apps.sock"):
        opened(device)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    with pytest.raises(sdk.Degraded, match="not_confirmed: gas is on trial"):
        opened(device)
    with pytest.raises(sdk.Degraded, match="unknown_model: this device has gas, and no other"):
        sdk.open("other", socket=apps_socket(device))
    waiting: list[str] = []

    def wait() -> None:
        with opened(device, wait_s=60) as model:
            waiting.append(model.version)

    thread = threading.Thread(target=wait)
    thread.start()
    device.infer(25)
    thread.join(TIMEOUT_S)
    assert waiting == ["1.0.0"]


def test_a_runtime_that_the_application_lacks_is_named_to_it_and_to_the_server(running: Device, server: Server) -> None:
    program = (
        "import sys\nsys.modules['onnxruntime'] = None\nfrom skerry_agent import sdk\n"
        f"try:\n    sdk.open('gas', socket={str(apps_socket(running))!r})\n"
        "except sdk.Degraded as error:\n    print(error.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT)
    assert done.stdout.strip() == "runtime_missing", done.stderr
    event = wait_for(lambda: server.events("application"), why="the event")[0]
    assert (event.code, event.data["model"], event.data["where"]) == ("runtime_missing", "gas", "application")
    wait_for(lambda: not leftover_rings(running), why="the ring's end")
    assert running.status()["outbox"]["lost"] == {}


@pytest.mark.slow
def test_a_bundle_that_fails_its_golden_cases_here_leaves_the_old_one_at_work(running: Device) -> None:
    with opened(running) as model:
        # Damaged on disk after it was confirmed: no reader but this one looks at the hash again.
        digest = running.bundle("1.1.0")
        running.publish(digest)
        running.sync()
        running.wait_running("1.1.0", "trial")
        file = next((running.state_dir / "slots" / digest).rglob("*.onnx"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.chmod(0o600)
        file.write_bytes(data)
        running.infer(25)
        wait_for(lambda: (model.status()["error"] or {}).get("code") == "hash_mismatch", why="the refusal")
        assert model.infer({"x": ROW}).version == "1.0.0"


# --- other users, and worse ------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(device: Device) -> Iterator[str]:
    """A socket where other users come; the state folder is not theirs to see."""
    folder = Path(tempfile.mkdtemp(prefix="skerry-test-"))
    folder.chmod(0o755)
    lines = f'[apps]\nsocket = "{folder}/apps.sock"\nsocket_mode = "0666"\nusers = ["{NOBODY}"]\n'
    device.config.write_text(device.config.read_text() + lines)
    confirm(device, "1.0.0")
    yield f"{folder}/apps.sock"
    device.close()
    folder.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_an_application_of_another_user_gets_the_bundle_and_its_ring_as_descriptors(
    device: Device, outside: str, server: Server, start: Callable[..., Application]
) -> None:
    application = start(user=str(NOBODY), at=outside)
    application.runs()
    rings = [device.state_dir / "rings" / name for name in leftover_rings(device)]
    assert [(ring.stat().st_uid, ring.stat().st_mode & 0o777) for ring in rings] == [(0, 0o600)]
    device.kill()
    application.runs()
    device.start()
    wait_for(lambda: versions(device) == ["1.0.0"], why="the application's return")
    assert device.status()["applications"]["connected"][0]["uid"] == NOBODY
    application.runs()
    ended, begun = application.kill()
    assert ended + 25 <= counted(server, device) <= begun + 25
    assert device.status()["outbox"]["lost"] == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_user_who_is_not_named_is_turned_away(device: Device, outside: str) -> None:
    program = (
        "import os, sys\nfrom skerry_agent import sdk\nos.setresuid(1234, 1234, 1234)\n"
        f"try:\n    sdk.open('gas', socket={outside!r})\nexcept sdk.Degraded as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT)
    assert done.stdout.strip() == "not_allowed: user 1234 is not in apps.users of this agent"
    assert device.status()["applications"]["connected"] == []


def greeted(device: Device) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(10)
    sock.connect(str(apps_socket(device)))
    appwire.send(sock, appwire.Hello(protocol=appwire.PROTOCOL, agent="test"))
    found = appwire.receive_at_application(sock)
    assert found is not None
    assert isinstance(found[0], appwire.Welcome)
    return sock


def hung_up(sock: socket.socket) -> bool:
    try:
        while appwire.receive_at_application(sock) is not None:
            pass
    except ConnectionError:
        pass
    sock.close()
    return True


def granted(sock: socket.socket) -> appwire.Grant:
    appwire.send(sock, appwire.Follow(model="gas"))
    found = appwire.receive_at_application(sock)
    assert found is not None
    assert isinstance(found[0], appwire.Grant)
    for fd in found[1]:
        os.close(fd)
    return found[0]


def window(key: w.Key, ok: int = 1) -> bytes:
    moment = w.Instant("00" * 16, 1, 1, True)
    return wire.encode(w.Window(key=key, start=moment, end=moment, counts=w.Counts(ok=ok, rows=ok)))


def test_an_application_counts_under_no_other_key_no_other_ring_and_nothing_twice(
    running: Device, server: Server
) -> None:
    digest = running.bundle("1.0.0")
    key = w.Key("gas", digest, models_variant(running, digest), "none", "", 0)
    forged = [
        lambda ring: ww.WindowCut(ring=ring, start=0, upto=1, body=window(key._replace(arm="candidate")), inferences=1),
        lambda ring: ww.WindowCut(ring=ring, start=0, upto=1, body=window(key._replace(bundle="0" * 64)), inferences=1),
        lambda ring: ww.WindowCut(ring=ring, start=5, upto=6, body=window(key), inferences=1),
        lambda _: ww.WindowCut(ring=worker_ring(running), start=0, upto=1, body=window(key), inferences=1),
        lambda ring: (
            appwire.Keep(ring=worker_ring(running), parts=(), key=tuple(key), version="1.0.0") and ww.Flush(id=1)
        ),
    ]
    for make in forged:
        sock = greeted(running)
        ring = granted(sock).served.ring
        appwire.send(sock, make(ring))
        assert hung_up(sock)
    for ring in ("", "/", "app1-gas-0.ring", str(running.state_dir / "rings" / "app999-gas-0.ring")):
        sock = greeted(running)
        appwire.send(sock, appwire.Keep(ring=ring, parts=(), key=tuple(key), version="1.0.0"))
        found = appwire.receive_at_application(sock)
        assert found == (appwire.Held(ring=ring, ok=False), [])
        sock.close()
    for rubbish in (b"", b"\xc1", b"\x81\xa1t\xa5hello", b"x" * 60_000):
        sock = greeted(running)
        sock.send(rubbish)
        if rubbish:
            assert hung_up(sock)
    # The same window twice on one connection: the second does not follow the first.
    sock = greeted(running)
    ring = granted(sock).served.ring
    good = ww.WindowCut(ring=ring, start=0, upto=1, body=window(key), inferences=1)
    appwire.send(sock, good)
    appwire.send(sock, good)
    assert hung_up(sock)
    wait_for(lambda: server.inferences(arm="none") == 26, why="the one good window")
    assert counted(server, running) == 26
    assert running.status()["applications"]["connected"] == []
    running.infer(1)


def test_a_bundle_that_an_application_refuses_again_and_again_is_told_once(running: Device, server: Server) -> None:
    digest = running.bundle("1.0.0")
    for _ in range(2):
        sock = greeted(running)
        ring = granted(sock).served.ring
        for code in ("golden_failed", *(f"code{i}" for i in range(200))):
            appwire.send(
                sock, appwire.Refused(model="gas", digest=digest, ring=ring, code=code, detail="x" * 500)
            )  # fmt: skip
        appwire.send(sock, appwire.Refused(model="other", digest="0" * 64, ring=ring, code="made_up", detail=""))
        appwire.send(sock, ww.Flush(id=1))
        assert hung_up(sock)
    wait_for(lambda: running.status()["outbox"]["pending"] == 0, why="all events")
    assert [event.code for event in server.events("application")] == ["golden_failed"]


def test_a_window_that_cannot_be_is_put_aside_and_its_ring_given_up_once_a_minute(
    running: Device, server: Server
) -> None:
    digest = running.bundle("1.0.0")
    key = w.Key("gas", digest, models_variant(running, digest), "none", "", 0)
    sock = greeted(running)
    first = granted(sock).served.ring
    appwire.send(sock, ww.WindowCut(ring=first, start=0, upto=1, body=window(key), inferences=1_000_000))
    # Another ring first, so that nothing is written into the one that a worker folds.
    found = appwire.receive_at_application(sock)
    assert found is not None
    grant, fds = found
    assert isinstance(grant, appwire.Grant)
    for fd in fds:
        os.close(fd)
    found = appwire.receive_at_application(sock)
    assert found is not None
    assert found[0] == appwire.Held(ring=first, ok=False)
    # What was on its way from that ring is nothing to hang up for, what the next one brings is.
    appwire.send(sock, ww.WindowCut(ring=first, start=1, upto=2, body=window(key), inferences=1))
    second = grant.served.ring
    appwire.send(sock, ww.WindowCut(ring=second, start=0, upto=1, body=window(key), inferences=1))
    wait_for(lambda: server.inferences(arm="none") == 26, why="the good window of the second ring")
    appwire.send(sock, ww.WindowCut(ring=second, start=1, upto=2, body=b"\x00" * 40, inferences=1))
    assert hung_up(sock)
    assert counted(server, running) == 26


@pytest.mark.slow
def test_a_window_that_cannot_be_loses_no_inference_of_its_application(
    running: Device, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(running)
    for _ in range(30):
        model.infer({"x": ROW})
    ledger = model._connection.ledger
    take = ledger.take

    def spoilt(message: ww.WindowCut | ww.BookClosed) -> None:
        if isinstance(message, ww.WindowCut):
            monkeypatch.setattr(ledger, "take", take)
            message = ww.WindowCut(
                ring=message.ring, start=message.start, upto=message.upto, body=message.body, inferences=message.inferences + 1
            )  # fmt: skip
        take(message)

    monkeypatch.setattr(ledger, "take", spoilt)
    assert model.flush(20.0)
    for _ in range(20):
        model.infer({"x": ROW})
    assert model.flush(20.0)
    model.close()
    assert counted(server, running) == 25 + 50


def test_a_child_of_a_fork_that_opens_its_own_model_is_counted(running: Device, server: Server) -> None:
    program = f"""
import os, time
import numpy as np
import onnxruntime
from skerry_agent import sdk
started = time.process_time()
while time.process_time() - started < 0.5: pass
child = os.fork()
if child == 0:
    with sdk.open("gas", socket={str(apps_socket(running))!r}) as model:
        for _ in range(40):
            model.infer({{"x": np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)}})
        os._exit(0 if model.flush(20.0) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert counted(server, running) == 25 + 40
    assert "window cannot be" not in running.log()


def test_the_child_of_a_fork_closes_no_descriptor_but_its_own_copies(running: Device) -> None:
    model = opened(running)
    model.infer({"x": ROW})
    child = os.fork()
    if child == 0:
        # These take the numbers of what was given up.
        opened_here = [os.open("/dev/null", os.O_RDONLY) for _ in range(16)]
        model.close()
        del model._connection._sock
        gc.collect()
        try:
            for fd in opened_here:
                os.fstat(fd)
        except OSError:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    model.infer({"x": ROW})
    assert model.flush(20.0), "its locks and its connection are the parent's still"
    model.close()


def test_an_application_short_of_descriptors_answers_on_and_finds_the_agent_again(
    running: Device, server: Server
) -> None:
    model = opened(running)
    model.infer({"x": ROW})
    assert model.flush(20.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    running.stop()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        failures = model._connection._failures
        wait_for(lambda: model._connection._failures >= failures + 2, why="tries without a descriptor")
        for _ in range(10):
            model.infer({"x": ROW})
        assert not model.flush(0.1)
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    running.start()
    wait_for(lambda: model.flush(1.0), why="the agent found again")
    model.close()
    assert model.flush(0.1), "after its end all is handed over, and nobody is asked"
    assert counted(server, running) == 25 + 11


def test_the_agent_outlives_a_store_that_another_program_holds_when_an_application_goes(running: Device) -> None:
    model = opened(running)
    model.infer({"x": ROW})
    assert model.flush(20.0)
    with contextlib.closing(sqlite3.connect(running.state_dir / "state.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        model.close()
        wait_for(lambda: not leftover_rings(running) or time.sleep(3.0) is None, why="ticks with a ring gone")
        other.execute("ROLLBACK")
    running.infer(1)
    wait_for(lambda: not leftover_rings(running), why="the ring folded")
    running.infer(1)


def models_variant(device: Device, digest: str) -> str:
    raw = json.loads((device.state_dir / "slots" / digest / "manifest.json").read_bytes())
    return str(raw["variants"][0]["id"])


def worker_ring(device: Device) -> str:
    return str(next(path for path in (device.state_dir / "rings").glob("[0-9]*.ring")))


def test_no_more_applications_connect_than_the_configuration_allows(device: Device) -> None:
    device.config.write_text(device.config.read_text() + "[apps]\nclients = 2\n")
    confirm(device, "1.0.0")
    with opened(device), opened(device), pytest.raises(sdk.Degraded, match="too_many_applications"):
        opened(device)
    with opened(device, wait_s=10) as model:
        model.infer({"x": ROW})


def test_an_application_stops_answering_below_a_forced_floor_until_a_permitted_version_is_confirmed(
    running: Device, server: Server
) -> None:
    with opened(running) as model:
        assert model.infer({"x": ROW}).outputs
        running.world["floors"] = running.world["forced"] = {"gas": "1.5.0"}
        running.save()
        running.sync()

        def refused() -> str:
            try:
                model.infer({"x": ROW})
            except sdk.Degraded as error:
                return error.code
            return ""

        wait_for(lambda: refused() == "below_forced_floor", why=lambda: running.log()[-3000:])
        confirm(running, "1.5.0")
        wait_for(lambda: refused() == "", why="the permitted version")
        assert model.version == "1.5.0"
