"""The outbox in a real agent with a real broker, before a server that decides by its own ledger: each inference once, or named."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from skerry_agent import config, facts
from skerry_agent.identity import identity
from skerry_agent.store import Entry, Store, open_store
from skerry_contract import window as w
from skerry_contract import wire

from tests.integration.agent import rig
from tests.integration.agent.rig import DEVICE, Broker, Device, Load, wait_for
from tests.unit.agent.test_outbox_model import Server as Ledger

AT = w.Instant("b" * 32, 1, 2, True)


class Server(rig.Server):
    """Takes and refuses as the real one; ``mute``: its acknowledgements are lost on their way."""

    def __init__(self, port: int) -> None:
        self.ledger = Ledger()
        self.mute = False
        self.sessions = 0
        super().__init__(port)

    def _connected(self, client: Any, *arguments: Any) -> None:
        super()._connected(client, *arguments)
        # Each session of the real server with its broker has a number, and is announced.
        if self.sessions:
            self.birth += 1
            self.announce("online")
        self.sessions += 1

    def _take(self, batch: wire.Batch) -> None:
        self.received.append(batch)
        ack = wire.decode(wire.Ack, self.ledger.take(wire.encode_batch(batch)))
        self.taken = self.ledger.taken
        if not self.mute:
            self.ack(ack.epoch, ack.upto, extra_ranges=ack.extra_ranges, conflict=ack.conflict)


@pytest.fixture
def server(broker: Broker) -> Iterator[Server]:
    found = Server(broker.port)
    yield found
    found.close()


@pytest.fixture
def serving(device: Device, server: Server) -> Device:
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    device.wait_running("1.0.0", "confirmed")
    wait_for(lambda: server.inferences() == 20 and empty(device), why="a quiet start")
    return device


def empty(device: Device) -> bool:
    return device.status()["outbox"]["pending"] == 0


def test_ack_lost(serving: Device, server: Server) -> None:
    """What the server holds and the device does not know is sent again, taken once, and freed by the next acknowledgement."""
    server.mute = True
    serving.infer(9)
    wait_for(lambda: server.inferences() == 29, why="nine taken")
    sent = {record.seq for record in server.received[-1].records}
    copies = len(server.received)
    wait_for(
        lambda: any(sent <= {r.seq for r in batch.records} for batch in server.received[copies:]), why="the same again"
    )
    assert serving.status()["outbox"]["pending_inferences"] == 9
    server.mute = False
    wait_for(lambda: empty(serving), why="an empty outbox")
    assert (server.inferences(), server.ledger.conflicts) == (29, 0)


def test_reconnect(serving: Device, server: Server, broker: Broker) -> None:
    """The broker dies again and again, with messages and acknowledgements on their way: nothing is counted twice."""
    with Load(serving, clients=2) as load:
        for _ in range(3):
            received = len(server.received)
            wait_for(lambda received=received: len(server.received) > received, why="something on its way")
            broker.stop(kill=True)
            broker.start()
            wait_for(lambda: serving.status()["link"]["server_online"], why="a new session")
    assert load.failed == []
    made = load.ok + 20
    wait_for(lambda: server.inferences() >= made and empty(serving), why=lambda: f"{made}, got {server.inferences()}")
    assert (server.inferences(), server.ledger.conflicts) == (made, 0)
    assert serving.status()["outbox"]["lost"] == {}


def test_buffer_full(device: Device, server: Server) -> None:
    """An outage that fills the outbox: it stays within its bound on disk, windows merge, no inference is lost."""
    text = device.config.read_text().replace("[limits]\n", "[limits]\noutbox_mb = 8.0\nupload_kib_s = 0.0\n")
    device.config.write_text(text)
    server.announce("offline")
    made = prefill(device, 9_000_000)
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    device.infer(20)
    made += 20
    wait_for(lambda: on_disk(device) <= 8_000_000, why=lambda: f"{on_disk(device)} bytes: {device.log()[-2000:]}")
    wait_for(lambda: device.status()["outbox"]["pending_inferences"] == made, why="all that was made")
    assert device.infer(3) == ["1.0.0"] * 3
    server.birth += 1
    server.announce("online")
    wait_for(
        lambda: server.inferences() == made + 3 and empty(device), why=lambda: f"{made + 3}, got {server.inferences()}"
    )
    assert device.status()["outbox"]["lost"] == {}
    assert max(r.merged for r in server.windows()) > 1
    assert server.ledger.conflicts == 0


@pytest.mark.slow
def test_an_outbox_that_nobody_foresaw_ends_no_serving_and_is_said(device: Device, server: Server) -> None:
    """Making it smaller fails for a reason of no class of ours: answers go on, what waits is sent, the log has it, and not often."""
    text = device.config.read_text().replace("[limits]\n", "[limits]\noutbox_mb = 8.0\nupload_kib_s = 0.0\n")
    device.config.write_text(text)
    with stored(device) as store:
        store.append([Entry(kind="tombstone", body=b"no tombstone at all", key="samples_thinned")])
        while store.live_bytes() < 9_000_000:
            store.append([Entry(kind="sample", body=os.urandom(20_000)) for _ in range(20)])
        held = store.pending()[0]
    server.announce("offline")
    device.publish(device.bundle("1.0.0"))
    device.start()
    device.wait_running("1.0.0", "trial")
    assert device.infer(20) == ["1.0.0"] * 20
    wait_for(lambda: "outbox_unforeseen" in device.log(), why=lambda: device.log()[-2000:])
    # A look at the outbox comes every half second.
    time.sleep(2.0)
    assert device.log().count("outbox not kept") == 1
    assert "Traceback" in device.log()
    assert device.status()["outbox"]["pending"] >= held
    server.birth += 1
    server.announce("online")
    wait_for(lambda: empty(device), why="an empty outbox", timeout_s=60.0)
    assert [event.code for event in server.events("outbox")] == ["outbox_unforeseen"]
    assert server.inferences() == 20
    assert device.infer(3) == ["1.0.0"] * 3


def test_a_bound_that_is_set_while_the_agent_runs_holds_at_once_for_what_lies_on_disk_too(
    device: Device, server: Server
) -> None:
    text = device.config.read_text()
    device.config.write_text(text.replace("[limits]\n", "[limits]\noutbox_mb = 20.0\n"))
    with stored(device) as store:
        # Two records do not fit a page: more lies on disk than waits.
        while store.live_bytes() < 9_500_000:
            store.append([Entry(kind="sample", body=os.urandom(2_200)) for _ in range(50)])
        assert store.pending()[1] < 0.9 * 8_000_000
    server.announce("offline")
    device.start()
    assert device.status()["outbox"]["lost"] == {}
    device.config.write_text(text.replace("[limits]\n", "[limits]\noutbox_mb = 8.0\n"))
    assert device.call("POST", "/skerry/v1/reload", {}).body["live"] == ["limits.outbox_mb"]
    wait_for(lambda: device.status()["outbox"]["lost"].get("samples_thinned"), why=lambda: device.log()[-2000:])


def prefill(device: Device, size: int) -> int:
    """Windows of an outage, as the agent itself would have stored them. Returns their inferences."""
    made = 0
    with stored(device) as store:
        while store.live_bytes() < size:
            entries = []
            for model in ("gas", "pump", "fan"):
                key = w.Key(model, "a" * 64, "v", "none", "", 0)
                readings = {f"reading_{i}_sum": made + i for i in range(90)}
                body = wire.encode(w.Window(key=key, start=AT, end=AT, counts=w.Counts(ok=5), resources=readings))
                entries.append(Entry(kind="window", body=body, key="/".join(map(str, key)), inferences=5))
            store.append(entries)
            made += 15
    return made


@contextmanager
def stored(device: Device) -> Iterator[Store]:
    """The device's store while no agent runs."""
    found = config.load(device.config, {})
    store, _ = open_store(
        device.state_dir / "state.db", binding=facts.binding(identity(found)), device=DEVICE,
        new_epoch=lambda: os.urandom(16).hex(), wall_s=0.0,
    )  # fmt: skip
    store._db.execute("PRAGMA synchronous = OFF")
    yield store
    store.close()


