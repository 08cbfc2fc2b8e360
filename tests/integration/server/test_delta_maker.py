"""Deltas are made for what devices report to run, served whole or not at all, and go when nobody needs them."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_contract import layout, sealed
from skerry_contract import manifest as m
from skerry_runtime import delta
from skerry_server import deltas
from skerry_server.config import Deltas as Settings
from skerry_server.core import deltas as core
from skerry_server.db import queries
from skerry_server.db import tables as t
from skerry_server.db.engine import open_engine, reading, sqlite_url, writing
from skerry_server.db.migrations import migrate
from skerry_server.delta_maker import DeltaMaker
from sqlalchemy import Engine, insert, select, update

OLD = os.urandom(12_000)
NEW = OLD[:4_000] + b"other" * 20 + OLD[4_100:]
NEWER = OLD[:8_000] + b"again" * 20 + OLD[8_100:]
STRANGE = os.urandom(12_000)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_of(path: str, data: bytes, key: bytes) -> m.File:
    stored = stored_as(data, key)
    plain = m.Plain(sha256=sha256(data), size=len(data)) if key else None
    return m.File(path=path, sha256=sha256(stored), size=len(stored), plain=plain)


def stored_as(data: bytes, key: bytes) -> bytes:
    """As it lies in the repository: encrypted where there is a content key."""
    return b"".join(sealed.seal(io.BytesIO(data), key, sha256(data), AESGCM)) if key else data


def manifest(version: str, weights: bytes, key: bytes = b"") -> bytes:
    tensor = m.Tensor(name="x", datatype="FP32", shape=(-1, 2))
    file, golden = file_of("model.onnx", weights, key), file_of("golden.jsonl", b"{}\n", key)
    variant = m.Variant(
        id="onnx", runtime="onnx", model="model.onnx", files=(file, golden), golden=m.Golden(cases="golden.jsonl"),
        needs=m.Needs(rss_mb=10, disk_mb=1),
    )  # fmt: skip
    whole = m.Manifest(
        schema=1, model="gas", version=version, created="2026-01-01T00:00:00Z", owner=m.Owner(name="a", contact="b"),
        licence="MIT", variants=(variant,), inputs=(tensor,), outputs=(tensor,), reference=m.Reference(n=0),
        requires=("encrypted",) if key else (),
        encryption=m.Encryption(scheme=sealed.SCHEME, key_id=sealed.key_id(key)) if key else None,
    )  # fmt: skip
    return m.encode(whole)


class Place:
    """A database with one group whose devices run 1.0.0, a repository with its files, and a maker."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder = folder
        self.engine = engine
        self.repository = folder / "repository"
        self.now_ms = 1_000_000_000
        self.content_keys: dict[str, bytes] = {}
        with writing(engine) as conn:
            conn.execute(insert(t.groups).values(name="line", created_ms=0))
        self.old = self.bundle("1.0.0", OLD)
        with writing(engine) as conn:
            conn.execute(insert(t.group_models).values(group="line", model="gas", stable=self.old))
        self.device("one")
        self.maker = self.restarted()

    def restarted(self, **settings: Any) -> DeltaMaker:
        """A maker as another start of the server has it."""
        self.maker = DeltaMaker(
            self.engine, self.repository, self.folder / "scratch", Settings(**settings), lambda: self.now_ms,
            content_key=self.content_keys.get,
        )  # fmt: skip
        return self.maker

    def bundle(self, version: str, weights: bytes, state: str = "approved", key: bytes = b"") -> str:
        stored = stored_as(weights, key)
        path = self.repository / layout.blob(sha256(stored))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored)
        data = manifest(version, weights, key)
        if key:
            self.content_keys[m.digest(data)] = key
        values = {"digest": m.digest(data), "model": "gas", "version": version, "state": state, "manifest": data}
        with writing(self.engine) as conn:
            conn.execute(insert(t.bundles).values(submitter="ci", pushed_ms=0, **values))
        return str(m.digest(data))

    def device(self, name: str, version: str = "1.0.0", digest: str = "", group: str = "line") -> None:
        running = {"gas": {"digest": digest or self.old, "version": version, "variant": "onnx", "state": "confirmed"}}
        with writing(self.engine) as conn:
            conn.execute(
                insert(t.devices).values(
                    id=name, group=group, status="enrolled", enrolled_ms=0, public_key_sha256="0" * 64, public_key_pem="",
                    certificate_serial="0", certificate_expires_ms=0, running=running,
                )
            )  # fmt: skip

    def work(self) -> list[core.Pair]:
        """One look, and all that it wants made; returns what was wanted."""
        due = self.maker.look()
        for pair in due:
            self.maker.make(pair)
        return due

    def listed(self) -> list[dict[str, Any]]:
        with reading(self.engine) as conn:
            return deltas.page(conn, model=None, state=None, after=None, limit=100)

    def served(self) -> list[str]:
        """Every file below ``deltas/``, unfinished ones too."""
        folder = self.repository / "deltas"
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def scratch(self) -> list[Path]:
        return list((self.folder / "scratch").iterdir())


