"""kill -9 of server, broker, supervisor, worker and courier at random moments of rollouts: 0 lost, 0 doubled, everyone where assigned.

Each run says its seed. ``SKERRY_KILLS_SEED`` draws the same kills at the same moments again, ``SKERRY_KILLS_ROUNDS`` says which rounds: ``100``
for the first hundred, ``41-43`` for some of them.
"""

from __future__ import annotations

import faulthandler
import os
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system import kill_draws, kill_processes, kill_tally, killing
from tests.system.conftest import Rig

HANGS_S = 600
"""A round that takes so long ends the run with every thread's stack."""


@pytest.fixture
def field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[killing.Field]:
    """Four devices, one of them on TFLite, with their applications; three good versions and a bad one; everyone on the first."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv(kill_processes.MARK, mark)
    rig = Rig(tmp_path, kill_draws.DEVICES, tflite=kill_draws.TFLITE)
    try:
        found = killing.Field(rig, seed=int(os.environ.get("SKERRY_KILLS_SEED") or secrets.randbelow(10**6)), mark=mark)
        found.start()
        yield found
    finally:
        rig.processes.stop()
        for left in kill_processes.members(mark):
            kill_processes.kill_9(left.pid)


def run(field: killing.Field, rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, dash, last = rounds.partition("-")
    numbers = range(int(first), int(last) + 1) if dash else range(int(first))
    for number in numbers:
        faulthandler.dump_traceback_later(HANGS_S, exit=True, file=sys.__stderr__)
        line = field.round(number)
        with capsys.disabled():
            print(line, flush=True)
    with capsys.disabled():
        print(f"seed {field.seed}\n{field.totals}", flush=True)
    wanted = {kill.kind for number in numbers for kill in kill_draws.drawn_kills(field.seed, number)}
    assert set(field.totals.kills) == wanted, f"never killed: {wanted - set(field.totals.kills)}"


WELL: dict[str, dict[Any, int]] = {
    "told": {
        ("answered", "1.0.0"): 20, ("answered", "2.0.0"): 30, ("label", "matched"): 50,
        ("matched", "1.0.0"): 20, ("matched", "2.0.0"): 30,
    },
    "here": {("ok", "1.0.0"): 20, ("ok", "2.0.0"): 30, ("labelled", "1.0.0"): 20, ("labelled", "2.0.0"): 30},
    "kills": {},
}  # fmt: skip
CUT_OFF = {("failed", "RemoteDisconnected"): 1}
REFUSED = {("failed", "ConnectionRefusedError"): 7}


@pytest.mark.parametrize(
    ("told", "here", "kills"),
    [
        ({}, {}, {}),
        (CUT_OFF, {}, {"worker": 1}),
        (CUT_OFF, {("ok", "2.0.0"): 31}, {"worker": 1}),
        ({**CUT_OFF, **REFUSED}, {}, {"supervisor": 1}),
    ],
)
def test_a_round_that_lost_and_doubled_nothing_is_well(told: Any, here: Any, kills: Any) -> None:
    merged = [Counter(WELL[name] | more) for name, more in (("told", told), ("here", here), ("kills", kills))]
    kill_tally.hold_against(*merged)


@pytest.mark.parametrize(
    ("told", "here", "kills", "why"),
    [
        ({}, {("ok", "2.0.0"): 29}, {}, "lost answers"),
        ({}, {("ok", "1.0.0"): 21, ("ok", "2.0.0"): 29}, {"worker": 1}, "lost answers"),
        ({}, {("ok", "2.0.0"): 31}, {"worker": 1}, "counted twice"),
        (CUT_OFF, {("ok", "2.0.0"): 32}, {"worker": 1}, "counted twice"),
        (REFUSED, {("ok", "2.0.0"): 31}, {"supervisor": 1}, "counted twice"),
        (CUT_OFF, {}, {"courier": 1}, "more requests were cut off"),
        (REFUSED, {}, {"worker": 1}, "refused although"),
        ({("failed", "ValueError"): 1}, {}, {"worker": 1}, "failures of another kind"),
        ({}, {("failed", "2.0.0"): 1}, {}, "not answered well"),
        ({("label", "unknown"): 1}, {}, {"worker": 1}, "a label was not taken"),
        ({}, {("labelled", "2.0.0"): 29}, {"worker": 1}, "labels lost or doubled"),
        ({}, {("labelled", "2.0.0"): 31}, {"worker": 1}, "labels lost or doubled"),
        ({}, {("labelled", "1.0.0"): 0, ("labelled", "2.0.0"): 50}, {"worker": 1}, "a version that did not answer"),
        ({}, {("labelled", "1.0.0"): 19, ("labelled", "2.0.0"): 31}, {"worker": 1}, "a version that did not answer"),
    ],
)
def test_a_round_that_lost_or_doubled_something_is_not(told: Any, here: Any, kills: Any, why: str) -> None:
    merged = [Counter(WELL[name] | more) for name, more in (("told", told), ("here", here), ("kills", kills))]
    with pytest.raises(AssertionError, match=why):
        kill_tally.hold_against(*merged)


FILED: dict[Any, int] = {
    ("filed", "1.0.0", "none", "", "0"): 5, ("filed", "1.0.0", "control", "r", "0"): 9, ("filed", "2.0.0", "candidate", "r", "0"): 8,
    ("filed", "2.0.0", "candidate", "r", "1"): 12, ("answers", "2.0.0", "candidate", "r", "0"): 6,
    ("answers", "2.0.0", "candidate", "r", "1"): 8,
}  # fmt: skip
ENDED = {("filed", "2.0.0", "none", "", "0"): 4, ("answers", "2.0.0", "none", "", "0"): 3}


@pytest.mark.parametrize(("more", "completed"), [({}, False), ({}, True), (ENDED, True)])
def test_counts_that_stand_where_they_belong_are_well(more: Any, completed: bool) -> None:
    filing = kill_tally.Filing(candidate="2.0.0", rollout="r", completed=completed, seen=14)
    kill_tally.hold_filing(Counter(FILED | more), filing)


@pytest.mark.parametrize(
    ("more", "completed", "why"),
    [
        (ENDED, False, "under the wrong arm"),
        ({("filed", "2.0.0", "control", "r", "0"): 1}, True, "under the wrong arm"),
        ({("filed", "1.0.0", "candidate", "r", "0"): 1}, True, "under the wrong arm"),
        ({("filed", "1.0.0", "control", "older", "0"): 1}, False, "under the wrong rollout"),
        ({("filed", "2.0.0", "candidate", "", "0"): 1}, False, "under the wrong rollout"),
        ({("filed", "1.0.0", "none", "r", "0"): 1}, False, "under the wrong rollout"),
        ({("filed", "1.0.0", "none", "", "1"): 1}, False, "under a stage of no rollout"),
        ({**ENDED, ("answers", "2.0.0", "candidate", "r", "1"): 7}, True, "the judge was robbed"),
    ],
)
def test_counts_that_stand_elsewhere_are_seen(more: Any, completed: bool, why: str) -> None:
    filing = kill_tally.Filing(candidate="2.0.0", rollout="r", completed=completed, seen=14)
    with pytest.raises(AssertionError, match=why):
        kill_tally.hold_filing(Counter(FILED | more), filing)


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_draws_the_same_again_and_three_rounds_have_every_kind_and_every_sort(seed: int) -> None:
    kills = [kill_draws.drawn_kills(seed, number) for number in range(100)]
    sorts = [kill_draws.drawn_sort(seed, number) for number in range(100)]
    assert kills == [kill_draws.drawn_kills(seed, number) for number in range(100)]
    assert kills != [kill_draws.drawn_kills(seed + 1, number) for number in range(100)]
    assert all(2 <= len(round_) <= 5 for round_ in kills)
    for first in range(0, 99, 3):
        assert {kill.kind for round_ in kills[first : first + 3] for kill in round_} == set(kill_draws.KINDS)
        assert set(sorts[first : first + 3]) == set(kill_draws.SORTS)


def test_a_process_that_ended_by_itself_is_no_kill() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert not kill_processes.kill_9(ended.pid), "a corpse"
    assert ended.wait() == 0
    assert not kill_processes.kill_9(ended.pid), "nobody"
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert kill_processes.kill_9(alive.pid)
    assert alive.wait() == -signal.SIGKILL


def test_kills_at_random_moments_of_rollouts_lose_and_double_nothing(
    field: killing.Field, capsys: pytest.CaptureFixture[str]
) -> None:
    run(field, "3", capsys)


@pytest.mark.slow
def test_a_hundred_rounds_of_kills_lose_and_double_nothing(
    field: killing.Field, capsys: pytest.CaptureFixture[str]
) -> None:
    run(field, os.environ.get("SKERRY_KILLS_ROUNDS") or "100", capsys)
