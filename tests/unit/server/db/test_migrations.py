"""The migrations make what tables.py describes, in one step or none."""

import pytest
from skerry_server.db import migrations
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from skerry_server.db.tables import groups, metadata, rollouts, schema_version
from sqlalchemy import create_engine, insert, inspect, select, text


@pytest.fixture
def opened():
    """Opens databases by path; all are closed in the end."""
    engines = []

    def open_(path):
        engines.append(open_engine(sqlite_url(path)))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.dispose()


def shape(engine):
    """Everything the schema says, order of creation apart."""
    look = inspect(engine)
    out = {}
    for table in look.get_table_names():
        out[table] = {
            "columns": [(c["name"], str(c["type"]), c["nullable"], c["default"]) for c in look.get_columns(table)],
            "key": look.get_pk_constraint(table)["constrained_columns"],
            "foreign": sorted(
                (tuple(f["constrained_columns"]), f["referred_table"], tuple(f["referred_columns"]))
                for f in look.get_foreign_keys(table)
            ),
            "unique": sorted(tuple(u["column_names"]) for u in look.get_unique_constraints(table)),
            "indexes": sorted((i["name"], tuple(i["column_names"]), i["unique"]) for i in look.get_indexes(table)),
            "rowid": "WITHOUT ROWID" in sql_of(engine, table),
        }
    return out


def sql_of(engine, table):
    with engine.connect() as connection:
        return connection.execute(text("SELECT sql FROM sqlite_master WHERE name = :n"), {"n": table}).scalar_one()


def test_migrated_schema_is_the_one_of_the_tables(tmp_path, opened):
    described = create_engine(sqlite_url(tmp_path / "described.db"))
    metadata.create_all(described)
    migrated = opened(tmp_path / "migrated.db")
    assert migrations.migrate(migrated) == 0
    assert shape(migrated) == shape(described)
    described.dispose()


def test_a_rollout_under_way_counts_from_where_its_stage_was_when_the_server_is_upgraded(tmp_path, monkeypatch, opened):
    engine = opened(tmp_path / "s.db")
    whole = migrations.MIGRATIONS
    monkeypatch.setattr(migrations, "MIGRATIONS", whole[:1])
    monkeypatch.setattr(migrations, "NEWEST", 1)
    migrations.migrate(engine)
    with writing(engine) as connection:
        connection.exec_driver_sql("INSERT INTO groups VALUES ('g', 0, '{}', NULL, 1, 0)")
        connection.exec_driver_sql(
            'INSERT INTO rollouts (id, "group", model, stable, candidate, salt, "plan", state, stage, stage_since_ms, cuts,'
            " created_by, created_ms, reason, version)"
            " VALUES ('r', 'g', 'gas', 'a', 'b', 's', '{}', 'running', 1, 777, '{}', 'x', 5, '', 3)"
        )
    monkeypatch.undo()
    assert migrations.migrate(engine) == 1
    with reading(engine) as connection:
        assert connection.execute(select(rollouts.c.entered_ms, rollouts.c.stage_since_ms)).all() == [(777, 777)]


def test_a_second_run_changes_nothing(tmp_path, opened):
    engine = opened(tmp_path / "s.db")
    migrations.migrate(engine, now_s=lambda: 5.0)
    assert migrations.migrate(engine, now_s=lambda: 9.0) == migrations.NEWEST
    every = [(version, 5000) for version in range(1, migrations.NEWEST + 1)]
    with reading(engine) as connection:
        query = select(schema_version.c.version, schema_version.c.applied_ms).order_by(schema_version.c.version)
        assert connection.execute(query).all() == every


def test_a_newer_database_is_refused_and_left_alone(tmp_path, opened):
    engine = opened(tmp_path / "s.db")
    migrations.migrate(engine)
    with writing(engine) as connection:
        connection.execute(insert(schema_version).values(version=99, name="later", applied_ms=0))
    with pytest.raises(migrations.NewerDatabase, match=rf"version 99 is newer than {migrations.NEWEST}\b"):
        migrations.migrate(engine)


def test_a_cut_in_the_middle_leaves_the_version_before(tmp_path, monkeypatch, opened):
    engine = opened(tmp_path / "s.db")
    name, statements = migrations.MIGRATIONS[0]
    monkeypatch.setattr(migrations, "MIGRATIONS", ((name, (*statements[:7], "CREATE TABLE broken (")),))
    with pytest.raises(Exception, match="incomplete input"):
        migrations.migrate(engine)
    assert inspect(engine).get_table_names() == []
    monkeypatch.undo()
    migrations.migrate(engine)
    assert "ledger" in inspect(engine).get_table_names()


