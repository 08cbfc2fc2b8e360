"""Nothing that arrives can stop ingest, and nothing wrong is counted."""

import os
import zlib

import pytest
from skerry_contract import topics, wire
from skerry_server.db import tables as t
from skerry_server.intake import MAX_TRANSACTION_BYTES
from skerry_server.mqtt import Message
from skerry_server.quarantine import KEEP


def raw(device, payload, leaf="up"):
    return Message(f"skerry/1/d/{device}/{leaf}", payload, False, 1)


def bomb():
    packer = zlib.compressobj(level=9, wbits=-15)
    return packer.compress(bytes(200 << 20)) + packer.flush()


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", "malformed"),
        (b"not zlib", "malformed"),
        (os.urandom(5000), "malformed"),
        (bomb(), "malformed"),
        (bytes(wire.MAX_MESSAGE_BYTES + 1), "oversized"),
        (wire.encode(wire.Bell(version=1)), "malformed"),
    ],
    ids=["empty", "text", "noise", "zip bomb", "oversized", "another message"],
)
def test_a_message_that_is_no_batch_is_counted_and_kept(server, make, payload, code):
    outcome = server.take(raw("dev-a", payload), make.up("dev-b", make.record(1)))
    assert server.counters()["dev-a", code] == 1
    kept = server.rows(t.quarantine, device="dev-a")[0]
    assert (kept["code"], kept["size"], kept["payload"]) == (code, len(payload), payload[: 64 * 1024])
    assert outcome.acks["dev-b", make.EPOCH].upto == 1


def test_a_transaction_holds_no_more_than_its_bytes_and_the_rest_comes_next(server, make):
    def large(seq):
        event = wire.Event(at=make.at(), name="e", data={"x": "y" * 60_000})
        return [make.record(seq + i, event, kind="event") for i in range(40)]

    first = make.up("dev-a", *large(1))
    second = make.up("dev-a", *large(41))
    third = make.up("dev-b", make.record(1))
    assert len(wire.inflate(first.payload)) * 2 > MAX_TRANSACTION_BYTES
    outcome = server.take(first, second, third)
    assert (outcome.taken, outcome.records) == (1, 40)
    outcome = server.take(second, third)
    assert (outcome.taken, outcome.records) == (2, 41)
    assert outcome.acks["dev-a", make.EPOCH].upto == 80


def test_a_newer_schema_is_kept_and_not_acknowledged(server, make):
    newer = wire.Batch(schema=2, epoch=make.EPOCH, records=(make.record(1),))
    outcome = server.take(raw("dev-a", wire.encode_batch(newer)))
    assert outcome.acks == {}
    assert server.counters() == {("dev-a", "unsupported_version"): 1}


@pytest.mark.parametrize(
    "topic", ["skerry/1/d/dev-a/ack", "skerry/1/d/../up", "skerry/1/d/_server/up", "x", "skerry/1/d/dev-x/up"]
)
def test_a_foreign_message_is_counted_and_dropped(server, make, topic):
    outcome = server.take(Message(topic, make.up("dev-a", make.record(1)).payload, False, 1))
    assert outcome.acks == {}
    assert sum(n for (_, name), n in server.counters().items() if name == "foreign") == 1
    assert server.rows(t.ledger) == []


def test_made_up_devices_do_not_fill_the_tables(server, make):
    for i in range(50):
        server.take(make.up(f"nobody-{i}", make.record(1)), make.state(f"nobody-{i}", 1))
    assert server.counters() == {("", "foreign"): 100}
    assert server.rows(t.quarantine) == []


BAD_BODIES = {
    "noise": b"\x93\x01",
    "arm": {"key": ("gas", "ab" * 32, "cpu", "left", "", 0)},
    "model": {"key": ("Gas!", "ab" * 32, "cpu", "none", "", 0)},
    "stage": {"key": ("gas", "ab" * 32, "cpu", "none", "", 1 << 40)},
    "negative": {"counts": {"ok": -1}},
    "huge": {"counts": {"ok": 1 << 50}},
    "time": {"start": ("b" * 32, 0, 1 << 63, True)},
    "latency": {"latency": {"total": (5, 0, 0, (1 << 63,), 1)}},
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_malformed_record_in_a_good_batch_moves_upto_on(server, make, name):
    import msgspec

    bad = BAD_BODIES[name]
    if isinstance(bad, dict):
        bad = msgspec.msgpack.encode({**msgspec.to_builtins(make.window()), **bad})
    records = (make.record(1), make.record(2, bad), make.record(3))
    ack = server.ack(make.up("dev-a", *records))
    assert (ack.upto, ack.conflict) == (3, ())
    assert server.counted() == 20
    assert server.counters() == {("dev-a", "malformed_record"): 1}
    kept = server.rows(t.quarantine)[0]
    assert kept["payload"] == bad
    assert "seq 2" in kept["detail"]
    assert [row["kind"] for row in server.rows(t.ledger)] == ["window", "quarantined", "window"]
    # Sent again it is known, not quarantined once more.
    assert server.ack(make.up("dev-a", *records)).upto == 3
    assert server.counters()["dev-a", "malformed_record"] == 1


def test_a_malformed_merged_record_moves_upto_over_what_it_replaced(server, make):
    ack = server.ack(make.up("dev-a", make.record(4, b"junk", replaces=[(1, 3)])))
    assert ack.upto == 4
    # Their content was never counted, so the originals do no harm, and are known all the same.
    assert server.counted() == 0


def test_events_and_samples_that_the_database_cannot_hold_are_set_aside(server, make):
    event = wire.Event(at=make.at(), name="update", data={"n": float("nan")})
    long = wire.Event(at=make.at(), name="x" * 61)
    good = wire.Event(at=make.at(), name="update", code="hash_mismatch", data={"model": "gas"})
    records = [make.record(i + 1, body, kind="event") for i, body in enumerate((event, long, good))]
    outcome = server.take(make.up("dev-a", *records))
    assert outcome.acks["dev-a", make.EPOCH].upto == 3
    assert [(e.name, e.code, e.data) for e in outcome.events] == [("update", "hash_mismatch", {"model": "gas"})]
    assert len(server.rows(t.events)) == 1


def test_a_device_that_sends_rubbish_all_day_costs_a_few_rows(server):
    for i in range(300):
        server.take(raw("dev-a", b"rubbish %d" % i), raw("dev-a", b"rubbish too"))
    assert server.counters()["dev-a", "malformed"] == 600
    kept = server.rows(t.quarantine)
    assert len(kept) == KEEP
    assert kept[-1]["share"] == 1 / 32


def test_a_message_that_breaks_the_writer_can_be_set_aside(server, make):
    from skerry_server.db.engine import writing

    with writing(server.engine) as connection:
        server.intake.set_aside(connection, raw("dev-a", b"what broke it"), now_ms=5)
        server.intake.set_aside(connection, Message("no/topic/of/ours", b"", False), now_ms=5)
    assert server.counters() == {("", "unusable"): 1, ("dev-a", "unusable"): 1}


@pytest.mark.parametrize("payload", [b"junk", b"\x80", os.urandom(300)])
def test_a_malformed_state_changes_nothing(server, make, payload):
    server.take(make.state("dev-a", 4, agent="0.1.0"))
    server.take(Message(topics.state("dev-a"), payload, True, 1))
    row = server.rows(t.devices, id="dev-a")[0]
    assert (row["birth"], row["online"], row["agent"]) == (4, True, "0.1.0")
