"""The device's store: one SQLite file with the outbox, the durable state and how far each recorder ring is committed.

Rules it keeps:

* A window and the ring position it covers are one transaction, so that a crash neither loses nor repeats it.
* Every commit is on disk before ``append`` returns (WAL, ``synchronous=FULL``): what is sent was committed before.
* A seq is given out once per epoch. The counter lives in the same file and transaction as the record.
* A record that was marked as sent is frozen until the server acknowledges it.
* An epoch is one life of the outbox: random, bound to the machine, the device's key and its id. A copied state
  folder, a new key, an acknowledgement above our own seq or a conflict begin a new one. Records of a former epoch stay
  as they are under it, so that a record that also exists elsewhere is the same record.
* A damaged file is moved aside with its time; a new one starts, and the loss is counted under ``lost``.

One connection, one thread. Wall time and randomness are arguments.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from skerry_contract import ids, wire
from skerry_contract import window as w
from skerry_contract.errors import ContractError

from skerry_agent.core import retention
from skerry_agent.errors import Degraded
from skerry_agent.logs import kv
from skerry_agent.migrations import migrate

log = logging.getLogger(__name__)

_PAGE_ROWS = 500
_ROW_BYTES = 64
"""What a row takes beside its body, about."""
_INCREMENTAL = 2
"""SQLite's number for ``PRAGMA auto_vacuum = INCREMENTAL``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
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
class Opened:
    """What was found when the store was opened.

    Attributes:
        new_epoch: why a new epoch began: ``first``, ``moved``, ``damaged``; empty when the old one goes on.
        moved_aside: where a damaged file went.
        lost_records: pending records in it that could still be counted; -1 when they could not.
    """

    new_epoch: str = ""
    moved_aside: str = ""
    lost_records: int = 0
    lost_inferences: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Acknowledged:
    """What an acknowledgement did. ``new_epoch``: why one began, ``ahead`` or ``conflict``; else empty."""

    freed: int
    new_epoch: str = ""


