"""Requests for logs and time: a late answer, and what a device is still asked for."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest
from skerry_server import requested_logs
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from skerry_server.db.migrations import migrate
from skerry_server.errors import Conflict
from sqlalchemy import Engine, insert, select

NOW = 1_800_000_000_000
LATE = NOW + requested_logs.LIFE_MS


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = open_engine(sqlite_url(tmp_path / "s.db"))
    migrate(found)
    with writing(found) as conn:
        conn.execute(insert(t.groups).values(name="g", created_ms=NOW))
        conn.execute(
            insert(t.devices).values(
                id="dev-1", group="g", tags={}, status="enrolled", public_key_sha256="0" * 64, public_key_pem="x",
                certificate_serial="1", certificate_expires_ms=LATE, enrolled_ms=NOW,
            )
        )  # fmt: skip
    yield found
    found.dispose()


def test_a_late_answer_is_refused_and_the_next_request_is_a_new_one(engine: Engine) -> None:
    with writing(engine) as conn:
        asked, _ = requested_logs.ask(conn, device="dev-1", actor="token:a", now_ms=NOW)
        assert requested_logs.waiting(conn, "dev-1", LATE - 1) == asked["number"]
        assert requested_logs.waiting(conn, "dev-1", LATE) is None
        number, packed = asked["number"], gzip.compress(b"x\n")
        refusal = requested_logs.take(conn, device="dev-1", number=number, body=packed, now_ms=LATE)
        assert isinstance(refusal, Conflict)
        assert refusal.code == "request_ended"
        assert requested_logs.find(conn, device="dev-1", number=number, now_ms=LATE)["state"] == "expired"
        fresh, repeated = requested_logs.ask(conn, device="dev-1", actor="token:a", now_ms=LATE)
        assert not repeated
        assert fresh["number"] != number


def test_every_asking_rings_but_only_the_first_is_recorded(engine: Engine) -> None:
    for _ in range(3):
        with writing(engine) as conn:
            requested_logs.ask(conn, device="dev-1", actor="token:a", now_ms=NOW)
    with reading(engine) as conn:
        assert conn.execute(select(t.bells.c.version).where(t.bells.c.target == "d/dev-1")).scalar_one() == 3
        assert conn.execute(select(t.audit.c.action)).scalars().all() == ["device.logs.ask"]
