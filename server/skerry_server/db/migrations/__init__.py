"""Numbered migrations: they bring an empty or older database to the schema that ``tables`` describes.

Each is a module ``v<number>`` with a ``NAME`` and frozen ``STATEMENTS``. It runs in one transaction together with its row in
``schema_version``, so that a cut leaves the version before or the version after. A database that is newer than this program
is refused before anything is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import Connection, Engine, func, insert, inspect, select

from skerry_server.db.engine import writing
from skerry_server.db.migrations import (
    v0001,
    v0002,
    v0003,
    v0004,
    v0005,
    v0006,
    v0007,
    v0008,
    v0009,
    v0010,
    v0011,
    v0012,
    v0013,
    v0014,
    v0015,
)
from skerry_server.db.tables import schema_version

MIGRATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (v0001.NAME, v0001.STATEMENTS),
    (v0002.NAME, v0002.STATEMENTS),
    (v0003.NAME, v0003.STATEMENTS),
    (v0004.NAME, v0004.STATEMENTS),
    (v0005.NAME, v0005.STATEMENTS),
    (v0006.NAME, v0006.STATEMENTS),
    (v0007.NAME, v0007.STATEMENTS),
    (v0008.NAME, v0008.STATEMENTS),
    (v0009.NAME, v0009.STATEMENTS),
    (v0010.NAME, v0010.STATEMENTS),
    (v0011.NAME, v0011.STATEMENTS),
    (v0012.NAME, v0012.STATEMENTS),
    (v0013.NAME, v0013.STATEMENTS),
    (v0014.NAME, v0014.STATEMENTS),
    (v0015.NAME, v0015.STATEMENTS),
)
"""Name and statements; the first brings version 0 to 1, the next 1 to 2, and so on. What is shipped never changes."""

NEWEST = len(MIGRATIONS)

_WORDS = {
    "sqlite": {
        "{ID}": "INTEGER",
        "{BYTES}": "BLOB",
        "{WITHOUT_ROWID}": "WITHOUT ROWID",
        "{NAMED_ROLLOUT}": "json_extract(e.data, '$.rollout')",
        "{NAMED_DIGEST}": "json_extract(e.data, '$.digest')",
        "{NAMES_MODEL}": "json_type(e.data, '$.models.\"' || r.model || '\"') IS NOT NULL",
    },
    "postgresql": {
        "{ID}": "BIGSERIAL",
        "{BYTES}": "BYTEA",
        "{WITHOUT_ROWID}": "",
        "{NAMED_ROLLOUT}": "e.data ->> 'rollout'",
        "{NAMED_DIGEST}": "e.data ->> 'digest'",
        "{NAMES_MODEL}": "e.data #> ARRAY['models', r.model] IS NOT NULL",
    },
}


class NewerDatabase(Exception):
    """The database was written by a newer release."""

    def __init__(self, found: int) -> None:
        self.found = found
        super().__init__(
            f"database: schema version {found} is newer than {NEWEST}, the newest this program knows; "
            "start the newer release, or restore a backup from before it"
        )


def migrate(engine: Engine, *, now_s: Callable[[], float] = time.time) -> int:
    """Brings the database to ``NEWEST`` and returns the version found before.

    Two programs may call it at once: each step looks again under the writer's lock.

    Raises:
        NewerDatabase: nothing was changed then.
    """
    with engine.connect() as connection:
        found = at = version_of(connection)
    while at < NEWEST:
        with writing(engine) as connection:
            at = version_of(connection)
            if at < NEWEST:
                name, statements = MIGRATIONS[at]
                for statement in statements:
                    connection.exec_driver_sql(spell(statement, connection.dialect.name))
                at += 1
                connection.execute(insert(schema_version).values(version=at, name=name, applied_ms=int(now_s() * 1000)))
    if at > NEWEST:
        raise NewerDatabase(at)
    return found


def version_of(connection: Connection) -> int:
    """The schema version of a database; 0 for an empty one."""
    if not inspect(connection).has_table(schema_version.name):
        return 0
    return int(connection.execute(select(func.coalesce(func.max(schema_version.c.version), 0))).scalar_one())


def spell(statement: str, dialect: str) -> str:
    """A migration's statement in the words of ``sqlite`` or ``postgresql``."""
    for word, spelt in _WORDS[dialect].items():
        statement = statement.replace(word, spelt)
    return statement.strip()