class Store:
    """See the module. Made by ``open_store``."""

    def __init__(
        self, path: Path, connection: sqlite3.Connection, new_epoch: Callable[[], str], bound_bytes: int
    ) -> None:
        self.path = path
        self._db = connection
        self._new_epoch = new_epoch
        self._depth = 0
        self.bound_bytes = bound_bytes
        self.epoch = ids.Epoch("")
        self.binding = ""
        self._next_seq = 1

    # --- transactions and durable state ------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is committed together, or not at all. May be nested: the outermost decides.

        Raises:
            Degraded: ``store_full`` without room on disk, ``store_busy`` while another process locks the file,
                ``store_damaged`` when it cannot be read or written.
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        before = self.epoch, self.binding, self._next_seq
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                self._depth = 0
        except BaseException as error:
            self.epoch, self.binding, self._next_seq = before
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.DatabaseError):
                raise _named(error, self.path) from error
            raise

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows, with the errors of ``transaction``: what is read may be damaged before anything is written."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise _named(error, self.path) from error

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the durable state, as builtins."""
        row = next(iter(self._read("SELECT value FROM state WHERE key = ?", (key,))), None)
        return default if row is None else msgspec.json.decode(row[0])

    def put(self, key: str, value: Any) -> None:
        """Stores a value (builtins or a Struct); on disk when this returns, unless in a transaction."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO state (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                (key, msgspec.json.encode(value)),
            )

    def delete(self, key: str) -> None:
        """Removes a value of the durable state."""
        with self.transaction():
            self._db.execute("DELETE FROM state WHERE key = ?", (key,))

    def count_up(self, key: str, floor: int = 0) -> int:
        """The next value of a durable counter, above ``floor``; never given out twice."""
        with self.transaction():
            value = max(int(self.get(key, 0)), floor) + 1
            self.put(key, value)
        return value

    def lost(self) -> dict[str, int]:
        """What was lost or dropped on this device, by cause."""
        return dict(self.get("lost", {}))

    def count_lost(self, cause: str, n: int) -> None:
        """Adds to ``lost``."""
        with self.transaction():
            counts = self.lost()
            counts[cause] = counts.get(cause, 0) + n
            self.put("lost", counts)

    # --- the outbox --------------------------------------------------------------------------------------------------

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
            seqs = tuple(self._insert(self.epoch, entry, ()) for entry in entries)
            for at in rings:
                self._db.execute(
                    "INSERT INTO rings (ring, upto) VALUES (?, ?) "
                    "ON CONFLICT (ring) DO UPDATE SET upto = max(upto, excluded.upto)",
                    (at.ring, at.upto),
                )
        return seqs

    def _insert(self, epoch: str, entry: Entry, replaces: tuple[wire.Range, ...]) -> int:
        seq = self._next_seq
        spans = msgspec.json.encode(replaces)
        size = len(entry.body) + len(spans) + _ROW_BYTES
        self._db.execute(
            "INSERT INTO outbox (epoch, seq, kind, key, size, inferences, replaces, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (epoch, seq, entry.kind, entry.key, size, entry.inferences, spans, entry.body),
        )
        self._next_seq = seq + 1
        self._db.execute("UPDATE epochs SET next_seq = ? WHERE epoch = ?", (self._next_seq, epoch))
        return seq

    def ring_upto(self, ring: str) -> int | None:
        """The committed position of a ring; None when it never committed anything."""
        rows = self._read("SELECT upto FROM rings WHERE ring = ?", (ring,))
        return int(rows[0][0]) if rows else None

    def rings(self) -> tuple[str, ...]:
        """Rings that have a committed position."""
        return tuple(str(ring) for (ring,) in self._read("SELECT ring FROM rings"))

    def forget_ring(self, ring: str) -> None:
        """Forgets a ring whose file is gone."""
        with self.transaction():
            self._db.execute("DELETE FROM rings WHERE ring = ?", (ring,))

    def pending(self) -> tuple[int, int]:
        """(records, bytes) that wait in the outbox, of all epochs."""
        ((records, size),) = self._read("SELECT count(*), coalesce(sum(size), 0) FROM outbox")
        return int(records), int(size)

    def pending_inferences(self) -> int:
        """Inferences counted in windows that wait."""
        return int(self._read("SELECT coalesce(sum(inferences), 0) FROM outbox")[0][0])

    def next_batch(
        self, in_flight: Collection[tuple[str, int]], *, max_bytes: int, max_records: int
    ) -> wire.Batch | None:
        """The next records to send: of former epochs first. None when nothing waits.

        Args:
            in_flight: (epoch, seq) of what is on its way.
            max_bytes: of bodies, before compression.
        """
        for (epoch,) in self._read("SELECT epoch FROM epochs ORDER BY current, rowid"):
            flying = {seq for flight, seq in in_flight if flight == epoch}
            seqs = retention.next_batch(
                self._waiting(epoch, len(flying)), flying, max_bytes=max_bytes, max_records=max_records
            )
            if seqs:
                return wire.Batch(epoch=epoch, records=tuple(self._record(epoch, seq) for seq in seqs))
        return None

    def _waiting(self, epoch: str, flying: int) -> list[retention.Row]:
        # One page of each sort: a long backlog is never loaded whole.
        found: list[retention.Row] = []
        for kind in wire.KINDS:
            found += self._rows(
                "SELECT seq, kind, key, size, sent FROM outbox WHERE epoch = ? AND kind = ? ORDER BY seq LIMIT ?",
                (epoch, kind, _PAGE_ROWS + flying),
            )
        return found

    def _rows(self, query: str, values: tuple[Any, ...]) -> list[retention.Row]:
        return [
            retention.Row(seq=seq, kind=kind, key=key, size=size, sent=bool(sent))
            for seq, kind, key, size, sent in self._read(query, values)
        ]

    def _record(self, epoch: str, seq: int) -> wire.Record:
        ((kind, replaces, body),) = self._read(
            "SELECT kind, replaces, body FROM outbox WHERE epoch = ? AND seq = ?", (epoch, seq)
        )
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
        rows = self._read("SELECT next_seq, current FROM epochs WHERE epoch = ?", (ack.epoch,))
        if not rows:
            return Acknowledged(freed=0)
        next_seq, current = int(rows[0][0]), bool(rows[0][1])
        ahead = current and max((ack.upto, *(high for _, high in ack.extra_ranges))) >= next_seq
        freed = 0
        with self.transaction():
            disputed = self._disputed(ack)
            for low, high in ((0, ack.upto), *ack.extra_ranges):
                freed += self._db.execute(
                    "DELETE FROM outbox WHERE epoch = ? AND seq BETWEEN ? AND ? AND kept = 0 AND sent = 1",
                    (ack.epoch, low, high),
                ).rowcount
            why = "ahead" if ahead else "conflict" if disputed else ""
            if why and current:
                self._begin_epoch(self.binding)
                self.count_lost(f"epoch_{why}", 1)
            if disputed:
                self._move(ack.epoch)
            self._db.execute(
                "DELETE FROM epochs WHERE current = 0 AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.epoch = epochs.epoch)"
            )
        return Acknowledged(freed=freed, new_epoch=why if current else "")

    def _disputed(self, ack: wire.Ack) -> bool:
        """Keeps records that the server holds under our seq but did not get from us. Whether there are any."""
        found = 0
        for seq in ack.conflict:
            found += self._db.execute(
                "UPDATE outbox SET kept = 1 WHERE epoch = ? AND seq = ?", (ack.epoch, seq)
            ).rowcount
        return found > 0

    def _move(self, epoch: str) -> None:
        """Renumbers the disputed records of a broken epoch into the current one."""
        rows = self._db.execute(
            "SELECT seq, kind, key, inferences, body FROM outbox WHERE epoch = ? AND kept = 1 ORDER BY seq",
            (epoch,),
        ).fetchall()
        for seq, kind, key, inferences, body in rows:
            self._db.execute("DELETE FROM outbox WHERE epoch = ? AND seq = ?", (epoch, seq))
            # What a merged record replaced lies under the old epoch: the new one knows no trace of it.
            self._insert(self.epoch, Entry(kind=kind, body=body, key=key, inferences=inferences), ())

    def _begin_epoch(self, binding: str) -> None:
        self.epoch = ids.epoch(self._new_epoch())
        self.binding = binding
        self._next_seq = 1
        self._db.execute("UPDATE epochs SET current = 0")
        self._db.execute(
            "INSERT INTO epochs (epoch, binding, next_seq, current) VALUES (?, ?, 1, 1)", (self.epoch, binding)
        )

    # --- the bound ---------------------------------------------------------------------------------------------------

    def compact(self, at: w.Instant) -> int:
        """Brings the outbox below its bound by ``core.retention``. Returns the bytes freed."""
        started = self.pending()[1]
        used = started
        while True:
            rows = self._rows(
                "SELECT seq, kind, key, size, sent FROM outbox WHERE epoch = ? ORDER BY seq", (self.epoch,)
            ) if used > self.bound_bytes else []  # fmt: skip
            actions = retention.plan_retention(rows, used, self.bound_bytes)
            if not actions:
                return started - used
            with self.transaction():
                for action in actions:
                    if isinstance(action, retention.Merge):
                        self._merge(action.seqs)
                    else:
                        self._drop(action, at)
            left = self.pending()[1]
            if left >= used:
                return started - left
            used = left

    def _merge(self, seqs: tuple[int, ...]) -> None:
        records = [self._record(self.epoch, seq) for seq in seqs]
        key, inferences = self._sum(seqs)
        try:
            windows = [wire.decode(w.Window, record.body, max_bytes=wire.MAX_INFLATED_BYTES) for record in records]
            merged = windows[0]
            for window in windows[1:]:
                merged = w.merge(merged, window)
        except (ValueError, ContractError) as error:
            # Bins that differ under one key cannot be added, bytes that are no window neither: these stay apart for ever.
            log.warning("windows cannot merge", extra=kv(code="unmergeable", key=key, detail=str(error)))
            self._db.executemany(
                "UPDATE outbox SET key = ? WHERE epoch = ? AND seq = ?",
                [(f"{key}#{seq}", self.epoch, seq) for seq in seqs],
            )
            return
        self._delete(seqs)
        body = wire.encode(merged)
        self._insert(self.epoch, Entry(kind="window", body=body, key=key, inferences=inferences), _replaced(records))

    def _drop(self, action: retention.Drop, at: w.Instant) -> None:
        # Older tombstones of the same reason are taken up, so that they cannot fill the outbox in their turn.
        tombs = [
            int(row[0])
            for row in self._db.execute(
                "SELECT seq FROM outbox WHERE epoch = ? AND kind = 'tombstone' AND key = ? AND sent = 0",
                (self.epoch, action.why),
            )
        ]
        records = [self._record(self.epoch, seq) for seq in (*tombs, *action.seqs)]
        _, inferences = self._sum(action.seqs)
        dropped = len(action.seqs)
        self.count_lost(action.why, dropped)
        if inferences:
            self.count_lost("inferences_dropped", inferences)
        for record in records[: len(tombs)]:
            old = wire.decode(wire.Tombstone, record.body)
            dropped, inferences = dropped + old.records, inferences + old.inferences
        self._delete((*tombs, *action.seqs))
        body = wire.encode(wire.Tombstone(at=at, why=action.why, records=dropped, inferences=inferences))
        self._insert(self.epoch, Entry(kind="tombstone", body=body, key=action.why), _replaced(records))

    def drop(self, epoch: str, seq: int, at: w.Instant, why: str) -> None:
        """Gives up one record that can never be sent, with a tombstone."""
        with self.transaction():
            if epoch != self.epoch:
                self._db.execute("DELETE FROM outbox WHERE epoch = ? AND seq = ?", (epoch, seq))
                self.count_lost(why, 1)
                return
            record = self._record(epoch, seq)
            _, inferences = self._sum((seq,))
            self._delete((seq,))
            self.count_lost(why, 1)
            body = wire.encode(wire.Tombstone(at=at, why=why, records=1, inferences=inferences))
            self._insert(epoch, Entry(kind="tombstone", body=body, key=why), _replaced([record]))

    def _delete(self, seqs: Sequence[int]) -> None:
        self._db.executemany("DELETE FROM outbox WHERE epoch = ? AND seq = ?", [(self.epoch, seq) for seq in seqs])

    def _sum(self, seqs: Sequence[int]) -> tuple[str, int]:
        rows = [
            self._db.execute(
                "SELECT key, inferences FROM outbox WHERE epoch = ? AND seq = ?", (self.epoch, seq)
            ).fetchone()
            for seq in seqs
        ]
        return (rows[0][0] if rows else ""), sum(int(row[1]) for row in rows)

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def mark_suspect(self) -> None:
        """Notes that the open file gave errors: the next ``open_store`` moves it aside whatever a quick check says."""
        _suspect(self.path).touch()


