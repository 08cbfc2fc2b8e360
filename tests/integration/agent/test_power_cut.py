"""Power fails at any moment, with records just sent: no seq comes back for other content, nothing committed is lost or doubled.

The agent's store and upload run in a process whose writes and synchronisations are recorded; cuts are made of the record.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import msgspec
import pytest
from skerry_agent.store import Entry, RingAt, open_store
from skerry_agent.upload import Upload
from skerry_contract import window as w
from skerry_contract import wire

from tests.integration.agent import power
from tests.unit.agent.test_outbox_model import Server

AT = w.Instant("b" * 32, 1, 2, True)
CUTS = 100
CHILD = """
import os, random, sys
from pathlib import Path
import msgspec
from skerry_agent.store import Entry, RingAt, open_store
from skerry_agent.upload import Upload
from skerry_contract import window as w, wire
from tests.unit.agent.test_outbox_model import Server

folder, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
world = os.open(folder / "world", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
AT = w.Instant("b" * 32, 1, 2, True)

def tell(kind, value):
    # What leaves the device, or is promised: no power cut takes it back.
    os.write(world, msgspec.msgpack.encode([kind, value]))

def publish(payload):
    tell("sent", payload)
    acks.append(server.take(payload))
    return True

store, _ = open_store(folder / "state.db", binding="m", device="d-1", new_epoch=lambda: "e" * 32, wall_s=0.0, bound_bytes=12000)
# Many checkpoints: the file itself is cut while it is written, too.
store._db.execute("PRAGMA wal_autocheckpoint = 12")
server, acks, upto = Server(), [], 0
upload = Upload(store, publish, window=3, batch_bytes=2000, ack_s=5.0)
upload.open = True
for step in range(120):
    entries = []
    for _ in range(rng.randrange(1, 4)):
        ok = rng.randrange(6)
        upto += ok
        key = w.Key("gas", "a" * 64, "v", "none", "", rng.randrange(3))
        body = wire.encode(w.Window(key=key, start=AT, end=AT, counts=w.Counts(ok=ok), resources={f"r{i}_n": 1 for i in range(60)}))
        entries.append(Entry(kind="window", body=body, key=str(key.stage), inferences=ok))
    store.append(entries, [RingAt(ring="r", upto=upto)])
    tell("committed", upto)
    if rng.random() < 0.3:
        store.append([Entry(kind="event", body=b"e" * rng.randrange(400))])
    store.compact(AT)
    upload.open = rng.random() < 0.6
    upload.pump(float(step), AT)
    while acks and rng.random() < 0.7:
        ack = wire.decode(wire.Ack, acks.pop(0))
        store.acknowledge(ack)
        upload.acknowledged(ack)
os._exit(0)
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[power.Operation]:
    if shutil.which("gcc") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("gcc is not installed")
        pytest.skip("gcc is not installed")
    folder = tmp_path_factory.mktemp("recorded")
    below = folder / "device"
    below.mkdir()
    return power.record(power.recorder(folder), CHILD, below, folder / "log", "1")


def world(operations: list[power.Operation]) -> list[tuple[str, object]]:
    return [tuple(msgspec.msgpack.decode(op.data)) for op in operations if op.name == "world" and op.what == "W"]


def test_the_record_is_whole(recorded: list[power.Operation]) -> None:
    """The cuts below say nothing when the recorder misses what SQLite does."""
    done = {(op.name, op.what) for op in recorded}
    assert {("state.db", "W"), ("state.db", "S"), ("state.db-wal", "W"), ("state.db-wal", "S")} <= done
    told = world(recorded)
    assert len({kind for kind, _ in told}) == 2
    assert len([None for kind, _ in told if kind == "sent"]) > 30
    # What was committed was synchronised before it was told: behind the last write of the log there is a synchronisation.
    open_writes = 0
    for op in recorded:
        if op.name == "state.db-wal":
            open_writes = 0 if op.what == "S" else open_writes + (op.what == "W")
        elif op.name == "world" and op.what == "W":
            assert open_writes == 0


@pytest.mark.parametrize("part", range(4))
def test_after_a_power_cut_no_seq_is_reused_for_other_content_and_the_counts_are_right(
    recorded: list[power.Operation], tmp_path: Path, part: int
) -> None:
    rng = random.Random(part)
    # Every second one right behind a message that left the device.
    sent = [at + 1 for at, op in enumerate(recorded) if op.name == "world" and op.what == "W"]
    for number in range(CUTS // 4):
        cut = rng.choice(sent) if number % 2 else rng.randrange(len(recorded))
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, data in power.left_by_a_cut(recorded[:cut], rng).items():
            if name.startswith("state.db") and not name.endswith("-shm"):
                (folder / name).write_bytes(data)
        _goes_on(folder, world(recorded[:cut]), rng)
        shutil.rmtree(folder)


def _goes_on(folder: Path, told: list[tuple[str, object]], rng: random.Random) -> None:
    store, opened = open_store(
        folder / "state.db", binding="m", device="d-1", new_epoch=lambda: "e" * 32, wall_s=0.0, bound_bytes=12_000
    )
    assert opened.new_epoch in (("first", "") if not told else ("",)), "a cut is no damage"
    server = Server()
    for kind, value in told:
        if kind == "sent":
            server.take(value)
    assert store.last_seq >= max((high for _, high in server.at.values()), default=0)
    upto = store.ring_upto("r") or 0
    assert upto >= max((value for kind, value in told if kind == "committed"), default=0)
    # What was on its way must be as it was, though the outbox is above its bound now and merges what it may.
    store.bound_bytes = 1500
    store.compact(AT)
    # Other content than the life before made: a seq that comes back would be a conflict.
    for _ in range(3):
        ok = rng.randrange(100, 1000)
        upto += ok
        key = w.Key("gas", "a" * 64, "v", "none", "", 7)
        body = wire.encode(w.Window(key=key, start=AT, end=AT, counts=w.Counts(ok=ok)))
        store.append([Entry(kind="window", body=body, key="7", inferences=ok)], [RingAt(ring="r", upto=upto)])
    acks: list[bytes] = []

    def publish(payload: bytes) -> bool:
        acks.append(server.take(payload))
        return True

    upload = Upload(store, publish, window=3, batch_bytes=2000, ack_s=5.0)
    upload.open = True
    while store.pending()[0]:
        assert upload.pump(0.0, AT)
        while acks:
            ack = wire.decode(wire.Ack, acks.pop(0))
            assert store.acknowledge(ack).new_epoch == ""
            upload.acknowledged(ack)
    assert server.conflicts == 0
    assert server.inferences() + server.told_lost()[1] == upto
    store.close()
