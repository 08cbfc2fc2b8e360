"""Many rows with one statement, compiled once.

SQLAlchemy's own way binds every row through the compiler again, which costs more than SQLite's insert. Here the compiled text and
the order of its parameters are kept, and rows go to the driver as they are. So this is for plain columns only: numbers, texts and
bytes; a JSON column needs its type and the ordinary ``execute``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Insert, Update


class Many:
    """An insert or update for many rows."""

    def __init__(self, build: Callable[[Connection], Insert | Update], columns: Sequence[str]) -> None:
        """Compiles nothing yet.

        Args:
            build: makes the statement for the connection's dialect.
            columns: those that the rows set by name; further parameters are named in the statement itself.
        """
        self._build = build
        self._columns = list(columns)
        self._compiled: dict[str, tuple[str, list[str] | None]] = {}

    def run(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Executes the statement once per row; does nothing without rows.

        Raises:
            KeyError: when a row lacks a parameter.
        """
        if not rows:
            return
        text, order = self._compile(connection)
        if order is None:
            connection.exec_driver_sql(text, [dict(row) for row in rows])
        else:
            connection.exec_driver_sql(text, [tuple([row[name] for name in order]) for row in rows])

    def _compile(self, connection: Connection) -> tuple[str, list[str] | None]:
        name = connection.dialect.name
        if name not in self._compiled:
            made: Any = self._build(connection).compile(dialect=connection.dialect, column_keys=self._columns)
            self._compiled[name] = str(made), list(made.positiontup) if made.positional else None
        return self._compiled[name]