def on_disk(device: Device) -> int:
    return sum(path.stat().st_size for path in device.state_dir.glob("state.db*"))


def test_cloned_to_a_second_board(serving: Device, server: Server, make_device: Callable[..., Device]) -> None:
    """Two lives of one outbox, even of one machine id: what both hold counts once, what each made counts, the conflict is seen."""
    server.announce("offline")
    wait_for(lambda: not serving.status()["link"]["server_online"], why="offline heard")
    serving.infer(5)
    wait_for(lambda: serving.status()["outbox"]["pending_inferences"] == 5, why="five that wait")
    epoch = serving.status()["outbox"]["epoch"]
    serving.kill()
    clone = make_device()
    shutil.rmtree(clone.state_dir)
    shutil.copytree(serving.state_dir, clone.state_dir, ignore=shutil.ignore_patterns("*.sock"))
    clone.world = serving.world
    clone.save()
    # The first life goes on alone: it sends the five, and seven more.
    server.birth += 1
    server.announce("online")
    serving.start()
    serving.wait_running("1.0.0", "confirmed")
    serving.infer(7)
    wait_for(lambda: server.inferences() == 32 and empty(serving), why=lambda: f"32, got {server.inferences()}")
    assert serving.status()["outbox"]["epoch"] == epoch
    serving.stop()
    # The second has the same five, and under the seqs of the seven something of its own.
    clone.start()
    clone.wait_running("1.0.0", "confirmed")
    clone.infer(6)
    wait_for(lambda: server.inferences() == 38 and empty(clone), why=lambda: f"38, got {server.inferences()}")
    assert server.ledger.conflicts > 0 or clone.status()["outbox"]["lost"].get("epoch_ahead")
    assert clone.status()["outbox"]["epoch"] != epoch
    assert [event.code for event in server.events("epoch")] in (["conflict"], ["ahead"])


