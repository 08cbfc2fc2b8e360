"""kill -9 of supervisor, worker and broker in the middle of work: everything is counted once, something always serves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from skerry_agent.slots import read_pointers

from tests import models
from tests.integration.agent.rig import Broker, Device, Load, Server, wait_for
from tests.integration.agent.test_update import digest_of, offer


@pytest.fixture
def serving(device: Device, server: Server) -> Device:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    return device


def move(device: Device) -> None:
    """Gives the agent another address, from its next start on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    device.config.write_text(f"{device.config.read_text()}[serving]\nport = {port}\n")


def test_a_killed_worker_is_replaced_and_its_ring_is_folded(serving: Device, server: Server) -> None:
    with Load(serving, clients=1) as load:
        for _ in range(3):
            pid = wait_for(lambda: serving.status()["worker"]["pid"], why="a worker")
            before = load.ok
            wait_for(lambda before=before: load.ok > before + 20, why="answers")
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: serving.status()["worker"]["pid"] not in (0, pid), why="another worker")
        wait_for(lambda: load.ok > before + 40, why="answers")
    # A reply that was on its way when the worker was killed is counted, and the client did not get it.
    counted = wait_for(lambda: (n := server.inferences()) >= 20 + load.ok and n, why=f"{20 + load.ok} counted")
    time.sleep(0.5)
    assert server.inferences() - (20 + load.ok) <= len(load.failed)
    assert counted and server.conflicts == []
    assert serving.running() == ("1.0.0", "confirmed")
    # Not only at the next sync.
    wait_for(
        lambda: {one.state for one in server.states[-1].running.values()} == {"confirmed"}, why="word of its return"
    )


def test_a_killed_supervisor_takes_its_worker_along_and_loses_nothing(serving: Device, server: Server) -> None:
    asked = 20
    for _ in range(3):
        asked += len(serving.infer(17))
        worker = psutil.Process(serving.status()["worker"]["pid"])
        serving.kill()
        wait_for(
            lambda worker=worker: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, why="its end"
        )
        serving.start()
        serving.wait_running("1.0.0", "confirmed")
        wait_for(lambda: serving.status()["worker"]["pid"], why="a worker")
    wait_for(lambda asked=asked: server.inferences() == asked, why=f"{asked} counted, got {server.inferences()}")
    time.sleep(0.5)
    assert server.inferences() == asked
    assert server.conflicts == []
    wait_for(lambda: len(list((serving.state_dir / "rings").glob("*.ring"))) == 1, why="only the live ring")


def test_what_the_worker_of_a_killed_supervisor_still_answers_is_counted_when_it_is_gone(
    serving: Device, server: Server
) -> None:
    x, _ = models.rows(1)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": x[0].tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()
    sent = b"POST /v2/models/gas/infer HTTP/1.1\r\nHost: d\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", serving.port)
        clients = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(20)]
        for client in clients:
            client.sendall(sent)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        # The device is so loaded that the worker gets no turn: requests wait in its sockets while the supervisor dies.
        pid = serving.status()["worker"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        for client in clients:
            client.sendall(sent)
        serving.kill()
        # Elsewhere, since the old address is still held: the next supervisor is up before the old worker has its turn.
        move(serving)
        serving.start()
        serving.infer(1)
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)
        answered = sum(client.recv(65536).startswith(b"HTTP/1.1 200") for client in clients)
    assert answered > 0
    made = 20 + 20 + 1 + answered
    wait_for(lambda: server.inferences() == made, why=f"{made} counted, got {server.inferences()}")
    time.sleep(0.5)
    assert server.inferences() == made
    assert server.conflicts == []
    wait_for(lambda: len(list((serving.state_dir / "rings").glob("*.ring"))) == 1, why="only the live ring")


@pytest.mark.parametrize("address", [pytest.param("kept", marks=pytest.mark.slow), "changed"])
def test_a_worker_that_hangs_when_its_supervisor_is_killed_is_ended_and_its_address_and_counts_are_taken_over(
    serving: Device, server: Server, address: str
) -> None:
    serving.infer(13)
    port, worker = serving.port, psutil.Process(serving.status()["worker"]["pid"])
    worker.suspend()
    serving.kill()
    if address == "changed":
        move(serving)
    serving.start()
    assert serving.infer(4) == ["1.0.0"] * 4
    assert (serving.port == port) == (address == "kept"), serving.log()[-3000:]
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, why="its end")
    wait_for(lambda: server.inferences() == 37, why=f"37 counted, got {server.inferences()}")
    assert "worker of a former life ended" in serving.log()


def test_a_supervisor_killed_in_a_trial_starts_with_what_was_confirmed(serving: Device, server: Server) -> None:
    second = offer(serving, "1.1.0", seed=1)
    serving.wait_running("1.1.0", "trial")
    serving.kill()
    serving.world["down"] = True
    serving.save()
    serving.start()
    serving.wait_running("1.0.0", "confirmed")
    serving.wait_update("idle", "trial_crashed")
    # Once is a power cut, as likely as not: it may try again.
    serving.world["down"] = False
    serving.save()
    serving.sync()
    serving.wait_running("1.1.0", "trial")
    serving.kill()
    # This time the disk takes neither the pointer file nor another, which keeps nobody from serving.
    slots = serving.state_dir / "slots"
    refused = [slots / "pointers.json.new", serving.state_dir / "run" / "supervisor.pid.new"]
    for path in refused:
        path.symlink_to(slots / "nowhere" / "file")
    serving.start()
    serving.wait_running("1.0.0", "confirmed")
    assert read_pointers(slots)["gas"].active != read_pointers(slots)["gas"].confirmed
    for path in refused:
        path.unlink()
    wait_for(
        lambda: read_pointers(slots)["gas"].active == read_pointers(slots)["gas"].confirmed, why="the pointer file"
    )
    serving.synced()
    assert serving.status()["update"]["state"] == "idle"
    assert serving.running() == ("1.0.0", "confirmed")
    wait_for(lambda: sum(e.code == "trial_crashed" and e.data["digest"] == second for e in server.events()) == 2)


