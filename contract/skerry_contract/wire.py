"""What travels over MQTT: batches of records up, state up, acknowledgements and bells down.

A batch is zlib (with a preset dictionary) over MessagePack; acknowledgements, bells and states are MessagePack alone. Every
message carries ``schema``. A reader refuses a newer schema and keeps fields it does not know: a program may pass on what it
does not understand. Bodies of records stay bytes from the outbox to the database, so a record that is sent again is
identical and its digest is the same.

A record's digest is ``sha256(kind || 0x00 || replaces || 0x00 || body)``: the same seq with another digest is a conflict.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from skerry_contract import histogram as h
from skerry_contract import ids
from skerry_contract import window as w
from skerry_contract.errors import Malformed, UnsupportedVersion
from skerry_contract.reading import ready

SCHEMA = 1
MAX_MESSAGE_BYTES = 256 * 1024
"""Greatest MQTT payload; a device splits its batches below it."""
MAX_INFLATED_BYTES = 4 << 20
MAX_RECORDS = 1000
MAX_SEQ = (1 << 63) - 1
MAX_RANGES = 10_000
"""Ranges that one record may replace. A device merges and drops so that it stays well below; the server refuses what has more."""
MAX_FIELDS = 64
"""Most fields of a message, known and unknown together."""
MAX_EXTRA_BYTES = 16 * 1024
"""Most bytes of fields that the reader does not know. A byte can become an object of 70: what nobody asked for stays small."""
MAX_SMALL_BYTES = 64 * 1024
"""Most bytes of a state, an event, an acknowledgement and whatever else is no batch, window or sample."""
MOST_BIRTH = 1 << 53
"""Greatest number of a device's session."""
MOST_BIRTHS_AT_ONCE = 1 << 32
"""Sessions that a device may be ahead of what is known of it: one per second for more than a century."""
ONLINE, OFFLINE = "online", "offline"

Kind = Literal["window", "event", "sample", "tombstone"]
KINDS: tuple[Kind, ...] = ("window", "event", "sample", "tombstone")

# Part of schema 1 for ever: both sides must have the same bytes. A better dictionary is another schema.
_DICTIONARY = (
    b"\xa5start\xa3end\xa6merged\xa5extra\xa9resources\xa6labels\xa6slices\xa7outputs\xa8features\xa7latency\xa6counts\xa3key"
    b"confusion\xa7matched\xa4late\xa7unknown\xa9duplicate\xabconflicting\xa5total\xa5queue\xa9transform\xa5infer"
    b"\xa2ok\xa7invalid\xa6failed\xa4shed\xa4rows\xa7retries\xa6cached\xa8fallbackcontrolcandidatenone"
    b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x05\x00\x00\x90\x00"
    b"\x86\xa6schema\x01\xa5epoch\xd9 \xa7records\xa3seq\xa4kind\xa6window\xa8replaces\x90\xa4body"
)

Range = tuple[int, int]
"""Inclusive (low, high)."""
Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_SEQ)]
"""What a database can hold: who says more down to a device is not heard."""


