"""What is written for SQLite can be said to PostgreSQL, and the bulk way writes what the ordinary way writes."""

import pytest
from skerry_server import audit, intake, presence, profiles, reports, rollups
from skerry_server.db import migrations, queries
from skerry_server.db.bulk import Many
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from skerry_server.db.tables import bells, server_sessions, streams
from sqlalchemy import event, insert, select
from sqlalchemy.dialects import postgresql


class Postgres:
    """What statements ask of a connection, with PostgreSQL's dialect."""

    dialect = postgresql.dialect()


def test_the_statements_of_ingest_compile_for_postgresql():
    dialect = postgresql.dialect()
    assert "coalesce" in str(intake._TOUCHING.compile(dialect=dialect))
    roll_ups = (rollups._ENTER, rollups._ADD, profiles._ENTER, profiles._SET, profiles._LABELS, reports._REPORTS)
    for many in (intake._LEDGER, intake._WINDOWS, intake._STREAMS, presence._SEEN, *roll_ups):
        text, _ = many._compile(Postgres())
        assert text.startswith(("INSERT", "UPDATE"))
    for many in (intake._STREAMS, profiles._LABELS, reports._REPORTS):
        assert "ON CONFLICT" in many._compile(Postgres())[0]
    upsert = queries.upsert(Postgres(), server_sessions).values(name="mqtt", birth=1)
    assert "RETURNING" in str(upsert.returning(server_sessions.c.birth).compile(dialect=dialect))


@pytest.fixture
def engine(tmp_path):
    found = open_engine(sqlite_url(tmp_path / "s.db"))
    migrations.migrate(found)
    yield found
    found.dispose()


def test_what_is_recorded_about_a_thing_is_found_without_reading_all_that_is_recorded(engine):
    asked = []

    def listen(_connection, _cursor, statement, parameters, _context, _many):
        asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", listen)
    with reading(engine) as connection:
        audit.last(connection, "rollout:r")
        audit.about(connection, "device:d", action="device.revoke", limit=5)
    event.remove(engine, "before_cursor_execute", listen)
    lookups = [one for one in asked if "FROM audit" in one[0]]
    assert len(lookups) == 2
    with reading(engine) as connection:
        for statement, parameters in lookups:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            assert [row.detail for row in plan] == ["SEARCH audit USING INDEX audit_by_subject (subject=?)"]


def test_many_writes_each_row(engine):
    many = Many(lambda _connection: insert(bells), ("target", "version", "rung_version"))
    rows = [{"version": i, "rung_version": 0, "target": f"g/{i}"} for i in range(5)]
    with writing(engine) as connection:
        many.run(connection, rows)
        many.run(connection, [])
    with reading(engine) as connection:
        assert [row._asdict() for row in connection.execute(select(bells).order_by(bells.c.version))] == rows


def test_a_row_that_lacks_a_column_writes_nothing(engine):
    many = Many(lambda _connection: insert(bells), ("target", "version", "rung_version"))
    with pytest.raises(KeyError), writing(engine) as connection:
        many.run(connection, [{"target": "g/a", "version": 1, "rung_version": 0}, {"target": "g/b", "version": 1}])
    with reading(engine) as connection:
        assert queries.bells(connection) == []


def test_bells_grow_and_note_only_the_newest_ring(engine):
    with writing(engine) as connection:
        assert [queries.bump_bell(connection, "d/dev-a") for _ in range(3)] == [1, 2, 3]
        queries.mark_rung(connection, [("d/dev-a", 3), ("d/dev-a", 2)])
        assert [tuple(row) for row in queries.bells(connection)] == [("d/dev-a", 3, 3)]


def test_every_session_of_the_server_has_a_higher_birth(engine):
    births = []
    for _ in range(3):
        with writing(engine) as connection:
            births.append(queries.next_server_birth(connection, 1000 + len(births)))
            assert queries.server_session_since(connection) == 999 + len(births)
    assert births == [1, 2, 3]


def test_pages_by_key_give_every_row_once(engine):
    keys = [(f"dev-{i % 3}", f"{i:032x}") for i in range(10)]
    with writing(engine) as connection:
        connection.execute(insert(streams), [{"device": d, "epoch": e, "first_ms": 0, "last_ms": 0} for d, e in keys])
    found, after = [], None
    with reading(engine) as connection:
        while page := queries.streams_page(connection, after=after, limit=4):
            found += [(row.device, row.epoch) for row in page]
            after = found[-1]
        assert found == sorted(keys)
        assert len(queries.streams_page(connection, device="dev-1")) == 3
