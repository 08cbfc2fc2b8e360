"""A migrated database with enrolled devices, and a writer of records as a device makes them."""

from dataclasses import dataclass, field

import pytest
from skerry_contract import histogram as h
from skerry_contract import manifest as m
from skerry_contract import topics, wire
from skerry_contract import window as w
from skerry_server.db import migrations
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from skerry_server.intake import Intake
from skerry_server.mqtt import Message
from sqlalchemy import insert, select

BUNDLE = "ab" * 32
CANDIDATE = "cd" * 32
EPOCH = "1" * 32
BOOT = "b" * 32


def at(ms=1000):
    return w.Instant(BOOT, ms * 1_000_000, ms, True)


def window(
    ok=10, failed=0, *, bundle=BUNDLE, arm="none", rollout="", stage=0, latencies=(1000, 2000), confusion=(), ms=1000
):
    return w.Window(
        key=w.Key("gas", bundle, "cpu", arm, rollout, stage),
        start=at(ms),
        end=at(ms + 500),
        counts=w.Counts(ok=ok, failed=failed, rows=ok),
        latency=w.Latency(total=h.exponential_of(latencies)),
        labels=w.Labels(confusion=tuple(confusion)),
    )


def record(seq, body=None, *, kind="window", replaces=()):
    body = window() if body is None else body
    data = body if isinstance(body, bytes) else wire.encode(body)
    return wire.Record(seq=seq, kind=kind, body=data, replaces=tuple(replaces))


def tombstone(seq, replaces, inferences=7):
    body = wire.Tombstone(at=at(), why="outbox_full", records=len(replaces), inferences=inferences)
    return record(seq, body, kind="tombstone", replaces=replaces)


def up(device, *records, epoch=EPOCH):
    batch = wire.Batch(epoch=epoch, records=tuple(records))
    return Message(topics.up(device), wire.encode_batch(batch), False, 1)


def state(device, birth, status="online", *, retained=False, **fields):
    payload = wire.encode(wire.State(status=status, birth=birth, **fields))
    return Message(topics.state(device), payload, retained, 1)


def device_row(name, status="enrolled"):
    return {
        "id": name,
        "group": "g",
        "status": status,
        "enrolled_ms": 0,
        "public_key_sha256": "0" * 64,
        "public_key_pem": "",
        "certificate_serial": "0",
        "certificate_expires_ms": 0,
    }


@dataclass
class Server:
    """The intake and its database; each ``take`` is one transaction, a second later than the one before."""

    engine: object
    now_ms: int = 1_000_000
    intake: Intake = field(default_factory=Intake)

    def take(self, *messages):
        self.now_ms += 1000
        with writing(self.engine) as connection:
            return self.intake.take(connection, list(messages), now_ms=self.now_ms)

    def ack(self, *messages, device="dev-a", epoch=EPOCH):
        return self.take(*messages).acks[device, epoch]

    def rows(self, table, **where):
        with reading(self.engine) as connection:
            query = select(table).where(*(table.c[name] == value for name, value in where.items()))
            return [row._mapping for row in connection.execute(query)]

    def counted(self, device="dev-a"):
        return sum(row["ok"] for row in self.rows(t.evidence, device=device))

    def counters(self):
        return {(row["device"], row["name"]): row["n"] for row in self.rows(t.ingest_counters)}

    def insert(self, table, **values):
        with writing(self.engine) as connection:
            connection.execute(insert(table), [values])

    def register(self, folder, digest):
        """A bundle of the model gas, approved; returns its manifest."""
        data = (folder / m.MANIFEST_FILE).read_bytes()
        row = {"model": "gas", "version": "1.0.0", "state": "approved", "submitter": "t", "pushed_ms": 0}
        self.insert(t.bundles, digest=digest, manifest=data, **row)
        return m.parse(data)

    def rollout(self, name="r-1", state="running", plan=None):
        self.insert(
            t.rollouts,
            id=name,
            group="g",
            model="gas",
            stable=BUNDLE,
            candidate=CANDIDATE,
            salt="0" * 32,
            plan=plan or {},
            state=state,
            stage_since_ms=0,
            created_by="t",
            created_ms=0,
        )


@pytest.fixture
def server(tmp_path):
    engine = open_engine(sqlite_url(tmp_path / "server.db"))
    migrations.migrate(engine)
    with writing(engine) as connection:
        connection.execute(insert(t.groups), [{"name": "g", "created_ms": 0}])
        connection.execute(
            insert(t.devices), [device_row("dev-a"), device_row("dev-b"), device_row("dev-x", "revoked")]
        )
    yield Server(engine)
    engine.dispose()


@pytest.fixture
def make():
    """The functions of this module, for the tests."""
    import types

    return types.SimpleNamespace(
        at=at,
        window=window,
        record=record,
        tombstone=tombstone,
        up=up,
        state=state,
        device_row=device_row,
        EPOCH=EPOCH,
        BUNDLE=BUNDLE,
        CANDIDATE=CANDIDATE,
    )
