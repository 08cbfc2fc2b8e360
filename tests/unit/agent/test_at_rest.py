"""Encryption at rest: sealed samples, rings in memory, and switching both ways without losing a record."""

from __future__ import annotations

import configparser
import fcntl
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from skerry_agent import at_rest, config, memory_folder, sealing
from skerry_agent.at_rest import Opener
from skerry_agent.errors import BadConfig, Degraded
from skerry_agent.memory_folder import is_ours
from skerry_agent.sealing import MAGIC, CannotOpen, Sealer, telemetry_key
from skerry_agent.store import Entry, open_store
from skerry_agent.upload import Upload
from skerry_contract import window as w
from skerry_contract import wire

from tests import strangers

AT = w.Instant("b" * 32, 1, 2, True)


def test_the_packaged_unit_empties_no_memory_of_the_agents_at_a_stop_and_lets_none_reach_the_disk() -> None:
    """systemd takes all of /dev/shm that is the unit's user's, where it is told so; a core dump holds what is opened."""
    unit = configparser.RawConfigParser(strict=False, delimiters=("=",))
    unit.read(Path(__file__).parents[3] / "packaging" / "deb" / "files" / "skerry-agent.service")
    service = unit["Service"]
    assert service.get("RemoveIPC", "no") == "no"
    assert service["LimitCORE"] == "0"


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder on a tmpfs."""
    folder = Path("/dev/shm") / f"skerry-test-{os.getpid()}-{threading.get_ident()}"
    folder.mkdir()
    yield folder
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def configured(tmp_path: Path, memory: Path | str, *, encrypt: bool = True) -> config.Config:
    state = tmp_path / "state"
    (state / "identity").mkdir(parents=True, exist_ok=True)
    tree = {"state_dir": str(state), "telemetry": {"encrypt": encrypt, "memory_dir": str(memory)}}
    return config.build(tree, {})


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4097])
def test_what_is_sealed_is_aes_256_gcm_as_others_know_it(size: int) -> None:
    key, plain = os.urandom(32), os.urandom(size)
    sealed = Sealer(key).seal(plain)
    nonce, body = sealed[len(MAGIC) : len(MAGIC) + 12], sealed[len(MAGIC) + 12 :]
    assert AESGCM(key).decrypt(nonce, body, b"skerry-sample") == plain
    theirs = MAGIC + bytes(12) + AESGCM(key).encrypt(bytes(12), plain, b"skerry-sample")
    assert Sealer(key).open(theirs) == plain


def test_a_changed_byte_or_another_key_opens_nothing() -> None:
    sealer = Sealer(os.urandom(32))
    sealed = sealer.seal(b"a sample")
    for i in range(len(sealed)):
        changed = bytearray(sealed)
        changed[i] ^= 1
        with pytest.raises(CannotOpen):
            sealer.open(bytes(changed))
    for wrong in (sealed[:-1], sealed[: len(MAGIC) + 5], b""):
        with pytest.raises(CannotOpen):
            sealer.open(wrong)
    with pytest.raises(CannotOpen):
        Sealer(os.urandom(32)).open(sealed)
    assert sealer.seal(b"a sample") != sealed


def test_no_record_of_ours_looks_sealed() -> None:
    sample = wire.Sample(at=AT, key=w.Key("gas", "a" * 64, "v", "none", "", 0), id="x", why="share")
    assert not sealing.is_sealed(wire.encode(sample))


def test_the_key_is_made_once_readable_by_its_owner_alone(tmp_path: Path) -> None:
    key = telemetry_key(tmp_path)
    assert telemetry_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / "telemetry.key").stat().st_mode) == 0o600
    (tmp_path / "telemetry.key").write_bytes(key[:-1])
    with pytest.raises(Degraded, match="wanted 32 bytes, got 31"):
        telemetry_key(tmp_path)


# --- rings in memory ---------------------------------------------------------------------------------------------------


def test_rings_move_into_memory_and_back_with_what_they_hold(tmp_path: Path, memory: Path) -> None:
    on, off = configured(tmp_path, memory), configured(tmp_path, memory, encrypt=False)
    folder = on.state_dir / "rings"
    at_rest.prepare(off)
    assert not folder.exists()
    folder.mkdir()
    (folder / "1-gas-0.ring").write_bytes(b"ring of before")
    at_rest.prepare(on)
    assert folder.is_symlink()
    assert memory_folder.file_system(folder) == "tmpfs"
    assert (folder / "1-gas-0.ring").read_bytes() == b"ring of before"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "2-gas-0.ring").write_bytes(b"ring of now")
    at_rest.prepare(on)
    assert sorted(p.name for p in folder.iterdir()) == ["1-gas-0.ring", "2-gas-0.ring"]
    assert [p.name for p in on.state_dir.iterdir() if p.name.startswith("rings")] == ["rings"]
    at_rest.prepare(off)
    assert not folder.is_symlink()
    assert (folder / "2-gas-0.ring").read_bytes() == b"ring of now"
    assert list(memory.iterdir()) == []


def test_after_a_reboot_the_folder_in_memory_is_made_anew(tmp_path: Path, memory: Path) -> None:
    found = configured(tmp_path, memory)
    at_rest.prepare(found)
    for _ in range(2):
        (folder,) = memory.iterdir()
        folder.rmdir()
        at_rest.prepare(found)
        assert (found.state_dir / "rings").is_dir()
    (found.state_dir / "rings").readlink().rmdir()
    at_rest.prepare(configured(tmp_path, memory, encrypt=False))
    assert not (found.state_dir / "rings").is_symlink()
    assert list(memory.iterdir()) == []


def test_a_crash_in_the_middle_of_the_move_loses_nothing(tmp_path: Path, memory: Path) -> None:
    found = configured(tmp_path, memory)
    at_rest.prepare(found)
    folder = found.state_dir / "rings"
    (folder / "1-gas-0.ring").write_bytes(b"kept")
    # As if a move back had ended between its two renames, then the move in again, with what it had copied so far.
    off = configured(tmp_path, memory, encrypt=False)
    for again in (off, found, off):
        folder.rename(found.state_dir / "rings.former")
        half = memory_folder.draw(memory, "rings", found.state_dir)
        half.mkdir(mode=0o700)
        (half / "1-gas-0.ring").write_bytes(b"ke")
        (found.state_dir / "rings.new").symlink_to(half)
        at_rest.prepare(again)
        assert folder.is_symlink() == again.telemetry.encrypt
        assert (folder / "1-gas-0.ring").read_bytes() == b"kept"
        assert [path.name for path in found.state_dir.iterdir() if path.name.startswith("rings")] == ["rings"]
        assert len(list(memory.iterdir())) == again.telemetry.encrypt, "nothing is left in memory"


def test_a_ring_that_a_worker_still_writes_is_waited_for(tmp_path: Path, memory: Path) -> None:
    found = configured(tmp_path, memory)
    folder = found.state_dir / "rings"
    folder.mkdir()
    ring = folder / "1-gas-0.ring"
    ring.write_bytes(b"half")
    with open(ring, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def finish() -> None:
            file.write(b"whole")
            file.flush()
            fcntl.flock(file, fcntl.LOCK_UN)

        timer = threading.Timer(0.3, finish)
        timer.start()
        at_rest.prepare(found)
        timer.join()
    assert ring.read_bytes() == b"whole"


def test_a_place_that_is_not_in_memory_is_refused(tmp_path: Path, memory: Path) -> None:
    with pytest.raises(Degraded, match="wanted a tmpfs, it is not there"):
        at_rest.prepare(configured(tmp_path, tmp_path / "nowhere"))
    with pytest.raises(Degraded, match="wanted a tmpfs"):
        at_rest.prepare(configured(tmp_path, "/proc"))


@pytest.mark.attack("symlink")
def test_rings_come_into_no_folder_of_others_and_none_keeps_them_from_memory(tmp_path: Path, memory: Path) -> None:
    found = configured(tmp_path, memory)
    folder = found.state_dir / "rings"
    for way in strangers.WAYS:
        at_rest.prepare(found)
        name = folder.readlink()
        (folder / "1-gas-0.ring").write_bytes(b"ours")
        shutil.rmtree(name)
        theirs = strangers.take(name, way)
        (theirs / "2-gas-0.ring").write_bytes(b"made up")
        at_rest.prepare(found)
        assert folder.readlink() != name
        assert list(folder.iterdir()) == [], "what others wrote is no ring of ours"
        assert is_ours(folder.readlink())
        (folder / "1-gas-0.ring").write_bytes(b"ours")
        # Nor does switching back take along or remove what is theirs.
        shutil.rmtree(folder.readlink())
        theirs = strangers.take(folder.readlink(), way)
        (theirs / "2-gas-0.ring").write_bytes(b"made up")
        at_rest.prepare(configured(tmp_path, memory, encrypt=False))
        assert list(folder.iterdir()) == []
        if way != "open":
            assert (theirs / "2-gas-0.ring").read_bytes() == b"made up"


def test_which_file_system_a_folder_is_on_is_the_nearest_and_latest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    (tmp_path / "a" / "b").mkdir(parents=True)
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\ntmpfs {tmp_path}/a tmpfs rw 0 0\n/dev/sdb {tmp_path}/ab xfs rw 0 0\n")
    assert memory_folder.file_system(tmp_path, mounts) == "ext4"
    assert memory_folder.file_system(tmp_path / "a" / "b", mounts) == "tmpfs"
    mounts.write_text(mounts.read_text() + f"overlay {tmp_path}/a overlay rw 0 0\n")
    assert memory_folder.file_system(tmp_path / "a" / "b", mounts) == "overlay"
    assert memory_folder.file_system(tmp_path / "none", mounts) == ""


def test_the_configuration_refuses_a_relative_place_and_an_unknown_treatment() -> None:
    tree = {"state_dir": "/x", "telemetry": {"memory_dir": "shm", "personal": "keep", "samples_per_hour": -1}}
    with pytest.raises(BadConfig) as raised:
        config.build(tree, {})
    assert all(name in str(raised.value) for name in ("memory_dir", "personal", "samples_per_hour"))


# --- on their way --------------------------------------------------------------------------------------------------------


def test_sealed_samples_are_sent_in_the_clear_and_those_nobody_can_open_are_given_up_aloud(tmp_path: Path) -> None:
    mine, lost = Sealer(telemetry_key(tmp_path)), Sealer(os.urandom(32))
    store, _ = open_store(
        tmp_path / "state.db", binding="m", device="d-1", new_epoch=lambda: "e" * 32, wall_s=1.0, bound_bytes=1 << 24
    )
    try:
        bodies = mine.seal(b"first"), lost.seal(b"second"), b"never sealed"
        store.append([Entry(kind="sample", body=body) for body in bodies])
        sent: list[bytes] = []
        upload = Upload(
            store,
            lambda payload: sent.append(payload) or True,
            window=1,
            batch_bytes=1000,
            ack_s=9,
            opened=Opener(tmp_path),
        )
        upload.open = True
        assert upload.pump(1.0, AT) == 1
        records = wire.decode_batch(sent[0]).records
        assert [(r.kind, r.body) for r in records[:2]] == [("sample", b"first"), ("sample", b"never sealed")]
        assert wire.decode(wire.Tombstone, records[2].body).why == "unreadable"
        assert records[2].replaces == ((2, 2),)
        # A second time the same bytes: a record's digest must not change.
        upload.again()
        upload.pump(2.0, AT)
        assert sent[0] == sent[1]
    finally:
        store.close()
