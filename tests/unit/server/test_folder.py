"""The folder that a server lives in: making it again, also after a power cut."""

from __future__ import annotations

import logging
from pathlib import Path

from skerry_server import access, clock, config, folder
from skerry_server.db.engine import open_engine, reading, writing


def caller(data: Path) -> str:
    engine = open_engine(config.load(data, {}, {}).database_url)
    with reading(engine) as conn:
        found, _ = access.find_caller(conn, (data / folder.ADMIN_TOKEN).read_text().strip(), clock.now_ms())
    engine.dispose()
    return found.name


def test_a_token_that_the_database_does_not_know_is_replaced_and_it_says_so(tmp_path: Path, caplog) -> None:
    # As a power cut leaves it between the file and the commit.
    (tmp_path / folder.ADMIN_TOKEN).write_text("skt_of_no_row\n")
    with caplog.at_level(logging.WARNING):
        folder.initialise(config.load(tmp_path, {}, {}))
    assert caller(tmp_path) == "admin"
    assert "another one is made" in caplog.text
    assert "skt_" not in caplog.text


def test_a_token_that_is_known_stays_also_when_it_was_revoked(tmp_path: Path) -> None:
    settings = config.load(tmp_path, {}, {})
    folder.initialise(settings)
    before = (tmp_path / folder.ADMIN_TOKEN).read_bytes()
    folder.initialise(settings)
    assert (tmp_path / folder.ADMIN_TOKEN).read_bytes() == before
    engine = open_engine(settings.database_url)
    with writing(engine) as conn:
        access.revoke_token(conn, name="admin", now_ms=clock.now_ms(), actor="test")
    engine.dispose()
    # Who revoked it meant it: another admin is not made by the way.
    folder.initialise(settings)
    assert (tmp_path / folder.ADMIN_TOKEN).read_bytes() == before
