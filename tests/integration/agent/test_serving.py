"""Generations and updates when the device has no room, no process, or a lock on its store. Real store, real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from skerry_agent import config
from skerry_agent.clock import Clock
from skerry_agent.core import effects as e
from skerry_agent.errand import Errands
from skerry_agent.errors import AgentError, Degraded
from skerry_agent.holding import Holding
from skerry_agent.leftovers import Roll
from skerry_agent.network import Networks
from skerry_agent.restoring import Restoring
from skerry_agent.runtimes import Runtimes
from skerry_agent.serving import Generation, Serving
from skerry_agent.slots import Slot, Slots
from skerry_agent.store import open_store
from skerry_agent.updating import Updating

from tests.integration.agent.rig import DEVICE, TIMEOUT_S, wait_for

HERE = Path(__file__).parent
GAS = Slot(digest="a" * 64, version="1.0.0", variant="v", standing="confirmed")


class Bench:
    """What a supervisor puts together, without its loop: a store, slots, generations of stand-in workers, updates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "run").mkdir()
        self.config = config.build({"state_dir": str(folder), "timing": {"backoff_scale": 0.01}}, {})
        self.clock, self.slots = Clock(), Slots(folder / "slots")
        self.store, _ = open_store(
            folder / "state.db", binding="m", device=DEVICE, new_epoch=lambda: "e" * 32, wall_s=0.0, bound_bytes=100
        )
        self.store._db.execute("PRAGMA busy_timeout = 5")
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.faults: list[Degraded] = []
        self.started: list[tuple[set[str], str]] = []
        self.program = folder / "worker"
        self.install()
        roll = Roll(folder / "run" / "workers.json", self.clock.boot_id)
        self.serving = Serving(
            self.config, self.store, self.slots, self.clock, [self.listener], roll, on_health=lambda _: None,
            on_crash=lambda generation, _code: not self.updating.crashed(generation, "killed"), on_unruly=lambda *_: False, on_start=self.note, on_records=lambda: None,
            on_fault=self.faults.append, draw=lambda: 0.5, worker_command=(str(self.program), str(folder)),
        )  # fmt: skip
        refuses = (sys.executable, "-c", 'print(\'{"error": {"kind": "rejected", "code": "expired", "detail": "x"}}\')')
        self.updating = Updating(
            self.config, self.store, self.slots, self.serving, Errands(refuses), self.clock,
            Runtimes(self.config, self.clock, lambda: 0.5), Restoring(self.slots, self.serving, on_damage=lambda *_: None),
            Holding(self.config, self.store, self.slots, self.clock, windows=lambda: (), opens_at=lambda _model, _digest: 0),
            Networks(self.config, self.clock, wanted=lambda: (), carried=lambda _digest: False), errand_input=dict,
            on_change=lambda _code, _data: None, on_progress=lambda: None, on_rest=lambda: None, on_fault=self.faults.append,
            draw=lambda: 0.5,
        )  # fmt: skip

    def note(self, models: Mapping[str, Slot], error: AgentError | None, *_: object) -> None:
        self.started.append((set(models), f"{error.code} {error.model}" if error is not None else ""))

    def install(self) -> None:
        self.program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "stand_in_worker.py"}" "$@"\n')
        self.program.chmod(0o700)

    async def serve(self, **models: Slot) -> Generation:
        launch = await self.serving.start(models, timeout_s=TIMEOUT_S, anew=True)
        await self.serving.switch(launch)
        return self.current

    @property
    def current(self) -> Generation:
        """The generation of the cell that all models without ``isolate`` share."""
        generation = self.serving.cells[""].current
        assert generation is not None
        return generation

    def heard(self, *line: str) -> bool:
        path = self.folder / "heard"
        return path.exists() and " ".join(line) in path.read_text().splitlines()

    def locked(self) -> closing[sqlite3.Connection]:
        """Another program's lock on the store: nothing can be written."""
        other = sqlite3.connect(self.folder / "state.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        return closing(other)

    async def end(self) -> None:
        await self.updating.stop()
        await self.serving.stop()
        self.listener.close()
        self.store.close()


async def until(what: Callable[[], Any]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not what():
            await asyncio.sleep(0.005)


@pytest.fixture
def on_bench(tmp_path: Path) -> Callable[[Callable[[Bench], Awaitable[None]]], None]:
    def run(act: Callable[[Bench], Awaitable[None]]) -> None:
        async def main() -> None:
            bench = Bench(tmp_path)
            try:
                await act(bench)
            finally:
                await bench.end()

        asyncio.run(main())

    return run


Run = Callable[[Callable[[Bench], Awaitable[None]]], None]


def test_a_key_that_changes_while_the_next_generation_loads_is_counted_by_it(on_bench: Run) -> None:
    async def act(bench: Bench) -> None:
        bench.slots.confirm("gas", GAS)
        await bench.serve(gas=GAS)
        (bench.folder / "act").write_text("wait")
        coming = asyncio.create_task(bench.serving.start({"gas": GAS}, timeout_s=TIMEOUT_S, anew=True))
        await until(lambda: bench.heard("2", "start", ""))
        bench.slots.rekey("gas", arm="control", rollout="r-1", stage=1)
        bench.serving.rekey("gas", arm="control", rollout="r-1", stage=1)
        (bench.folder / "go").touch()
        await bench.serving.switch(await coming)
        await until(lambda: bench.heard("2", "rekey", "control"))
        assert bench.serving.models()["gas"].rollout == "r-1"

    on_bench(act)


def test_a_worker_that_dies_between_its_proof_and_its_first_request_is_started_again(on_bench: Run) -> None:
    async def act(bench: Bench) -> None:
        first = await bench.serve(gas=GAS)
        (bench.folder / "act").write_text("die")
        os.kill(first.worker.pid, signal.SIGKILL)
        await until(lambda: len(bench.serving.site.alive) == 1 and bench.serving.site.alive[0] is not first)
        second = bench.serving.site.alive[0]
        # The loop hears of its word and of its death together, the death first.
        wait_for(lambda: not psutil.pid_exists(second.worker.pid), why="its death")
        (bench.folder / "act").write_text("ready")
        await until(lambda: bench.serving.answering() and bench.current not in (first, second))

    on_bench(act)


def test_a_model_whose_runtime_went_missing_keeps_no_other_one_down(on_bench: Run) -> None:
    async def act(bench: Bench) -> None:
        first = await bench.serve(gas=GAS, pump=GAS)
        (bench.folder / "act").write_text("lacks gas")
        os.kill(first.worker.pid, signal.SIGKILL)
        await until(lambda: bench.serving.answering() and bench.current is not first)
        assert set(bench.serving.models()) == {"pump"}
        assert bench.started == [({"gas", "pump"}, ""), ({"gas", "pump"}, "runtime_missing gas"), ({"pump"}, "")]

    on_bench(act)


def test_a_single_model_whose_runtime_went_missing_is_tried_until_it_works(on_bench: Run) -> None:
    async def act(bench: Bench) -> None:
        first = await bench.serve(gas=GAS)
        (bench.folder / "act").write_text("lacks gas")
        os.kill(first.worker.pid, signal.SIGKILL)
        await until(lambda: len(bench.started) > 3)
        (bench.folder / "act").write_text("ready")
        await until(lambda: bench.serving.answering() and bench.current is not first)
        assert set(bench.serving.models()) == {"gas"}

    on_bench(act)


def test_without_a_process_for_a_worker_it_is_tried_again(on_bench: Run) -> None:
    async def act(bench: Bench) -> None:
        first = await bench.serve(gas=GAS)
        bench.program.unlink()
        with pytest.raises(Degraded) as caught:
            await bench.serving.start({"gas": GAS}, timeout_s=TIMEOUT_S, anew=True)
        assert caught.value.code == "process_not_started"
        os.kill(first.worker.pid, signal.SIGKILL)
        await until(lambda: bench.serving.cells[""].failures > 2)
        bench.install()
        await until(bench.serving.answering)

    on_bench(act)


def test_rings_of_generations_that_could_not_be_stored_are_never_named_again(on_bench: Run) -> None:
    async def act(bench: Bench) -> None:
        numbers = [(await bench.serve(gas=GAS)).number]
        with bench.locked():
            numbers += [(await bench.serve(gas=GAS)).number for _ in range(2)]
            assert await bench.serving.flush(TIMEOUT_S)
        # Its ring's position is committed, and the store goes on while the next supervisor takes over.
        bench.serving.tick()
        bench.serving.site.number = 0
        numbers.append((await bench.serve(gas=GAS)).number)
        assert numbers == sorted(set(numbers))

    on_bench(act)


def test_windows_that_cannot_be_stored_wait_and_are_stored_once(on_bench: Run) -> None:
    async def act(bench: Bench) -> None:
        await bench.serve(gas=GAS)
        assert await bench.serving.flush(TIMEOUT_S)
        with bench.locked():
            for _ in range(2):
                assert await bench.serving.flush(TIMEOUT_S)
                bench.serving.tick()
            assert bench.store.pending_inferences() == 3

        def stored() -> bool:
            # A store that was held is tried again once a second.
            bench.serving.tick()
            return bench.store.pending_inferences() == 9

        await until(stored)
        assert bench.faults == []

    on_bench(act)


def test_an_event_that_cannot_be_stored_changes_nothing_until_it_can(on_bench: Run) -> None:
    async def act(bench: Bench) -> None:
        bench.slots.confirm("gas", GAS)
        with bench.locked():
            bench.updating.feed(e.Assigned(model="gas", digest="b" * 64, version="1.1.0"))
            bench.updating.tick()
            assert bench.updating.update.state == "idle"
        bench.updating.tick()
        assert bench.updating.update.state == "fetch"
        await until(lambda: bench.updating.update.code == "expired")

    on_bench(act)


def test_a_crash_on_trial_that_cannot_be_stored_is_answered_by_another_worker_and_the_way_back_follows(
    on_bench: Run,
) -> None:
    async def act(bench: Bench) -> None:
        bench.slots.confirm("gas", GAS)
        trial = Slot(digest="b" * 64, version="1.1.0", variant="v", standing="trial")
        bench.slots.activate("gas", trial)
        generation = await bench.serve(gas=trial)
        for event in (
            e.Assigned(model="gas", digest=trial.digest, version="1.1.0"), e.FilesFetched(), e.Verified(), e.Staged(),
            e.Proved(),
        ):  # fmt: skip
            bench.updating._take(event)
        for task in (bench.updating._task, *bench.updating._others):
            assert task is not None
            task.cancel()
        assert bench.updating.update.state == "trial"
        with bench.locked():
            os.kill(generation.worker.pid, signal.SIGKILL)
            await until(lambda: bench.serving.answering() and bench.current is not generation)
            assert bench.updating.update.state == "trial"
        bench.updating.tick()
        assert (bench.updating.update.state, bench.updating.update.code) == ("revert", "trial_crashed")

    on_bench(act)
