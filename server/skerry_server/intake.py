"""One transaction of ingest: messages in, rows and acknowledgements out.

Owns the order of the steps and the statements that write records. Leaves the decision about each record to ``ledger``, the
roll-ups to ``rollups``, ``profiles`` and ``reports``, device states to ``presence`` and rubbish to ``quarantine``; threads, retries and MQTT to ``ingest``.

Every select and insert serves the whole batch; only a record below what its stream already holds costs a look of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from skerry_contract import ids, topics, wire
from skerry_contract import window as w
from skerry_contract.errors import ContractError, Malformed
from sqlalchemy import Connection, Insert, bindparam, delete, func, insert, select

from skerry_server import ledger, profiles, reports, rollups, shadowing, windows
from skerry_server.anchors import Anchors
from skerry_server.core import profile as core
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.bulk import Many
from skerry_server.mqtt import Message
from skerry_server.presence import Known, Presence, decode_state, load, plain_json
from skerry_server.quarantine import UNKNOWN_DEVICE, Notes
from skerry_server.reports import TakenEvent

_MOST_MS = 1 << 53
MOST_SAMPLES = 1_000_000
MAX_TRANSACTION_BYTES = wire.MAX_INFLATED_BYTES
"""Inflated bytes of one transaction, but at least one message: a few kilobytes on the wire may become megabytes of objects."""


@dataclass(slots=True)
class Outcome:
    """What a transaction did. Good only once it is committed.

    Attributes:
        taken: how many of the messages it dealt with, from the first; the rest is for the next transaction.
        acks: (device, epoch) -> what to tell the device.
    """

    taken: int = 0
    acks: dict[tuple[str, str], wire.Ack] = field(default_factory=dict)
    events: list[TakenEvent] = field(default_factory=list)
    records: int = 0
    windows: int = 0
    duplicates: int = 0
    conflicts: int = 0
    quarantined: int = 0


class _Up(NamedTuple):
    """The records of one message. Fields that this release does not know are of no use here and are not held."""

    topic: str
    device: str
    epoch: str
    records: tuple[wire.Record, ...]


class Intake:
    """Whatever it knows comes from the database; between transactions it remembers only what never changes, bundles' shapes."""

    def __init__(self, *, bucket_ms: int = profiles.BUCKET_MS, most_samples: int = MOST_SAMPLES) -> None:
        """Args:
        bucket_ms: length of the buckets in which profiles are kept.
        most_samples: of all devices together; the oldest go.
        """
        self._most_samples = most_samples
        self._bucket_ms = bucket_ms
        self._shapes = profiles.Shapes()

    def take(self, connection: Connection, messages: Sequence[Message], *, now_ms: int) -> Outcome:
        """Takes messages in their order, within the caller's transaction; not all, when they hold too much for one.

        Args:
            now_ms: when they were received, milliseconds since 1970.
        """
        folder = profiles.Folder(connection, self._shapes, bucket_ms=self._bucket_ms, now_ms=now_ms)
        return _Batch(connection, now_ms, folder, self._most_samples).take(messages)

    def set_aside(self, connection: Connection, message: Message, *, now_ms: int) -> Outcome:
        """Counts and keeps a message that made ``take`` raise."""
        notes = Notes()
        try:
            device: str = topics.parse_device_topic(message.topic).device
        except Malformed:
            device = UNKNOWN_DEVICE
        if device not in load(connection, [device]):
            device = UNKNOWN_DEVICE
        notes.keep(device, message.topic, "unusable", "could not be stored", message.payload)
        notes.store(connection, now_ms)
        return Outcome(taken=1, quarantined=1)


