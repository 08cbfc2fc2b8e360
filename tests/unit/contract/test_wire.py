"""Records on MQTT: round trips, unknown fields, and bytes that nobody of ours sent."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skerry_contract import window as w
from skerry_contract import wire
from skerry_contract.errors import ContractError, Malformed, UnsupportedVersion

from tests.golden import values as golden
from tests.unit.contract import values

MESSAGES = [
    golden.EVENT, golden.SAMPLE, golden.TOMBSTONE, golden.STATE, golden.WILL, golden.ACK, golden.BELL, golden.SERVER_STATE,
    golden.BATCH, golden.WINDOW,
]  # fmt: skip


def named(message: object) -> str:
    return type(message).__name__


def pack(value: object) -> bytes:
    packer = zlib.compressobj(wbits=-15, zdict=wire._DICTIONARY)
    return packer.compress(msgspec.msgpack.encode(value)) + packer.flush()


def batch_of(**fields: object) -> bytes:
    record = {"seq": 1, "kind": "event", "body": b"", "replaces": []}
    value = {"schema": 1, "epoch": "0" * 32, "records": [record]} | fields
    return pack(value)


def record_of(**fields: object) -> bytes:
    return batch_of(records=[{"seq": 5, "kind": "event", "body": b"", "replaces": []} | fields])


@pytest.mark.parametrize("message", MESSAGES, ids=named)
def test_a_message_is_read_back(message: object) -> None:
    assert wire.decode(type(message), wire.encode(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=named)
@given(fields=st.dictionaries(st.text(min_size=1, max_size=8).map("x-".__add__), values.json_values, max_size=3))
def test_unknown_fields_survive_a_program_that_does_not_know_them(message: object, fields: dict) -> None:
    newer = msgspec.msgpack.encode(msgspec.msgpack.decode(wire.encode(message)) | fields)
    found = wire.decode(type(message), newer)
    assert found.extra == fields
    assert msgspec.msgpack.decode(wire.encode(found)) == msgspec.msgpack.decode(newer)


def test_an_unknown_field_cannot_stand_in_for_a_known_one() -> None:
    forged = msgspec.structs.replace(golden.BELL, extra={"version": 999})
    assert wire.decode(wire.Bell, wire.encode(forged)).version == golden.BELL.version


@pytest.mark.parametrize("message", MESSAGES, ids=named)
def test_a_newer_schema_is_told_from_a_broken_one(message: object) -> None:
    newer = msgspec.msgpack.encode(msgspec.msgpack.decode(wire.encode(message)) | {"schema": 2})
    with pytest.raises(UnsupportedVersion, match="schema 2"):
        wire.decode(type(message), newer)


@pytest.mark.parametrize("schema", [0, -1, "1", None, 1.5, [1]])
def test_a_schema_that_never_was_is_refused(schema: object) -> None:
    with pytest.raises(Malformed, match="schema"):
        wire.decode(wire.Bell, msgspec.msgpack.encode({"schema": schema, "version": 1}))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xc1", b"\x93\x01\x02\x03", b"\x80", b"\x81\x01\x02", b"\x81\xa7version\xa1x", b"{}", b"\xdd\xff\xff\xff\xff",
        b"\x81\xa7version\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", wire.encode(golden.BELL) + b"\x00", b"\x91" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_bell_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed, match="bell"):
        wire.decode(wire.Bell, data)


def test_length_is_checked_before_anything_is_parsed() -> None:
    with pytest.raises(Malformed, match="at most 3 bytes, got 18"):
        wire.decode(wire.Bell, wire.encode(golden.BELL), max_bytes=3)


@given(values.batches())
def test_a_batch_is_read_back(batch: wire.Batch) -> None:
    assert wire.decode_batch(wire.encode_batch(batch)) == batch


@given(values.windows)
def test_a_window_is_read_back(window: w.Window) -> None:
    if all(getattr(window.latency, part).total < 1 << 63 for part in window.latency.__struct_fields__):
        assert wire.decode_window(wire.encode(window)) == window


def test_a_window_that_no_device_can_make_is_refused_when_it_is_read() -> None:
    bad = msgspec.structs.replace(golden.WINDOW, counts=w.Counts(ok=-1))
    with pytest.raises(Malformed, match=r"counts\.ok"):
        wire.decode_window(wire.encode(bad))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (batch_of(epoch="0" * 31), "epoch"),
        (batch_of(epoch="../" + "0" * 29), "epoch"),
        (batch_of(epoch=b"0" * 32), "epoch"),
        (batch_of(records=[]), "1 to 1000 records"),
        (batch_of(records=[{"seq": i, "kind": "event", "body": b""} for i in range(1, 1002)]), "1 to 1000 records"),
        (batch_of(records={}), "records"),
        (record_of(seq=0), "ascend"),
        (record_of(seq=-1), "ascend"),
        (record_of(seq=1 << 63), "ascend"),
        (record_of(seq="5"), "seq"),
        (record_of(kind="command"), "kind"),
        (record_of(body=5), "body"),
        (record_of(replaces=[[1, 5]]), "ascending ranges"),
        (record_of(replaces=[[0, 1]]), "ascending ranges"),
        (record_of(replaces=[[3, 2]]), "ascending ranges"),
        (record_of(replaces=[[3, 4], [1, 2]]), "ascending ranges"),
        (record_of(replaces=[[1, 3], [3, 4]]), "ascending ranges"),
        (record_of(replaces=[[1]]), "replaces"),
        (batch_of(records=[{"seq": s, "kind": "event", "body": b""} for s in (1, 1)]), "ascend"),
        (batch_of(records=[{"seq": s, "kind": "event", "body": b""} for s in (2, 1)]), "ascend"),
        (pack([1, 2]), "map"),
        (pack({1: 2}), "map"),
    ],
)
def test_a_batch_that_breaks_a_rule_is_refused_and_named(data: bytes, named: str) -> None:
    with pytest.raises(Malformed, match=named):
        wire.decode_batch(data)


def test_a_batch_of_a_newer_schema_is_told_from_a_broken_one() -> None:
    with pytest.raises(UnsupportedVersion):
        wire.decode_batch(batch_of(schema=2))


def test_a_batch_with_bytes_after_it_or_cut_short_is_refused() -> None:
    data = wire.encode_batch(golden.BATCH)
    for changed in (data + b"\0", data + data, data[:-1], data[: len(data) // 2], b""):
        with pytest.raises(Malformed):
            wire.decode_batch(changed)


def test_a_zip_bomb_is_never_inflated_past_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    packer = zlib.compressobj(level=9, wbits=-15, zdict=wire._DICTIONARY)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(128)) + packer.flush()
    assert len(bomb) < wire.MAX_MESSAGE_BYTES
    asked: list[int] = []
    real = zlib.decompressobj

    class Watched:
        def __init__(self, **arguments: object) -> None:
            self.inner = real(**arguments)

        def decompress(self, data: bytes, limit: int = 0) -> bytes:
            asked.append(limit)
            return self.inner.decompress(data, limit)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    with pytest.raises(Malformed, match=f"at most {wire.MAX_INFLATED_BYTES} bytes"):
        wire.decode_batch(bomb)
    assert asked == [wire.MAX_INFLATED_BYTES]


def swollen(**fields: object) -> bytes:
    """A small good batch with a field of four million empty maps, which no reader knows."""
    maps = b"\xdd" + (4_190_000).to_bytes(4, "big") + b"\x80" * 4_190_000
    good = msgspec.msgpack.encode({"schema": 1, "epoch": "0" * 32, "records": [], **fields})
    assert good[0] & 0xF0 == 0x80
    return bytes([good[0] + 1]) + good[1:] + b"\xa1x" + maps


def test_a_bomb_of_objects_is_refused_before_it_is_built() -> None:
    inflated = swollen()
    packer = zlib.compressobj(level=9, wbits=-15, zdict=wire._DICTIONARY)
    data = packer.compress(inflated) + packer.flush()
    assert len(data) < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(Malformed, match="not known"):
            wire.decode_batch(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The inflated bytes and copies of them; as objects they would take 290 MB.
    assert peak < 8 * wire.MAX_INFLATED_BYTES


def test_more_fields_than_any_message_has_are_refused_unread() -> None:
    many = {f"f{i}": 0 for i in range(wire.MAX_FIELDS + 1)}
    with pytest.raises(Malformed, match="fields"):
        wire.decode(wire.Bell, msgspec.msgpack.encode({"schema": 1, "version": 1, **many}))
    announced = b"\xdf\xff\xff\xff\xff"
    with pytest.raises(Malformed, match="fields"):
        wire.decode(wire.Bell, announced)


def test_unknown_fields_up_to_the_limit_survive_and_one_byte_more_is_refused() -> None:
    def sized(n: int) -> bytes:
        # Two bytes of name, three of header.
        return msgspec.msgpack.encode({"schema": 1, "version": 1, "ab": bytes(n - 5)})

    kept = wire.decode(wire.Bell, sized(wire.MAX_EXTRA_BYTES))
    assert len(kept.extra["ab"]) == wire.MAX_EXTRA_BYTES - 5
    with pytest.raises(Malformed, match="not known"):
        wire.decode(wire.Bell, sized(wire.MAX_EXTRA_BYTES + 1))


def test_small_messages_have_a_limit_of_their_own() -> None:
    with pytest.raises(Malformed, match=f"at most {wire.MAX_SMALL_BYTES} bytes"):
        wire.decode(wire.Event, bytes(wire.MAX_SMALL_BYTES + 1))


def test_a_batch_just_at_the_limit_is_read_and_one_byte_more_is_not() -> None:
    def sized(size: int) -> bytes:
        record = {"seq": 1, "kind": "sample", "body": b"", "replaces": []}
        value = {"schema": 1, "epoch": "0" * 32, "records": [record]}
        record["body"] = bytes(size)
        overhead = len(msgspec.msgpack.encode(value)) - size
        record["body"] = bytes(size - overhead)
        assert len(msgspec.msgpack.encode(value)) == size
        return pack(value)

    assert len(wire.decode_batch(sized(wire.MAX_INFLATED_BYTES)).records) == 1
    with pytest.raises(Malformed, match="at most"):
        wire.decode_batch(sized(wire.MAX_INFLATED_BYTES + 1))


def test_a_message_past_the_limit_of_mqtt_is_refused_unread() -> None:
    with pytest.raises(Malformed, match=f"at most {wire.MAX_MESSAGE_BYTES} bytes"):
        wire.decode_batch(bytes(wire.MAX_MESSAGE_BYTES + 1))


@given(st.binary(max_size=400))
def test_noise_raises_nothing_but_a_contract_error(data: bytes) -> None:
    with pytest.raises(ContractError):
        wire.decode_batch(data)


@given(st.binary(max_size=300))
def test_noise_inside_a_good_stream_raises_nothing_but_a_contract_error(data: bytes) -> None:
    packer = zlib.compressobj(wbits=-15, zdict=wire._DICTIONARY)
    with pytest.raises(ContractError):
        wire.decode_batch(packer.compress(data) + packer.flush())


@given(st.randoms(use_true_random=False), st.integers(1, 6))
def test_a_batch_with_flipped_bits_raises_nothing_but_a_contract_error(rng: random.Random, flips: int) -> None:
    for data, decode in (
        (bytearray(wire.encode_batch(golden.BATCH)), wire.decode_batch),
        (bytearray(wire.encode(golden.BATCH)), lambda changed: wire.decode(wire.Batch, changed)),
        (bytearray(wire.encode(golden.WINDOW)), wire.decode_window),
        (bytearray(wire.encode(golden.STATE)), lambda changed: wire.decode(wire.State, changed)),
    ):
        for _ in range(flips):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            decode(bytes(data))
        except ContractError:
            pass


def test_a_digest_covers_kind_ranges_and_body() -> None:
    record = wire.Record(seq=9, kind="window", body=b"body", replaces=((1, 2), (4, 4)))
    assert wire.digest(record) == hashlib.sha256(b"window\x001-2,4-4\x00body").digest()
    changed = [
        msgspec.structs.replace(record, kind="event"),
        msgspec.structs.replace(record, body=b"Body"),
        msgspec.structs.replace(record, replaces=((1, 2),)),
        msgspec.structs.replace(record, replaces=()),
    ]
    assert len({wire.digest(other) for other in [record, *changed]}) == 5


def test_a_digest_does_not_depend_on_the_seq() -> None:
    record = golden.RECORDS[1]
    assert wire.digest(record) == wire.digest(msgspec.structs.replace(record, seq=77))


@given(values.windows, values.windows)
def test_windows_merged_after_the_wire_are_those_merged_before(a: w.Window, b: w.Window) -> None:
    def through(window: w.Window) -> w.Window:
        return wire.decode(w.Window, wire.encode(window), max_bytes=1 << 22)

    if all(getattr(x.latency, part).total < 1 << 63 for x in (a, b) for part in x.latency.__struct_fields__):
        assert w.merge(through(a), through(b)) == w.merge(a, b)


@pytest.mark.parametrize("number", [-1, 1 << 63, (1 << 64) - 1])
def test_a_device_hears_no_number_that_a_database_cannot_hold(number: int) -> None:
    ack = {"schema": 1, "epoch": "1" * 32, "upto": 1}
    for kind, fields in (
        (wire.Ack, {**ack, "upto": number}),
        (wire.Ack, {**ack, "extra_ranges": [[1, number]]}),
        (wire.Ack, {**ack, "conflict": [number]}),
        (wire.Bell, {"schema": 1, "version": number}),
        (wire.ServerState, {"schema": 1, "status": "online", "birth": number}),
    ):
        with pytest.raises(Malformed):
            wire.decode(kind, msgspec.msgpack.encode(fields))
