"""A card that goes bad damages the store again and again: what is moved aside does not fill it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from skerry_agent.store import Entry, Opened, open_store
from skerry_agent.store.opening import moved_aside_of

BOUND = 8_000_000


def live(path: Path, wall_s: float, *, leave_bytes: int = 0) -> Opened:
    """One life of an agent: it opens the store, fills it a little, ends, and the card damages the file."""
    store, opened = open_store(
        path,
        binding="m",
        device="d-1",
        new_epoch=lambda: os.urandom(16).hex(),
        wall_s=wall_s,
        bound_bytes=BOUND,
        files_bound_bytes=BOUND,
        free_bytes=leave_bytes,
    )
    store.append([Entry(kind="sample", body=os.urandom(4000)) for _ in range(100)])
    store.close()
    data = bytearray(path.read_bytes())
    data[100:4096] = bytes(3996)
    path.write_bytes(data)
    return opened


def taken(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())


def test_of_damaged_files_the_newest_stays(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    live(path, 1000.0)
    size = taken(path)
    for life in range(1, 6):
        opened = live(path, 1000.0 + life)
        assert opened.moved_aside == f"{path}.damaged-{1000 + life}"
        assert moved_aside_of(path)[0].name == f"state.db.damaged-{1000 + life}"
        assert taken(path) < 2.5 * size


def test_two_within_a_second_are_one(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    for _ in range(3):
        live(path, 1000.0)
    assert len([file for file in moved_aside_of(path) if not file.name.endswith(("-wal", "-shm"))]) == 1


def test_none_stays_where_the_new_store_needs_its_room_also_at_a_later_start(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    live(path, 1000.0)
    live(path, 1001.0)
    assert moved_aside_of(path)
    found = os.statvfs(tmp_path)
    short = found.f_bavail * found.f_frsize + (1 << 30)
    store, opened = open_store(
        path, binding="m", device="d-1", new_epoch=lambda: os.urandom(16).hex(), wall_s=1002.0, bound_bytes=BOUND,
        files_bound_bytes=BOUND, free_bytes=short,
    )  # fmt: skip
    store.close()
    assert (opened.new_epoch, opened.moved_aside) == ("damaged", "")
    assert moved_aside_of(path) == []
    (tmp_path / "state.db.damaged-7").write_bytes(b"of an older life")
    store, opened = open_store(
        path, binding="m", device="d-1", new_epoch=lambda: os.urandom(16).hex(), wall_s=1003.0, bound_bytes=BOUND,
        files_bound_bytes=BOUND, free_bytes=short,
    )  # fmt: skip
    store.close()
    assert (opened.new_epoch, moved_aside_of(path)) == ("", [])


def test_what_is_no_damaged_store_of_ours_stays(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    for name in ("state.db.keep", "other.db.damaged-1", "damaged-2"):
        (tmp_path / name).write_bytes(b"x")
    live(path, 1000.0)
    live(path, 1001.0)
    live(path, 1002.0)
    assert all((tmp_path / name).exists() for name in ("state.db.keep", "other.db.damaged-1", "damaged-2"))


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_what_belongs_to_a_damaged_file_goes_with_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "state.db"
    live(path, 1000.0)
    Path(f"{path}{suffix}").write_bytes(b"rest of a log")
    live(path, 1001.0)
    live(path, 1002.0)
    assert moved_aside_of(path)
    assert all(file.name.startswith("state.db.damaged-1002") for file in moved_aside_of(path))