def open_store(
    path: Path,
    *,
    binding: str,
    device: str,
    new_epoch: Callable[[], str],
    wall_s: float,
    bound_bytes: int = 64 << 20,
) -> tuple[Store, Opened]:
    """Opens the store, or begins a new one.

    Args:
        path: the database file; its folder exists.
        binding: digest of machine id and device key; another one than stored begins a new epoch.
        device: the device's id; records of another device are dropped and counted.
        new_epoch: makes 32 random hex digits.
        wall_s: seconds since 1970, for the name of a damaged file.
        bound_bytes: what the outbox may hold.

    Raises:
        Degraded: ``store_unusable`` when no store can be made here at all.
    """
    damaged = _damage(path)
    moved_aside, records, inferences = "", 0, 0
    if damaged:
        aside = path.with_name(f"{path.name}.damaged-{int(wall_s)}")
        records, inferences = _salvage_counts(path)
        for suffix in ("", "-wal", "-shm"):
            source = Path(f"{path}{suffix}")
            if source.exists():
                source.replace(Path(f"{aside}{suffix}"))
        _suspect(path).unlink(missing_ok=True)
        moved_aside = str(aside)
    try:
        store = Store(path, _connect(path), new_epoch, bound_bytes)
    except (sqlite3.Error, OSError) as error:
        raise Degraded("store_unusable", f"{path}: {error}", advice="make room or repair the file system") from error
    try:
        why = _adopt_epoch(store, binding, device)
    except BaseException:
        store.close()
        raise
    if damaged:
        store.count_lost("store_damaged", 1)
        if records > 0:
            store.count_lost("records_in_damaged_store", records)
        if inferences > 0:
            store.count_lost("inferences_in_damaged_store", inferences)
        why = "damaged"
    return store, Opened(new_epoch=why, moved_aside=moved_aside, lost_records=records, lost_inferences=inferences)


