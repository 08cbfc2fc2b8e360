"""One SQLite file: its transactions, what its errors mean, and the durable state, a table of named values.

Every commit is on disk before the call returns (WAL, ``synchronous=FULL``). One connection, one thread. What lies in the other
tables is ``outbox``'s.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from skerry_agent.errors import Degraded
from skerry_agent.migrations import migrate

_BUSY_MS = 250
_INCREMENTAL = 2
"""SQLite's number for ``PRAGMA auto_vacuum = INCREMENTAL``."""
SUFFIXES = ("", "-wal", "-shm")
"""The files that one store is."""
_NOT_THE_FILE = (
    sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_PROTOCOL,
)  # fmt: skip
"""What the disk, its mount or the memory did: they say nothing about what the file holds."""
WAL_PAGES = 512
"""The log goes back into the file when it has so many pages, 2 MB; the page that carries it over is written twice, not three times."""
_TIDY_SHARE = 8
_TIDY_PAGES = 256
"""Free pages that stay in the file, and that one ``tidy`` gives back: what comes next wants them again."""


class Database:
    """An open file. ``connect`` makes the connection, which the database owns from now on."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection
        self._depth = 0
        self.page_bytes = int(connection.execute("PRAGMA page_size").fetchone()[0])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is committed together, or not at all. May be nested: the outermost decides.

        Raises:
            Degraded: ``store_full`` without room on disk, ``store_busy`` while another process locks the file,
                ``store_failed`` when disk or memory do, ``store_damaged`` when what the file holds cannot be.
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        before = self._held()
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                yield
                self._settle()
                self._db.execute("COMMIT")
            finally:
                self._depth = 0
        except BaseException as error:
            self._hold(before)
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.DatabaseError):
                found = named(error, self.path)
                if found.code == "store_full":
                    self._make_room()
                raise found from error
            raise

    def _make_room(self) -> None:
        """What a subclass gives up when the disk is full, so that the next transaction fits."""

    def _settle(self) -> None:
        """What a subclass writes last, once per transaction."""

    def _held(self) -> tuple[Any, ...]:
        """What a subclass holds in memory of the file, for a transaction that fails."""
        return ()

    def _hold(self, before: tuple[Any, ...]) -> None:
        """Holds it again."""

    def read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows, with the errors of ``transaction``: what is read may be damaged before anything is written."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise named(error, self.path) from error

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the durable state, as builtins."""
        row = next(iter(self.read("SELECT value, crc FROM state WHERE key = ?", (key,))), None)
        if row is None:
            return default
        self.trust(row[1], key, row[0])
        return msgspec.json.decode(row[0])

    def put(self, key: str, value: Any) -> None:
        """Stores a value (builtins or a Struct); on disk when this returns, unless in a transaction."""
        with self.transaction():
            data = msgspec.json.encode(value)
            self._db.execute(
                "INSERT INTO state (key, value, crc) VALUES (?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET value = excluded.value, crc = excluded.crc",
                (key, data, checksum(key, data)),
            )

    def trust(self, crc: int | None, *fields: str | int | bytes) -> None:
        """Checks the fields of a row against its sum.

        Raises:
            Degraded: ``store_damaged``.
        """
        if crc is not None and crc != checksum(*fields):
            raise damaged(self.path, f"a row that begins with {fields[0]!r} is not what was written")

    def verify(self) -> None:
        """Checks every row that says how things stand. Records are checked when they are read.

        Raises:
            Degraded: ``store_damaged``.
        """
        for key, value, crc in self.read("SELECT key, value, crc FROM state"):
            self.trust(crc, key, value)
        for ring, upto, crc in self.read("SELECT ring, upto, crc FROM rings"):
            self.trust(crc, ring, upto)
        for epoch, binding, next_seq, current, crc in self.read(
            "SELECT epoch, binding, next_seq, current, crc FROM epochs"
        ):
            self.trust(crc, epoch, binding, next_seq, current)

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

    def live_bytes(self) -> int:
        """What the pages in use take, of all tables."""
        ((pages,),) = self.read("PRAGMA page_count")
        ((free,),) = self.read("PRAGMA freelist_count")
        return int(pages - free) * self.page_bytes

    def log_bytes(self) -> int:
        """What the write-ahead log takes on disk."""
        return _size(Path(f"{self.path}-wal"))

    def files_bytes(self) -> int:
        """What the store takes on disk: the file, its write-ahead log, its index of that."""
        return sum(_size(Path(f"{self.path}{suffix}")) for suffix in SUFFIXES)

    def tidy(self) -> int:
        """Gives free pages of the file back to the file system, some at a time, once they are a good part of it.

        Returns how many; 0 when there is nothing to do.

        Raises:
            Degraded: as ``transaction``.
        """
        ((free,),) = self.read("PRAGMA freelist_count")
        ((pages,),) = self.read("PRAGMA page_count")
        n = min(int(free) - _TIDY_PAGES, _TIDY_PAGES)
        if n <= 0 or free * _TIDY_SHARE < pages:
            return 0
        try:
            # Not ``execute``: it takes one step of a statement without columns, which here is one page.
            self._db.executescript(f"PRAGMA incremental_vacuum({n})")
        except sqlite3.DatabaseError as error:
            raise named(error, self.path) from error
        self.checkpoint()
        return n

    def checkpoint(self) -> bool:
        """Carries the write-ahead log over into the file. False while a reader of another program needs the log."""
        ((busy, _, _),) = self.read("PRAGMA wal_checkpoint(RESTART)")
        return not busy

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def mark_suspect(self) -> None:
        """Notes that the open file gave errors: the next ``open_store`` moves it aside whatever a quick check says."""
        suspect_mark(self.path).touch()


