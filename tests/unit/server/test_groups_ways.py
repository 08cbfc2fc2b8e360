"""Which versions to pass through a group's document names, composed from the tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from skerry_server import groups
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from skerry_server.db.migrations import migrate
from sqlalchemy import Engine, insert, update
from sqlalchemy import event as hooks

from tests import models


class Line:
    """A group of one model."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        with writing(engine) as conn:
            conn.execute(insert(t.groups).values(name="line", created_ms=0))

    def bundle(self, version: str, state: str = "approved", **changes: Any) -> str:
        place = self.folder / version
        digest = models.build_bundle(place, version=version, changes=changes or None)
        row = {"digest": digest, "model": "gas", "version": version, "state": state, "submitter": "ci", "pushed_ms": 0}
        with writing(self.engine) as conn:
            conn.execute(insert(t.bundles).values(manifest=(place / "manifest.json").read_bytes(), **row))
        return digest

    def gives(self, **columns: str) -> None:
        with writing(self.engine) as conn:
            conn.execute(t.group_models.delete())
            conn.execute(insert(t.group_models).values(group="line", model="gas", **columns))

    def pins(self, device: str, digest: str) -> None:
        row = {"id": device, "group": "line", "status": "enrolled", "enrolled_ms": 0, "public_key_sha256": "", "public_key_pem": "", "certificate_serial": "1", "certificate_expires_ms": 0}  # fmt: skip
        pin = {"device": device, "model": "gas", "digest": digest, "set_by": "x", "set_ms": 0}
        with writing(self.engine) as conn:
            conn.execute(insert(t.devices).values(**row))
            conn.execute(insert(t.pins).values(**pin))

    def via(self) -> list[str]:
        with reading(self.engine) as conn:
            return [one.version for one in groups.compose(conn, "line", 1, {}).models["gas"].via]


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    engine = open_engine(sqlite_url(tmp_path / "server.db"))
    migrate(engine)
    yield Line(engine, tmp_path)
    engine.dispose()


def test_where_the_version_to_pass_through_is_gone_the_next_later_one_is_named(line: Line) -> None:
    line.bundle("1.0.0")
    line.bundle("2.0.0")
    last = line.bundle("3.0.0", after="2.0.0", requires=["after"])
    line.gives(stable=last)
    assert line.via() == ["2.0.0"]
    with writing(line.engine) as conn:
        conn.execute(update(t.bundles).where(t.bundles.c.version == "2.0.0").values(state="retired"))
    assert line.via() == []
    line.bundle("2.10.0")
    line.bundle("2.9.0", after="1.5.0", requires=["after"])
    line.bundle("3.1.0")
    assert line.via() == ["2.9.0"], "1.5.0 or later below it is nowhere"
    line.bundle("1.6.0")
    assert line.via() == ["1.6.0", "2.9.0"]


def test_a_document_costs_no_more_for_many_devices_that_are_pinned_to_one_bundle(line: Line) -> None:
    line.bundle("1.0.0")
    pinned = line.bundle("2.0.0", after="1.0.0", requires=["after"])
    line.gives(stable=line.bundle("3.0.0"))
    said: list[str] = []
    hooks.listen(line.engine, "before_cursor_execute", lambda _c, _cur, statement, *_: said.append(statement))

    def cost() -> int:
        said.clear()
        assert line.via() == ["1.0.0"]
        return len(said)

    line.pins("d-0", pinned)
    one = cost()
    for number in range(1, 20):
        line.pins(f"d-{number}", pinned)
    assert cost() == one


def test_what_the_fallback_goes_after_is_named_too(line: Line) -> None:
    first = line.bundle("1.0.0")
    line.bundle("2.0.0")
    line.gives(stable=first, fallback=line.bundle("3.0.0", after="2.0.0", requires=["after"]))
    assert line.via() == ["2.0.0"]