def test_restored_from_a_backup(serving: Device, server: Server) -> None:
    """The state folder of an hour ago, its log included: what it holds again counts once, what follows counts."""
    server.announce("offline")
    wait_for(lambda: not serving.status()["link"]["server_online"], why="offline heard")
    serving.infer(4)
    wait_for(lambda: serving.status()["outbox"]["pending_inferences"] == 4, why="four that wait")
    serving.kill()
    backup = {path.name: path.read_bytes() for path in serving.state_dir.glob("state.db*")}
    serving.start()
    server.birth += 1
    server.announce("online")
    serving.wait_running("1.0.0", "confirmed")
    serving.infer(9)
    wait_for(lambda: server.inferences() == 33 and empty(serving), why=lambda: f"33, got {server.inferences()}")
    serving.stop()
    for path in serving.state_dir.glob("state.db*"):
        path.unlink()
    for name, data in backup.items():
        Path(serving.state_dir / name).write_bytes(data)
    serving.start()
    serving.wait_running("1.0.0", "confirmed")
    serving.infer(6)
    wait_for(lambda: server.inferences() == 39 and empty(serving), why=lambda: f"39, got {server.inferences()}")
    lost = serving.status()["outbox"]["lost"]
    assert lost.keys() <= {"epoch_ahead", "epoch_conflict"}
    assert lost


def test_a_store_restored_beside_the_ring_of_a_killed_worker_counts_nothing_again(
    serving: Device, server: Server, tmp_path: Path
) -> None:
    made = 20
    live, backup = sqlite3.connect(serving.state_dir / "state.db"), sqlite3.connect(tmp_path / "backup.db")
    with closing(live) as source, closing(backup) as target:
        source.backup(target)
    serving.infer(25)
    made += 25
    wait_for(lambda: server.inferences() == made and empty(serving), why="what the backup does not know")
    worker = serving.status()["worker"]["pid"]
    serving.kill()
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(worker), why="the worker's end")
    assert list((serving.state_dir / "rings").glob("*.ring"))
    for path in serving.state_dir.glob("state.db*"):
        path.unlink()
    (serving.state_dir / "state.db").write_bytes((tmp_path / "backup.db").read_bytes())
    serving.start()
    serving.wait_running("1.0.0", "confirmed")
    serving.infer(5)
    made += 5
    wait_for(lambda: server.inferences() >= made and empty(serving), why=lambda: f"{made}, got {server.inferences()}")
    # What would be folded again came before what was answered since.
    assert server.inferences() == made


def test_a_damaged_store_holds_up_no_start_and_is_reported_with_what_it_cost(serving: Device, server: Server) -> None:
    server.announce("offline")
    wait_for(lambda: not serving.status()["link"]["server_online"], why="offline heard")
    serving.infer(9)
    wait_for(lambda: serving.status()["outbox"]["pending_inferences"] == 9, why="nine that wait")
    took = []
    for damage in (False, True):
        serving.kill()
        if damage:
            path = serving.state_dir / "state.db"
            data = bytearray(path.read_bytes())
            data[4096 * 2 : 4096 * 4] = os.urandom(4096 * 2)
            path.write_bytes(data)
            (serving.state_dir / "state.db-wal").unlink()
        begun = time.monotonic()
        serving.start()
        wait_for(lambda: serving.infer() == ["1.0.0"], why="an answer")
        took.append(time.monotonic() - begun)
    print(f"start to first answer: {took[0]:.2f} s, with a damaged store {took[1]:.2f} s")
    assert took[1] < took[0] + 2.0
    server.birth += 1
    server.announce("online")
    event = wait_for(lambda: server.events("epoch"), why="the report")[0]
    assert (event.code, event.data["why"]) == ("store_damaged", "damaged")
    lost = serving.status()["outbox"]["lost"]
    assert lost["store_damaged"] == 1
    assert list(serving.state_dir.glob("state.db.damaged-*"))
    # What is missing on the server of the 31 that were made is what the report names.
    named = event.data["lost_inferences"]
    assert named in (9, 10)
    wait_for(lambda: server.inferences() + named == 31, why=lambda: f"{31 - named}, got {server.inferences()}")
