"""The store's schema, by numbered migrations. ``PRAGMA user_version`` says which were done, ``application_id`` who may use it.

An agent is also put back to an older version, and then must serve. A migration that only adds (a table, an index, a column with a
default) leaves ``LEAST`` as it is: older agents that know schema ``LEAST`` go on with the file as they did, and the newer one finds
its migrations done when it returns. One that changes what older agents read raises ``LEAST`` to its own number, and they
leave the file alone.
"""

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
    (
        # SQLite has no sums over its pages: a bit that turns over in a record or a number would be believed. NULL: an older agent's row.
        "ALTER TABLE outbox ADD COLUMN crc INTEGER",
        "ALTER TABLE epochs ADD COLUMN crc INTEGER",
        "ALTER TABLE state ADD COLUMN crc INTEGER",
        "ALTER TABLE rings ADD COLUMN crc INTEGER",
        # What waits is asked for twice a second: without these every answer reads the whole outbox, bodies included.
        "CREATE INDEX outbox_waiting ON outbox (epoch, kind, seq, size)",
        "CREATE TABLE waiting (records INTEGER NOT NULL, bytes INTEGER NOT NULL, inferences INTEGER NOT NULL)",
        "INSERT INTO waiting SELECT count(*), coalesce(sum(size), 0), coalesce(sum(inferences), 0) FROM outbox",
        """CREATE TRIGGER outbox_in AFTER INSERT ON outbox BEGIN
            UPDATE waiting SET records = records + 1, bytes = bytes + NEW.size, inferences = inferences + NEW.inferences;
        END""",
        """CREATE TRIGGER outbox_out AFTER DELETE ON outbox BEGIN
            UPDATE waiting SET records = records - 1, bytes = bytes - OLD.size, inferences = inferences - OLD.inferences;
        END""",
    ),
    (
        # Whoever puts records in adds up what it put in, once a transaction: a trigger did it once a row, and took a fifth of a commit.
        # ``told`` is the epoch and its next seq when the sums were last right: an older agent leaves it behind, and is seen by it.
        "DROP TRIGGER outbox_in",
        "ALTER TABLE waiting ADD COLUMN told TEXT NOT NULL DEFAULT ''",
    ),
)
LEAST = 1
"""Who knows this schema can use a file of the newest."""


def migrate(connection: sqlite3.Connection) -> None:
    """Brings the file to the newest schema, one transaction per step; one that a newer agent only added to stays as it is.

    Raises:
        Degraded: ``store_too_new`` when a newer agent changed what this one reads.
    """
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    least = int(connection.execute("PRAGMA application_id").fetchone()[0])
    if version > len(MIGRATIONS) and 0 < least <= len(MIGRATIONS):
        return
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
            connection.execute(f"PRAGMA application_id = {LEAST}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
