"""Floors and the lower bound of time: what a device keeps over restarts, a damaged store, and keys that go."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from skerry_agent.clock import Clock
from skerry_agent.remembered import FILE, Remembered
from skerry_agent.store import Store, open_store

AT_S = 1_800_000_000.0


class Life:
    """One start of an agent on a folder."""

    def __init__(self, folder: Path) -> None:
        self.store: Store = open_store(
            folder / "state.db", binding="m", device="d-1", new_epoch=lambda: os.urandom(16).hex(), wall_s=1.0
        )[0]
        self.clock = Clock()
        self.remembered = Remembered(self.store, self.clock, folder)

    def take(
        self, at_s: float = 0.0, by: tuple[str, ...] = ("a",), named: tuple[str, ...] = ("a",), **floors: Any
    ) -> None:
        self.remembered.take(
            signed_at_s=at_s,
            signed_by=by,
            named=named,
            floors=floors.get("floors", {}),
            forced=floors.get("forced", {}),
        )
        self.remembered.keep()

    def end(self) -> None:
        self.store.close()

    @property
    def bound(self) -> tuple[float, tuple[str, ...]]:
        return self.clock.lower_bound_s, self.remembered.bound_keys


def lose_the_store(folder: Path) -> None:
    for file in folder.glob("state.db*"):
        file.unlink()


def test_what_was_taken_is_there_after_a_restart_and_without_the_store(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.take(AT_S, floors={"gas": "1.10.0"}, forced={"gas": "1.9.0"})
    life.end()
    for harm in (lambda _: None, lose_the_store):
        harm(tmp_path)
        life = Life(tmp_path)
        assert life.bound == (AT_S, ("a",))
        assert (life.remembered.floors, life.remembered.forced) == ({"gas": "1.10.0"}, {"gas": "1.9.0"})
        assert life.store.get("forced") == {"gas": "1.9.0"}
        life.end()


def test_floors_and_the_bound_only_rise(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.take(AT_S, forced={"gas": "2.0.0"})
    life.take(AT_S - 5, forced={"gas": "1.0.0", "oil": "1.0.0"})
    assert life.bound == (AT_S, ("a",))
    assert life.remembered.forced == {"gas": "2.0.0", "oil": "1.0.0"}
    life.end()


@pytest.mark.parametrize("with_store", [True, False])
def test_a_bound_is_void_once_root_names_none_of_the_keys_that_signed_it(tmp_path: Path, with_store: bool) -> None:
    life = Life(tmp_path)
    life.take(AT_S + 1e6, by=("old",), named=("old", "new"))
    life.take(AT_S, by=("new",), named=("old", "new"))
    assert life.bound == (AT_S + 1e6, ("old",)), "root still names it"
    life.end()
    life = Life(tmp_path)
    life.take(AT_S + 1, by=("new",), named=("new",))
    assert life.bound == (AT_S + 1, ("new",))
    life.end()
    if not with_store:
        lose_the_store(tmp_path)
    life = Life(tmp_path)
    assert life.bound == (AT_S + 1, ("new",))
    life.end()


def test_a_file_of_before_the_key_went_does_not_bring_its_bound_back(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.take(AT_S + 1e6, by=("old",), named=("old",))
    before = (tmp_path / FILE).read_bytes()
    life.take(AT_S, by=("new",), named=("new",))
    life.end()
    # Power failed between the store and the file.
    (tmp_path / FILE).write_bytes(before)
    life = Life(tmp_path)
    assert life.bound == (AT_S, ("new",))
    life.end()


def test_the_file_is_not_written_for_every_new_timestamp(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.take(AT_S, floors={"gas": "1.0.0"})
    first = (tmp_path / FILE).stat().st_ino, (tmp_path / FILE).read_bytes()
    life.take(AT_S + 60, floors={"gas": "1.0.0"})
    assert ((tmp_path / FILE).stat().st_ino, (tmp_path / FILE).read_bytes()) == first
    life.take(AT_S + 4000)
    assert json.loads((tmp_path / FILE).read_bytes())["lower_bound_s"] == AT_S + 4000
    life.end()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b'{"floors": {"gas": 7}, "forced": {}, "lower_bound_s": 0, "lower_bound_keys": []}',
        b'{"floors": {}, "forced": {"gas": "nonsense"}, "lower_bound_s": 0, "lower_bound_keys": []}',
        b'{"floors": {}, "forced": {}, "lower_bound_s": 1e300, "lower_bound_keys": []}',
        b'{"floors": {}, "forced": {}, "lower_bound_s": NaN, "lower_bound_keys": []}',
        b'{"floors": {}, "forced": {}, "lower_bound_s": 5, "lower_bound_keys": [5]}',
        b"\xff" * 100,
        b"[" * 100_000,
    ],
)
def test_a_file_that_cannot_be_read_is_passed_over_and_written_anew(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE).write_bytes(data)
    life = Life(tmp_path)
    assert life.bound == (0.0, ())
    life.take(AT_S, forced={"gas": "2.0.0"})
    life.end()
    lose_the_store(tmp_path)
    life = Life(tmp_path)
    assert life.remembered.forced == {"gas": "2.0.0"}
    life.end()
