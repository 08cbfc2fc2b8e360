"""The embedded broker's life: who is cut off, what survives a death, and that nothing is left behind."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from skerry_contract import topics
from skerry_server import mqtt
from skerry_server.broker.embedded import BrokerFailed, EmbeddedBroker
from skerry_server.broker.natsconf import Client


@pytest.fixture
def fleet(nats_fleet):
    return nats_fleet


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_a_removed_device_is_cut_off_and_the_others_stay(fleet, peers):
    gone = peers(peers.Peer, fleet, "dev-a").open()
    stays = peers(peers.Peer, fleet, "dev-b").open()
    fleet.broker.set_clients([Client("dev-b")])
    peers.until(lambda: gone.drops, "dev-a cut off")
    gone.close()
    again = peers(peers.Peer, fleet, "dev-a")
    assert again.refused()
    assert stays.client.is_connected()
    assert stays.drops == []


def test_a_new_device_is_let_in_without_a_restart(fleet, peers):
    assert peers(peers.Peer, fleet, "dev-c").refused()
    stays = peers(peers.Peer, fleet, "dev-b").open()
    pid = fleet.broker.pid
    fleet.enrol("dev-c")
    # The broker reads its users again in its own time.
    peers.until(lambda: not peers(peers.Peer, fleet, "dev-c").refused(), "dev-c let in")
    assert fleet.broker.pid == pid
    assert stays.drops == []


def test_an_id_that_breaks_the_grammar_changes_nothing(fleet):
    before = fleet.broker.config_file.read_text()
    with pytest.raises(Exception, match="device id"):
        fleet.broker.set_clients([Client("dev-b"), Client('x", permissions: {publish: ">"}')])
    with pytest.raises(Exception, match="sha256"):
        fleet.broker.set_clients([Client("dev-b", '", permissions: {publish: ">"}')])
    assert fleet.broker.config_file.read_text() == before


def test_a_killed_broker_comes_back_on_its_port_with_what_was_retained(fleet, peers):
    server = peers(peers.Peer, fleet, "_server").open()
    server.publish(topics.bell("dev-a"), b"ring", retain=True)
    port, pid = fleet.broker.port, fleet.broker.pid
    os.kill(pid, signal.SIGKILL)
    peers.until(lambda: fleet.broker.restarts == 1, "a restart")
    assert fleet.broker.port == port
    assert fleet.broker.pid not in (None, pid)
    device = peers(peers.Peer, fleet, "dev-a").open()
    assert device.subscribed(topics.bell("dev-a"))
    peers.until(lambda: (topics.bell("dev-a"), b"ring") in device.got, "the retained bell")


@pytest.mark.parametrize("kills", [1, 5])
def test_a_broker_that_is_killed_while_it_starts_is_started_again_and_not_for_ever(tmp_path, fleet, peers, kills):
    port = fleet.broker.port
    fleet.broker.stop()
    certificate, key = fleet.authority.serve()
    broker = EmbeddedBroker(
        tmp_path / "second", ca_file=fleet.authority.pem, certificate_file=certificate, key_file=key, port=port
    )
    killed = set()
    with ThreadPoolExecutor(1) as aside:
        started = aside.submit(broker.start)
        for _ in range(kills):
            pid = peers.until(lambda: broker.pid not in killed and broker.pid, "the next child")
            # Long before it says that it is ready: it is still Python that becomes it.
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        try:
            if kills == 5:
                with pytest.raises(BrokerFailed, match="ended at its start"):
                    started.result(30)
            else:
                started.result(30)
                assert broker.pid not in (None, *killed) and broker.port == port
        finally:
            broker.stop()
    assert not any(map(alive, killed))


def test_the_server_is_back_on_its_broker_as_soon_as_that_is_back(nats_fleet, peers, monkeypatch):
    """Its own waits grow to half a minute when the broker dies again and again; but it is told when the broker listens."""
    monkeypatch.setattr(mqtt, "BACKOFF_FIRST_S", mqtt.BACKOFF_CAP_S)

    class Patient(random.Random):
        def uniform(self, a, b):
            return b

    link = mqtt.ServerLink(nats_fleet.engine, nats_fleet.endpoint(), chance=Patient())
    nats_fleet.broker.when_back(link.hurry)
    link.start(lambda message: None)
    try:
        assert link.wait_connected(15)
        for restarts in (1, 2):
            os.kill(nats_fleet.broker.pid, signal.SIGKILL)
            peers.until(lambda n=restarts: nats_fleet.broker.restarts == n, "a restart")
            peers.until(lambda n=restarts: link.sessions > n and link.connected, "another session", 20)
    finally:
        began = time.monotonic()
        link.stop()
    assert time.monotonic() - began < 10


def test_stop_ends_the_child_and_no_other(fleet):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        pid = fleet.broker.pid
        assert alive(pid)
        fleet.broker.stop()
        assert not alive(pid)
        assert bystander.poll() is None
        assert fleet.broker.restarts == 0
    finally:
        bystander.kill()
        bystander.wait()


def test_a_server_that_is_killed_leaves_no_broker(tmp_path, fleet, peers):
    certificate, key = fleet.authority.serve()
    program = f"""
import time
from pathlib import Path
from skerry_server.broker.embedded import EmbeddedBroker
broker = EmbeddedBroker(Path({str(tmp_path / "second")!r}), ca_file=Path({str(fleet.authority.pem)!r}),
    certificate_file=Path({str(certificate)!r}), key_file=Path({str(key)!r}))
broker.start()
print(broker.pid, flush=True)
time.sleep(60)
"""
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(server.stdout.readline())
    assert alive(pid)
    server.kill()
    server.wait()
    server.stdout.close()
    peers.until(lambda: not alive(pid), "the broker's end")


def test_the_log_of_a_device_that_asks_for_more_than_it_may_is_bounded(tmp_path, fleet, peers):
    certificate, key = fleet.authority.serve()
    fleet.broker.stop()
    files = {"ca_file": fleet.authority.pem, "certificate_file": certificate, "key_file": key}
    fleet.broker = EmbeddedBroker(fleet.folder, **files, clients=[Client("dev-a")], log_bytes=50_000)
    fleet.broker.start()
    device = peers(peers.Peer, fleet, "dev-a").open()
    for _ in range(4000):
        device.client.publish(topics.up("dev-b"), b"x", qos=0)
    logs = fleet.folder / "nats"
    peers.until(lambda: len(list(logs.glob("broker.log*"))) > 1, "a log put aside")
    time.sleep(1)
    sizes = [path.stat().st_size for path in logs.glob("broker.*")]
    assert sum(sizes) <= 4 * 60_000, sizes
    assert "Publish Violation" in "".join(path.read_text() for path in logs.glob("broker.log*"))
    # What it says is still found, for the ready line of the next start and for the server's log.
    pid = fleet.broker.pid
    os.kill(pid, signal.SIGKILL)
    peers.until(lambda: fleet.broker.restarts == 1, "a restart")


def test_a_port_that_is_taken_is_said(tmp_path, fleet):
    certificate, key = fleet.authority.serve()
    broker = EmbeddedBroker(
        tmp_path / "second",
        ca_file=fleet.authority.pem,
        certificate_file=certificate,
        key_file=key,
        port=fleet.broker.port,
    )
    with pytest.raises(BrokerFailed, match="address already in use"):
        broker.start()
    assert broker.pid is None