class _Batch:
    def __init__(self, connection: Connection, now_ms: int, folder: profiles.Folder, most_samples: int) -> None:
        self._most_samples = most_samples
        self._connection = connection
        self._now_ms = now_ms
        self._profiles = folder
        self._outcome = Outcome()
        self._notes = Notes()
        self._streams: dict[tuple[str, str], ledger.Stream] = {}
        self._anchors = Anchors(connection, now_ms)
        self._happened: list[tuple[w.Instant, TakenEvent]] = []
        self._windows: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []
        self._arrived: list[rollups.Arrived] = []
        self._paired: list[shadowing.Paired] = []

    def take(self, messages: Sequence[Message]) -> Outcome:
        addressed = [(message, self._address(message)) for message in messages]
        known = load(self._connection, sorted({topic.device for _, topic in addressed if topic is not None}))
        self._anchors.load(known)
        presence = Presence(known, self._now_ms)
        batches: list[_Up] = []
        room = MAX_TRANSACTION_BYTES
        for message, topic in addressed:
            if topic is not None and self._is_welcome(message, topic, known):
                try:
                    if topic.leaf == "state":
                        self._take_state(presence, topic.device, message)
                    else:
                        inflated = wire.inflate(message.payload)
                        room -= len(inflated)
                        if room < 0 and batches:
                            break
                        batch = wire.read_batch(inflated)
                        batches.append(_Up(message.topic, topic.device, batch.epoch, batch.records))
                        presence.seen(topic.device)
                except ContractError as error:
                    self._notes.keep(topic.device, message.topic, error.code, str(error), message.payload)
                    self._outcome.quarantined += 1
            self._outcome.taken += 1
        self._open_streams(batches)
        for up in batches:
            stream = self._streams[up.device, up.epoch]
            for record in up.records:
                self._take_record(up.topic, up.device, up.epoch, stream, record)
        self._store()
        presence.store(self._connection)
        return self._outcome

    def _address(self, message: Message) -> topics.DeviceTopic | None:
        try:
            return topics.parse_device_topic(message.topic)
        except Malformed:
            self._notes.count(UNKNOWN_DEVICE, "foreign")
            return None

    def _is_welcome(self, message: Message, topic: topics.DeviceTopic, known: Mapping[str, Known]) -> bool:
        """Whether an enrolled device says something that devices say, in a size that they may."""
        device = topic.device
        if device not in known or not known[device].enrolled:
            # Names that nobody enrolled are counted together: a made-up name must not make a row.
            self._notes.count(device if device in known else UNKNOWN_DEVICE, "foreign")
            return False
        if len(message.payload) > wire.MAX_MESSAGE_BYTES:
            self._notes.keep(device, message.topic, "oversized", f"{len(message.payload)} bytes", message.payload)
            self._outcome.quarantined += 1
            return False
        if topic.leaf not in ("state", "up"):
            self._notes.count(device, "foreign")
            return False
        return True

    def _take_state(self, presence: Presence, device: str, message: Message) -> None:
        state = decode_state(message.payload) if message.payload else None
        if state is not None and not presence.apply(device, state, retained=message.retained):
            self._notes.count(device, "stale_state")
        elif state is not None and state.at is not None and not message.retained:
            # A retained one was said at some other time.
            self._anchors.heard(device, state.at)

    def _open_streams(self, batches: Sequence[_Up]) -> None:
        wanted = {(up.device, up.epoch) for up in batches}
        if not wanted:
            return
        s = t.streams.c
        found = self._connection.execute(
            select(s.device, s.epoch, s.upto, s.high)
            .where(s.device.in_(sorted({device for device, _ in wanted})), s.epoch.in_(sorted({e for _, e in wanted})))
            .with_for_update()
        )
        stored = {(device, epoch): (upto, high) for device, epoch, upto, high in found}
        for device, epoch in wanted:
            upto, high = stored.get((device, epoch), (0, 0))
            self._streams[device, epoch] = ledger.Stream(upto, high, self._loader(device, epoch))

    def _loader(self, device: str, epoch: str) -> ledger.Load:
        def rows(low: int, high: int, most: int) -> Sequence[ledger.Held]:
            found = self._connection.execute(
                _TOUCHING, {"of_device": device, "of_epoch": epoch, "from_seq": low, "to_seq": high, "most": most}
            )
            return [ledger.Held(*row) for row in found]

        return rows

    def _take_record(self, topic: str, device: str, epoch: str, stream: ledger.Stream, record: wire.Record) -> None:
        digest = wire.digest(record)
        body: _Body | None = None
        fault = ""
        try:
            if len(record.replaces) > wire.MAX_RANGES:
                raise Malformed("record", f"wanted at most {wire.MAX_RANGES} ranges", where="replaces")
            body = _read_body(record)
        except ContractError as error:
            # What it replaces is entered all the same: nobody sends those seqs any more, and they would be holes for ever.
            fault = f"epoch {epoch} seq {record.seq}: {error}"
        verdict = stream.take(record, digest, malformed=body is None)
        if verdict in ("conflict", "overlap"):
            self._outcome.conflicts += 1
            self._notes.keep(device, topic, verdict, f"epoch {epoch} seq {record.seq}", record.body)
        elif verdict == "duplicate":
            self._outcome.duplicates += 1
        elif body is None:
            self._outcome.quarantined += 1
            self._notes.keep(device, topic, "malformed_record", fault, record.body)
        else:
            self._outcome.records += 1
            self._enter(device, epoch, record, body)

    def _enter(self, device: str, epoch: str, record: wire.Record, body: _Body) -> None:
        if isinstance(body, w.Window):
            self._outcome.windows += 1
            position = record.replaces[0][0] if record.replaces else record.seq
            labels_fit = self._profiles.labels_fit(body)
            self._notes.count(device, "labels_unfit", 0 if labels_fit else 1)
            latency_fits = core.latency_fits(body.latency.total)
            self._notes.count(device, "latency_unfit", 0 if latency_fits else 1)
            self._arrived.append(
                rollups.arrived(device, epoch, position, body, labels_fit=labels_fit, latency_fits=latency_fits)
            )
            self._anchors.saw(device, body.start)
            self._anchors.saw(device, body.end)
            at_ms, _ = self._anchors.place(device, body.end)
            self._notes.count(device, "profile_unfit", self._profiles.add(device, body, at_ms=at_ms))
            if body.shadows:
                paired = shadowing.paired(device, body)
                fitting = [one for one in paired if core.shadow_fits(one.shadow)]
                self._notes.count(device, "shadow_unfit", len(paired) - len(fitting))
                self._paired += fitting
            self._windows.append(
                {
                    "device": device,
                    "epoch": epoch,
                    "seq": record.seq,
                    "received_ms": self._now_ms,
                    **body.key._asdict(),
                    # Placed at the end: what comes later in the batch may say when this boot was.
                    "start_ms": body.start,
                    "end_ms": body.end,
                    "timed": "",
                    "ok": body.counts.ok,
                    "errors": body.counts.failed,
                    "body": record.body,
                }
            )
        elif isinstance(body, wire.Sample):
            self._samples.append(
                {
                    "device": device,
                    "received_ms": self._now_ms,
                    "model": body.key.model,
                    "bundle": body.key.bundle,
                    "body": record.body,
                }
            )
        elif isinstance(body, wire.Event):
            self._anchors.saw(device, body.at)
            self._happened.append((body.at, TakenEvent(device, self._now_ms, 0, body.name, body.code, body.data)))
        else:
            # What was dropped and why stands among the events, where people look.
            data = {"records": body.records, "inferences": body.inferences, "seqs": [list(r) for r in record.replaces]}
            self._anchors.saw(device, body.at)
            self._happened.append((body.at, TakenEvent(device, self._now_ms, 0, "tombstone", body.why[:60], data)))

    def _store(self) -> None:
        rows: list[dict[str, Any]] = []
        streams: list[dict[str, Any]] = []
        for (device, epoch), stream in self._streams.items():
            extra = stream.settle()
            rows += [
                {"device": device, "epoch": epoch, "seq": r.seq, "low": r.low, "digest": r.digest, "kind": r.kind}
                for r in stream.added
            ]
            streams.append(self._stream_row(device, epoch, stream))
            self._notes.count(device, "duplicate", stream.duplicates)
            self._outcome.acks[device, epoch] = wire.Ack(
                epoch=epoch,
                upto=stream.upto,
                extra_ranges=extra,
                server_time=self._now_ms / 1000,
                conflict=tuple(stream.conflicts),
            )
        _LEDGER.run(self._connection, rows)
        for row in self._windows:
            row["start_ms"], _ = self._anchors.place(row["device"], row["start_ms"])
            row["end_ms"], row["timed"] = self._anchors.place(row["device"], row["end_ms"])
        for at, event in self._happened:
            at_ms, _ = self._anchors.place(event.device, at)
            self._outcome.events.append(event._replace(at_ms=at_ms))
        self._anchors.store()
        _WINDOWS.run(self._connection, self._windows)
        if self._samples:
            self._connection.execute(insert(t.samples), self._samples)
            newest = select(func.max(t.samples.c.id)).scalar_subquery()
            self._connection.execute(delete(t.samples).where(t.samples.c.id <= newest - self._most_samples))
        if self._outcome.events:
            self._connection.execute(insert(t.events), [event._asdict() for event in self._outcome.events])
            reports.fold(self._connection, self._outcome.events)
        _STREAMS.run(self._connection, streams)
        rollups.fold(self._connection, self._arrived, self._now_ms)
        for strange in shadowing.fold(self._connection, self._paired, self._now_ms):
            self._notes.count(strange.device, "shadow_unknown")
        self._profiles.store()
        self._notes.store(self._connection, self._now_ms)

    def _stream_row(self, device: str, epoch: str, stream: ledger.Stream) -> dict[str, Any]:
        return {
            "device": device,
            "epoch": epoch,
            "upto": stream.upto,
            "high": stream.high,
            "first_ms": self._now_ms,
            "last_ms": self._now_ms,
            "records": stream.records,
            "duplicates": stream.duplicates,
            "conflicts": len(stream.conflicts),
            "tombstoned": stream.tombstoned,
        }