def _adopt_epoch(store: Store, binding: str, device: str) -> str:
    with store.transaction():
        owner = store.get("device")
        if owner is not None and owner != device:
            gone = store._db.execute("DELETE FROM outbox").rowcount
            store._db.execute("DELETE FROM epochs")
            store.count_lost("foreign_records", gone)
        if owner != device:
            store.put("device", device)
        row = store._db.execute("SELECT epoch, binding, next_seq FROM epochs WHERE current = 1").fetchone()
        if row is not None and row[1] == binding:
            store.epoch, store.binding, store._next_seq = ids.epoch(row[0]), binding, int(row[2])
            return ""
        # Records of the former epoch are frozen: they may exist on another machine too, and must stay the same records.
        store._db.execute("UPDATE outbox SET sent = 1")
        store._begin_epoch(binding)
        return "first" if owner is None else "moved"


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    try:
        path.chmod(0o600)
        if connection.execute("PRAGMA auto_vacuum").fetchone()[0] != _INCREMENTAL:
            # Asked for again it is written again, into the file of a newer agent too.
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -1024")
        migrate(connection)
    except BaseException:
        # Left to the collector it would hold the file that is about to be moved aside, and its locks.
        connection.close()
        raise
    return connection


def _damage(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        # The mark was for the file that went aside: power may have failed before it was taken down.
        _suspect(path).unlink(missing_ok=True)
        return False
    if _suspect(path).exists():
        return True
    try:
        connection = _connect(path)
        try:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok")
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        # A lock or a full disk is no damage: moving the file aside would make the loss that it is to prevent.
        return not isinstance(error, sqlite3.OperationalError) or "malformed" in str(error)


def _salvage_counts(path: Path) -> tuple[int, int]:
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            row = connection.execute("SELECT count(*), coalesce(sum(inferences), 0) FROM outbox").fetchone()
            return int(row[0]), int(row[1])
        finally:
            connection.close()
    except sqlite3.Error:
        return -1, -1


def _named(error: sqlite3.DatabaseError, path: Path) -> Degraded:
    text = str(error)
    # Extended codes carry the primary one in their lowest byte.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return Degraded("store_full", f"{path}: {text}", advice="make room on the device's disk")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        # Moving the file aside would make the loss that a lock is not.
        return Degraded("store_busy", f"{path}: {text}", advice="end the program that has the file open")
    return Degraded("store_damaged", f"{path}: {text}", advice="restart the agent: it moves the file aside")


def _suspect(path: Path) -> Path:
    return path.with_name(path.name + ".suspect")


def _ranges(data: bytes) -> tuple[wire.Range, ...]:
    return tuple((int(low), int(high)) for low, high in msgspec.json.decode(data))


def _replaced(records: Iterable[wire.Record]) -> tuple[wire.Range, ...]:
    spans: list[wire.Range] = []
    for record in records:
        spans.append((record.seq, record.seq))
        spans += record.replaces
    return retention.join_ranges(spans)
