"""The audit row of every installation, also of one that ended between the repository's files and the row."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from skerry_cli import key_files, keys
from skerry_server import audit
from skerry_server.db import migrations
from skerry_server.db.engine import open_engine, reading, sqlite_url
from skerry_server.publication import Publication
from skerry_server.repository import Repository
from skerry_server.trust import RepositoryRefused
from sqlalchemy import Engine

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)


@dataclass
class Site:
    """A server's folder with database and repository, and the operator's ceremony beside it."""

    engine: Engine
    repository: Repository
    ceremony: keys.Ceremony

    def publication(self) -> Publication:
        """As a server that starts makes it."""
        return Publication(self.engine, self.repository, lambda: 5_000)

    def rows(self) -> list[dict[str, Any]]:
        with reading(self.engine) as conn:
            found = audit.rows(conn, after=0, limit=100)
        assert audit.first_break(found) is None
        return [row for row in found if row["action"] == "repository.install"]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    signer = CryptoSigner.generate_ed25519()
    engine = open_engine(sqlite_url(tmp_path / "server.db"))
    migrations.migrate(engine)
    online = {signer.public_key.keyid: signer.public_key}
    ceremony = keys.hold_ceremony(tmp_path / "keys", online_keys=online, password=None, now=NOW)
    yield Site(engine, Repository(tmp_path / "repository", signer, lambda: NOW), ceremony)
    engine.dispose()


def subjects(rows: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return [(row["actor"], row["subject"], row["after"]["version"]) for row in rows]


def test_what_was_installed_and_not_recorded_is_recorded_once_at_the_next_start(site: Site) -> None:
    site.repository.install_root(site.ceremony.root)
    site.repository.install_targets(site.ceremony.targets)
    site.repository.install_catalog(site.ceremony.catalog, site.ceremony.floors, lambda _digest: None)
    assert site.rows() == []
    site.publication().align(starting=True)
    rows = site.rows()
    assert subjects(rows) == [("system:publication", f"metadata:{r}", 1) for r in ("root", "targets", "catalog")]
    assert all(row["reason"].startswith("found at start") for row in rows)
    site.publication().align(starting=True)
    assert site.rows() == rows


def test_a_start_after_recorded_installations_adds_nothing(site: Site) -> None:
    publication = site.publication()
    for role in ("root", "targets", "catalog"):
        floors = site.ceremony.floors if role == "catalog" else None
        publication.install(role, getattr(site.ceremony, role), floors, actor="token:ada")
    rows = site.rows()
    assert subjects(rows) == [("token:ada", f"metadata:{r}", 1) for r in ("root", "targets", "catalog")]
    site.publication().align(starting=True)
    assert site.rows() == rows


def test_the_next_version_does_not_hide_one_that_was_not_recorded(site: Site) -> None:
    # The server lived on, and only the row could not be written.
    site.repository.install_root(site.ceremony.root)
    publication = site.publication()
    signer = key_files.load_signer(site.ceremony.key_path("root"), None)
    second = keys.next_root(site.ceremony.root, signers=[signer], now=NOW)
    publication.install("root", second, None, actor="token:ada")
    assert subjects(site.rows()) == [("system:publication", "metadata:root", 1), ("token:ada", "metadata:root", 2)]


def test_what_is_refused_leaves_no_row(site: Site) -> None:
    with pytest.raises(RepositoryRefused):
        site.publication().install("targets", site.ceremony.targets, None, actor="token:ada")
    site.publication().align(starting=True)
    assert site.rows() == []
