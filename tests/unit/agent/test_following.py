"""Which of two models' updates has its turn, as the group's document is followed."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from skerry_agent.core import lifecycle as lc
from skerry_agent.core import turns
from skerry_agent.following import Following
from skerry_agent.orders import Orders
from skerry_agent.runtimes import Runtimes
from skerry_contract import group, ids

from tests.unit.agent.test_attempts import DEVICE, DIGEST, Life

LINE, OTHER = ids.group_name("line-1"), "5" * 64


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    one = Life(tmp_path)
    yield one
    one.store.close()


def following(life: Life) -> Following:
    orders = Orders(life.store, LINE)
    plans = {
        model: group.ModelPlan(stable=group.Target(digest=digest, version="2.0.0"))
        for model, digest in (("gas", DIGEST), ("pump", OTHER))
    }
    orders.document = group.GroupDocument(schema=group.SCHEMA, group=LINE, generation=1, models=plans)
    nobody = cast(Any, types.SimpleNamespace(device=ids.device_id(DEVICE), follow=lambda *_: None))
    return Following(
        nobody, life.store, life.slots, life.clock, Runtimes(life.config, life.clock, lambda: 0.5), life.serving, orders,
        life.updating, nobody, stratum="", ready=lambda: True, on_event=lambda *_: None, ask_sync=lambda: None,
    )  # fmt: skip


def downloads(life: Life, model: str, digest: str, for_s: float) -> None:
    at = life.clock.instant()
    since = msgspec.structs.replace(at, boot_ns=at.boot_ns - int(for_s * 1e9), wall_ms=at.wall_ms - int(for_s * 1e3))
    life.updating.update = lc.Update(state="fetch", model=model, digest=digest, version="2.0.0", since=since)


def test_two_long_downloads_have_their_turns_by_the_hour_and_each_gives_way_to_the_other_once(life: Life) -> None:
    async def main() -> None:
        one = following(life)
        for model, digest, other in (("gas", DIGEST, "pump"), ("pump", OTHER, "gas")):
            downloads(life, model, digest, turns.LONG_S - 60)
            one.look()
            assert life.updating.update.state == "fetch"
            downloads(life, model, digest, turns.LONG_S + 60)
            one.look()
            assert (life.updating.update.state, life.updating.update.code) == ("revert", "yielded")
            assert life.updating.update.detail == f"for {other} 2.0.0"
            await life.rest()
            # Not the one that has just made way.
            one.look()
            assert (life.updating.update.state, life.updating.update.model) == ("fetch", other)
            # Here is no courier.
            await life.rest()
            life.updating.failures.hurry()
        downloads(life, "gas", DIGEST, 20 * turns.LONG_S)
        one.look()
        assert life.updating.update.state == "fetch"

    asyncio.run(main())
