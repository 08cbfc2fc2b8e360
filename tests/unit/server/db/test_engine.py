"""The settings that durability rests on, and the two kinds of transaction."""

import threading

import pytest
from skerry_server.db import migrations, queries
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from skerry_server.db.tables import bells
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError


@pytest.fixture
def engine(tmp_path):
    found = open_engine(sqlite_url(tmp_path / "s.db"))
    migrations.migrate(found)
    yield found
    found.dispose()


@pytest.mark.parametrize(("pragma", "value"), [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)])
def test_sqlite_is_set_for_acknowledged_data(engine, pragma, value):
    with reading(engine) as connection:
        assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar_one() == value


def test_foreign_keys_are_enforced(engine):
    from skerry_server.db.tables import group_models

    with pytest.raises(IntegrityError), writing(engine) as connection:
        connection.execute(insert(group_models).values(group="nowhere", model="m", stable="0" * 64))


def test_a_block_that_raises_writes_nothing(engine):
    with pytest.raises(RuntimeError), writing(engine) as connection:
        queries.bump_bell(connection, "g/a")
        raise RuntimeError
    with reading(engine) as connection:
        assert connection.execute(select(bells)).all() == []


def test_writers_wait_for_each_other_and_lose_no_update(engine):
    def ring():
        for _ in range(20):
            with writing(engine) as connection:
                # Read, then write: with a deferred transaction this fails as soon as two of them overlap.
                now = connection.execute(select(bells.c.version).where(bells.c.target == "g/a")).scalar()
                assert queries.bump_bell(connection, "g/a") == (now or 0) + 1

    threads = [threading.Thread(target=ring) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with reading(engine) as connection:
        assert connection.execute(select(bells.c.version)).scalar_one() == 80


def test_a_reader_keeps_its_snapshot(engine):
    with reading(engine) as connection:
        assert connection.execute(select(bells)).all() == []
        with writing(engine) as other:
            queries.bump_bell(other, "g/a")
        assert connection.execute(select(bells)).all() == []


def test_another_database_is_refused():
    with pytest.raises(ValueError, match="wanted a sqlite or postgresql URL, got 'mysql'"):
        open_engine("mysql://localhost/skerry")
