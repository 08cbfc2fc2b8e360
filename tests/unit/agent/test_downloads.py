"""The files of a bundle come at the group's rate, as it is now, and for as long as their size allows."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from skerry_agent import config
from skerry_agent.clock import Clock
from skerry_agent.core import lifecycle
from skerry_agent.downloads import Downloads
from skerry_agent.errand import Errands
from skerry_agent.errors import Transient
from skerry_agent.network import Networks

COURIER = """
import json, sys, time
cap = json.loads(sys.stdin.readline())["max_kib_s"]
steps = {0: 3, 1: 10_000, 5: 12, 7: 0}[cap]
for step in range(1, steps + 1):
    print(json.dumps({"progress": {"file": "m", "total_done": step, "total_size": 20_000, "received": step}}), flush=True)
    time.sleep(0.1)
if cap == 7:
    time.sleep(60)
print(json.dumps({"ok": {"bytes": steps}}), flush=True)
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Downloads, list[int]]:
    monkeypatch.setattr("skerry_agent.network._LOOK_S", 0.05)
    clock, cap = Clock(), [0]
    rules = Networks(
        config.build({"state_dir": str(tmp_path)}, {}), clock, wanted=lambda: (), carried=lambda _digest: False
    )
    errands = Errands((sys.executable, "-c", COURIER))
    return Downloads(errands, clock, rules, max_kib_s=lambda: cap[0]), cap


def test_another_rate_reaches_a_download_that_is_under_way(made: tuple[Downloads, list[int]]) -> None:
    found, cap = made
    said: list[dict[str, Any]] = []

    def hear(line: dict[str, Any]) -> None:
        said.append(line)
        if len(said) == 2:
            cap[0] = 0

    cap[0] = 1
    answer = asyncio.run(found.run({}, on_progress=hear))
    # Both couriers' bytes, and one count for whoever follows it.
    assert answer["bytes"] >= 2 + 3
    assert said[-1]["received"] == answer["bytes"]


def test_a_download_that_gets_further_outlasts_the_deadline_and_one_that_stands_still_does_not(
    made: tuple[Downloads, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, cap = made
    # Less than the download takes, and many times what passes between two lines.
    monkeypatch.setitem(lifecycle.DEADLINES_S, "fetch", 2.5)
    cap[0] = 5
    slow = COURIER.replace("time.sleep(0.1)", "time.sleep(0.3)")
    found._errands = Errands((sys.executable, "-c", slow))
    large = {"files": [{"path": "m", "size": 10**6}]}
    assert asyncio.run(found.run(large)) == {"bytes": 12}
    assert found.left_s() > 0
    cap[0] = 7
    with pytest.raises(Transient, match="timeout: courier"):
        asyncio.run(found.run(large))
    assert found.left_s() <= 0


def test_a_download_that_only_trickles_ends_by_its_size_and_the_groups_rate(
    made: tuple[Downloads, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, cap = made
    monkeypatch.setitem(lifecycle.DEADLINES_S, "fetch", 1.0)
    cap[0] = 1
    files = {"files": [{"path": "a", "size": 512}, {"path": "b", "size": 256}]}
    assert lifecycle.fetch_s(768, 1) == 1.5
    with pytest.raises(Transient, match=r"timeout: not all of it is here after [12] s"):
        # A line every 0.1 s, for many minutes.
        asyncio.run(found.run(files))
    assert found.left_s() == 0
    # The lifecycle's own timer says the same: what gets further is over all the same.
    found._is_further({"total_done": 10**6})
    assert found.left_s() == 0