def _upsert_stream(connection: Connection) -> Insert:
    fresh = queries.upsert(connection, t.streams)
    s, new = t.streams.c, fresh.excluded
    grown = {n: s[n] + new[n] for n in ("records", "duplicates", "conflicts", "tombstoned")}
    moved = {n: new[n] for n in ("upto", "high", "last_ms")}
    statement: Insert = fresh.on_conflict_do_update(index_elements=["device", "epoch"], set_=grown | moved)
    return statement


_LEDGER = Many(lambda _connection: insert(t.ledger), t.ledger.c.keys())
_WINDOWS = Many(lambda _connection: insert(t.windows), [column.name for column in t.windows.c if column.name != "id"])
_STREAMS = Many(_upsert_stream, t.streams.c.keys())

_l = t.ledger.c
_MINE = (_l.device == bindparam("of_device"), _l.epoch == bindparam("of_epoch"))
_beyond = t.ledger.alias()
_TOUCHING = (
    select(_l.seq, _l.low, _l.digest, _l.kind)
    .where(
        *_MINE,
        _l.seq >= bindparam("from_seq"),
        # Rows do not overlap, so at most one that ends above to_seq can begin at or below it: the first.
        _l.seq
        <= func.coalesce(
            select(func.min(_beyond.c.seq))
            .where(
                _beyond.c.device == bindparam("of_device"),
                _beyond.c.epoch == bindparam("of_epoch"),
                _beyond.c.seq >= bindparam("to_seq"),
            )
            .scalar_subquery(),
            bindparam("to_seq"),
        ),
        _l.low <= bindparam("to_seq"),
    )
    .order_by(_l.seq)
    .limit(bindparam("most"))
)

