"""What became of an update is said: once, and not never."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from skerry_agent import config
from skerry_agent.clock import Clock
from skerry_agent.core.lifecycle import Update
from skerry_agent.endings import Endings
from skerry_agent.errors import Degraded
from skerry_agent.failures import Failures
from skerry_agent.fetched import Fetched
from skerry_agent.identity import Identity
from skerry_agent.store import Store, open_store
from skerry_agent.updating.telling import Telling
from skerry_agent.uplink import Uplink
from skerry_contract import ids, wire


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found, _ = open_store(
        tmp_path / "state.db", binding="m", device=ids.device_id("d-1"), new_epoch=lambda: "e" * 32, wall_s=0.0,
        bound_bytes=1_000_000,
    )  # fmt: skip
    yield found
    found.close()


def begin(store: Store, folder: Path) -> Telling:
    """What a start makes of the store."""
    clock, choices = Clock(), config.build({"state_dir": str(folder)}, {})
    identity = Identity(
        device=ids.device_id("d-1"), group=ids.group_name("field"), server_url="", repository_url="", mqtt_host="127.0.0.1",
        mqtt_port=1, key=folder / "key", certificate=folder / "certificate", fleet_ca=folder / "ca",
    )  # fmt: skip
    state = wire.State(status="online", birth=1)
    uplink = Uplink(
        choices, identity, store, clock, state=lambda: state, on_bell=lambda _: None, on_fault=lambda _: None,
        draw=lambda: 0.5, plain_mqtt=True,
    )  # fmt: skip
    failures = Failures(store, clock, lambda: 0.5, 1.0)
    return Telling(store, clock, failures, Endings(store), Fetched(store), on_change=uplink.changed)


@pytest.mark.parametrize("attempt", [1, 5])
def test_a_word_that_a_full_disk_does_not_take_is_said_when_it_does(
    store: Store, tmp_path: Path, attempt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> tuple[int, ...]:
        raise Degraded("store_full", "no room", advice="")

    async def main() -> None:
        ended = Update(
            state="idle",
            model="gas",
            digest="a" * 64,
            version="2.0.0",
            code="runtime_missing",
            failed_in="prove",
            attempt=attempt,
        )
        telling = begin(store, tmp_path)
        monkeypatch.setattr(store, "append", full)
        telling.record(ended)
        telling.tick()
        monkeypatch.undo()
        assert store.pending()[0] == 0
        telling.tick()
        assert store.pending()[0] == 1
        telling.tick()
        begin(store, tmp_path).record(ended)
        assert store.pending()[0] == 1

    asyncio.run(main())


def test_a_word_that_was_not_taken_is_said_before_that_of_what_was_taken_up_since(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, str, str]] = []
    is_full = True

    def on_change(code: str, data: dict[str, Any]) -> None:
        if is_full:
            raise Degraded("store_busy", "a reader holds the log", advice="")
        said.append((data["model"], data["state"], code))

    telling = begin(store, tmp_path)
    monkeypatch.setattr(telling, "_on_change", on_change)
    failed = Update(state="revert", model="gas", digest="a" * 64, version="2.0.0", code="golden_failed", attempt=1)
    telling.record(failed)
    telling.record(msgspec.structs.replace(failed, state="idle"))
    telling.record(Update(state="fetch", model="press", digest="b" * 64, version="1.0.0", attempt=1))
    is_full = False
    for _ in range(2):
        telling.tick()
        assert said == [("gas", "idle", "golden_failed"), ("press", "fetch", "")]


def test_what_an_update_took_is_told_up_to_its_confirmation_and_a_later_one_of_the_bundle_begins_anew(
    store: Store, tmp_path: Path
) -> None:
    async def main() -> None:
        telling, fetched = begin(store, tmp_path), Fetched(store)
        for took in (100, 70):
            fetched.begin()
            fetched.end("a" * 64, 500, {"bytes": took})
        update = Update(state="trial", model="gas", digest="a" * 64, version="2.0.0", attempt=2)
        told = []
        for state in ("trial", "confirmed"):
            telling.record(msgspec.structs.replace(update, state=state))
            record = store.record(store.epoch, store.last_seq)
            told.append(wire.decode(wire.Event, record.body).data["fetched"]["bytes"])
        assert told == [170, 170]
        fetched.begin()
        fetched.end("a" * 64, 500, {"bytes": 30})
        assert fetched.of("a" * 64)["bytes"] == 30

    asyncio.run(main())
