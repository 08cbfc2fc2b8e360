"""How long an import lasts, and which bundles come with it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from skerry_agent.core import effects as e
from skerry_agent.core import lifecycle as lc
from skerry_agent.importing import Importing
from skerry_contract import group

from tests.unit.agent.test_attempts import Life

CARRIED, OTHER = "a" * 64, "b" * 64
TARGET = group.Target(digest=CARRIED, version="2.0.0")
DOCUMENT = group.GroupDocument(schema=1, group="line", generation=1, models={"gas": group.ModelPlan(stable=TARGET)})


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    one = Life(tmp_path)
    yield one
    one.store.close()


def importing(life: Life, events: list[dict[str, Any]]) -> Importing:
    # It is not asked to look into a folder: that needs no syncing.
    return Importing(
        life.config, life.store, cast("Any", None), life.updating, ready=lambda: True,
        on_event=lambda _name, _code, data: events.append(data), running=dict, document=lambda: None,
    )  # fmt: skip


def test_an_import_lasts_for_its_own_bundles_and_speaks_for_no_other(life: Life) -> None:
    events: list[dict[str, Any]] = []
    one = importing(life, events)
    one._begin("/media/stick", {"group_document": group.encode(DOCUMENT).decode()})
    assert (one.brings(CARRIED), one.brings(OTHER)) == (True, False)
    for digest in (CARRIED, OTHER):
        life.updating.failures.penalise(lc.Update(digest=digest, code="not_enough_memory", failed_in="fetch"))
    one.rested()
    assert one.active, "its bundle is tried again"
    assert importing(life, events).brings(CARRIED), "over a restart, too"
    life.updating.failures.forgive(CARRIED)
    one.rested()
    # What waits for another reason does not keep it.
    assert (one.active, one.brings(CARRIED), events[-1]["state"]) == (False, False, "ended")


@pytest.mark.parametrize("code", ["golden_failed", "cancelled"])
def test_an_import_whose_bundle_failed_for_good_has_ended_and_says_how(life: Life, code: str) -> None:
    async def main() -> None:
        events: list[dict[str, Any]] = []
        one = importing(life, events)
        one._begin("/media/stick", {"group_document": group.encode(DOCUMENT).decode()})
        life.until("prove")
        life.updating.feed(e.Cancelled() if code == "cancelled" else e.Failed(code=code))
        one.rested()
        assert one.active, "its way back is under way"
        async with asyncio.timeout(30):
            while not life.updating.at_rest:
                await asyncio.sleep(0.005)
        assert life.updating.failures.wait_s(CARRIED) > 0
        one.rested()
        assert (one.active, events[-1]["state"]) == (False, "ended")
        assert [(told["version"], told["code"]) for told in events[-1]["updates"]] == [("2.0.0", code)]

    asyncio.run(main())


def test_a_second_folder_that_is_refused_takes_nothing_from_the_first(life: Life) -> None:
    """Who mistypes a path, or asks twice, ends no copy under way."""
    events: list[dict[str, Any]] = []
    one = importing(life, events)
    one._begin("/media/stick", {"group_document": group.encode(DOCUMENT).decode()})
    life.updating.failures.penalise(lc.Update(digest=CARRIED, code="not_enough_memory", failed_in="fetch"))

    async def asked() -> None:
        assert (await one.answer({"folder": "/"})).status == 200
        assert (one.status()["state"], one.brings(CARRIED)) == ("checking", True)
        assert one.fields()["folder"] == "/media/stick"
        one.rested()
        # The agent ends in the middle of looking.
        assert importing(life, events).status()["state"] == "taken"
        # It cannot be looked into: there is no syncing here.
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    asyncio.run(asked())
    for now in (one, importing(life, events)):
        assert (now.status()["state"], now.status()["folder"], "behind" in now.status()) == ("refused", "/", False)
        assert (now.brings(CARRIED), now.fields()["folder"]) == (True, "/media/stick")
    life.updating.failures.forgive(CARRIED)
    one.rested()
    assert (events[-1]["state"], events[-1]["folder"]) == ("ended", "/media/stick")
    assert (one.active, one.status()["state"]) == (False, "refused")
    assert not importing(life, events).active