def test_a_database_of_each_older_version_becomes_the_newest_and_keeps_its_rows(tmp_path, monkeypatch):
    described = create_engine(sqlite_url(tmp_path / "described.db"))
    metadata.create_all(described)
    newest = migrations.MIGRATIONS
    for version in range(1, migrations.NEWEST):
        engine = open_engine(sqlite_url(tmp_path / f"{version}.db"))
        with monkeypatch.context() as older:
            older.setattr(migrations, "MIGRATIONS", newest[:version])
            older.setattr(migrations, "NEWEST", version)
            migrations.migrate(engine)
        with writing(engine) as connection:
            connection.execute(insert(groups), [{"name": "g", "created_ms": 7}])
        assert migrations.migrate(engine) == version
        assert shape(engine) == shape(described)
        with reading(engine) as connection:
            assert connection.execute(select(groups.c.name, groups.c.created_ms)).all() == [("g", 7)]


def test_a_database_of_the_first_release_keeps_its_rows(tmp_path, monkeypatch, opened):
    engine = opened(tmp_path / "s.db")
    with monkeypatch.context() as first:
        first.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:1])
        first.setattr(migrations, "NEWEST", 1)
        migrations.migrate(engine)
    # As the first release wrote them: without the columns that came later.
    fill = {"JSON": "{}", "BLOB": b"", "BIGINT": 7, "INTEGER": 0, "FLOAT": 0.5, "BOOLEAN": 1}
    with writing(engine) as connection:
        for table in ("groups", "rollouts", "rollout_devices", "evidence"):
            columns = inspect(connection).get_columns(table)
            row = {c["name"]: fill.get(str(c["type"]).split("(")[0], "x") for c in columns}
            names = ", ".join(f'"{name}"' for name in row)
            connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({', '.join(':' + n for n in row)})"), row)
    assert migrations.migrate(engine) == 1
    with reading(engine) as connection:
        (frozen,) = connection.execute(select(metadata.tables["rollout_devices"])).mappings()
        (counted,) = connection.execute(select(metadata.tables["evidence"])).mappings()
    assert (frozen["device"], frozen["online"]) == ("x", True)
    assert (counted["ok"], counted["entered_boot"], counted["entered_ns"], counted["early"]) == (7, "", 0, None)


def test_what_devices_said_of_a_rollout_under_way_is_known_after_an_upgrade(tmp_path, monkeypatch, opened):
    engine = opened(tmp_path / "s.db")
    with monkeypatch.context() as older:
        older.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:5])
        older.setattr(migrations, "NEWEST", 5)
        migrations.migrate(engine)
    tables = metadata.tables
    rollout = {
        "group": "g",
        "model": "gas",
        "stable": "a",
        "candidate": "c",
        "salt": "s",
        "plan": {},
        "stage_since_ms": 0,
    }
    rollout |= {"created_by": "x", "created_ms": 10}
    device = {"group": "g", "status": "enrolled", "enrolled_ms": 0, "public_key_sha256": "", "public_key_pem": ""}
    device |= {"certificate_serial": "", "certificate_expires_ms": 0}
    of = {"rollout": "r", "digest": "c"}
    events = [
        ("d1", 11, "update", "hash_mismatch", of),
        ("d1", 12, "update", "golden_failed", of),
        ("d1", 13, "update", "unreachable", of),
        ("d1", 14, "worker", "runtime_crashed", {"models": {"gas": "x"}}),
        ("d1", 15, "worker", "runtime_crashed", {"models": {"other": "x"}}),
        ("d2", 11, "update", "no_variant", of),
        ("d2", 9, "update", "hash_mismatch", of),
        ("d3", 11, "update", "hash_mismatch", {"rollout": "old", "digest": "c"}),
        ("d3", 11, "update", "hash_mismatch", {"rollout": "r", "digest": "a"}),
        ("d3", 11, "update", "hash_mismatch", None),
        ("d3", 11, "update", "", of),
        ("d3", 11, "worker", "runtime_crashed", {"models": ["gas"]}),
        ("d3", 11, "worker", "runtime_crashed", [1]),
    ]
    names = ("device", "received_ms", "name", "code", "data")
    with writing(engine) as connection:
        connection.execute(insert(groups).values(name="g", created_ms=0))
        for name, state in (("r", "running"), ("old", "completed")):
            connection.execute(insert(rollouts).values(**rollout, id=name, state=state))
        connection.execute(insert(tables["devices"]), [{**device, "id": name} for name in ("d1", "d2", "d3")])
        rows = [dict(zip(names, event, strict=True)) | {"at_ms": 0} for event in events]
        connection.execute(insert(tables["events"]), rows)
    assert migrations.migrate(engine) == 5
    with reading(engine) as connection:
        reports = tables["rollout_reports"]
        assert connection.execute(select(reports).order_by(reports.c.device)).all() == [
            ("r", "d1", "golden_failed", "", 14),
            ("r", "d2", "", "no_variant", 0),
        ]


def test_statements_can_be_said_to_postgresql():
    for _, statements in migrations.MIGRATIONS:
        for statement in statements:
            said = migrations.spell(statement, "postgresql")
            assert "{" not in said
            assert "BLOB" not in said
            assert "ROWID" not in said
