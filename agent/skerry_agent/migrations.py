"""The store's schema, by numbered migrations. ``PRAGMA user_version`` says which were done; a newer file is left alone."""

from __future__ import annotations

import sqlite3

from skerry_agent.errors import Degraded

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE epochs (
            epoch TEXT PRIMARY KEY, binding TEXT NOT NULL, next_seq INTEGER NOT NULL, current INTEGER NOT NULL
        )""",
        """CREATE TABLE outbox (
            id INTEGER PRIMARY KEY, epoch TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL,
            size INTEGER NOT NULL, inferences INTEGER NOT NULL, sent INTEGER NOT NULL DEFAULT 0,
            kept INTEGER NOT NULL DEFAULT 0, replaces BLOB NOT NULL, body BLOB NOT NULL, UNIQUE (epoch, seq)
        )""",
        "CREATE TABLE state (key TEXT PRIMARY KEY, value BLOB NOT NULL)",
        "CREATE TABLE rings (ring TEXT PRIMARY KEY, upto INTEGER NOT NULL)",
    ),
)


def migrate(connection: sqlite3.Connection) -> None:
    """Brings the file to the newest schema, one transaction per step.

    Raises:
        Degraded: ``store_too_new`` when a newer agent wrote it.
    """
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise Degraded(
            "store_too_new",
            f"the store has schema {version}, this agent knows {len(MIGRATIONS)}",
            advice="install the newer agent again",
        )
    for number, statements in enumerate(MIGRATIONS[version:], version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