def believable_birth(seen: int, known: int) -> bool:
    """Whether a birth can follow from the one that is known: a broker can put any number where a device keeps its own.

    >>> [believable_birth(n, 7) for n in (3, 8, 4_000_000_000, 1 << 33, 1 << 63)]
    [True, True, True, False, False]
    """
    return 0 <= seen <= min(known + MOST_BIRTHS_AT_ONCE, MOST_BIRTH)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One thing the outbox holds.

    Attributes:
        seq: running number within the epoch, from 1; never reused.
        replaces: seqs of older records that this one stands for (merged windows, tombstones), ascending, disjoint.
        body: MessagePack of a Window, Event, Sample or Tombstone.
    """

    seq: int
    kind: Kind
    body: bytes
    replaces: tuple[Range, ...] = ()


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Records of one epoch, ascending by seq."""

    schema: int = SCHEMA
    epoch: str
    records: tuple[Record, ...]
    extra: dict[str, Any] = {}


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened on the device, for the server's record.

    Attributes:
        name: e.g. ``update``; code: stable reason code, e.g. ``hash_mismatch``, empty for success.
        data: further fields by name.
    """

    at: w.Instant
    name: str
    code: str = ""
    data: dict[str, Any] = {}
    extra: dict[str, Any] = {}


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One inference kept whole, without features marked ``pii``."""

    at: w.Instant
    key: w.Key
    id: str
    why: str
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    extra: dict[str, Any] = {}


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """Records that were dropped: which is in the record's ``replaces``; how much and why is here."""

    at: w.Instant
    why: str
    records: int
    inferences: int = 0
    extra: dict[str, Any] = {}


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What answers requests for one model now."""

    digest: str
    version: str
    variant: str
    state: Literal["trial", "confirmed", "confirmed_on_golden", "stopped"]


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """The update under way or last ended. ``since`` is when its state was entered."""

    model: str
    digest: str
    state: str
    since: w.Instant
    code: str = ""
    detail: str = ""
    attempt: int = 0


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far the files of the update under way are, bytes: ``done`` of ``size``."""

    done: int
    size: int


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A device's retained state; its will is the same with ``status`` offline and nothing else.

    Attributes:
        birth: number of this session, grows with every connect; the will carries the same number, so that an old will
            that comes late is told from the present session.
        tuf: verified version per role, e.g. ``{"root": 1, "timestamp": 7, "fleet": 3}``.
        generation: of the group document obeyed.
        epoch, seq: the outbox and its newest seq.
        stratum: hardware class and variants, as cuts name it.
        abilities: what it understands of a group document.
        lost: counters of what was lost or dropped, by cause.
        at: when it was said; left out of the bytes while there is none. By it the server places what a clock that was not set stamped.
        progress: while files are fetched; left out otherwise.
    """

    schema: int = SCHEMA
    status: Literal["online", "offline"]
    birth: int
    agent: str = ""
    group: str = ""
    generation: int = 0
    boot_id: str = ""
    epoch: str = ""
    seq: int = 0
    stratum: str = ""
    arch: str = ""
    abilities: tuple[str, ...] = ()
    runtimes: dict[str, str] = {}
    tuf: dict[str, int] = {}
    running: dict[str, Running] = {}
    update: Update | None = None
    lost: dict[str, int] = {}
    at: w.Instant | None = None
    progress: Progress | None = None
    extra: dict[str, Any] = {}


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """What the server has committed.

    Attributes:
        upto: highest seq below which all are committed, tombstoned or quarantined; from the database.
        extra_ranges: what it holds above that.
        server_time: seconds since 1970; annotates, decides nothing.
        conflict: seqs that it holds with another digest.
    """

    schema: int = SCHEMA
    epoch: str
    upto: Number
    extra_ranges: tuple[tuple[Number, Number], ...] = ()
    server_time: float = 0.0
    conflict: tuple[Number, ...] = ()
    extra: dict[str, Any] = {}


class Bell(msgspec.Struct, frozen=True, kw_only=True):
    """Look again. ``version`` grows with every ring."""

    schema: int = SCHEMA
    version: Number
    extra: dict[str, Any] = {}


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the server listens; while it does not, devices publish only birth and will."""

    schema: int = SCHEMA
    status: Literal["online", "offline"]
    birth: Number
    extra: dict[str, Any] = {}


T = TypeVar("T", Batch, Event, Sample, Tombstone, State, Ack, Bell, ServerState, w.Window)

_encoder = msgspec.msgpack.Encoder()
_NO_AGES = msgspec.structs.astuple(h.Exponential())


def encode(message: T) -> bytes:
    """MessagePack of a message, with the fields of ``extra`` beside the known ones."""
    fields = msgspec.structs.asdict(message)
    extra = fields.pop("extra", {})
    if isinstance(message, w.Window):
        for name in w.LATER_FIELDS:
            value = fields[name]
            # By its numbers: a reader's own subclass of a histogram is never equal to the contract's.
            if not value or (isinstance(value, h.Exponential) and msgspec.structs.astuple(value) == _NO_AGES):
                del fields[name]
        if not message.labels.lags:
            fields["labels"] = msgspec.structs.asdict(message.labels)
            del fields["labels"]["lags"]
    elif isinstance(message, State):
        for name in ("at", "progress"):
            if fields[name] is None:
                del fields[name]
    return _encoder.encode({**extra, **fields})


_raw = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_decoders: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {}
_LARGE = (Batch, Sample, w.Window)