def connect(path: Path) -> sqlite3.Connection:
    """Opens or makes the file, with the schema of this agent.

    Raises:
        Degraded: ``store_too_new``. SQLite's own errors when it is no database, or cannot be written.
    """
    connection = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    try:
        path.chmod(0o600)
        if connection.execute("PRAGMA auto_vacuum").fetchone()[0] != _INCREMENTAL:
            # Asked for again it is written again, into the file of a newer agent too.
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -1024")
        connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        # Of a log that one large transaction made longer, the rest is given back.
        connection.execute(f"PRAGMA journal_size_limit = {2 * WAL_PAGES * 4096}")
        migrate(connection)
        # Opening may wait; in the supervisor's loop a lock must not hold up links and workers. What is refused waits its turn.
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
    except BaseException:
        # Left to the collector it would hold the file that is about to be moved aside, and its locks.
        connection.close()
        raise
    return connection


def named(error: sqlite3.DatabaseError, path: Path) -> Degraded:
    """What an error of SQLite means for the agent, by its code."""
    text = str(error)
    # Extended codes carry the primary one in their lowest byte.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return Degraded("store_full", f"{path}: {text}", advice="make room on the device's disk")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        # Moving the file aside would make the loss that a lock is not.
        return Degraded("store_busy", f"{path}: {text}", advice="end the program that has the file open")
    if code in _NOT_THE_FILE:
        return Degraded("store_failed", f"{path}: {text}", advice="check the disk, its mount and the device's memory")
    return damaged(path, text)


def damaged(path: Path, text: str) -> Degraded:
    """The file cannot be believed."""
    return Degraded("store_damaged", f"{path}: {text}", advice="restart the agent: it moves the file aside")


def checksum(*fields: str | int | bytes) -> int:
    """CRC-32 over fields, which end where they end."""
    crc = 0
    for field in fields:
        data = field if isinstance(field, bytes) else str(field).encode()
        crc = zlib.crc32(data, zlib.crc32(b"%d:" % len(data), crc))
    return crc


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def suspect_mark(path: Path) -> Path:
    """The file whose presence says that the open store gave errors."""
    return path.with_name(path.name + ".suspect")