def test_a_confirmation_that_power_cut_before_the_pointer_file_is_carried_out_at_the_next_start(
    serving: Device, server: Server
) -> None:
    offer(serving, "1.1.0", seed=1)
    serving.wait_running("1.1.0", "trial")
    serving.infer(20)
    serving.wait_running("1.1.0", "confirmed")
    assert serving.stop() == 0
    path = serving.state_dir / "slots" / "pointers.json"
    pointers = json.loads(path.read_text())
    gas = pointers["models"]["gas"]
    pointers["models"]["gas"] = {"confirmed": gas["previous"], "previous": None, "active": gas["active"]}
    path.write_text(json.dumps(pointers))
    serving.world["down"] = True
    serving.save()
    serving.start()
    serving.wait_running("1.1.0", "confirmed")
    assert serving.infer(3) == ["1.1.0"] * 3
    assert json.loads(path.read_text())["models"]["gas"]["previous"]["version"] == "1.0.0"


def test_a_supervisor_killed_at_random_during_updates_always_comes_back(serving: Device, server: Server) -> None:
    first, second = digest_of(serving, "1.0.0"), serving.bundle("1.1.0", seed=1)
    for turn in range(6):
        serving.publish(second if turn % 2 == 0 else first)
        serving.sync(pardon=True)
        time.sleep(0.13 * turn)
        serving.kill()
        serving.start()
        wait_for(lambda: serving.running()[1] in ("confirmed", "trial"), why=f"something runs: {serving.log()[-2000:]}")
        assert serving.infer(1)[0] in ("1.0.0", "1.1.0")
    serving.publish(second)
    serving.sync(pardon=True)
    serving.wait_running("1.1.0", "trial", "confirmed")
    serving.infer(20)
    serving.wait_running("1.1.0", "confirmed")


def test_without_any_network_at_boot_the_confirmed_bundle_serves(
    serving: Device, server: Server, broker: Broker
) -> None:
    assert serving.stop() == 0
    server.close()
    broker.stop()
    serving.world["down"] = True
    serving.save()
    serving.start()
    serving.wait_running("1.0.0", "confirmed")
    assert serving.infer(3) == ["1.0.0"] * 3
    assert serving.status()["link"]["connected"] is False


def test_a_killed_broker_delays_the_counts_and_loses_none(serving: Device, server: Server, broker: Broker) -> None:
    broker.stop(kill=True)
    serving.infer(50)
    broker.start()
    wait_for(lambda: server.inferences() == 70, why=f"70 counted, got {server.inferences()}")
    assert server.conflicts == []


def test_a_clean_stop_folds_and_says_goodbye(serving: Device, server: Server) -> None:
    serving.infer(11)
    assert serving.stop() == 0
    wait_for(lambda: server.inferences() == 31, why=f"31 counted, got {server.inferences()}")
    wait_for(lambda: server.states[-1].status == "offline", why="offline")
    assert list((serving.state_dir / "rings").glob("*.ring")) == []


def test_what_a_power_cut_took_out_of_a_ring_is_counted_and_reported(
    make_device: Callable[..., Device], server: Server
) -> None:
    device = make_device(fold_interval_s=60)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    assert device.call("POST", "/skerry/v1/flush", {}).body == {"ok": True}
    device.infer(11)
    worker = psutil.Process(device.status()["worker"]["pid"])
    worker.suspend()
    device.kill()
    worker.kill()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, why="its end")
    # To the next supervisor it looks like a file of the boot before.
    (ring,) = (device.state_dir / "rings").glob("*.ring")
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "").encode()
    data = ring.read_bytes()
    assert boot_id in data
    ring.write_bytes(data.replace(boot_id, b"0" * 32))
    device.start()
    event = wait_for(lambda: server.events("ring"), why="the event")[0]
    assert (event.code, event.data["inferences"]) == ("ring_damaged", 11)
    assert device.status()["outbox"]["lost"] == {"rings_damaged": 1, "inferences_in_damaged_rings": 11}
    assert server.inferences() == 20


def test_a_damaged_store_is_moved_aside_and_the_device_serves_on(serving: Device, server: Server) -> None:
    serving.stop()
    path = serving.state_dir / "state.db"
    epoch = server.states[-2].epoch
    path.write_bytes(b"not a database" * 1000)
    (serving.state_dir / "state.db-wal").unlink(missing_ok=True)
    serving.start()
    serving.wait_running("1.0.0", "confirmed")
    event = wait_for(lambda: server.events("epoch"), why="the event")[0]
    assert event.code == "store_damaged"
    assert serving.status()["outbox"]["epoch"] not in ("", epoch)
    assert serving.status()["outbox"]["lost"]["store_damaged"] == 1
    assert list(serving.state_dir.glob("state.db.damaged-*"))
    serving.infer(5)
    wait_for(lambda: server.inferences() == 25, why=f"25 counted, got {server.inferences()}")
