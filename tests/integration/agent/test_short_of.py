"""A device that is short of descriptors, or of its store, for a while serves on, and is whole again afterwards."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.integration.agent.rig import Broker, Device, Load, Server, wait_for


@pytest.fixture
def serving(device: Device, server: Server) -> Device:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    return device


@contextlib.contextmanager
def short_of_descriptors(device: Device, left: int) -> Iterator[None]:
    """The supervisor may open ``left`` more and no others."""
    assert device.process is not None
    agent = psutil.Process(device.process.pid)
    before = agent.rlimit(psutil.RLIMIT_NOFILE)
    used = min(agent.num_fds() for _ in range(50) if time.sleep(0.01) is None)
    agent.rlimit(psutil.RLIMIT_NOFILE, (used + left, before[1]))
    try:
        yield
    finally:
        agent.rlimit(psutil.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def idle(device: Device, connections: int) -> Iterator[list[socket.socket]]:
    """Connections that have asked once and stay open."""
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(socket.create_connection(("127.0.0.1", device.port), 10)) for _ in range(connections)
        ]
        assert sum(answers(sock) for sock in found) == connections
        yield found


def answers(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: d\r\n\r\n")
        return sock.recv(4096).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


def test_an_agent_started_with_a_small_soft_limit_keeps_more_connections_than_that_over_a_swap(
    device: Device, server: Server
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    device.publish(device.bundle("1.0.0"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        device.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    with idle(device, 300) as sockets:
        device.publish(device.bundle("1.1.0", seed=1))
        device.sync()
        device.wait_running("1.1.0", "trial")
        assert device.infer(20) == ["1.1.0"] * 20
        device.wait_running("1.1.0", "confirmed")
        assert sum(map(answers, sockets)) == 300
    assert device.status()["outbox"]["lost"] == {}


def test_connections_that_a_new_worker_has_no_descriptors_for_are_counted_as_cut(
    serving: Device, server: Server
) -> None:
    assert serving.process is not None
    agent, old = psutil.Process(serving.process.pid), serving.status()["worker"]["pid"]

    def successor() -> psutil.Process | None:
        for child in agent.children():
            # A courier may end between the two questions.
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.pid != old and "skerry_agent.worker" in " ".join(child.cmdline()):
                    return child
        return None

    with idle(serving, 120) as sockets:
        serving.publish(serving.bundle("1.1.0", seed=1))
        serving.sync()
        new = wait_for(successor, why="the next worker")
        new.rlimit(psutil.RLIMIT_NOFILE, (64, new.rlimit(psutil.RLIMIT_NOFILE)[1]))
        serving.wait_running("1.1.0", "trial", "confirmed_on_golden")
        wait_for(lambda: not psutil.pid_exists(old), why="the end of the old worker")
        cut = wait_for(lambda: serving.status()["outbox"]["lost"].get("connections_cut"), why="some cut")
        kept = sum(map(answers, sockets))
        assert 0 < kept < 120
        wait_for(
            lambda: serving.status()["outbox"]["lost"]["connections_cut"] == 120 - kept,
            why=f"{120 - kept} cut, first {cut}",
        )


@pytest.mark.parametrize("left", [0, 2])
def test_a_worker_that_died_while_descriptors_were_short_is_replaced_when_there_are_some(
    serving: Device, server: Server, left: int
) -> None:
    pid = serving.status()["worker"]["pid"]
    with short_of_descriptors(serving, left):
        os.kill(pid, signal.SIGKILL)
        if left:
            # Enough for the next worker: what cannot be started is the courier of a sync that a bell asks for.
            server.ring(77)
        wait_for(lambda: "process_not_started" in serving.log(), why="a failed start")
    assert serving.infer(5) == ["1.0.0"] * 5
    assert serving.status()["worker"]["pid"] not in (0, pid)
    wait_for(lambda: server.inferences() == 25, why=f"25 counted, got {server.inferences()}")


def test_a_sync_without_descriptors_fails_alone_and_the_next_one_works(serving: Device, server: Server) -> None:
    with Load(serving, clients=1) as load:
        with short_of_descriptors(serving, 3):
            server.ring(77)
            wait_for(lambda: "process_not_started" in serving.log(), why="a failed sync")
        serving.publish(serving.bundle("1.1.0", seed=1))
        serving.sync()
        serving.wait_running("1.1.0")
    assert load.failed == []


def test_an_answer_that_nobody_foresaw_ends_no_sync_for_good(serving: Device, server: Server) -> None:
    serving.world["signed_at"] = {"not": "a number"}
    serving.save()
    serving.sync()
    wait_for(lambda: serving.status()["sync"]["code"] == "sync_failed", why="the failure")
    time.sleep(0.2)
    assert serving.infer(2) == ["1.0.0"] * 2
    serving.world["signed_at"] = 0
    serving.publish(serving.bundle("1.1.0", seed=1))
    serving.sync()
    serving.wait_running("1.1.0", "trial", "confirmed")


def test_a_store_that_another_program_holds_ends_neither_link_nor_serving_and_loses_nothing(
    serving: Device, server: Server, broker: Broker
) -> None:
    with Load(serving, clients=2) as load:
        wait_for(lambda: serving.status()["link"]["server_online"], why="the link")
        before = serving.status()["link"]["birth"]
        with contextlib.closing(sqlite3.connect(serving.state_dir / "state.db", isolation_level=None)) as other:
            wait_for(lambda: other.execute("BEGIN IMMEDIATE") is not None, why="the lock")
            broker.stop(kill=True)
            broker.start()
            wait_for(
                lambda: (link := serving.status()["link"])["connected"] and link["birth"] > before, why="a new session"
            )
            other.execute("ROLLBACK")
        time.sleep(0.5)
    assert load.failed == []
    made = load.ok + 20
    wait_for(
        lambda: server.inferences() >= made, why=f"{made} counted, got {server.inferences()}: {serving.log()[-2000:]}"
    )
    assert server.inferences() == made
    assert serving.status()["outbox"]["lost"] == {}
