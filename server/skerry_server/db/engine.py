"""Opening the server's database: SQLite by default, PostgreSQL by URL.

Owns the connection settings that durability rests on, and the two kinds of transaction. Leaves the schema to ``tables`` and
``migrations`` and the statements to ``queries``.

SQLite rules kept here: WAL; ``synchronous=FULL``, since ingest acknowledges what it has committed; foreign keys on; and a
writer takes its lock at ``BEGIN IMMEDIATE``, so that it waits at the start instead of failing at its first write.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

BUSY_TIMEOUT_MS = 15_000
_WRITER = {"skerry_writer": True}


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file."""
    return f"sqlite:///{path.absolute()}"


def open_engine(url: str) -> Engine:
    """An engine for ``sqlite:///...`` or ``postgresql+psycopg://...``. Connects lazily and changes no schema.

    Raises:
        ValueError: for another database.
    """
    kind = make_url(url).get_backend_name()
    if kind == "sqlite":
        engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000}, pool_size=8, max_overflow=24)
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if kind == "postgresql":
        return create_engine(url, pool_size=8, max_overflow=24, pool_pre_ping=True)
    raise ValueError(f"database: wanted a sqlite or postgresql URL, got {kind!r}")


def _configure_sqlite(connection: Any, _record: object) -> None:
    # The driver must not open transactions by itself: _begin_sqlite says which kind.
    connection.isolation_level = None
    cursor = connection.cursor()
    try:
        for pragma in (
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "temp_store=MEMORY",
            "cache_size=-16000",
        ):
            cursor.execute(f"PRAGMA {pragma}")
    finally:
        cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("skerry_writer", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that sees one snapshot and writes nothing."""
    with engine.connect() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes: committed at the end of the block, rolled back when it raises.

    On SQLite writers wait for each other up to ``BUSY_TIMEOUT_MS``; keep the block short and do no network call in it.
    """
    with engine.connect().execution_options(**_WRITER) as connection, connection.begin():
        yield connection


def is_unavailable(error: Exception) -> bool:
    """Whether the database itself fails, and waiting may help, rather than what was asked of it."""
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, OperationalError):
        return isinstance(error, DBAPIError) and bool(error.connection_invalidated)
    # SQLite says "operational" of a statement it cannot carry out, too; that would fail for ever.
    return getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR


def can_write(engine: Engine, wait_s: float) -> bool:
    """Whether a writing transaction could begin now, waiting so long for its turn. Writes nothing.

    Raises:
        SQLAlchemyError: the database does not answer at all.
    """
    if engine.dialect.name != "sqlite":
        with reading(engine) as connection:
            return connection.exec_driver_sql("select not pg_is_in_recovery()").scalar() is True
    with contextlib.closing(engine.raw_connection()) as raw:
        cursor = raw.cursor()
        cursor.execute(f"PRAGMA busy_timeout={int(wait_s * 1000)}")
        try:
            cursor.execute("BEGIN IMMEDIATE")
            cursor.execute("ROLLBACK")
        except sqlite3.OperationalError:
            return False
        finally:
            cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
            cursor.close()
    return True
