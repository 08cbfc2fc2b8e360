"""When a device looks again at what follows from its group's document."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from skerry_agent.core.lifecycle import Update
from skerry_agent.following import Following
from skerry_agent.identity import Identity
from skerry_agent.orders import Orders
from skerry_contract import group, ids

from tests.unit.agent.test_attempts import DEVICE, Life

TARGET = group.Target(digest="a" * 64, version="2.0.0")
DOCUMENT = group.GroupDocument(schema=1, group="line", generation=1, models={"gas": group.ModelPlan(stable=TARGET)})


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    one = Life(tmp_path, backoff_scale=0.05)
    yield one
    one.store.close()


def test_a_start_that_finds_a_bundle_waiting_looks_again_when_its_wait_is_over(life: Life, tmp_path: Path) -> None:
    async def main() -> None:
        orders = Orders(life.store, ids.group_name("line"))
        orders.take(group.encode(DOCUMENT).decode())
        identity = Identity(
            device=DEVICE, group=ids.group_name("line"), server_url="", repository_url="", mqtt_host="", mqtt_port=1,
            key=tmp_path, certificate=tmp_path, fleet_ca=tmp_path,
        )  # fmt: skip
        asked: list[float] = []
        failures = life.updating.failures
        following = Following(
            identity, life.store, life.slots, life.clock, cast("Any", None), life.serving, orders, life.updating,
            # No bundle is in shadow.
            cast("Any", SimpleNamespace(follow=lambda *_: None)), stratum="", ready=lambda: True,
            on_event=lambda *_: None, ask_sync=lambda: asked.append(failures.wait_s(TARGET.digest)),
        )  # fmt: skip
        failures.penalise(Update(digest=TARGET.digest, code="interrupted", failed_in="trial"))
        began_s, wait_s = time.monotonic(), failures.wait_s(TARGET.digest)
        for _ in range(3):
            following.look()
        assert (life.updating.update.state, asked) == ("idle", [])
        async with asyncio.timeout(30):
            while not asked:
                await asyncio.sleep(0.01)
        assert time.monotonic() - began_s >= wait_s > 0
        await asyncio.sleep(0.1)
        assert asked == [0.0], "once, whoever looked meanwhile"

    asyncio.run(main())
