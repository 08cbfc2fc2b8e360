"""Records on their way to the server: seqs, epochs, and what an acknowledgement frees.

* A window and the ring position it covers are one transaction, so that a crash neither loses nor repeats it.
* A seq is given out once per epoch. The counter lives in the same file and transaction as the record.
* A record that was marked as sent is frozen until the server acknowledges it.
* An epoch is one life of the outbox: random, bound to the machine, the device's key and its id. A copied state
  folder, a new key, an acknowledgement above our own seq or a conflict begin a new one. Records of a former epoch stay
  as they are under it, so that a record that also exists elsewhere is the same record.

What gives way when it is full is ``compaction``'s.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from skerry_contract import ids, wire

from skerry_agent.core import lives, retention
from skerry_agent.store.database import Database, checksum

_PAGE_ROWS = 500
AT_ONCE = 256
"""Records that one transaction takes out."""
_BOOTS = 256
"""Boots whose order is remembered."""
_ROW_BYTES = 64
"""What a row takes beside its body, about."""


_OLDEST = "SELECT seq, kind, '', size, 0 FROM outbox INDEXED BY outbox_waiting WHERE epoch = ? AND kind = ? ORDER BY seq LIMIT ?"
_INSERT = "INSERT INTO outbox (epoch, seq, kind, key, size, inferences, replaces, body, crc) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_FIELDS = _INSERT.count("?")
_TOGETHER = 25
"""Rows of one statement, where there are so many: a step of SQLite's for each costs a tenth of a commit."""
_INSERT_TOGETHER = _INSERT + f", ({', '.join('?' * _FIELDS)})" * (_TOGETHER - 1)
_NEWEST = _OLDEST.replace("ORDER BY seq", "ORDER BY seq DESC")


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A record to be. ``key`` groups windows that may merge; ``inferences`` is for counting what a drop costs."""

    kind: wire.Kind
    body: bytes
    key: str = ""
    inferences: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RingAt:
    """A recorder ring and the position below which its windows are committed."""

    ring: str
    upto: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Acknowledged:
    """What an acknowledgement did. ``new_epoch``: why one began, ``ahead`` or ``conflict``; else empty."""

    freed: int
    new_epoch: str = ""


class RecordDamaged(Exception):
    """A record is not what was written. Whoever reads it gives it up, with ``Store.drop``."""

    def __init__(self, epoch: str, seq: int) -> None:
        super().__init__(f"epoch {epoch} seq {seq}")
        self.epoch = epoch
        self.seq = seq


class Outbox(Database):
    """Records, epochs and the committed positions of recorder rings.

    Attributes:
        epoch: this life of the outbox; binding: the machine and key it belongs to.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, new_epoch: Callable[[], str]) -> None:
        super().__init__(path, connection)
        self._new_epoch = new_epoch
        self.epoch = ids.Epoch("")
        self.binding = ""
        self._next_seq = 1
        self._stored = ""
        """The epoch and next seq that the file has."""
        self._starts: dict[str, lives.Starts] = {}
        self._added = (0, 0, 0)
        """Records, bytes and inferences that the transaction under way put in."""

    def _held(self) -> tuple[Any, ...]:
        return self.epoch, self.binding, self._next_seq, self._stored, self._added

    def _hold(self, before: tuple[Any, ...]) -> None:
        self.epoch, self.binding, self._next_seq, self._stored, self._added = before

    def _settle(self) -> None:
        reached = f"{self.epoch} {self._next_seq}"
        if reached == self._stored:
            return
        self._db.execute(
            "UPDATE epochs SET next_seq = ?, crc = ? WHERE epoch = ?",
            (self._next_seq, checksum(self.epoch, self.binding, self._next_seq, 1), self.epoch),
        )
        self._db.execute(
            "UPDATE waiting SET records = records + ?, bytes = bytes + ?, inferences = inferences + ?, told = ?",
            (*self._added, reached),
        )
        self._stored = reached
        self._added = (0, 0, 0)

    def _add_up(self, reached: str) -> None:
        """Counts what waits anew when an older agent put records in: then, and only then, all of them are read."""
        ((told,),) = self.read("SELECT told FROM waiting")
        if told != reached:
            self._db.execute(
                "UPDATE waiting SET (records, bytes, inferences, told) = "
                "(SELECT count(*), coalesce(sum(size), 0), coalesce(sum(inferences), 0), ? FROM outbox)",
                (reached,),
            )

    def adopt(self, binding: str, device: str) -> str:
        """Goes on with the epoch of this machine and key, or begins one. Records of another device are dropped and counted.

        Returns:
            Why a new epoch began, ``first`` or ``moved``; empty when the old one goes on.
        """
        with self.transaction():
            owner = self.get("device")
            if owner is not None and owner != device:
                gone = self._db.execute("DELETE FROM outbox").rowcount
                self._db.execute("DELETE FROM epochs")
                self.count_lost("foreign_records", gone)
            if owner != device:
                self.put("device", device)
            row = self._db.execute("SELECT epoch, binding, next_seq FROM epochs WHERE current = 1").fetchone()
            reached = f"{row[0]} {row[2]}" if row else ""
            self._add_up(reached)
            if row is not None and row[1] == binding:
                self.epoch, self.binding = ids.epoch(row[0]), binding
                self._next_seq, self._stored = int(row[2]), reached
                self._note_start()
                return ""
            # Records of the former epoch are frozen: they may exist on another machine too, and must stay the same records.
            self._db.execute("UPDATE outbox SET sent = 1")
            self.begin_epoch(binding)
            return "first" if owner is None else "moved"

    def _note_start(self) -> None:
        """See ``core.lives``."""
        known = self.get("starts", {})
        starts: dict[str, list[int]] = {}
        for epoch, next_seq in self.read("SELECT epoch, next_seq FROM epochs"):
            if self.read("SELECT 1 FROM outbox WHERE epoch = ? LIMIT 1", (epoch,)):
                last = int(next_seq) - 1
                starts[epoch] = [int(known[epoch][0]) if epoch in known else last, last]
        if starts != known:
            self.put("starts", starts)
        self._starts = {epoch: lives.Starts(*seqs) for epoch, seqs in starts.items()}

    def starts(self, epoch: str) -> lives.Starts:
        """How far an epoch was at the starts that matter."""
        return self._starts.get(epoch, lives.Starts())

    def note_boot(self, boot_id: str) -> None:
        """Remembers the order of boots, in which no clock that was never set can mislead."""
        boots = self.boots()
        if boot_id not in boots[-1:]:
            self.put("boots", [*(boot for boot in boots if boot != boot_id), boot_id][-_BOOTS:])

    def boots(self) -> tuple[str, ...]:
        """The last boots of this device, in their order."""
        return tuple(self.get("boots", ()))

    @property
    def last_seq(self) -> int:
        """The newest seq of the epoch, 0 for none."""
        return self._next_seq - 1

    def append(self, entries: Iterable[Entry], rings: Iterable[RingAt] = ()) -> tuple[int, ...]:
        """Commits records, and the ring positions they cover, in one transaction.

        A ring's position only grows. Call with many entries at once: one commit is one fsync.

        Raises:
            Degraded: ``store_full`` or ``store_damaged``; nothing was taken then.
        """
        with self.transaction():
            first = self._next_seq
            self._insert(entries)
            seqs = tuple(range(first, self._next_seq))
            for at in rings:
                upto = max(at.upto, self.ring_upto(at.ring) or 0)
                self._db.execute(
                    "INSERT INTO rings (ring, upto, crc) VALUES (?, ?, ?) "
                    "ON CONFLICT (ring) DO UPDATE SET upto = excluded.upto, crc = excluded.crc",
                    (at.ring, upto, checksum(at.ring, upto)),
                )
        return seqs

    def insert(self, entry: Entry, replaces: tuple[wire.Range, ...]) -> int:
        """Adds a record of the epoch, in the caller's transaction. Returns its seq."""
        seq = self._next_seq
        self._insert([entry], replaces)
        return seq

    def _insert(self, entries: Iterable[Entry], replaces: tuple[wire.Range, ...] = ()) -> None:
        # On the way of every record: what is the same for all is looked up once.
        epoch, seq, spans = self.epoch, self._next_seq, msgspec.json.encode(replaces) if replaces else b"[]"
        about, extra = epoch.encode(), len(spans) + _ROW_BYTES
        values: list[str | int | bytes] = []
        _, size, inferences = self._added
        for entry in entries:
            kind, body, n = entry.kind, entry.body, entry.inferences
            row_bytes = len(body) + extra
            crc = _checksum(about, seq, kind, n, spans, body)
            values += (epoch, seq, kind, entry.key, row_bytes, n, spans, body, crc)
            seq += 1
            size += row_bytes
            inferences += n
        self._added = self._added[0] + seq - self._next_seq, size, inferences
        self._next_seq = seq
        step = _FIELDS * _TOGETHER
        alone = len(values) - len(values) % step
        for start in range(0, alone, step):
            self._db.execute(_INSERT_TOGETHER, values[start : start + step])
        self._db.executemany(_INSERT, (values[at : at + _FIELDS] for at in range(alone, len(values), _FIELDS)))

    def ring_upto(self, ring: str) -> int | None:
        """The committed position of a ring; None when it never committed anything."""
        rows = self.read("SELECT upto, crc FROM rings WHERE ring = ?", (ring,))
        if not rows:
            return None
        self.trust(rows[0][1], ring, rows[0][0])
        return int(rows[0][0])

    def rings(self) -> tuple[str, ...]:
        """Rings that have a committed position."""
        return tuple(str(ring) for (ring,) in self.read("SELECT ring FROM rings"))

    def forget_ring(self, ring: str) -> None:
        """Forgets a ring whose file is gone."""
        with self.transaction():
            self._db.execute("DELETE FROM rings WHERE ring = ?", (ring,))

    def pending(self) -> tuple[int, int]:
        """(records, bytes) that wait in the outbox, of all epochs."""
        ((records, size),) = self.read("SELECT records, bytes FROM waiting")
        return int(records) + self._added[0], int(size) + self._added[1]

    def pending_inferences(self) -> int:
        """Inferences counted in windows that wait."""
        return int(self.read("SELECT inferences FROM waiting")[0][0]) + self._added[2]

    def next_batch(
        self, in_flight: Collection[tuple[str, int]], *, max_bytes: int, max_records: int
    ) -> wire.Batch | None:
        """The next records to send: of former epochs first. None when nothing waits.

        Args:
            in_flight: (epoch, seq) of what is on its way.
            max_bytes: of bodies, before compression.

        Raises:
            RecordDamaged: one of them must be given up first.
        """
        for (epoch,) in self.read("SELECT epoch FROM epochs ORDER BY current, rowid"):
            flying = {seq for flight, seq in in_flight if flight == epoch}
            seqs = retention.next_batch(
                self._waiting(epoch, len(flying)), flying, max_bytes=max_bytes, max_records=max_records
            )
            if seqs:
                return wire.Batch(epoch=epoch, records=tuple(self.record(epoch, seq) for seq in seqs))
        return None

    def _waiting(self, epoch: str, flying: int) -> list[retention.Row]:
        # One page of each sort, out of the index alone: a long backlog is never loaded whole.
        found: list[retention.Row] = []
        for kind in wire.KINDS:
            found += self.rows(
                _NEWEST if kind in retention.NEWEST_FIRST else _OLDEST, (epoch, kind, _PAGE_ROWS + flying)
            )
        return found

    def rows(self, query: str, values: tuple[Any, ...]) -> list[retention.Row]:
        """What decides about records: ``query`` selects seq, kind, key, size and sent."""
        return [
            retention.Row(seq=seq, kind=kind, key=key, size=size, sent=bool(sent))
            for seq, kind, key, size, sent in self.read(query, values)
        ]

    def record(self, epoch: str, seq: int) -> wire.Record:
        """One record that is there, whole.

        Raises:
            RecordDamaged: it is not what was written.
        """
        ((kind, inferences, replaces, body, crc),) = self.read(
            "SELECT kind, inferences, replaces, body, crc FROM outbox WHERE epoch = ? AND seq = ?", (epoch, seq)
        )
        if crc is not None and crc != _checksum(epoch.encode(), seq, kind, inferences, replaces, body):
            raise RecordDamaged(epoch, seq)
        return wire.Record(seq=seq, kind=kind, body=body, replaces=_ranges(replaces))

    def mark_sent(self, epoch: str, seqs: Sequence[int]) -> None:
        """Freezes records; on disk before they are published."""
        with self.transaction():
            self._db.executemany(
                "UPDATE outbox SET sent = 1 WHERE epoch = ? AND seq = ? AND sent = 0", [(epoch, seq) for seq in seqs]
            )

    def acknowledge(self, ack: wire.Ack) -> Acknowledged:
        """Frees what the server holds.

        A server that holds a seq above ours, or ours with another digest, knows another life of this outbox (a restored
        backup, a cloned card): a new epoch begins. What waits keeps its epoch and seq and is still sent under them, so that
        the server can tell by digest what the other life has sent already; only what it disputes moves to the new epoch.
        For the same reason nothing is freed that this life has not sent.
        """
        rows = self.read("SELECT next_seq, current FROM epochs WHERE epoch = ?", (ack.epoch,))
        if not rows:
            return Acknowledged(freed=0)
        next_seq, current = int(rows[0][0]), bool(rows[0][1])
        ahead = current and max((ack.upto, *(high for _, high in ack.extra_ranges))) >= next_seq
        freed = 0
        with self.transaction():
            disputed = self._disputed(ack)
        spans = [(0, ack.upto), *ack.extra_ranges]
        while spans:
            # Some at a time: one transaction of all that a long outage held up would write a log as long as the outbox.
            with self.transaction():
                gone, spans = self._free(ack.epoch, spans)
            freed += gone
        with self.transaction():
            why = "ahead" if ahead else "conflict" if disputed else ""
            if why and current:
                self.begin_epoch(self.binding)
                self.count_lost(f"epoch_{why}", 1)
            if disputed:
                self._move(ack.epoch, spans=((1, ack.upto), *ack.extra_ranges))
            self._db.execute(
                "DELETE FROM epochs WHERE current = 0 AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.epoch = epochs.epoch)"
            )
        return Acknowledged(freed=freed, new_epoch=why if current else "")

    def _free(self, epoch: str, spans: list[wire.Range]) -> tuple[int, list[wire.Range]]:
        """Takes out some of what the server holds. Returns how many, and the ranges that are left."""
        freed = 0
        for at, (low, high) in enumerate(spans):
            freed += self._db.execute(
                "DELETE FROM outbox WHERE id IN (SELECT id FROM outbox "
                "WHERE epoch = ? AND seq BETWEEN ? AND ? AND kept = 0 AND sent = 1 ORDER BY seq LIMIT ?)",
                (epoch, low, high, AT_ONCE - freed),
            ).rowcount
            if freed >= AT_ONCE:
                return freed, spans[at:]
        return freed, []

    def _disputed(self, ack: wire.Ack) -> bool:
        """Keeps records that the server holds under our seq but did not get from us. Whether there are any."""
        found = 0
        for seq in ack.conflict:
            found += self._db.execute(
                "UPDATE outbox SET kept = 1 WHERE epoch = ? AND seq = ?", (ack.epoch, seq)
            ).rowcount
        return found > 0

    def _move(self, epoch: str, spans: Sequence[wire.Range]) -> None:
        """Renumbers the disputed records of a broken epoch into the current one. ``spans``: what the server holds of the broken one.

        A merged window of which the server may hold parts is not sent whole a second time: they would count twice.
        """
        rows = self._db.execute(
            "SELECT seq, key, inferences FROM outbox WHERE epoch = ? AND kept = 1 ORDER BY seq", (epoch,)
        ).fetchall()
        for seq, key, inferences in rows:
            try:
                record = self.record(epoch, seq)
            except RecordDamaged:
                self._count_gone("record_damaged", inferences)
                record = None
            self._db.execute("DELETE FROM outbox WHERE epoch = ? AND seq = ?", (epoch, seq))
            if record is None:
                continue
            fate = "move"
            if record.kind == "window":
                fate = self.starts(epoch).fate(seq, record.replaces, spans)
            if fate == "move":
                # What a merged record replaced lies under the old epoch: the new one knows no trace of it.
                self.insert(Entry(kind=record.kind, body=record.body, key=key, inferences=inferences), ())
            elif fate == "give up":
                self._count_gone("windows_disputed", inferences)

    def _count_gone(self, cause: str, inferences: int) -> None:
        self.count_lost(cause, 1)
        if inferences:
            self.count_lost("inferences_dropped", inferences)

    def begin_epoch(self, binding: str) -> None:
        """Begins another life of the outbox, in the caller's transaction."""
        self.epoch = ids.epoch(self._new_epoch())
        self.binding = binding
        self._next_seq, self._stored = 1, ""
        for epoch, bound, next_seq in self.read("SELECT epoch, binding, next_seq FROM epochs"):
            self._db.execute(
                "UPDATE epochs SET current = 0, crc = ? WHERE epoch = ?", (checksum(epoch, bound, next_seq, 0), epoch)
            )
        self._db.execute(
            "INSERT INTO epochs (epoch, binding, next_seq, current, crc) VALUES (?, ?, 1, 1, ?)",
            (self.epoch, binding, checksum(self.epoch, binding, 1, 1)),
        )

    def remove(self, seqs: Sequence[int]) -> None:
        """Takes records of the epoch out, in the caller's transaction."""
        self._db.executemany("DELETE FROM outbox WHERE epoch = ? AND seq = ?", [(self.epoch, seq) for seq in seqs])

    def weigh(self, seqs: Sequence[int]) -> tuple[str, int]:
        """(key of the first, inferences of all) of records of the epoch."""
        rows = [
            self._db.execute(
                "SELECT key, inferences FROM outbox WHERE epoch = ? AND seq = ?", (self.epoch, seq)
            ).fetchone()
            for seq in seqs
        ]
        return (rows[0][0] if rows else ""), sum(int(row[1]) for row in rows)


def _checksum(epoch: bytes, seq: int, kind: str, inferences: int, spans: bytes, body: bytes) -> int:
    # One of few steps, unlike ``checksum``: it is on the way of every record.
    return zlib.crc32(body, zlib.crc32(b"%b %d %b %d %b " % (epoch, seq, kind.encode(), inferences, spans)))


def _ranges(data: bytes) -> tuple[wire.Range, ...]:
    return tuple((int(low), int(high)) for low, high in msgspec.json.decode(data))