_Body = w.Window | wire.Event | wire.Sample | wire.Tombstone


def _read_body(record: wire.Record) -> _Body:
    """The body, checked for what the database can hold. Raises ``ContractError``."""
    if record.kind == "window":
        return windows.read(record.body)
    if record.kind == "event":
        event = wire.decode(wire.Event, record.body)
        _check_instant(event.at, "event")
        if not 0 < len(event.name) <= 60 or len(event.code) > 60:
            raise Malformed("event", "wanted a name of 1 to 60 and a code of at most 60 characters")
        plain_json(event.data, what="event")
        if event.name == "worker" and not isinstance(event.data.get("models", {}), dict):
            # Of a worker's event this is read again, by the judge.
            raise Malformed("event", "wanted an object of model to bundle", where="data.models")
        return event
    if record.kind == "sample":
        sample = wire.decode(wire.Sample, record.body)
        ids.model_name(sample.key.model)
        ids.bundle_digest(sample.key.bundle)
        return sample
    tombstone = wire.decode(wire.Tombstone, record.body)
    _check_instant(tombstone.at, "tombstone")
    if not (0 <= tombstone.records < _MOST_MS and 0 <= tombstone.inferences < _MOST_MS):
        raise Malformed("tombstone", "wanted counts from 0 to 2**53")
    return tombstone


def _check_instant(at: w.Instant, what: str) -> None:
    if not -_MOST_MS < at.wall_ms < _MOST_MS:
        raise Malformed(what, "wanted a time within 2**53 ms of 1970")
