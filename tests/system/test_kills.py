"""kill -9 of server, broker, supervisor, worker and courier at random moments of rollouts: 0 lost, 0 doubled, everyone where assigned.

Each run says its seed. ``SKERRY_KILLS_SEED`` draws the same kills at the same moments again, ``SKERRY_KILLS_ROUNDS`` says which rounds: ``100``
for the first hundred, ``41-43`` for some of them.
"""

from __future__ import annotations

import faulthandler
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import killing
from tests.system.conftest import Rig

HANGS_S = 600
"""A round that takes so long ends the run with every thread's stack."""


@pytest.fixture
def field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[killing.Field]:
    """Four devices, one of them on TFLite, with their applications; three good versions and a bad one; everyone on the first."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv(killing.MARK, mark)
    rig = Rig(tmp_path, killing.DEVICES, tflite=killing.TFLITE)
    try:
        found = killing.Field(rig, seed=int(os.environ.get("SKERRY_KILLS_SEED") or secrets.randbelow(10**6)), mark=mark)
        found.start()
        yield found
    finally:
        rig.processes.stop()
        for left in killing.members(mark):
            killing.kill_9(left.pid)


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
    assert len(numbers) < len(killing.KINDS) or set(field.totals.kills) == set(killing.KINDS), "a kind was never killed"


def test_kills_at_random_moments_of_rollouts_lose_and_double_nothing(
    field: killing.Field, capsys: pytest.CaptureFixture[str]
) -> None:
    run(field, "5", capsys)


@pytest.mark.slow
def test_a_hundred_rounds_of_kills_lose_and_double_nothing(
    field: killing.Field, capsys: pytest.CaptureFixture[str]
) -> None:
    run(field, os.environ.get("SKERRY_KILLS_ROUNDS") or "100", capsys)
