"""A way back that is owed: kept until the table takes it, over a power cut, and dropped where it leads nowhere any more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from skerry_agent.core import effects as e
from skerry_agent.core import lifecycle
from skerry_agent.core.lifecycle import Update
from skerry_agent.returning import Returning
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import Store, open_store
from skerry_contract import ids
from skerry_contract import manifest as m
from skerry_contract.window import Instant

from tests import models

AT = Instant("b" * 32, 1, 1, True)


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    """Of gas: 2.0.0 is confirmed, 1.0.0 what was before it."""
    found = Slots(tmp_path / "slots")
    for version in ("1.0.0", "2.0.0"):
        folder = tmp_path / version
        digest = models.build_bundle(folder, version=version)
        variant = m.parse((folder / "manifest.json").read_bytes()).variants[0].id
        folder.rename(found.path(digest))
        found.confirm("gas", Slot(digest=digest, version=version, variant=variant, standing="confirmed"))
    return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found, _ = open_store(
        tmp_path / "state.db", binding="m", device=ids.device_id("d-1"), new_epoch=lambda: "e" * 32, wall_s=0.0,
        bound_bytes=1_000_000,
    )  # fmt: skip
    yield found
    found.close()


def looped(slots: Slots) -> e.CrashLooped:
    going = slots.pointers("gas").confirmed
    assert going is not None
    return e.CrashLooped(model="gas", digest=going.digest, version=going.version, variant=going.variant, detail="why")


def take(returning: Returning, store: Store, event: e.Event, update: Update) -> Update:
    after, _ = lifecycle.step(update, event, AT)
    with store.transaction():
        returning.note(after, event)
    returning.noted(event)
    return after


def test_a_way_back_is_owed_over_a_power_cut_until_the_table_has_taken_it(store: Store, slots: Slots) -> None:
    event = looped(slots)
    Returning(store, slots).owe(event)
    again = Returning(store, slots)
    assert again.due() == event
    # What is under way makes way first, and that is not it yet.
    held = Update(state="ready", model="oil", digest="1" * 64)
    rested = take(again, store, e.Reverted(), take(again, store, e.Yielded(detail="for the way back of gas"), held))
    assert (rested.state, rested.code, rested.detail) == ("idle", "yielded", "for the way back of gas")
    assert again.due() == event
    gone = take(again, store, event, rested)
    assert (gone.state, gone.code, gone.model) == ("revert", "crash_loop", "gas")
    assert again.owed is None
    assert Returning(store, slots).owed is None


def test_a_way_back_that_leads_nowhere_any_more_is_dropped(store: Store, slots: Slots) -> None:
    returning = Returning(store, slots)
    returning.owe(looped(slots))
    slots.step_back("gas")
    assert returning.due() is None
    assert Returning(store, slots).owed is None


def test_what_was_confirmed_last_is_known_while_another_update_lies_ready(store: Store, slots: Slots) -> None:
    returning = Returning(store, slots)
    now = slots.pointers("gas").confirmed
    assert now is not None
    held = Update(state="ready", model="oil", digest="1" * 64)
    assert returning.last_confirmed(held) == ""
    assert returning.last_confirmed(Update(state="confirmed", model="gas", digest=now.digest)) == "gas"
    take(returning, store, e.TrialKept(), Update(state="trial", model="gas", digest=now.digest))
    assert Returning(store, slots).last_confirmed(held) == "gas"
    slots.step_back("gas")
    assert returning.last_confirmed(held) == "", "it runs no more"