@pytest.fixture
def place(tmp_path):
    engine = open_engine(sqlite_url(tmp_path / "server.db"))
    migrate(engine)
    yield Place(tmp_path, engine)
    engine.dispose()


def says_wrong(place: Place, digest: str) -> None:
    """A device's event: what came gives another file."""
    data = {"model": "gas", "digest": digest, "state": "verify", "fetched": {"bytes": 1, "refused": {"delta_wrong": 1}}}
    values = {
        "epoch": "e",
        "seq": 1,
        "received_ms": 1,
        "boot_id": "b",
        "boot_s": 1,
        "at_ms": 1,
        "synced": True,
        "code": "",
    }
    with writing(place.engine) as conn:
        columns = t.events.c.keys()
        row = {"device": "one", "name": "update", "data": data} | {k: v for k, v in values.items() if k in columns}
        conn.execute(insert(t.events).values(**row))


def test_a_delta_that_rotted_is_made_anew(place):
    new = place.bundle("1.1.0", NEW)
    place.work()
    (served,) = place.served()
    file = place.repository / "deltas" / served
    whole = file.read_bytes()
    assert place.listed()[0]["state"] == "ready"

    # Half of it is there: its size says so at the next look.
    file.write_bytes(whole[: len(whole) // 2])
    assert [pair.target_version for pair in place.work()] == ["1.1.0"]
    assert file.read_bytes() == whole

    # Of the right length: nobody looks before a device complains, and then at that bundle's alone.
    damaged = bytes([whole[0], whole[1] ^ 255]) + whole[2:]
    file.write_bytes(damaged)
    assert place.work() == []
    says_wrong(place, "0" * 64)
    assert place.work() == [] and file.read_bytes() == damaged
    says_wrong(place, new)
    assert [pair.target_version for pair in place.work()] == ["1.1.0"]
    assert file.read_bytes() == whole
    assert place.listed()[0]["state"] == "ready"
    # A device that says so again and again, of a file that is as it was made, has nothing made.
    says_wrong(place, new)
    assert place.work() == []


def name(base: bytes, target: bytes) -> str:
    return f"{sha256(base)}/{sha256(target)}"


def test_a_newer_approved_bundle_gets_its_delta_before_it_is_given_to_anyone(place, tmp_path):
    assert place.work() == []
    place.bundle("2.0.0", NEW)
    assert len(place.work()) == 1
    assert place.served() == [name(OLD, NEW)]
    result = tmp_path / "result"
    delta.apply(
        place.repository / layout.blob(sha256(OLD)), place.repository / "deltas" / name(OLD, NEW), result,
        sha256=sha256(NEW), size=len(NEW),
    )  # fmt: skip
    assert result.read_bytes() == NEW
    (row,) = place.listed()
    assert (row["state"], row["from_version"], row["to_version"], row["devices"]) == ("ready", "1.0.0", "2.0.0", 1)
    assert row["bytes"] == (place.repository / "deltas" / name(OLD, NEW)).stat().st_size
    assert row["share"] < 0.1
    assert place.scratch() == []
    # What is there is not made again.
    assert place.work() == []


@pytest.mark.parametrize("state", ["draft", "validated", "retired", "rejected"])
def test_nothing_is_made_towards_a_bundle_that_no_device_may_run(place, state):
    digest = place.bundle("2.0.0", NEW, state)
    with writing(place.engine) as conn:
        conn.execute(update(t.group_models).values(shadow=digest))
    assert place.work() == []


def test_a_pin_and_a_rollout_are_goals_and_a_version_that_is_no_longer_approved_is_a_base(place):
    with writing(place.engine) as conn:
        conn.execute(update(t.bundles).values(state="retired"))
    pinned = place.bundle("0.9.0", NEW)
    candidate = place.bundle("1.5.0", NEWER)
    place.bundle("3.0.0", STRANGE)
    with writing(place.engine) as conn:
        conn.execute(insert(t.pins).values(device="one", model="gas", digest=pinned, set_by="x", set_ms=0))
        conn.execute(
            insert(t.rollouts).values(
                id="r-1", group="line", model="gas", stable=place.old, candidate=candidate, salt="00" * 16, plan={},
                state="draft", stage_since_ms=0, created_by="x", created_ms=0,
            )
        )  # fmt: skip
    assert {pair.target for pair in place.work()} == {sha256(NEW), sha256(NEWER), sha256(STRANGE)}
    # One that saves nothing is not kept, and not made again.
    assert place.served() == sorted([name(OLD, NEW), name(OLD, NEWER)])
    states = {row["to_version"]: row["state"] for row in place.listed()}
    assert states == {"0.9.0": "ready", "1.5.0": "ready", "3.0.0": "useless"}
    assert place.work() == []


def test_revoked_devices_and_reports_of_bundles_that_are_not_here_want_nothing(place):
    place.bundle("2.0.0", NEW)
    with writing(place.engine) as conn:
        conn.execute(update(t.devices).values(status="revoked"))
    place.device("two", digest="ab" * 32)
    assert place.work() == []


def test_a_damaged_blob_leads_to_no_delta_and_is_not_tried_for_ever(place):
    place.bundle("2.0.0", NEW)
    (place.repository / layout.blob(sha256(NEW))).write_bytes(STRANGE[: len(NEW)])
    for attempt in range(core.ATTEMPTS):
        assert len(place.work()) == 1
        (row,) = place.listed()
        assert (row["state"], row["attempts"]) == ("failed", attempt + 1)
        assert "wrong_result" in row["detail"]
        assert place.work() == []
        place.now_ms += max(core.RETRY_MS)
    assert place.work() == []
    assert place.served() == []
    # A person mended it.
    (place.repository / layout.blob(sha256(NEW))).write_bytes(NEW)
    with writing(place.engine) as conn:
        assert deltas.retry(conn, model="gas", actor="token:ada", now_ms=place.now_ms) == 1
        assert deltas.retry(conn, model="gas", actor="token:ada", now_ms=place.now_ms) == 0
        (noted,) = conn.execute(select(t.audit).where(t.audit.c.action == "delta.retry")).all()
    assert (noted.subject, noted.actor) == ("model:gas", "token:ada")
    place.work()
    assert [row["state"] for row in place.listed()] == ["ready"]


@pytest.mark.parametrize(
    ("setting", "value", "code"), [("timeout_s", 0.05, "timeout"), ("memory_mb", 1, "out_of_memory")]
)
def test_a_child_that_takes_too_much_fails_alone(place, setting, value, code):
    place.restarted(**{setting: value})
    place.bundle("2.0.0", NEW)
    place.work()
    (row,) = place.listed()
    assert row["state"] == "failed"
    assert row["detail"].split(":")[0] == code
    assert place.served() == []
    assert place.scratch() == []


def test_a_base_that_rotted_leads_to_no_delta(place):
    place.bundle("2.0.0", NEW)
    (place.repository / layout.blob(sha256(OLD))).write_bytes(STRANGE[: len(OLD)])
    place.work()
    (row,) = place.listed()
    assert row["state"] == "failed"
    assert row["detail"].startswith("wrong_base")
    assert place.served() == []


def test_a_blob_that_is_not_here_is_said_and_waited_for(place):
    place.bundle("2.0.0", NEW)
    (place.repository / layout.blob(sha256(OLD))).unlink()
    place.work()
    place.work()
    (row,) = place.listed()
    assert (row["state"], row["attempts"]) == ("waiting", 0)
    assert sha256(OLD) in row["detail"]
    (place.repository / layout.blob(sha256(OLD))).write_bytes(OLD)
    place.work()
    assert place.served() == [name(OLD, NEW)]


def test_no_more_is_served_than_the_quota_and_what_nobody_wants_goes_first(place):
    """The quota is 1 MB; all of it but 10 bytes is taken by a delta that somebody wants, or nobody."""
    place.restarted(quota_mb=1)
    place.bundle("2.0.0", NEW)
    other = place.bundle("0.1.0", STRANGE)

    def taken_by(base: bytes, target: bytes, *, size: int) -> None:
        pair = core.Pair(
            base=sha256(base), target=sha256(target), base_size=len(base), target_size=len(target), model="gas", path="model.onnx",
            base_version="?", target_version="?", devices=1,
        )  # fmt: skip
        path = place.repository / layout.delta(pair.base, pair.target)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        os.truncate(path, size)
        with writing(place.engine) as conn:
            deltas.note_wanted(conn, [pair], now_ms=place.now_ms)
            deltas.note(conn, (pair.base, pair.target), "ready", now_ms=place.now_ms, size=size)

    def states() -> dict[str, str]:
        return {row["to_version"]: row["state"] for row in place.listed()}

    taken_by(OLD, STRANGE, size=999_990)
    with writing(place.engine) as conn:
        conn.execute(update(t.group_models).values(fallback=other))
    place.work()
    (refused,) = [row for row in place.listed() if row["to_version"] == "2.0.0"]
    assert refused["state"] == "failed"
    assert "quota" in refused["detail"]
    assert place.served() == [name(OLD, STRANGE)]
    # Nobody is given it any more.
    with writing(place.engine) as conn:
        conn.execute(update(t.group_models).values(fallback=None))
    place.now_ms += max(core.RETRY_MS)
    place.work()
    assert place.served() == [name(OLD, NEW)]
    assert states() == {"2.0.0": "ready"}


def test_what_nobody_wants_any_more_goes_after_a_day(place):
    place.bundle("2.0.0", NEW)
    place.work()
    with writing(place.engine) as conn:
        conn.execute(update(t.devices).values(status="revoked"))
    place.now_ms += core.KEEP_MS
    place.work()
    assert place.served() == [name(OLD, NEW)]
    place.now_ms += 1
    place.work()
    assert place.served() == []
    assert place.listed() == []
    assert list((place.repository / "deltas").iterdir()) == []


def test_what_a_crash_left_is_found_by_the_next_start(place):
    place.bundle("2.0.0", NEW)
    place.work()
    made = (place.repository / "deltas" / name(OLD, NEW)).read_bytes()
    key = (sha256(OLD), sha256(NEW))

    def crashed(state: str, *, there: bool) -> list[core.Pair]:
        path = place.repository / "deltas" / name(OLD, NEW)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(made) if there else path.unlink(missing_ok=True)
        with writing(place.engine) as conn:
            deltas.note(conn, key, state, now_ms=place.now_ms, size=None, attempts=1)
        (place.folder / "scratch" / "patch").write_bytes(b"half")
        return place.restarted().look()

    # Between the file and its row: it is whole, so it is served.
    assert crashed("making", there=True) == []
    assert [(row["state"], row["bytes"]) for row in place.listed()] == [("ready", len(made))]
    # Before the file.
    assert len(crashed("making", there=False)) == 1
    assert place.scratch() == []
    # A row without its file, as a restored backup may have it.
    assert len(crashed("ready", there=False)) == 1
    # A file without a row is nobody's.
    stray = place.repository / "deltas" / name(NEW, OLD)
    stray.parent.mkdir()
    stray.write_bytes(b"?")
    place.maker.look()
    assert place.served() == []


def test_a_quiet_server_writes_nothing(place):
    place.bundle("2.0.0", NEW)
    place.work()
    before = [row["wanted_ms"] for row in place.listed()]
    place.now_ms += core.NOTED_MS
    place.work()
    assert [row["wanted_ms"] for row in place.listed()] == before
    place.now_ms += 1
    place.work()
    assert [row["wanted_ms"] for row in place.listed()] == [place.now_ms]


def test_totals_count_by_state(place):
    place.bundle("2.0.0", NEW)
    place.work()
    with reading(place.engine) as conn:
        assert queries.delta_totals(conn) == {"ready": (1, place.listed()[0]["bytes"])}


# --- encrypted models ------------------------------------------------------------------------------------------------


def opened(place: Place, base: m.File, target: m.File, *, key: bytes, base_key: bytes) -> bytes:
    """What is in the delta that everybody may download."""
    path = place.repository / layout.delta(base.sha256, target.sha256)
    with path.open("rb") as source:
        pieces = sealed.opened_delta(
            source, key, base_key=base_key, base=base.sha256, target=target.sha256, new_cipher=AESGCM
        )
        return b"".join(pieces)


@pytest.mark.attack("leaked content key")
def test_who_has_one_versions_content_key_reads_neither_delta_between_it_and_the_other(place, tmp_path):
    leaked, fresh = os.urandom(32), os.urandom(32)
    old, new = place.bundle("2.0.0", OLD, key=leaked), place.bundle("3.0.0", NEW, key=fresh)
    old_file, new_file = file_of("model.onnx", OLD, leaked), file_of("model.onnx", NEW, fresh)
    with writing(place.engine) as conn:
        conn.execute(update(t.devices).values(running=running("2.0.0", old)))
        conn.execute(update(t.group_models).values(stable=new, fallback=old))
    place.device("two", "3.0.0", new)
    place.work()
    assert len(place.served()) == 2, place.listed()
    for base, target, keys in ((old_file, new_file, (leaked, fresh)), (new_file, old_file, (fresh, leaked))):
        for one in (leaked, fresh):
            for base_key in (b"", one):
                with pytest.raises(sealed.CannotOpen):
                    opened(place, base, target, key=one, base_key=base_key)
        (tmp_path / "base").write_bytes(OLD if base is old_file else NEW)
        (tmp_path / "patch").write_bytes(opened(place, base, target, base_key=keys[0], key=keys[1]))
        assert target.plain is not None
        delta.apply(
            tmp_path / "base", tmp_path / "patch", tmp_path / "made", sha256=target.plain.sha256, size=target.plain.size
        )


def test_nothing_that_is_secret_is_the_base_of_what_is_not(place):
    key = os.urandom(32)
    secret, clear = place.bundle("2.0.0", OLD, key=key), place.bundle("3.0.0", NEW)
    with writing(place.engine) as conn:
        conn.execute(update(t.devices).values(running=running("2.0.0", secret)))
        conn.execute(update(t.group_models).values(stable=clear))
    assert place.work() == []
    assert place.served() == []


def test_a_delta_that_an_older_program_encrypted_under_one_key_is_served_no_longer_and_made_anew(place):
    keys = os.urandom(32), os.urandom(32)
    old, new = place.bundle("2.0.0", OLD, key=keys[0]), place.bundle("3.0.0", NEW, key=keys[1])
    with writing(place.engine) as conn:
        conn.execute(update(t.devices).values(running=running("2.0.0", old)))
        conn.execute(update(t.group_models).values(stable=new))
    place.work()
    (name,) = place.served()
    path = place.repository / "deltas" / name
    path.write_bytes(b"SKRYDLT1" + path.read_bytes()[8:])
    place.restarted()
    assert place.served() == []
    place.work()
    assert place.served() == [name]
    assert path.read_bytes()[:8] == b"SKRYDLT2"


def running(version: str, digest: str) -> dict[str, Any]:
    return {"gas": {"digest": digest, "version": version, "variant": "onnx", "state": "confirmed"}}