def decode(kind: type[T], data: bytes, *, max_bytes: int | None = None) -> T:
    """Reads a message; fields it does not know go to ``extra``.

    Nothing is built of what the message does not need: known fields become their types at once, unknown ones are cut out as
    bytes and read only while they are few and small.

    Args:
        max_bytes: ``MAX_MESSAGE_BYTES`` for a batch, a window and a sample, ``MAX_SMALL_BYTES`` for the others when None.

    Raises:
        Malformed: too long, not MessagePack, a field missing or of the wrong type, too much that is not known.
        UnsupportedVersion: a newer schema.
    """
    what = kind.__name__.lower()
    if max_bytes is None:
        max_bytes = MAX_MESSAGE_BYTES if issubclass(kind, _LARGE) else MAX_SMALL_BYTES
    if len(data) > max_bytes:
        raise Malformed(what, f"at most {max_bytes} bytes, got {len(data)}")
    if _fields(data) > MAX_FIELDS:
        raise Malformed(what, f"wanted a map of at most {MAX_FIELDS} fields")
    try:
        fields = _raw.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Malformed(what, f"wanted MessagePack, a map with text keys: {error}") from None
    _check_schema(what, fields.get("schema"))
    known = [name for name in kind.__struct_fields__ if name != "extra" and name in fields]
    unknown = [name for name in fields if name not in known]
    if sum(len(bytes(fields[name])) + len(name) for name in unknown) > MAX_EXTRA_BYTES:
        raise Malformed(what, f"fields that are not known hold more than {MAX_EXTRA_BYTES} bytes")
    if unknown:
        data = _encoder.encode({name: fields[name] for name in known})
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders.setdefault(kind, msgspec.msgpack.Decoder(kind))
    try:
        message: T = decoder.decode(data)
        extra = {name: msgspec.msgpack.decode(fields[name]) for name in unknown}
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
        raise Malformed(what, str(error)) from None
    return msgspec.structs.replace(message, extra=extra) if extra else message


def _fields(data: bytes) -> int:
    """How many fields the map at the start of the bytes announces; 0 when there is none: the decoder will say so."""
    first = data[0] if data else 0
    if first & 0xF0 == 0x80:
        return first & 0x0F
    width = {0xDE: 2, 0xDF: 4}.get(first, 0)
    return int.from_bytes(data[1 : 1 + width], "big")


def _check_schema(what: str, raw: msgspec.Raw | None) -> None:
    if raw is None:
        return
    try:
        schema = msgspec.msgpack.decode(raw, type=int)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise Malformed(what, f"wanted {SCHEMA}", where="schema") from None
    if schema > SCHEMA:
        raise UnsupportedVersion(what, schema, SCHEMA)
    if schema != SCHEMA:
        raise Malformed(what, f"wanted {SCHEMA}", where="schema")


def encode_batch(batch: Batch) -> bytes:
    """The bytes of an ``up`` message."""
    packer = zlib.compressobj(level=6, wbits=-15, zdict=_DICTIONARY)
    return packer.compress(encode(batch)) + packer.flush()


def inflate(data: bytes) -> bytes:
    """The MessagePack inside an ``up`` message, never more than ``MAX_INFLATED_BYTES``.

    Raises:
        Malformed: too long, no zlib stream, trailing bytes.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise Malformed("batch", f"at most {MAX_MESSAGE_BYTES} bytes, got {len(data)}")
    unpacker = zlib.decompressobj(wbits=-15, zdict=_DICTIONARY)
    try:
        inflated = unpacker.decompress(data, MAX_INFLATED_BYTES)
    except zlib.error as error:
        raise Malformed("batch", f"wanted a zlib stream: {error}") from None
    if not unpacker.eof or unpacker.unused_data or unpacker.unconsumed_tail:
        raise Malformed("batch", f"wanted one whole zlib stream of at most {MAX_INFLATED_BYTES} bytes")
    return inflated


def decode_batch(data: bytes) -> Batch:
    """Reads an ``up`` message. Raises as ``inflate`` and ``read_batch``."""
    return read_batch(inflate(data))


def read_batch(inflated: bytes) -> Batch:
    """Reads what ``inflate`` gave.

    Raises:
        Malformed: no batch, or records out of order or range.
        UnsupportedVersion: a newer schema.
    """
    batch = decode(Batch, inflated, max_bytes=MAX_INFLATED_BYTES)
    ids.epoch(batch.epoch)
    if not 0 < len(batch.records) <= MAX_RECORDS:
        raise Malformed("batch", f"wanted 1 to {MAX_RECORDS} records, got {len(batch.records)}")
    last = 0
    for record in batch.records:
        if not last < record.seq <= MAX_SEQ:
            raise Malformed("batch", "wanted seqs that ascend from 1", where=f"seq {record.seq}")
        last = record.seq
        _check_replaces(record)
    return batch


def _check_replaces(record: Record) -> None:
    last = 0
    for low, high in record.replaces:
        if not last < low <= high < record.seq:
            raise Malformed("batch", "wanted ascending ranges below the seq", where=f"seq {record.seq} replaces")
        last = high


def digest(record: Record) -> bytes:
    """The 32-byte digest of a record's content."""
    spans = ",".join(f"{low}-{high}" for low, high in record.replaces)
    return hashlib.sha256(record.kind.encode() + b"\0" + spans.encode() + b"\0" + record.body).digest()


def decode_window(body: bytes) -> w.Window:
    """Reads and checks the body of a ``window`` record. Raises ``Malformed``."""
    return w.check(decode(w.Window, body, max_bytes=MAX_INFLATED_BYTES))


ready(Ack, Batch, Bell, Event, Sample, ServerState, State, Tombstone, w.Window)
